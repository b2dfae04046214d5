"""The checks of bench/gpu.py: parity, determinism, CUDA graphs and compute-sanitizer."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from gpu_device import DTYPES, SMOKE, synchronize
from gpu_operations import operations
from gpu_report import Report
from torch import Tensor

from gptfast import GPT, AdamW, GPTConfig, ops

TESTS = ("philox", "attention", "cross_entropy", "adamw", "sampling", "sampling_split", "embedding")
TESTS += ("decode_linear", "engine_gpu")
ROOT = Path(__file__).resolve().parent.parent
PARITY_TIMEOUT_S = 200
REPEATS = 2 if SMOKE else 20


def parity(report: Report) -> None:
    """Run the tests of the operations on the GPU, with bf16."""
    files = [f"tests/test_{name}.py" for name in TESTS if not SMOKE or name == "philox"]
    command = [sys.executable, "-m", "pytest", "-rf", "-m", "triton", *files]
    if find_spec("xdist"):
        command += ["-n", "8"]  # most of the time goes into compiling, on the CPU
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PARITY_TIMEOUT_S
        )
        passed, output = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode()
        passed, output = None, f"{output}\nnot finished after {PARITY_TIMEOUT_S} s"
    last = output.strip().splitlines()[-40:]
    print("\n".join(last))
    seconds = round(time.monotonic() - start, 1)
    report.add("parity", {"passed": passed, "summary": last, "seconds": seconds})


def determinism(report: Report) -> None:
    """Check that each operation gives the same bits in REPEATS runs."""
    result = {}
    for name, dtype in DTYPES.items():
        for op, run in operations(dtype, small=SMOKE).items():
            first = run()
            same = all(
                torch.equal(a, b)
                for _ in range(REPEATS - 1)
                for a, b in zip(first, run(), strict=True)
            )
            result[f"{op} {name}"] = same
            print(f"{op} {name}: {'the same bits' if same else 'DIFFERENT BITS'} in {REPEATS} runs")
    report.add("determinism", result)


def _training_step(compiled: bool) -> Callable[[], Tensor]:
    """Return a training step of a small GPT that returns its loss."""
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

    return step


def graph(report: Report) -> None:
    """Compare five steps in bf16 with fp32 masters: eager, compiled, captured in a CUDA graph."""
    losses = {}
    step = _training_step(compiled=False)
    losses["eager"] = [step().item() for _ in range(5)]
    if SMOKE:
        print(losses)
        return
    step = _training_step(compiled=True)
    losses["compiled"] = [step().item() for _ in range(5)]
    step = _training_step(compiled=False)
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


def small_launches() -> None:
    """Launch every kernel on small tensors of odd sizes, for compute-sanitizer to watch."""
    for dtype in DTYPES.values():
        for run in operations(dtype, small=True).values():
            run()
    q, k = torch.randn(2, 2, 1, 64), torch.randn(2, 2, 333, 64)
    ops.attention(q, k, k, kv_len=torch.tensor([7, 333]))
    synchronize()


def sanitize(report: Report) -> None:
    """Run compute-sanitizer's memcheck over `small_launches`."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        report.add("sanitize", "compute-sanitizer is not installed")
        print("compute-sanitizer is not installed")
        return
    # The caching allocator would hide a read past the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    command += [sys.executable, str(ROOT / "bench" / "gpu.py"), "--only", "small_launches"]
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
        result = {"clean": None, "summary": ["not finished within its time"]}
    print("\n".join(result["summary"]))
    report.add("sanitize", result)
