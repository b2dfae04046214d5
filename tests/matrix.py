"""Run the tests under the settings in which machines differ: `make matrix`.

The settings are the instruction-set levels of the C++ kernels, of ATen and of oneDNN, the number
of threads, who multiplies fp32 matrices, and the seed of everything drawn at random. Their product
has hundreds of runs, so the runs are chosen pairwise: each value meets each value of every other
setting at least once. `--part` makes one of the runs only, on fewer tests.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gptfast.ops.backend import EXTENSION

Run = dict[str, str]

# The modules of every run: they compute with the settings. Those in no list here handle files,
# text and options.
COMPUTING = (
    "arena beam book checkpoint cli_engine derivatives drop_in dtypes engine engine_files "
    "engine_gpu engine_levels evaluate examples generate guard hellaswag lm_eval model modules "
    "settings stop stream torch_tools train_step trainer weights"
)
# The operations' tests try each level by themselves, so they run only where another setting is new.
OPERATIONS = (
    "adamw adamw_masters attention cross_entropy decode_linear embedding library linear mlp philox "
    "sampling threads"
)
LEVELS = ("GPTFAST_ISA", "GPTFAST_TEST_PRODUCTS")
# These start many processes, so they run once per level.
PROCESSES = "chat commands finetuning recovery"
# The modules of a part of the matrix.
QUICK = "engine evaluate examples generate model stream threads train_step trainer"
# Every run leaves out the backends without levels and threads (by the marks of conftest.py) and the
# tests of files and signals that start dozens of processes (by name).
MARKS = "not triton and not reference"
NAMES = (
    "not test_killed and not test_a_second_interrupt and not test_peak_memory "
    "and not interrupted_and_goes_on"
)
# The run of a part, by its place from 1 on: it has no value of the first run but the level, so none
# of those with which `make test` runs, at the best level.
PART = 2
MAX_MINUTES = 30  # for one run: xdist waits forever for a worker that died at the wrong moment


def settings() -> dict[str, list[str]]:
    """Return each setting's values on this machine, after the levels those of `make test` first.

    "" leaves the choice to the library.
    """
    info = EXTENSION.build_info() if EXTENSION is not None else {}
    supported = info.get("isa_supported", [])
    products = ["gptfast", "library"] if info.get("matmul") == "gptfast" else ["library", "gptfast"]
    return {
        "GPTFAST_ISA": supported or [""],
        "ATEN_CPU_CAPABILITY": ["", "default", "avx2"],
        "ONEDNN_MAX_CPU_ISA": ["", "AVX2"],
        "OMP_NUM_THREADS": ["1", "2", "3"],
        "GPTFAST_TEST_PRODUCTS": products if supported else [""],
        "GPTFAST_TEST_SEED": ["0", "1", "2"],
    }


def pairs_of(run: Run) -> set[tuple[tuple[str, str], ...]]:
    return set(itertools.combinations(sorted(run.items()), 2))


def pairwise(values: dict[str, list[str]]) -> Iterator[Run]:
    """Yield runs until each value has met each value of every other setting, greedily."""
    runs = [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]
    missing = set().union(*map(pairs_of, runs))
    while missing:
        best = max(runs, key=lambda run: len(pairs_of(run) & missing))
        missing -= pairs_of(best)
        yield best


def modules(runs: list[Run], index: int, part: bool) -> list[str]:
    """Return the names of the modules that run `index` tests, given the runs before it."""
    if part:
        return QUICK.split()
    run, before = runs[index], runs[:index]
    names = COMPUTING.split()
    bare, *others = (
        {name: value for name, value in one.items() if name not in LEVELS} for one in (run, *before)
    )
    if pairs_of(bare) - set().union(*map(pairs_of, others)):
        names += OPERATIONS.split()
    if all(run["GPTFAST_ISA"] != other["GPTFAST_ISA"] for other in before):
        names += PROCESSES.split()
    return names


def environment(run: Run, scratch: str) -> dict[str, str]:
    # Passive: with more threads than cores, waiting threads must not keep others from computing.
    variables = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    # One cache per vector width: torch.compile's ignores the width (seen with torch 2.13), and
    # code made for 8 floats that is compiled for 16 writes past its tensors.
    compiled = f"compiled-{run['ATEN_CPU_CAPABILITY'] or 'best'}"
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch) / compiled)
    return variables | {name: value for name, value in run.items() if value}


def outcome(
    run: Run, files: list[str], extra: list[str], scratch: str
) -> tuple[int, str, list[str]]:
    """Run pytest once; return its exit code, its closing line and the tests that failed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-n", "logical", "--maxprocesses", "8", "-m", MARKS, "-k", NAMES]
    command += [f"--hypothesis-seed={run['GPTFAST_TEST_SEED']}", *extra, *files]
    try:
        done = subprocess.run(
            command,
            env=environment(run, scratch),
            capture_output=True,
            encoding="utf-8",
            timeout=60 * MAX_MINUTES,
        )
    except subprocess.TimeoutExpired as late:
        print((late.stdout or b"").decode(errors="replace"))
        return 1, f"not done in {MAX_MINUTES} minutes", []
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
    lines = done.stdout.strip().splitlines() or [f"no output, exit code {done.returncode}"]
    return done.returncode, lines[-1], failed


def show(run: Run, text: str) -> None:
    print(
        "  ".join((value or "-").ljust(len(name)) for name, value in run.items()), text, flush=True
    )


def make_runs(runs: list[Run], chosen: list[int], part: bool, extra: list[str]) -> int:
    """Make the chosen runs of all; return how many of them are green."""
    failures: list[tuple[Run, list[str]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for index in chosen:
            start, run = time.monotonic(), runs[index]
            names = modules(runs, index, part)
            files = [str(Path(__file__).parent / f"test_{name}.py") for name in names]
            code, last, failed = outcome(run, files, extra, scratch)
            show(run, f"{time.monotonic() - start:4.0f} s  {last}")
            if code:
                failures.append((run, failed))
    for run, failed in failures:
        print("failed with", *(f"{name}={value}" for name, value in run.items() if value))
        print(*(f"  {name}" for name in failed), sep="\n")
    return len(chosen) - len(failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="store_true", help="one run of a minute or two")
    parser.add_argument("--list", action="store_true", help="name the runs and run nothing")
    parser.add_argument("--runs", type=int, nargs="+", help="only these, by their place from 1 on")
    args, extra = parser.parse_known_args()
    values = settings()
    runs = list(pairwise(values))
    places = [PART] if args.part else range(1, len(runs) + 1)
    print("  ".join(values), flush=True)
    if args.list:
        for n in places:
            show(runs[n - 1], f"{len(modules(runs, n - 1, args.part))} modules")
        return 0
    for n in args.runs or ():
        if not 1 <= n <= len(runs):
            parser.error(f"--runs takes places from 1 to {len(runs)}, got {n}")
    chosen = [n - 1 for n in args.runs or places]
    green = make_runs(runs, chosen, args.part, extra)
    print(f"{green} of {len(chosen)} runs are green")
    return 0 if green == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
