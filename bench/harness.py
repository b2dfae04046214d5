"""What every benchmark shares: the case, interleaved timing, the machine's own limits.

Ours and the peer run in one process, A B A B, so that a change of clock meets both. A sample is as
many calls as fill a few milliseconds. The ratio is the median over the pairs of peer / ours (above
1: ours is faster); its quartiles say how far to trust it.

Interleaving does not make up for a busy machine: where other processes want the cores, a parallel
region waits for a descheduled thread, and the side with more regions loses more (a 19x was seen as
327x; with one thread the effect is gone). So the CPU time of others is measured with each case, a
disturbed case is timed again, and one that stays disturbed says so in its row.

A fraction above 100% of the copy's rate means that the data stayed in a cache.
"""

import gc
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gptfast.engine  # noqa: F401 - defines engine_new
from gptfast.ops.backend import EXTENSION

Run = Callable[[], object]

SAMPLE_SECONDS = 4e-3
MIN_PAIRS = 5
MAX_PAIRS = 200
LONG_SECONDS, FEWEST_PAIRS = 2.0, 3
"""Of calls that take so long, so few pairs will do."""
ATTEMPTS = 2
DISTURBED = 0.03
"""Share of all cores used by others from which a timing is not to be trusted."""


@dataclass(frozen=True)
class Pair:
    """The two sides of a case, with their data, and `check`, which raises where they differ."""

    ours: Run
    peer: Run
    check: Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One row of the table. `build` makes its data, so that cases not being run hold no memory."""

    op: str
    name: str
    shape: str
    peer_name: str
    build: Callable[[], Pair]
    n_bytes: float = 0.0
    """Bytes that must cross the memory bus per call, whatever the implementation."""
    flops: float = 0.0
    """Multiplications and additions per call, whatever the implementation."""
    target: float = 0.0
    """The ratio to reach; 0 for none. Below 1 where the peer is a floor."""
    unit: str = "s"
    """What both sides cost: "s", measured by time, or "bytes", which they return."""
    reads_only: bool = False
    """Whether n_bytes are read and none written, so that the limit is that of reading."""
    tokens: int = 0
    """Tokens that a call writes, for those who want tokens/s; 0 where that says nothing."""


@dataclass(frozen=True)
class Limits:
    """The machine's own limits: a large fp32 GEMM, a copy and a sum far beyond the caches.

    MKL, which torch.mm calls, takes AVX-512 on Intel's CPUs only; oneDNN takes it wherever it is.
    """

    flops_per_s: float
    bytes_per_s: float
    read_bytes_per_s: float

    def floor(self, case: Case) -> float:
        """Seconds below which no implementation of `case` can go on this machine."""
        bytes_per_s = self.read_bytes_per_s if case.reads_only else self.bytes_per_s
        return max(case.flops / self.flops_per_s, case.n_bytes / bytes_per_s)


@dataclass(frozen=True)
class Timing:
    """Seconds per call on both sides (medians) and peer / ours (median and quartiles of pairs)."""

    ours_s: float
    peer_s: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    pairs: int
    others: float
    """Share of all cores that other processes used meanwhile; NaN where /proc does not say."""

    @property
    def disturbed(self) -> bool:
        return self.others > DISTURBED


OWN_PROCESSES: set[int] = set()
"""Ids of live processes that work for a benchmark, whose CPU time is not that of others."""


def _cpu_seconds(process: int) -> float:
    """What a process has used, its dead threads included."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Others:
    """How much of all cores other processes use, from its creation to the call of `share`."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds on the clock, busy seconds of all cores, CPU seconds of this process and of those
        that it started."""
        stat, busy = Path("/proc/stat"), math.nan
        if stat.exists():
            user, nice, system, _, _, irq, softirq, steal = map(
                int, stat.read_text().split(maxsplit=9)[1:9]
            )
            ticks = user + nice + system + irq + softirq + steal
            busy = ticks / os.sysconf("SC_CLK_TCK")
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = time.process_time() + ended.ru_utime + ended.ru_stime
        own += sum(map(_cpu_seconds, OWN_PROCESSES))
        return time.perf_counter(), busy, own

    def share(self) -> float:
        wall, busy, own = (b - a for a, b in zip(self.start, self._now(), strict=True))
        return max(busy - own, 0.0) / (wall * os.cpu_count())


def _wait_for_quiet(seconds: float) -> None:
    """Return once others leave the cores alone, or after `seconds`."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        others = _Others()
        time.sleep(0.5)
        if not others.share() > DISTURBED:
            return


def seconds_per_call(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def calls_per_sample(run: Run) -> tuple[int, float]:
    """How many calls fill a sample, and what one takes; warms up on the way."""
    seconds = seconds_per_call(run, 1)
    if seconds < 1:
        seconds = seconds_per_call(run, 1)
    return max(1, math.ceil(SAMPLE_SECONDS / seconds)), seconds


def _time_once(pair: Pair, seconds: float) -> Timing:
    gc.collect()
    (ours_calls, ours_s), (peer_calls, peer_s) = map(calls_per_sample, (pair.ours, pair.peer))
    ours: list[float] = []
    peer: list[float] = []
    others, end = _Others(), time.perf_counter() + seconds
    fewest = FEWEST_PAIRS if max(ours_s, peer_s) > LONG_SECONDS else MIN_PAIRS
    while len(ours) < fewest or (time.perf_counter() < end and len(ours) < MAX_PAIRS):
        ours.append(seconds_per_call(pair.ours, ours_calls))
        peer.append(seconds_per_call(pair.peer, peer_calls))
    low, ratio, high = statistics.quantiles([p / o for o, p in zip(ours, peer, strict=True)], n=4)
    return Timing(
        statistics.median(ours),
        statistics.median(peer),
        ratio,
        (low, high),
        len(ours),
        others.share(),
    )


def format_cost(value: float, unit: str) -> str:
    """Seconds or bytes (`unit` of a Case) as a reader takes them in."""
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MB"
    name, scale = next((x for x in (("s", 1.0), ("ms", 1e-3)) if value >= x[1]), ("µs", 1e-6))
    return f"{value / scale:.3g} {name}"


def child_bytes(code: str, *args: object) -> float:
    """The number that Python code prints in a process of its own, where memory is nobody else's."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measured_bytes(pair: Pair) -> Timing:
    """The bytes that both sides say they take, as a Timing."""
    ours, peer = pair.ours(), pair.peer()
    ratio = peer / ours
    return Timing(ours, peer, ratio, (ratio, ratio), 1, 0.0)


def time_pair(pair: Pair, seconds: float, patience: float) -> Timing:
    """Time ours and the peer in turn for about `seconds`, but at least MIN_PAIRS times (long calls
    FEWEST_PAIRS times).

    A disturbed timing is repeated, each time after at most `patience` seconds of waiting for quiet;
    the least disturbed one is returned, whichever side it favours.
    """
    timings: list[Timing] = []
    while len(timings) < ATTEMPTS and (not timings or timings[-1].disturbed):
        if timings:
            _wait_for_quiet(patience)
        timings.append(_time_once(pair, seconds))
    return min(timings, key=lambda timing: timing.others)


def _large() -> Tensor:
    """2**27 ones, on large pages where the engine's memory is: they are read a fifth faster."""
    if EXTENSION is None:
        return torch.ones(2**27)
    return torch.ops.gptfast.engine_new(2**29).view(torch.float32).fill_(1)


class LimitMeter:
    """Measures the limits now and then during a run; the limit is the best it has seen."""

    def __init__(self) -> None:
        self.a, self.b, self.product = (torch.rand(2048, 2048) for _ in range(3))
        # 512 MB: more than a server's last-level cache gives to one process.
        self.source, self.copy = _large(), torch.ones(2**27)
        self.gemm_s = self.copy_s = self.read_s = math.inf

    def read_rate(self) -> float:
        """Bytes/s that a sum reads now."""
        read_s = min(seconds_per_call(self.source.sum, 1) for _ in range(3))
        self.read_s = min(self.read_s, read_s)
        return self.source.nbytes / read_s

    def sample(self) -> None:
        layer = torch.ops.mkldnn._linear_pointwise
        for gemm in (
            lambda: torch.mm(self.a, self.b, out=self.product),
            lambda: layer(self.a, self.b, None, "none", [], ""),
        ):
            self.gemm_s = min(self.gemm_s, seconds_per_call(gemm, 3))
        copy_s = seconds_per_call(lambda: self.copy.copy_(self.source), 2)
        self.copy_s = min(self.copy_s, copy_s)
        self.read_rate()

    def limits(self) -> Limits:
        flops = 2.0 * self.a.shape[0] ** 3
        n_bytes = float(self.source.numel() * self.source.element_size())
        return Limits(flops / self.gemm_s, 2 * n_bytes / self.copy_s, n_bytes / self.read_s)


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
    """A pair whose sides return the tensors to compare."""
    return Pair(ours, peer, lambda: assert_close(ours(), peer(), tolerance))


def tolerance_of(dtype: torch.dtype) -> float:
    """A cheap bound that catches a wrong kernel; the tests hold the derived one."""
    return 1e-4 if dtype == torch.float32 else 4e-2


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def both_sides(cases: Iterable[Case]) -> Iterator[object]:
    """The parameters (case, side) of a pytest-benchmark test."""
    for case in cases:
        for side in ("ours", "peer"):
            label = f"{case.name}-{case.shape}-{case.peer_name}-{side}".replace(" ", "_")
            yield pytest.param(case, side, id=label)
