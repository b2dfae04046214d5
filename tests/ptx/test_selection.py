"""The selection has tests of every operation with kernels, and none drops out unnoticed."""

from pathlib import Path

import pytest

from ptx.selection import NODE_IDS, SELECTED, differences, selected

ROOT = Path(__file__).parents[2]


def test_no_test_drops_out(request: pytest.FixtureRequest) -> None:
    """Each pattern matches as many tests as it should, of the modules that this run has collected.

    A test or a parameter that was renamed would else no longer run in the emulator.
    """
    config = request.config
    if any("::" in arg for arg in config.args):
        pytest.skip("single tests were chosen: their modules were not collected as a whole")
    assert differences(config.stash[NODE_IDS]) == []


def test_differences() -> None:
    """A missing parameter is found, and modules that were not collected are not compared."""
    (pattern, n), module = next(iter(SELECTED["test_embedding"].items())), "tests/test_embedding.py"
    assert pattern.startswith("test_parity")
    nodeids = [f"{module}::test_parity[triton-{i}]" for i in range(n)]
    assert not [line for line in differences(nodeids) if pattern in line]
    found = [line for line in differences(nodeids[1:]) if pattern in line]
    assert found == [f"test_embedding: {pattern} matches {n - 1} tests, not {n}"]
    assert differences(["tests/test_engine.py::test_parity[triton]"]) == []


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
