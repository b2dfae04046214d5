"""Run what needs a GPU: `make gpu-kernels`, `make gpu-train`, `make gpu-rest`, or all: `make gpu`.

python bench/gpu.py [--call kernels|train|rest|all] [--only SECTION,...] [--cases REGEX]
                    [--out DIR] [--minutes N]

Each call takes under nine minutes, the most telling first. kernels: each operation beside its peers
(gpu_cases.py, gpu_layers.py), and the tests of the operations on the GPU. train: the step that
`gptfast train --precision bf16` takes, eager, replayed from its CUDA graph and compiled: the same
numbers, its profile, its time beside plain PyTorch's (gpu_steps.py, gpu_train.py); choices that a
GPU must confirm (gpu_variants.py). rest: generation, compute-sanitizer and Nsight Compute, if they
are installed.

Every job has a process of its own and a time limit (gpu_jobs.py). Results go to <out>/<gpu>/<call>
.json and .md after each job; out is $OUT if that is set, else bench/results/gpu. --smoke runs the
same code on a CPU, in Triton's interpreter, with tiny shapes: its times mean nothing.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import gpu_faults
from gpu_cache import unpack
from gpu_jobs import Emit, Job, Outcome, run_job, serve
from gpu_report import Report

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
CALLS = ("kernels", "train", "rest")
MINUTES = 8.5
PARITY_S = 270.0
FAULTS = "faults"
"""The section of the jobs that end badly on purpose; no call has it."""
MIN_SECONDS = 10.0
"""A job that has less time left than this does not start."""


def _device_job(name: str, section: str, work: Callable[..., None], seconds: float) -> Job:
    """Return a job that runs our kernels on the device."""

    def run(emit: Emit) -> None:
        from gpu_device import kernels

        with kernels():
            work(emit=emit)

    return Job(name, section, run, seconds)


def _first_jobs() -> Iterator[Job]:
    """Yield what each call begins with: the machine and its limits."""
    from gpu_device import SMOKE, machine
    from gpu_timing import limits

    if SMOKE:  # once for all forked jobs: its import takes a second
        import torch._dynamo  # noqa: F401

    yield Job("machine", "machine", lambda emit: emit(machine()), 120)
    yield _device_job("limits", "limits", limits, 60)


def _cases(cases: Iterable, out: Path) -> Iterator[Job]:
    """Yield a job for each benchmark case."""
    from gpu_device import SMOKE
    from gpu_timing import measure

    def work(emit: Emit, case) -> None:  # type: ignore[no-untyped-def]
        path = out / "jobs" / "limits.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        measure(case, found.get("result") or {}, emit)

    for case in cases:
        if case.smoke or not SMOKE:
            yield _device_job(case.name, "bench", partial(work, case=case), case.seconds)


def _kernels(out: Path) -> Iterator[Job]:
    from gpu_cases import operation_cases, sampling_cases
    from gpu_checks import parity
    from gpu_layers import layer_cases

    few, *many = sampling_cases()
    yield from _cases((*operation_cases(), few), out)
    # pytest chooses the device itself.
    yield Job("parity", "parity", partial(_parity, parity, out), PARITY_S + 20)
    yield from _cases(layer_cases(), out)
    yield from _cases(many, out)


def _parity(parity: Callable[..., None], out: Path, emit: Emit) -> None:
    left = float(os.environ.get("GPU_JOB_SECONDS", PARITY_S))
    parity(out, max(1.0, min(PARITY_S, left)), emit)


def _train(out: Path) -> Iterator[Job]:
    from gpu_checks import determinism
    from gpu_device import SMOKE
    from gpu_steps import check_step, profile_step
    from gpu_train import COMPILED, EAGER, REPLAYED, large_case, train_cases
    from gpu_variants import chunk_cases, tile_cases

    replayed, *others = _cases(train_cases(), out)

    def check(form: str, seconds: float) -> Job:
        return _device_job(f"step {form}", "step", partial(check_step, form), seconds)

    def profile(form: str, side: str) -> Job:
        work = partial(profile_step, form, side, out)
        return _device_job(f"profile {form}", "profile", work, 100)

    yield check("eager", 60)
    if not SMOKE:
        yield check("replayed", 60)
    yield replayed
    yield profile("eager", EAGER)
    yield _device_job("determinism", "determinism", determinism, 60)
    yield from _cases(chunk_cases(), out)
    yield from _cases(tile_cases(), out)
    if SMOKE:  # where nothing is compiled or captured
        return
    yield check("compiled", 90)
    yield profile("compiled", COMPILED)
    yield from others
    yield profile("replayed", REPLAYED)
    yield from _cases(large_case(), out)


def _rest(out: Path) -> Iterator[Job]:
    from gpu_checks import PROFILED, SANITIZED, TOOLS, nsight, sanitize
    from gpu_device import SMOKE
    from gpu_generate import generation_cases

    few = 1 if SMOKE else None  # the others run the same lines
    yield from _cases(generation_cases(), out)
    sanitized = {
        tool: [
            _device_job(f"{tool} {op}", "sanitize", partial(sanitize, op, tool, out), 60)
            for op in SANITIZED[:few]
        ]
        for tool in TOOLS
    }
    yield from sanitized["memcheck"]
    for kernel in list(PROFILED)[:few]:
        yield _device_job(f"ncu {kernel}", "ncu", partial(nsight, kernel, out), 60)
    yield from sanitized["racecheck"]


def jobs(call: str, out: Path) -> Iterator[Job]:
    """Yield the jobs of a call, or of all three, in the order in which they run."""
    yield from _first_jobs()
    for name, of in zip(CALLS, (_kernels, _train, _rest), strict=True):
        if call in (name, "all"):
            yield from of(out)


def _fresh(job: Job, out: Path) -> list[str] | None:
    """Return the command that runs a job in a fresh interpreter. A smoke run forks instead."""
    if "--smoke" in sys.argv:
        return None
    return [sys.executable, str(Path(__file__).resolve()), "--job", job.name, "--out", str(out)]


def run(chosen: list[Job], report: Report, deadline: float) -> bool:
    """Run the jobs one after the other and return whether all of them did their work."""
    for job in chosen:
        limit = min(job.seconds, deadline - time.monotonic())
        if limit < min(MIN_SECONDS, job.seconds):
            report.add(job, Outcome("left out: too little time is left", 0.0))
            continue
        os.environ["GPU_JOB_SECONDS"] = str(limit - 20)
        outcome = run_job(job, report.out, limit, _fresh(job, report.out))
        report.add(job, outcome)
        if job.section == "machine" and outcome.status != "done":
            break
    return all(job["status"] == "done" for job in report.jobs.values())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--call", default="all", choices=(*CALLS, "all"), help="which jobs to run")
    parser.add_argument("--only", help="comma-separated sections: no jobs of other sections")
    parser.add_argument("--cases", type=re.compile, help="no jobs but those whose names match")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or RESULTS),
        help="where results go (default: $OUT if that is set, else bench/results/gpu)",
    )
    parser.add_argument("--minutes", type=float, help=f"when to stop (default: {MINUTES} a call)")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--job", help="run one job in this process")
    parser.add_argument("--launch-operation", help="launch an operation, for a tool to watch")
    parser.add_argument("--launch-case", help="launch our side of a case, for a tool to watch")
    return parser.parse_args()


def _launch(args: argparse.Namespace) -> None:
    """Launch what compute-sanitizer or Nsight Compute watches."""
    from gpu_checks import launch_case, launch_operation

    def work(emit: Emit) -> None:
        if args.launch_case:
            launch_case(args.launch_case)
        else:
            launch_operation(args.launch_operation)

    _device_job("launch", "launch", work, 0).run(print)


def _chosen(args: argparse.Namespace, out: Path) -> list[Job]:
    """Return the jobs that the options ask for; the machine is described in every call."""
    sections = args.only.split(",") if args.only else None
    if args.only == FAULTS:
        return gpu_faults.jobs()
    found = list(jobs(args.call, out))
    known = {job.section for job in found}
    if sections and (unknown := set(sections) - known):
        raise SystemExit(f"no section {unknown.pop()!r}; choose from {', '.join(sorted(known))}")
    return [
        job
        for job in found
        if job.section in ("machine", "limits")
        or (
            (not sections or job.section in sections)
            and (not args.cases or args.cases.search(job.name))
        )
    ]


def _in_this_process(name: str, out: Path) -> int:
    """Run the job of that name here and return its exit status."""
    for found in (gpu_faults.jobs(), jobs("all", out)):
        for job in found:
            if job.name == name:
                return serve(job, out)
    raise SystemExit(f"no job named {name!r}")


def main() -> int:
    args = _arguments()
    out = args.out.resolve()
    if args.launch_operation or args.launch_case:
        _launch(args)
        return 0
    if args.job:
        return _in_this_process(args.job, out)
    minutes = args.minutes or MINUTES * (len(CALLS) if args.call == "all" else 1)
    deadline = time.monotonic() + 60 * minutes
    chosen = _chosen(args, out)
    if not args.smoke and args.only != FAULTS:
        unpack()
    report = Report(out, args.call)
    done = run(chosen, report, deadline)
    print(f"\nwrote {report.directory / args.call}.json and .md")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
