"""Time both sides of a case in turn, and notice when other programs use the cores meanwhile.

Ours and the peer run in one process, A B A B, so that a change of the clock rate affects both. A
sample is as many calls as fill a few milliseconds. The ratio is the median over the pairs of peer /
ours (above 1: ours is faster); its quartiles say how far to trust it.

Interleaving does not make up for a busy machine: when other processes use the cores, a parallel
region waits for a thread that is not running, and the side with more regions loses more (a ratio of
19 was seen as 327; with one thread the effect is gone). So the CPU time of other processes is
measured with each case. A disturbed case is measured again, up to MAX_ATTEMPTS times; if it is
still disturbed, its row says so and is published nowhere.
"""

import gc
import math
import os
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from harness import Pair, Run

MIN_SAMPLE_S = 4e-3
MIN_PAIRS = 5
MAX_PAIRS = 200
LONG_CALL_S = 2.0
MIN_PAIRS_OF_LONG_CALLS = 3
MAX_ATTEMPTS = 4
MAX_OTHER_LOAD = 0.03
"""The share of all cores that other processes may use before a timing counts as disturbed."""

OWN_PROCESSES: set[int] = set()
"""Ids of live processes that belong to a benchmark: their CPU time is not that of others."""


@dataclass(frozen=True)
class Timing:
    """The median cost per call on both sides, and peer / ours (median and quartiles of pairs)."""

    gptfast_cost: float
    peer_cost: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    pairs: int
    other_load: float
    """Share of all cores that other processes used meanwhile; NaN where /proc is missing."""

    @property
    def disturbed(self) -> bool:
        return self.other_load > MAX_OTHER_LOAD


def _cpu_seconds(process: int) -> float:
    """Return the CPU time that a process has used, including its threads that have ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class OtherLoad:
    """Measures how much of all cores other processes use, from its creation to `share()`."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return the clock, the busy seconds of all cores, and the CPU seconds of this benchmark
        (this process and those that it started)."""
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


def _wait_for_quiet(timeout_s: float) -> None:
    """Return once other processes leave the cores alone, or after `timeout_s`."""
    end = time.perf_counter() + timeout_s
    while time.perf_counter() < end:
        load = OtherLoad()
        time.sleep(0.5)
        if not load.share() > MAX_OTHER_LOAD:
            return


def seconds_per_call(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def calls_per_sample(run: Run) -> tuple[int, float]:
    """Return how many calls fill a sample and the seconds that one takes; this warms up `run`."""
    seconds = seconds_per_call(run, 1)
    if seconds < 1:
        seconds = seconds_per_call(run, 1)
    return max(1, math.ceil(MIN_SAMPLE_S / seconds)), seconds


def _time_once(pair: Pair, seconds: float) -> Timing:
    gc.collect()
    (ours_calls, ours_s), (peer_calls, peer_s) = map(calls_per_sample, (pair.ours, pair.peer))
    ours: list[float] = []
    peer: list[float] = []
    load, end = OtherLoad(), time.perf_counter() + seconds
    is_long = max(ours_s, peer_s) > LONG_CALL_S
    min_pairs = MIN_PAIRS_OF_LONG_CALLS if is_long else MIN_PAIRS
    while len(ours) < min_pairs or (time.perf_counter() < end and len(ours) < MAX_PAIRS):
        ours.append(seconds_per_call(pair.ours, ours_calls))
        peer.append(seconds_per_call(pair.peer, peer_calls))
    low, ratio, high = statistics.quantiles([p / o for o, p in zip(ours, peer, strict=True)], n=4)
    medians = statistics.median(ours), statistics.median(peer)
    return Timing(*medians, ratio, (low, high), len(ours), load.share())


def time_pair(pair: Pair, seconds: float, timeout_s: float) -> Timing:
    """Time ours and the peer in turn for about `seconds`, but at least MIN_PAIRS times (calls
    longer than LONG_CALL_S: MIN_PAIRS_OF_LONG_CALLS times).

    A disturbed timing is repeated up to MAX_ATTEMPTS times in all, each time after waiting at most
    `timeout_s` for other processes to leave the cores alone. The least disturbed timing is
    returned, whichever side it favours.
    """
    timings = [_time_once(pair, seconds)]
    while timings[-1].disturbed and len(timings) < MAX_ATTEMPTS:
        _wait_for_quiet(timeout_s)
        timings.append(_time_once(pair, seconds))
    return min(timings, key=lambda timing: timing.other_load)


def returned_costs(pair: Pair) -> Timing:
    """Return the costs that both sides return, as a Timing."""
    ours, peer = pair.ours(), pair.peer()
    ratio = peer / ours
    return Timing(ours, peer, ratio, (ratio, ratio), 1, pair.other_load())
