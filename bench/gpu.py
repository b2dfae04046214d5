"""Everything a GPU is needed for, in one call under nine minutes: `make gpu`.

python bench/gpu.py [--only parity,determinism,graph,bench,sanitize] [--out DIR] [--minutes 8.5]

parity: the tests of the operations on the GPU. determinism: the same bits in 20 runs. graph: a
training step of GPT under torch.compile(fullgraph=True) and as a CUDA graph, against the eager one.
sanitize: compute-sanitizer over small launches, where it runs. bench: each operation and the whole
step beside its peers (bench/gpu_cases.py, bench/gpu_generate.py), interleaved, medians of device
time.
Results go to <gpu>-<date>.json and .md in bench/results, row by row, so that what was measured
before a time limit is kept. --smoke walks the same way on a CPU, in Triton's interpreter, with tiny
shapes: its times mean nothing.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # noqa: E402
import triton  # noqa: E402
from gpu_cases import GpuCase, cases  # noqa: E402
from gpu_generate import generation_cases  # noqa: E402
from gpu_operations import operations  # noqa: E402
from torch import Tensor  # noqa: E402

from gptfast import GPT, AdamW, GPTConfig, ops, use_backend  # noqa: E402

SECTIONS = ("parity", "determinism", "graph", "bench", "sanitize")
TESTS = ("philox", "attention", "cross_entropy", "adamw", "sampling", "embedding")
TESTS += ("decode_linear", "engine_gpu")
ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cpu" if SMOKE else "cuda"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if not SMOKE:
    DTYPES["bf16"] = torch.bfloat16


class Report:
    """The results so far: printed as they come, and written after each."""

    def __init__(self, out: Path, deadline: float) -> None:
        name = "smoke" if SMOKE else torch.cuda.get_device_name().replace(" ", "-").lower()
        stem = f"{name}-{datetime.date.today():%Y-%m-%d}"
        self.path, self.deadline = out / f"{stem}.json", deadline
        self.results: dict[str, object] = {"machine": machine()}
        out.mkdir(parents=True, exist_ok=True)

    def add(self, section: str, result: object) -> None:
        self.results[section] = result
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


def machine() -> dict[str, object]:
    """What the figures are worth nothing without."""
    gpu = {"gpu": "none (smoke run)"}
    if not SMOKE:
        properties = torch.cuda.get_device_properties()
        gpu = {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9),
            "cuda": torch.version.cuda,
        }
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return gpu | versions | {"python": platform.python_version()}


def synchronize() -> None:
    if not SMOKE:
        torch.cuda.synchronize()


def parity(report: Report) -> None:
    """The operations' own tests, on the GPU (with bf16)."""
    files = [f"tests/test_{name}.py" for name in TESTS if not SMOKE or name == "philox"]
    command = [sys.executable, "-m", "pytest", "-rf", "-m", "triton", *files]
    if find_spec("xdist"):
        command += ["-n", "8"]  # compiling takes the time, and the machine has cores for it
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        passed, said = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        passed, said = None, f"{(error.stdout or b'').decode()}\nnot done within the time"
    last = said.strip().splitlines()[-40:]
    print("\n".join(last))
    took = round(time.monotonic() - start, 1)
    report.add("parity", {"passed": passed, "summary": last, "seconds": took})


def determinism(report: Report) -> None:
    """The same bits in 20 runs."""
    result = {}
    for name, dtype in DTYPES.items():
        for op, run in operations(dtype, small=SMOKE).items():
            first = run()
            same = all(
                torch.equal(a, b)
                for _ in range(1 if SMOKE else 19)
                for a, b in zip(first, run(), strict=True)
            )
            result[f"{op} {name}"] = same
            print(f"{op} {name}: {'the same bits' if same else 'DIFFERENT BITS'} in 20 runs")
    report.add("determinism", result)


def _model_and_step(compiled: bool) -> tuple[GPT, Callable[[], Tensor]]:
    torch.manual_seed(0)
    T = 8 if SMOKE else 256
    config = GPTConfig(
        vocab_size=101 if SMOKE else 50257, block_size=T, n_layer=2, n_head=2, n_embd=128
    )
    model = GPT(config)
    model = model if SMOKE else model.bfloat16()
    optimizer = AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    idx, target = torch.randint(config.vocab_size, (2, 2, T))
    f = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = f(idx, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, step


def graph(report: Report) -> None:
    """Five steps of GPT in bf16 with fp32 masters: eager, compiled, captured in a CUDA graph."""
    losses = {}
    _, step = _model_and_step(compiled=False)
    losses["eager"] = [step().item() for _ in range(5)]
    if SMOKE:
        print(losses)
        return
    _, step = _model_and_step(compiled=True)
    losses["compiled"] = [step().item() for _ in range(5)]
    _, step = _model_and_step(compiled=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        losses["graph"] = [step().item() for _ in range(2)]
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        loss = step()
    for _ in range(3):
        captured.replay()
        losses["graph"].append(loss.item())
    for name, values in losses.items():
        print(f"{name}: {values}")
    same = losses["graph"] == losses["eager"]
    print(f"graph {'equals' if same else 'DIFFERS FROM'} eager bit for bit")
    report.add("graph", {"losses": losses, "graph_equals_eager": same})


def sanitize_subset() -> None:
    """What compute-sanitizer watches: every kernel, small and odd."""
    for dtype in DTYPES.values():
        for run in operations(dtype, small=True).values():
            run()
    q, k = torch.randn(2, 2, 1, 64), torch.randn(2, 2, 333, 64)
    ops.attention(q, k, k, kv_len=torch.tensor([7, 333]))
    synchronize()


def sanitize(report: Report) -> None:
    """compute-sanitizer's memcheck over `sanitize_subset`."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        report.add("sanitize", "compute-sanitizer is not installed")
        print("compute-sanitizer is not installed")
        return
    # The caching allocator would hide a read past the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    command += [sys.executable, __file__, "--only", "sanitize_subset"]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(10.0, min(90.0, report.seconds_left)),
        )
        last = (done.stdout + done.stderr).strip().splitlines()[-12:]
        result = {"clean": done.returncode == 0, "summary": last}
    except subprocess.TimeoutExpired:
        result = {"clean": None, "summary": ["not done within the time"]}
    print("\n".join(result["summary"]))
    report.add("sanitize", result)


def device_seconds(run: Callable[[], object], wall: bool = False) -> float:
    """Device time of one call, from events around it; with wall, until it is done, for the host.

    The GPU is kept waiting meanwhile, so that what the host takes to launch is not counted.
    """
    if SMOKE or wall:
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # some 10 ms
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def limits() -> dict[str, float]:
    """This GPU's own: a large bf16 product, and a copy counting bytes read and written."""
    size, n = (64, 2**12) if SMOKE else (8192, 2**31)
    a, b = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.ones(n, dtype=torch.uint8)
    copy = torch.empty_like(source)
    gemm = statistics.median(device_seconds(lambda: torch.mm(a, b, out=out)) for _ in range(15))
    copying = statistics.median(device_seconds(lambda: copy.copy_(source)) for _ in range(15))
    return {"bf16_flops_per_s": 2.0 * size**3 / gemm, "bytes_per_s": 2.0 * n / copying}


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """run as a CUDA graph: its replay is device time without the launches."""
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
    """Each side warmed up, and captured where the case asks; what cannot run says why."""
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


def measure(case: GpuCase, limit: dict[str, float]) -> dict[str, object]:
    """One row: medians of all sides, interleaved; peak memory of ours and the peers."""
    failed: dict[str, str] = {}
    built = case.build(SMOKE)
    sides = _ready(case, built.sides, failed)
    built.check()
    memory = {}
    if not SMOKE and not case.graph:
        for side, run in sides.items():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            memory[side] = torch.cuda.max_memory_allocated() - before
    samples: dict[str, list[float]] = {side: [] for side in sides}
    rounds = 1 if SMOKE else case.rounds
    for _ in range(rounds):
        for side, run in sides.items():
            samples[side].append(device_seconds(run, case.wall))
    seconds = {side: statistics.median(values) for side, values in samples.items()}
    ours = seconds["gptfast"]
    peers = {side: s for side, s in seconds.items() if not side.startswith("gptfast")}
    best = min(peers, key=peers.get) if peers else None
    floor = max(case.flops / limit["bf16_flops_per_s"], case.n_bytes / limit["bytes_per_s"])
    return {
        "case": case.name,
        "seconds": seconds,
        "best_peer": best,
        "ratio": peers[best] / ours if best else None,
        "tflops": case.flops / ours / 1e12 if case.flops else None,
        "gb_per_s": case.n_bytes / ours / 1e9 if case.n_bytes else None,
        "fraction_of_limit": floor / ours,
        "memory_bytes": memory,
        "failed": failed,
        "target": case.target,
    }


def row_text(row: dict) -> str:
    """One line of the Markdown table."""
    times = ", ".join(f"{side} {s * 1e6:,.0f}" for side, s in row["seconds"].items())
    rate = f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] else f"{row['gb_per_s']:.0f} GB/s"
    ratio = f"{row['ratio']:.2f}x {row['best_peer']}" if row["ratio"] else ""
    cells = (row["case"], times, ratio, rate, f"{row['fraction_of_limit']:.0%}", row["target"])
    return "| " + " | ".join(cells) + " |"


HEAD = "| case | device time, us | against the best peer | rate | of the limit | target |\n"
HEAD += "|" + "---|" * 6


def bench(report: Report) -> None:
    """The table of the peers."""
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
            print(f"{case.name}: left out, no time")
            rows.append({"case": case.name, "error": "left out, no time"})
            continue
        try:
            rows.append(measure(case, limit))
            lines.append(row_text(rows[-1]))
            print(lines[-1], rows[-1]["failed"] or "", flush=True)
        except Exception as error:  # one wrong case must not cost the others their time
            if SMOKE:
                raise
            rows.append({"case": case.name, "error": f"{type(error).__name__}: {error}"})
            print(f"{case.name}: {rows[-1]['error']}", flush=True)
        report.add("bench", {"limits": limit, "rows": rows})
        title = ", ".join(f"{k} {v}" for k, v in report.results["machine"].items())
        report.path.with_suffix(".md").write_text("\n".join([title, "", line, "", *lines]) + "\n")
        if not SMOKE:
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--minutes", type=float, default=8.5, help="when to stop measuring")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, with tiny shapes")
    args = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        parser.error("no GPU; --smoke walks through on the CPU")
    torch.set_default_device(DEVICE)
    if args.only == "sanitize_subset":
        sanitize_subset()
        return
    report = Report(args.out, time.monotonic() + 60 * args.minutes)
    print(report.results["machine"])
    names = args.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no section named {unknown.pop()!r}; choose from {', '.join(SECTIONS)}")
    # Not use_backend("auto") on a GPU: torch.compile refuses to work inside a dispatch mode.
    with use_backend("triton") if SMOKE else contextlib.nullcontext():
        for name in names:
            print(f"\n== {name}", flush=True)
            try:
                globals()[name](report)
            except Exception as error:  # one section must not cost the others their time
                if SMOKE:
                    raise
                traceback.print_exc()
                report.add(name, {"error": f"{type(error).__name__}: {error}"})
    print(f"\nwrote {report.path}")


if __name__ == "__main__":
    main()
