"""Every pattern of selection.py chooses tests, and every kernel's tests are there."""

from pathlib import Path

import pytest

from ptx.selection import SELECTED, selected

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", SELECTED)
def test_the_tests_exist(module: str) -> None:
    """A test that was renamed would no longer run in the emulator, and nobody would notice."""
    text = (ROOT / "tests" / f"{module}.py").read_text("utf-8")
    for pattern in SELECTED[module]:
        stem = pattern.partition(r"\[")[0]
        names = [stem]
        if "(" in stem:
            head, _, rest = stem.partition("(")
            choices, _, tail = rest.partition(")")
            names = [f"{head}{choice}{tail}" for choice in choices.split("|")]
        for name in names:
            assert f"def {name}(" in text, f"{module} has no {name}"


def test_every_operation_with_kernels_is_there() -> None:
    launchers = {path.stem for path in (ROOT / "kernels" / "triton").glob("*.py")}
    operations = {path.stem for path in (ROOT / "kernels" / "reference").glob("*.py")}
    shared = {"__init__", "philox"}
    wanted = {f"test_{name}" for name in (launchers & operations) - shared}
    assert wanted <= set(SELECTED)


def test_selected() -> None:
    assert selected("tests/test_attention.py::test_parity[triton-B1-H1-Tq1-Tk1-D16-bf16]")
    assert not selected("tests/test_attention.py::test_parity[reference-B1-H1-Tq1-Tk1-D16-fp32]")
    assert not selected("tests/test_engine.py::test_parity[triton]")
