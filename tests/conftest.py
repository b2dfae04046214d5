"""Fixtures shared by the tests of the operations."""

from collections.abc import Iterator

import pytest
import torch

from gptfast.ops.library import EXTENSION, MISSING, use_backend

LEVELS = EXTENSION.build_info()["isa_supported"] if EXTENSION else []
_SKIPPED = pytest.param("cpp", marks=pytest.mark.skip(f"the C++ extension is not built: {MISSING}"))


def _at_level(level: str) -> Iterator[str]:
    before = EXTENSION.build_info()["isa"]
    EXTENSION.set_isa(level)
    yield level
    EXTENSION.set_isa(before)


@pytest.fixture(params=LEVELS or [_SKIPPED])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction-set level this machine has, one after the other."""
    yield from _at_level(request.param)


@pytest.fixture(params=["reference", *(f"cpp-{level}" for level in LEVELS or [])])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, then the C++ kernels at each level."""
    if request.param == "reference":
        with use_backend("reference"):
            yield request.param
    else:
        for _ in _at_level(request.param.removeprefix("cpp-")):
            yield request.param


@pytest.fixture
def cpp() -> None:
    """Skips a test of the C++ kernels where they are not built."""
    if EXTENSION is None:
        pytest.skip(f"the C++ extension is not built: {MISSING}")


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
