"""Run everything that needs a GPU, in one call under nine minutes: `make gpu`.

python bench/gpu.py [--only parity,determinism,graph,bench,sanitize] [--out DIR] [--minutes 8.5]

parity: the tests of the operations on the GPU. determinism: the same bits in 20 runs. graph: a
training step of GPT under torch.compile(fullgraph=True) and as a CUDA graph, against the eager one.
bench: each operation and the whole step beside its peers (gpu_cases.py, gpu_generate.py),
interleaved, medians of device time. sanitize: compute-sanitizer over small launches, if it is
installed.
Results go to bench/results/<gpu>-<date>.json and .md, row by row, so that what was measured before
a time limit is kept. --smoke runs the same code on a CPU, in Triton's interpreter, with tiny
shapes: its times mean nothing.
"""

import argparse
import contextlib
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from gpu_device import DEVICE, SMOKE  # isort: skip - before Triton and gptfast
import torch
from gpu_checks import determinism, graph, parity, sanitize, small_launches
from gpu_report import Report
from gpu_timing import bench

from gptfast import use_backend

SECTIONS: dict[str, Callable[[Report], None]] = {
    "parity": parity,
    "determinism": determinism,
    "graph": graph,
    "bench": bench,
    "sanitize": sanitize,
}


def run(names: list[str], report: Report) -> None:
    """Run the named sections; one that fails on a GPU is reported, and the next one runs."""
    for name in names:
        print(f"\n== {name}", flush=True)
        try:
            SECTIONS[name](report)
        except Exception as error:
            if SMOKE:
                raise
            traceback.print_exc()
            report.add(name, {"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help=f"comma-separated, from {','.join(SECTIONS)}"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="where results go (default: bench/results)",
    )
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="when to stop measuring (default: 8.5)"
    )
    parser.add_argument("--smoke", action="store_true", help="on the CPU, with tiny shapes")
    args = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        parser.error("no GPU; --smoke runs the same code on the CPU")
    torch.set_default_device(DEVICE)
    # `sanitize` starts this under compute-sanitizer.
    if args.only == "small_launches":
        small_launches()
        return
    names = args.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no section named {unknown.pop()!r}; choose from {', '.join(SECTIONS)}")
    report = Report(args.out, time.monotonic() + 60 * args.minutes)
    print(report.results["machine"])
    # Not use_backend("auto") on a GPU: torch.compile refuses to work inside a dispatch mode.
    with use_backend("triton") if SMOKE else contextlib.nullcontext():
        run(names, report)
    print(f"\nwrote {report.path}")


if __name__ == "__main__":
    main()
