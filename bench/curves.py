"""Measure how cost grows with size and what more threads gain: a table, JSON and a picture.

python bench/curves.py [--out DIR]

The table has, for each operation, the slope of log time over log size between the two largest
sizes, beside the expected one: attention is quadratic in T and linear in B * H, the rest is linear.
The speed-up is that of all threads over one, at the largest size.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Run
from picture import draw
from record import RESULTS, folder_name, machine, machine_line, save
from timing import calls_per_sample, seconds_per_call

from gptfast import AdamW, ops

REPEATS = 9


@dataclass(frozen=True)
class Curve:
    """Calls of growing size, and the power of the size with which their cost should grow."""

    name: str
    sizes: tuple[int, ...]
    expected: float
    build: Callable[[int], Run]


def _attention(B: int, H: int, T: int) -> Run:
    qkv = torch.randn(B, T, 3 * H * 64, requires_grad=True)
    dout = torch.randn(B, T, H * 64)
    return lambda: torch.autograd.grad(ops.attention_qkv(qkv, H), qkv, dout)


def _cross_entropy(N: int) -> Run:
    logits, target = torch.randn(N, 50257, requires_grad=True), torch.randint(50257, (N,))
    return lambda: torch.autograd.grad(ops.cross_entropy(logits, target), logits)


def _linear_cross_entropy(N: int) -> Run:
    x, weight = (torch.randn(n, 768, requires_grad=True) for n in (N, 50257))
    target = torch.randint(50257, (N,))
    return lambda: torch.autograd.grad(ops.linear_cross_entropy(x, weight, target), (x, weight))


def _mlp(N: int) -> Run:
    shapes = (N, 768), (3072, 768), (3072,), (768, 3072), (768,)
    x, *layers = leaves = [torch.randn(*shape).mul_(0.02).requires_grad_() for shape in shapes]
    dout = torch.randn(N, 768)
    return lambda: torch.autograd.grad(ops.mlp(x, *layers), leaves, dout)


def _sample(B: int, V: int) -> Run:
    logits = torch.randn(B, V) * 3
    return lambda: ops.sample(logits, top_k=50, top_p=0.9)


def _adamw(n: int) -> Run:
    param = torch.randn(n, requires_grad=True)
    param.grad = torch.randn(n)
    return AdamW([param], max_norm=1.0).step


CURVES = [
    Curve("attention over T", (256, 512, 1024, 2048, 4096), 2.0, lambda T: _attention(1, 4, T)),
    Curve("attention over B * H", (4, 8, 16, 32), 1.0, lambda n: _attention(n // 4, 4, 512)),
    Curve("cross_entropy over N", (64, 128, 256, 512, 1024), 1.0, _cross_entropy),
    Curve("linear_cross_entropy over N", (256, 512, 1024), 1.0, _linear_cross_entropy),
    Curve("mlp over N", (128, 256, 512, 1024), 1.0, _mlp),
    Curve("sampling over V", (2**13, 2**15, 2**17, 2**19), 1.0, lambda V: _sample(1, V)),
    Curve("sampling over B", (8, 32, 128), 1.0, lambda B: _sample(B, 50257)),
    Curve("adamw over parameters", (2**22, 2**24, 2**26), 1.0, _adamw),
]


def seconds(run: Run) -> float:
    """Return the median time per call of REPEATS samples."""
    calls, _ = calls_per_sample(run)
    return statistics.median(seconds_per_call(run, calls) for _ in range(REPEATS))


def measure(curve: Curve) -> dict[str, object]:
    """Return a curve's times, its slope and its speed-up by threads."""
    costs = [seconds(curve.build(size)) for size in curve.sizes]
    (n0, t0), (n1, t1) = (curve.sizes[-2], costs[-2]), (curve.sizes[-1], costs[-1])
    run, threads = curve.build(curve.sizes[-1]), torch.get_num_threads()
    torch.set_num_threads(1)
    alone = seconds(run)
    torch.set_num_threads(threads)
    together = seconds(run)
    return {
        "name": curve.name,
        "sizes": curve.sizes,
        "seconds": costs,
        "slope": math.log(t1 / t0) / math.log(n1 / n0),
        "expected": curve.expected,
        "speed_up": alone / together,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="where results go (default: bench/results)"
    )
    args = parser.parse_args()
    record = {"machine": machine(), "benchmark": "curves", "curves": []}
    print(f"{machine_line(record)}\n")
    print(f"| curve | slope | expected | {torch.get_num_threads()} threads over 1 |")
    print("|---|---|---|---|")
    for curve in CURVES:
        result = measure(curve)
        record["curves"].append(result)
        print(
            f"| {result['name']} | {result['slope']:.2f} | {result['expected']:g} | "
            f"{result['speed_up']:.2f}x |",
            flush=True,
        )
    path = args.out / folder_name(str(record["machine"]["cpu"])) / "curves.json"
    save(path, record)
    draw(path.with_suffix(".png"), record)


if __name__ == "__main__":
    main()
