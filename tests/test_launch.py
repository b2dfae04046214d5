"""Launches from plans: the same kernels and the same parameters as Triton's own launches.

Both tests run in processes of their own, where Triton compiles for a driver that launches nothing
(bench/stub_cuda.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def printed(script: str) -> dict[str, Any]:
    """Return what a script beside this file prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def kernel_names() -> set[str]:
    """Return the names of all kernels that launchers launch, as their files define them."""
    folder = Path(__file__).parents[1] / "kernels" / "triton"
    lines = [line for path in folder.glob("*.py") for line in path.read_text("utf-8").splitlines()]
    starts = [line.removeprefix("def ").partition("(")[0] for line in lines if line[:4] == "def "]
    return {name for name in starts if name.endswith("_kernel")}


def test_every_kernel_gets_the_parameters_that_it_declares() -> None:
    found = printed("stub_launches.py")
    assert set(found["kernels"]) == kernel_names()
    assert [text for case in found["cases"].values() for text in case["wrong"]] == []
    # Launches were repeated, and only the first of a kind went through Triton's binder.
    assert found["repeated"] and all(found["repeated"])
    for name, case in found["cases"].items():
        assert case["launches"] >= 3 and 3 * case["misses"] <= case["launches"] + 6, (name, case)


def test_a_plan_launches_the_kernel_that_triton_would() -> None:
    found = printed("stub_keys.py")
    assert found["wrong"] == []
    assert found["kernels"] > 1000
