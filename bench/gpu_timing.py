"""The measurements of bench/gpu.py: device, host and wall times of all sides, interleaved.

Nothing here runs in `on_device` but the making of data and the checks.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_cases import GpuCase
from gpu_device import SMOKE, on_device, synchronize
from gpu_jobs import Emit

CYCLES_PER_S = 2e9
"""More cycles a second than GPUs have: a sleep of so many cycles lasts at least as long."""
MIN_SLEEP_S = 0.01
WARM_UPS = 4
"""Calls of each side before it is measured; in the third one, TrainStep captures its graph."""

Run = Callable[[], object]


@dataclass
class Waiting:
    """A call that waits for the GPU; `run` calls its argument when it has queued all its work."""

    run: Callable[[Callable[[], None]], object]
    queued_at: float = 0.0

    def __call__(self) -> object:
        return self.run(self._note)

    def _note(self) -> None:
        self.queued_at = time.perf_counter()


def wall_seconds(run: Run) -> tuple[float, float]:
    """Return how long the host takes to queue one call, and until it sees the call done."""
    synchronize()
    start = time.perf_counter()
    run()
    queued = run.queued_at if isinstance(run, Waiting) else time.perf_counter()
    synchronize()
    return queued - start, time.perf_counter() - start


def device_seconds(run: Run, queueing: float = 0.0) -> float:
    """Return the device time of one call, from events around it.

    The GPU sleeps first while the host queues the work, which takes it `queueing` seconds. A GPU
    queues about a thousand launches: of a call with more, this time still contains waiting for the
    host.
    """
    if SMOKE:
        return queueing
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CYCLES_PER_S * max(MIN_SLEEP_S, 1.5 * queueing)))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def _median_of(run: Run) -> float:
    """Return the median device time of 15 calls."""
    return statistics.median(device_seconds(run, wall_seconds(run)[0]) for _ in range(15))


def limits(emit: Emit, small: bool = SMOKE) -> None:
    """Measure this GPU's rates for a large bf16 product and for a copy (bytes read and written)."""
    size, n = (64, 2**12) if small else (8192, 2**31)
    with on_device():
        a, b = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
        source = torch.ones(n, dtype=torch.uint8)
    out, copy = torch.empty_like(a), torch.empty_like(source)
    gemm = _median_of(lambda: torch.mm(a, b, out=out))
    copying = _median_of(lambda: copy.copy_(source))
    emit({"bf16_flops_per_s": 2.0 * size**3 / gemm, "bytes_per_s": 2.0 * n / copying})


def captured(run: Run) -> Run:
    """Return the replay of `run` as a CUDA graph: device time without the launches."""
    if SMOKE:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        run()
    return recorded.replay


def _ready(case: GpuCase, sides: dict[str, Run], failed: dict[str, str]) -> dict[str, Run]:
    """Return each side warmed up, and captured if the case asks for it; put into `failed` why a
    side cannot run."""
    ready = {}
    for side, run in sides.items():
        try:
            run = captured(run) if case.graph else run
            for _ in range(0 if SMOKE else WARM_UPS):
                run()
            synchronize()
            ready[side] = run
        except Exception as error:
            if SMOKE:
                raise
            failed[side] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ready


def _peak_bytes(run: Run) -> int:
    """Return the peak memory that a call takes beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def share_of_limit(case: GpuCase, seconds: float, limit: dict[str, float]) -> float | None:
    """Return which share of the limit is reached, or None above 100%: then the limit is none."""
    if not limit:
        return None
    floor = max(case.flops / limit["bf16_flops_per_s"], case.n_bytes / limit["bytes_per_s"])
    return floor / seconds if 0 < floor <= seconds else None


def _medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {side: statistics.median(values) for side, values in samples.items() if values}


@dataclass
class Samples:
    """The times of each side so far, in seconds."""

    device: dict[str, list[float]]
    host: dict[str, list[float]]
    wall: dict[str, list[float]]

    def take(self, case: GpuCase, side: str, run: Run) -> None:
        """Measure a side once."""
        queueing, seconds = wall_seconds(run)
        self.host[side].append(queueing)
        self.wall[side].append(seconds)
        if case.device:
            self.device[side].append(device_seconds(run, queueing))


def _row(
    case: GpuCase,
    samples: Samples,
    memory: dict[str, int],
    failed: dict[str, str],
    limit: dict[str, float],
) -> dict[str, object]:
    """Return a row from the samples so far; ours and the best peer are compared by what counts."""
    times, walls = _medians(samples.device), _medians(samples.wall)
    counted = walls if case.wall else times
    # "gptfast" is what users run; a case may have other forms of it only.
    ours = next((s for side, s in counted.items() if side.startswith("gptfast")), None)
    peers = {side: s for side, s in counted.items() if not side.startswith("gptfast")}
    best = min(peers, key=lambda side: peers[side]) if peers else None
    return {
        "case": case.name,
        "seconds": times,
        "host_seconds": _medians(samples.host),
        "wall_seconds": walls,
        "rounds": min((len(values) for values in samples.wall.values()), default=0),
        "best_peer": best,
        "ratio": peers[best] / ours if best and ours else None,
        "tflops": case.flops / ours / 1e12 if case.flops and ours else None,
        "gb_per_s": case.n_bytes / ours / 1e9 if case.n_bytes and ours else None,
        "share_of_limit": share_of_limit(case, ours, limit) if ours else None,
        "memory_bytes": memory,
        "failed": failed,
        "target": case.target,
    }


def measure(case: GpuCase, limit: dict[str, float], emit: Emit) -> None:
    """Measure all sides in turn and compare their results.

    The row is handed out after each round, with the medians so far.
    """
    failed: dict[str, str] = {}
    with on_device():
        built = case.build(SMOKE)
    sides = _ready(case, built.sides, failed)
    memory = {}
    if not SMOKE and not case.graph:
        memory = {side: _peak_bytes(run) for side, run in sides.items()}
    samples = Samples(*({side: [] for side in sides} for _ in range(3)))
    for _ in range(1 if SMOKE else case.rounds):
        for side, run in sides.items():
            samples.take(case, side, run)
        emit(_row(case, samples, memory, failed, limit))
    try:
        with on_device():
            built.check()
    except AssertionError as error:
        failed["check"] = str(error)[:200]
    emit(_row(case, samples, memory, failed, limit))
    # Peers may be missing; ours may neither fail nor differ.
    ours = [f"{x}: {why}" for x, why in failed.items() if x.startswith(("gptfast", "check"))]
    assert not ours, "; ".join(ours)
