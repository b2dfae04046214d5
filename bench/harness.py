"""Describe what a benchmark measures: a case, its two sides, and the check that they agree.

`timing.py` measures a case, `limits.py` the machine's limits, `record.py` writes the result.
"""

import atexit
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptfast.ops.backend import EXTENSION

Run = Callable[[], object]


@dataclass(frozen=True)
class Pair:
    """The two sides of a case with their data; `check` raises if their results differ."""

    ours: Run
    peer: Run
    check: Callable[[], None]
    other_load: Callable[[], float] = lambda: 0.0
    """The share of all cores that other processes used, where the sides return their cost."""


@dataclass(frozen=True)
class Case:
    """One row of the table. `build` creates the data, so that waiting cases hold no memory."""

    op: str
    name: str
    shape: str
    peer_name: str
    build: Callable[[], Pair]
    n_bytes: float = 0.0
    """Bytes that every implementation must move between memory and the cores, per call."""
    flops: float = 0.0
    """Multiplications and additions that every implementation must do, per call."""
    target: float = 0.0
    """The ratio to reach; 0 if there is none, below 1 where the peer is a lower bound."""
    unit: str = "s"
    """The unit of both costs: "s" or "bytes"."""
    returns_cost: bool = False
    """Whether the sides return their cost. Otherwise a clock measures it, in seconds."""
    reads_only: bool = False
    """Whether all of n_bytes are read and none written: the limit is then a read, not a copy."""
    working_set: float = 0.0
    """Bytes of data that each call goes through; 0 if it is n_bytes."""
    products: str = "fp32"
    """The type of the matrices that are multiplied: "fp32" or "bf16"."""
    tokens: int = 0
    """Tokens that a call generates; 0 if tokens/s would say nothing."""


def kept_directory() -> Path:
    """Return a new folder, which is removed when this process exits."""
    kept = tempfile.TemporaryDirectory()
    atexit.register(kept.cleanup)
    return Path(kept.name)


def child_bytes(code: str, *args: object) -> float:
    """Return the number that `code` prints when it runs in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def assert_close(ours: Sequence[Tensor], peer: Sequence[Tensor], tolerance: float) -> None:
    """Raise AssertionError unless max|ours - peer| <= tolerance * max|peer| for each tensor."""
    assert len(ours) == len(peer)
    for i, (a, b) in enumerate(zip(ours, peer, strict=True)):
        a, b = a.detach().float(), b.detach().float()
        error, largest = (a - b).abs().max().item(), b.abs().max().item()
        assert error <= tolerance * largest, f"tensor {i}: off by {error:.3g} of {largest:.3g}"


def pair_of(
    ours: Callable[[], Sequence[Tensor]], peer: Callable[[], Sequence[Tensor]], tolerance: float
) -> Pair:
    """Return a pair whose check compares the tensors that both sides return."""
    return Pair(ours, peer, lambda: assert_close(ours(), peer(), tolerance))


def tolerance_of(dtype: torch.dtype) -> float:
    """Return a coarse bound that catches a wrong kernel; the tests use the derived bounds."""
    return 1e-4 if dtype == torch.float32 else 4e-2


def level() -> str:
    """Return gptfast's instruction-set level, or "none" where its extension is not built."""
    return EXTENSION.build_info()["isa"] if EXTENSION else "none"


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def both_sides(cases: Iterable[Case]) -> Iterator[object]:
    """Yield the parameters (case, side) of a pytest-benchmark test."""
    for case in cases:
        for side in ("ours", "peer"):
            label = f"{case.name}-{case.shape}-{case.peer_name}-{side}".replace(" ", "_")
            yield pytest.param(case, side, id=label)
