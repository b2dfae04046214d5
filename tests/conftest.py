"""Fixtures shared by the tests.

The tests of an operation run once per backend. The Triton kernels run on a GPU where there is one,
and then every tensor is made there; otherwise they run on the CPU in Triton's interpreter, which
has no bf16 (its casts truncate, its products are garbage).

Three variables of the environment change what the whole suite runs with; `make matrix` sets them.
OMP_NUM_THREADS is the number of threads, GPTFAST_TEST_SEED is the seed of what the tests draw, and
GPTFAST_TEST_PRODUCTS selects who multiplies fp32 matrices ("gptfast" or "library").

GPTFAST_TEST_PTX=1 runs the Triton kernels as they are compiled for a GPU, bf16 included, in the
emulator of tests/ptx, and of the tests of kernels only those that tests/ptx/selection.py names;
GPTFAST_TEST_PTX=all runs all of them, which takes hours.

GPTFAST_TEST_PART=1/2 runs one half of the tests, 2/2 the other.
"""

import gc
import importlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Set before torch reads it. At the tests' sizes, several threads only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from ptx.selection import NODE_IDS, selected  # noqa: E402
from seeds import shifted  # noqa: E402

# No test depends on the speed of a machine, which may have other work: not on that of one example,
# and not on that of making the first one.
hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any speed")

# Run the Triton kernels as PTX, compiled for a GPU, in the emulator of tests/ptx.
PTX = os.environ.get("GPTFAST_TEST_PTX", "")
GPU = torch.cuda.is_available() and not PTX
if PTX:
    os.environ["TRITON_INTERPRET"] = "0"
elif not GPU:
    # Set before anything imports Triton, which reads it on import.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# This makes cuBLAS deterministic. It is read when the first cuBLAS handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from gptfast.ops.backend import EXTENSION, MISSING, TRITON_MISSING, use_backend  # noqa: E402

if PTX:
    importlib.import_module("ptx.launch").install()
elif not GPU and not TRITON_MISSING:
    importlib.import_module("interpreter").patch_once_a_launch()
if os.environ.get("GPTFAST_SANITIZE") == "1":
    # `make sanitize` must test the sanitizer build, not the usual one.
    assert EXTENSION and "build/sanitize/lib" in EXTENSION.__file__, EXTENSION
PRODUCTS = os.environ.get("GPTFAST_TEST_PRODUCTS", "")
if EXTENSION is not None:
    EXTENSION.set_matmul_provider(PRODUCTS)
ENGINE_LEVELS = EXTENSION.build_info()["isa_supported"] if EXTENSION else []
# The operations have kernels for these levels only.
LEVELS = [level for level in ENGINE_LEVELS if level in ("default", "avx2", "avx512", "neon")]
_SKIPPED = pytest.param("cpp", marks=pytest.mark.skip(f"the C++ extension is not built: {MISSING}"))


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Run the C++ kernels at an instruction-set level."""
    before = EXTENSION.build_info()["isa"]
    EXTENSION.set_isa(level)
    try:
        yield
    finally:
        EXTENSION.set_isa(before)


@pytest.fixture(params=LEVELS or [_SKIPPED])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test at each instruction-set level of this machine."""
    with at_level(request.param):
        yield request.param


@pytest.fixture(params=ENGINE_LEVELS or [_SKIPPED])
def engine_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test at each of the engine's levels that this machine has."""
    with at_level(request.param):
        yield request.param


@pytest.fixture(params=["amx_emulated", *(level for level in ENGINE_LEVELS if level == "amx")])
def tiles_isa(request: pytest.FixtureRequest, cpp: None) -> Iterator[str]:
    """Run the test on emulated tiles, and on the CPU's matrix engine where it has one."""
    with at_level(request.param):
        yield request.param


@pytest.fixture(scope="module", params=["engine", "model"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Generate from a GPT by a packed engine, even for few tokens, then by the model itself."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "engine":
            if EXTENSION is None:
                pytest.skip(f"the C++ extension is not built: {MISSING}")
            patch.setattr("gptfast.engine.choice.MIN_TOKENS_TO_PACK", 0)
        else:
            patch.setattr("gptfast.engine.choice.dtype_to_pack", lambda model, n: None)
        yield request.param


# Modules whose tests share what is slow to set up.
SHARING = ("test_adamw_shards", "test_compile_audit", "test_finetuning", "test_predicted_step")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Send the modules whose fixtures take long to one worker, and any other test to any worker.

    xdist's own mark for this, xdist_group, has no effect with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = Path(nodeid.partition("::")[0]).stem
            return module if module in SHARING else nodeid

        def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
            super().mark_test_complete(node, item_index, duration)
            # It counts through all that a worker has got, at each test: what is done may go.
            work = self.assigned_work[node]
            scope = self._split_scope(self.registered_collections[node][item_index])
            if all(work[scope].values()):
                del work[scope]

    return Scheduler(config, log)


def _by_the_parity_rule(item: pytest.Item) -> bool:
    """Return whether the test calls parity.py's check, or a helper of its module around it."""
    names = item.function.__code__.co_names
    return any(name.startswith(("check", "assert_parity")) for name in names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that prove nothing, and mark tests for GPU and sanitizer runs.

    In 16 bits, the parity rule would compare the reference with itself. The mark "triton" is for
    tests on the Triton kernels, which a GPU run selects; "reference" is for tests in which a
    sanitizer of the C++ kernels has nothing to find.
    """
    config.stash[NODE_IDS] = [item.nodeid for item in items]
    kept = []
    for item in items:
        if PTX == "1" and item.path.parent.name != "ptx" and not selected(item.nodeid):
            continue
        callspec = getattr(item, "callspec", None)
        params = callspec.params if callspec is not None else {}
        backend = params.get("backend")
        in_16_bits = params.get("dtype") in (torch.bfloat16, torch.float16)
        if backend == "reference" and in_16_bits and _by_the_parity_rule(item):
            continue
        if backend == "triton" or "triton" in getattr(item, "fixturenames", ()):
            item.add_marker("triton")
        if backend == "reference":
            item.add_marker("reference")
        kept.append(item)
    part, parts = map(int, (os.environ.get("GPTFAST_TEST_PART") or "1/1").split("/"))
    # By their names: every n-th in order might be all those of one dtype.
    items[:] = [item for item in kept if zlib.crc32(item.nodeid.encode()) % parts == part - 1]


def pytest_collection_finish() -> None:
    """Keep what was imported and collected, a million objects, from each garbage collection.

    Neither does the emulator of PTX look among them for the tensors of a test.
    """
    gc.freeze()


def _with_triton(request: pytest.FixtureRequest) -> Iterator[str]:
    if TRITON_MISSING:
        pytest.skip(TRITON_MISSING)
    if GPU:
        with torch.device("cuda"):
            yield "triton"
        return
    callspec = getattr(request.node, "callspec", None)
    if not PTX and callspec and torch.bfloat16 in callspec.params.values():
        pytest.skip("Triton's interpreter has no bf16")
    with use_backend("triton"):
        yield "triton"


@pytest.fixture(params=["reference", "triton", *(f"cpp-{level}" for level in LEVELS or [])])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the reference, the Triton kernels, and the C++ kernels at each level."""
    if request.param == "reference":
        with use_backend("reference"):
            yield request.param
    elif request.param == "triton":
        yield from _with_triton(request)
    else:
        with at_level(request.param.removeprefix("cpp-")):
            yield request.param


@pytest.fixture(params=["library", "gptfast"])
def products(request: pytest.FixtureRequest, isa: str) -> Iterator[str]:
    """Run the test with each provider of fp32 matrix products, at each instruction-set level."""
    EXTENSION.set_matmul_provider(request.param)
    yield request.param
    EXTENSION.set_matmul_provider(PRODUCTS)


@pytest.fixture
def triton(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the Triton kernels alone: the other backends lack or share the behaviour."""
    yield from _with_triton(request)


@pytest.fixture
def cpp() -> None:
    """Skip a test of the C++ kernels where they are not built."""
    if EXTENSION is None:
        pytest.skip(f"the C++ extension is not built: {MISSING}")


@pytest.fixture(scope="session")
def byte_model() -> Any:
    """Return the tiny model of bytes that the tests of the server serve. No test changes it."""
    from helpers import random_model

    return random_model(vocab_size=257, block_size=128).eval()


@pytest.fixture(scope="session")
def byte_engine(byte_model: Any) -> Any:
    """Return an engine of `byte_model` that says what each request gets alone."""
    from gptfast import Engine

    return Engine(byte_model)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Give each test the same random state and number of threads, whatever ran before it."""
    torch.manual_seed(shifted(0))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
