"""Measure the machine's own limits, so that a time can be shown as a share of what is possible.

Products are compared with a large matrix product of the same type, the best one of the run. Bytes
are compared with a copy, or with a read where nothing is written, of as much data as the case goes
through: data that stays in a cache is compared with a copy that stays in that cache. A machine
that is shared with others changes its memory rate within minutes, so that rate is measured before
and after each case.

A share above 100% would say that the limit is none: it is left out, with the reason.
"""

import math
from dataclasses import dataclass

import torch
from harness import Case
from timing import calls_per_sample, seconds_per_call
from torch import Tensor

import gptfast.engine  # noqa: F401 - defines engine_new
from gptfast.ops.backend import EXTENSION

GEMM_SIZE = 2048
MAX_BYTES = 2**29
"""The size of each large buffer: more than a server's last-level cache gives to one process."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Limit:
    """A rate of this machine, in FLOPs or bytes per second."""

    name: str
    per_s: float


@dataclass(frozen=True)
class Share:
    """The share of a limit that was reached; if `value` is None, `reason` says why."""

    value: float | None
    limit: Limit | None
    reason: str = ""


def _ones_on_large_pages() -> Tensor:
    """Return MAX_BYTES of fp32 ones in the memory that the engine uses: large pages, which are
    read a fifth faster."""
    if EXTENSION is None:
        return torch.ones(MAX_BYTES // 4)
    return torch.ops.gptfast.engine_new(MAX_BYTES).view(torch.float32).fill_(1)


class LimitMeter:
    """Measures matrix products (keeping the best of the run) and memory rates (each time anew)."""

    def __init__(self) -> None:
        self.source, self.copy = _ones_on_large_pages(), torch.ones(MAX_BYTES // 4)
        self.gemm_s = dict.fromkeys(DTYPES, math.inf)

    def measure_gemm(self, dtype: str) -> None:
        """Time a product of `dtype` by both of torch's libraries.

        torch.mm calls MKL, which takes AVX-512 on Intel's CPUs only; oneDNN takes it on all.
        """
        a, b = (torch.rand(GEMM_SIZE, GEMM_SIZE, dtype=DTYPES[dtype]) for _ in range(2))
        product = torch.empty_like(a)
        layer = torch.ops.mkldnn._linear_pointwise
        for gemm in (
            lambda: torch.mm(a, b, out=product),
            lambda: layer(a, b, None, "none", [], ""),
        ):
            # The first call sets up; without hardware for bf16 one more call is already long.
            calls = 3 if seconds_per_call(gemm, 1) < 1 else 1
            self.gemm_s[dtype] = min(self.gemm_s[dtype], seconds_per_call(gemm, calls))

    def gemm_limit(self, dtype: str) -> Limit:
        """Return the limit of products of `dtype`; a bf16 one may also be computed in fp32."""
        seconds = self.gemm_s["fp32"]
        if dtype != "fp32":
            seconds = min(seconds, self.gemm_s[dtype])
        return Limit(f"{dtype} GEMM", 2.0 * GEMM_SIZE**3 / seconds)

    def memory_limit(self, n_bytes: float, reads_only: bool) -> Limit:
        """Return the rate now of a read or a copy that goes through n_bytes of data."""
        if reads_only:
            n = min(MAX_BYTES, max(64, int(n_bytes))) // 4
            source = self.source[:n]
            moved, run = source.nbytes, source.sum
        else:
            n = min(MAX_BYTES, max(64, int(n_bytes) // 2)) // 4
            source, copy = self.source[:n], self.copy[:n]
            moved, run = 2 * source.nbytes, lambda: copy.copy_(source)
        calls, _ = calls_per_sample(run)
        seconds = min(seconds_per_call(run, calls) for _ in range(3))
        name = "read" if reads_only else "copy"
        return Limit(f"{name} of {size_text(moved)}", moved / seconds)

    def memory_limit_of(self, case: Case) -> Limit | None:
        """Return the memory rate now for the data of `case`, or None if it counts no bytes."""
        if not case.n_bytes or case.unit != "s":
            return None
        return self.memory_limit(case.working_set or case.n_bytes, case.reads_only)

    def summary(self) -> dict[str, float]:
        """Return the rates that describe this machine, by name, per second."""
        rates = {
            f"{dtype} GEMM": self.gemm_limit(dtype).per_s
            for dtype, seconds in self.gemm_s.items()
            if seconds < math.inf
        }
        rates["copy"] = self.memory_limit(2 * MAX_BYTES, False).per_s
        rates["read"] = self.memory_limit(MAX_BYTES, True).per_s
        return rates


def size_text(n_bytes: float) -> str:
    """Return a size such as "6 MB", for the name of a limit."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.0f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


def share_of_limit(case: Case, seconds: float, gemm: Limit | None, memory: Limit | None) -> Share:
    """Return which share of the tighter limit `case` reaches when a call takes `seconds`."""
    if case.unit != "s":
        return Share(None, None, "memory has no limit to compare with")
    floors = []
    if case.flops and gemm:
        floors.append((case.flops / gemm.per_s, gemm))
    if case.n_bytes and memory:
        floors.append((case.n_bytes / memory.per_s, memory))
    if not floors:
        return Share(None, None, "no bytes or FLOPs are counted for this case")
    floor, limit = max(floors, key=lambda x: x[0])
    if floor > seconds:
        return Share(None, limit, f"faster than the {limit.name} that was measured beside it")
    return Share(floor / seconds, limit)
