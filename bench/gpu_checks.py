"""The checks of bench/gpu.py: parity, determinism and compute-sanitizer, and Nsight Compute."""

import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from gpu_device import DTYPES, SMOKE, on_device, synchronize
from gpu_jobs import Emit, slug
from gpu_operations import operations

TESTS = ("philox", "attention", "cross_entropy", "adamw", "sampling", "sampling_split", "embedding")
TESTS += ("decode_linear", "linear", "mlp", "engine_gpu")
ROOT = Path(__file__).resolve().parent.parent
WORKERS = 14
"""Workers of pytest: most of the time goes into compiling, on the CPU."""
TEST_TIMEOUT_S = 60
REPEATS = 2 if SMOKE else 20
OTHER = "DIFFERENT"

# Operations by what they launch besides our kernels. Under the sanitizer cuBLAS takes minutes.
SANITIZED = ("attention", "attention dropout", "attention decode", "cross_entropy", "embedding")
SANITIZED += ("adamw", "decode_linear", "sample", "sample by slices")
TOOLS = ("memcheck", "racecheck")

# Kernel: the case of gpu_cases.py that launches it.
PROFILED = {
    "attention_fwd_kernel": "attention fwd",
    "attention_bwd_dk_dv_kernel": "attention bwd",
    "sample": "sample B=1 ",
    "linear_cross_entropy_rows_kernel": "linear_cross_entropy fwd+bwd",
    "linear_cross_entropy_dweight_kernel": "linear_cross_entropy fwd+bwd",
}


def _pytest(out: Path) -> list[str]:
    """Return the command that runs the tests of the operations."""
    command = [sys.executable, "-m", "pytest", "-v", "-rf", "--durations=20"]
    command += [f"--junitxml={out / 'parity.xml'}"]
    if find_spec("xdist"):
        command += ["-n", "2" if SMOKE else str(WORKERS)]
    if find_spec("pytest_timeout"):
        command += ["--timeout", str(TEST_TIMEOUT_S)]
    if SMOKE:
        test = out / "jobs" / "test_smoke.py"
        test.write_text("def test_smoke():\n    pass\n")
        return [*command, "-c", os.devnull, f"--rootdir={test.parent}", "-n", "0", str(test)]
    return [*command, "-m", "triton", *(f"tests/test_{name}.py" for name in TESTS)]


def parity(out: Path, seconds: float, emit: Emit) -> None:
    """Run the tests of the operations on the GPU, with bf16, for up to `seconds`.

    Its workers belong to this process's group, which ends with it.
    """
    tests = subprocess.Popen(_pytest(out), cwd=ROOT)
    finished = True
    try:
        tests.wait(seconds)
    except subprocess.TimeoutExpired:
        finished = False
        tests.send_signal(signal.SIGINT)  # pytest then reports what it has
        try:
            tests.wait(15)
        except subprocess.TimeoutExpired:
            tests.kill()
    emit({"finished": finished, "exit_status": tests.poll(), **_counts(out / "parity.xml")})
    assert finished and not tests.returncode, "not all tests passed"


def _counts(path: Path) -> dict[str, object]:
    """Return the counts of a JUnit report, and the names of the tests that failed."""
    if not path.exists():
        return {"summary": "no report: see the log"}
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": failed}


def determinism(emit: Emit) -> None:
    """Check that each operation gives the same bits in REPEATS runs."""
    result = {}
    for name, dtype in list(DTYPES.items())[: 1 if SMOKE else None]:
        with on_device():
            runs = list(operations(dtype, small=SMOKE).items())
        for op, run in runs[: 3 if SMOKE else None]:
            first = run()
            same = all(
                torch.equal(a, b)
                for _ in range(REPEATS - 1)
                for a, b in zip(first, run(), strict=True)
            )
            result[f"{op} {name}"] = f"{'the same' if same else OTHER} bits in {REPEATS} runs"
            emit(result)
    different = [case for case, said in result.items() if said.startswith(OTHER)]
    assert not different, f"other bits in another run: {', '.join(different)}"


def launch_operation(op: str) -> None:
    """Launch an operation on small tensors of odd sizes, for compute-sanitizer to watch."""
    for dtype in list(DTYPES.values())[: 1 if SMOKE else None]:
        with on_device():
            run = operations(dtype, small=True)[op]
        run()
    synchronize()


def launch_case(name: str, small: bool = SMOKE) -> None:
    """Launch our side of a case a few times, for Nsight Compute to watch."""
    from gpu_cases import operation_cases, sampling_cases

    cases = [*operation_cases(), *sampling_cases()]
    case = next(case for case in cases if case.name.startswith(name))
    with on_device():
        ours = case.build(small).sides["gptfast"]
    for _ in range(1 if SMOKE else 4):
        ours()
    synchronize()


def _watch(
    tool: str, options: list[str], launch: list[str], run: Callable[[], None], log: Path, emit: Emit
) -> None:
    """Run `gpu.py <launch>` under a tool and hand out the tool's exit status; all that it says goes
    to a file. Without the tool, only a smoke run launches."""
    path = shutil.which(tool, path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if path is None:
        if SMOKE:
            run()
        emit({"left out": f"{tool} is not installed"})
        return
    # The caching allocator would hide a read past the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [path, *options, sys.executable, str(ROOT / "bench" / "gpu.py"), *launch]
    emit({"log": log.name})
    with log.open("w") as file:
        status = subprocess.run(command, env=environment, stdout=file, stderr=file).returncode
    last = log.read_text().strip().splitlines()[-6:]
    emit({"exit_status": status, "log": log.name, "last lines": last})
    assert not status, f"{tool} ended with exit status {status}"


def sanitize(op: str, tool: str, out: Path, emit: Emit) -> None:
    """Run one of compute-sanitizer's tools over an operation."""
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    log = out / "jobs" / f"{slug(f'{tool} {op}')}.txt"
    launch = ["--launch-operation", op]
    _watch("compute-sanitizer", options, launch, lambda: launch_operation(op), log, emit)


def nsight(kernel: str, out: Path, emit: Emit) -> None:
    """Profile one launch of a kernel with Nsight Compute."""
    options = ["--clock-control", "none", "--set", "detailed", "-k", f"regex:{kernel}"]
    options += ["--launch-skip", "2", "--launch-count", "1"]
    log = out / "jobs" / f"{slug(f'ncu {kernel}')}.txt"
    case = PROFILED[kernel]
    _watch("ncu", options, ["--launch-case", case], lambda: launch_case(case), log, emit)
