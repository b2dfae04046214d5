"""The benchmark of bench/gpu.py: device times of all sides, interleaved, and a table."""

import statistics
import time
from collections.abc import Callable

import torch
from gpu_cases import GpuCase, cases
from gpu_device import SMOKE, synchronize
from gpu_generate import generation_cases
from gpu_report import Report

SLEEP_CYCLES = 20_000_000
"""How long the GPU waits before a timed call: about 10 ms."""


def device_seconds(run: Callable[[], object], wall: bool = False) -> float:
    """Return the device time of one call, from events around it; with `wall`, the time until the
    host sees the call done.

    The GPU sleeps first, so that the time the host takes to launch is not counted.
    """
    if SMOKE or wall:
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def limits() -> dict[str, float]:
    """Return this GPU's rates for a large bf16 product and for a copy (bytes read and written)."""
    size, n = (64, 2**12) if SMOKE else (8192, 2**31)
    a, b = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.ones(n, dtype=torch.uint8)
    copy = torch.empty_like(source)
    gemm = statistics.median(device_seconds(lambda: torch.mm(a, b, out=out)) for _ in range(15))
    copying = statistics.median(device_seconds(lambda: copy.copy_(source)) for _ in range(15))
    return {"bf16_flops_per_s": 2.0 * size**3 / gemm, "bytes_per_s": 2.0 * n / copying}


def captured(run: Callable[[], object]) -> Callable[[], object]:
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


def _ready(case: GpuCase, sides: dict[str, Callable], failed: dict[str, str]) -> dict:
    """Return each side warmed up, and captured if the case asks for it; put into `failed` why a
    peer cannot run."""
    ready = {}
    for side, run in sides.items():
        try:
            run = captured(run) if case.graph else run
            for _ in range(1 if SMOKE else 3):
                run()
            synchronize()
            ready[side] = run
        except Exception as error:
            if side == "gptfast":
                raise
            failed[side] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ready


def _peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak memory that a call takes beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def share_of_limit(case: GpuCase, seconds: float, limit: dict[str, float]) -> float | None:
    """Return which share of the limit is reached, or None above 100%: then the limit is none."""
    floor = max(case.flops / limit["bf16_flops_per_s"], case.n_bytes / limit["bytes_per_s"])
    return floor / seconds if 0 < floor <= seconds else None


def measure(case: GpuCase, limit: dict[str, float]) -> dict[str, object]:
    """Return one row: medians of all sides, interleaved, and each side's peak memory."""
    failed: dict[str, str] = {}
    built = case.build(SMOKE)
    sides = _ready(case, built.sides, failed)
    built.check()
    memory = {}
    if not SMOKE and not case.graph:
        memory = {side: _peak_bytes(run) for side, run in sides.items()}
    samples: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(1 if SMOKE else case.rounds):
        for side, run in sides.items():
            samples[side].append(device_seconds(run, case.wall))
    seconds = {side: statistics.median(values) for side, values in samples.items()}
    ours = seconds["gptfast"]
    peers = {side: s for side, s in seconds.items() if not side.startswith("gptfast")}
    best = min(peers, key=peers.get) if peers else None
    return {
        "case": case.name,
        "seconds": seconds,
        "best_peer": best,
        "ratio": peers[best] / ours if best else None,
        "tflops": case.flops / ours / 1e12 if case.flops else None,
        "gb_per_s": case.n_bytes / ours / 1e9 if case.n_bytes else None,
        "share_of_limit": share_of_limit(case, ours, limit),
        "memory_bytes": memory,
        "failed": failed,
        "target": case.target,
    }


def row_text(row: dict) -> str:
    """Return one line of the Markdown table."""
    times = ", ".join(f"{side} {s * 1e6:,.0f}" for side, s in row["seconds"].items())
    rate = f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] else f"{row['gb_per_s']:.0f} GB/s"
    ratio = f"{row['ratio']:.2f}x {row['best_peer']}" if row["ratio"] else ""
    share = "" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}"
    cells = (row["case"], times, ratio, rate, share, row["target"])
    return "| " + " | ".join(cells) + " |"


HEAD = "| case | device time, us | against the best peer | rate | share of the limit | target |\n"
HEAD += "|" + "---|" * 6


def bench(report: Report) -> None:
    """Measure every case beside its peers and write the table."""
    limit = limits()
    line = (
        f"limits: bf16 product {limit['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s, "
        f"copy {limit['bytes_per_s'] / 1e9:.0f} GB/s"
    )
    print(line)
    rows, lines = [], [HEAD]
    for case in (*cases(), *generation_cases()):
        if SMOKE and not case.smoke:
            continue
        if report.seconds_left < case.seconds and not SMOKE:
            print(f"{case.name}: left out: too little time is left")
            rows.append({"case": case.name, "error": "left out: too little time is left"})
            continue
        try:
            rows.append(measure(case, limit))
            lines.append(row_text(rows[-1]))
            print(lines[-1], rows[-1]["failed"] or "", flush=True)
        except Exception as error:  # the other cases are still to be measured
            if SMOKE:
                raise
            rows.append({"case": case.name, "error": f"{type(error).__name__}: {error}"})
            print(f"{case.name}: {rows[-1]['error']}", flush=True)
        report.add("bench", {"limits": limit, "rows": rows})
        title = ", ".join(f"{k} {v}" for k, v in report.results["machine"].items())
        report.path.with_suffix(".md").write_text("\n".join([title, "", line, "", *lines]) + "\n")
        if not SMOKE:
            torch.cuda.empty_cache()
