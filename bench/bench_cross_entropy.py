"""Measure cross_entropy and linear_cross_entropy against PyTorch's.

Bytes counted for cross_entropy: the logits are read in the forward and in the backward, and the
gradient is written (3 N V). FLOPs counted for linear_cross_entropy: three products, 6 N C V.
PyTorch allocates the gradient anew in each call; gptfast takes it from memory that it keeps. The
"warm memory" case gives both sides such memory.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from harness import (
    Case,
    Pair,
    both_sides,
    child_bytes,
    dtype_name,
    level,
    pair_of,
    tolerance_of,
)
from torch import Tensor

from gptfast import ops

V, C = 50257, 768

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _linear_then_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def _logits_pair(N: int, dtype: torch.dtype) -> Callable[[], Pair]:
    def build() -> Pair:
        torch.manual_seed(0)
        logits = torch.randn(N, V).to(dtype).requires_grad_()
        target = torch.randint(V, (N,))

        def side(loss_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
            loss = loss_of(logits, target)
            return loss, *torch.autograd.grad(loss, logits)

        return pair_of(
            lambda: side(ops.cross_entropy), lambda: side(F.cross_entropy), tolerance_of(dtype)
        )

    return build


def _warm_pair(N: int, dtype: torch.dtype) -> Callable[[], Pair]:
    """Return a pair of the operators alone; both sides keep the gradient's memory between calls."""

    def build() -> Pair:
        torch.manual_seed(0)
        logits, target = torch.randn(N, V).to(dtype), torch.randint(V, (N,))
        log_p, dlog_p, dlogits = (torch.empty_like(logits) for _ in range(3))
        per_row = torch.full((N,), 1 / N)
        one, weight = torch.ones((), dtype=dtype), torch.tensor(float(N), dtype=dtype)
        options = (-100, 0.0, 0.0)
        fwd, bwd = torch.ops.gptfast.cross_entropy_fwd, torch.ops.gptfast.cross_entropy_bwd

        def ours() -> tuple[Tensor, ...]:
            loss, stats = fwd(logits, target, *options)
            return loss.mean(), bwd(per_row, logits, target, stats, *options)

        def peer() -> tuple[Tensor, ...]:
            torch.ops.aten._log_softmax.out(logits, 1, False, out=log_p)
            loss, _ = torch.ops.aten.nll_loss_forward(log_p, target, None, 1, -100)
            torch.ops.aten.nll_loss_backward.grad_input(
                one, log_p, target, None, 1, -100, weight, grad_input=dlog_p
            )
            torch.ops.aten._log_softmax_backward_data.out(dlog_p, log_p, 1, dtype, out=dlogits)
            return loss, dlogits

        return pair_of(ours, peer, tolerance_of(dtype))

    return build


def _bare_products(N: int) -> Callable[[], Pair]:
    """Return a pair against the head's three products alone, written into existing memory."""

    def build() -> Pair:
        torch.manual_seed(0)
        x, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C) * 0.02
        weight.requires_grad_()
        target = torch.randint(V, (N,))
        logits, dx, dweight = torch.empty(N, V), torch.empty(N, C), torch.empty(V, C)

        def ours() -> None:
            torch.autograd.grad(ops.linear_cross_entropy(x, weight, target), (x, weight))

        @torch.no_grad()
        def peer() -> None:
            torch.mm(x, weight.T, out=logits)
            torch.mm(logits, weight, out=dx)
            torch.mm(logits.T, x, out=dweight)

        return Pair(ours, peer, lambda: None)

    return build


_CHILD = """
import sys, torch, torch.nn.functional as F
from gptfast import empty_cache, ops
from gptfast.device import peak_memory
N, V, C, side = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
x, w = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
target = torch.randint(V, (N,))
def loss(x, w, target):
    if side == "ours":
        return ops.linear_cross_entropy(x, w, target)
    return F.cross_entropy(F.linear(x, w), target)
loss(x[:64], w, target[:64]).backward()  # libraries set themselves up in their first call
x.grad = w.grad = None
empty_cache()
open("/proc/self/clear_refs", "w").write("5")
before = peak_memory('cpu')
loss(x, w, target).backward()
print(peak_memory('cpu') - before - 4 * (N * C + V * C))
"""


def _memory_pair(N: int) -> Callable[[], Pair]:
    """Return a pair of peak bytes beyond inputs and gradients, each side in its own process."""

    def side(name: str) -> Callable[[], float]:
        return lambda: child_bytes(_CHILD, N, V, C, name)

    return lambda: Pair(side("ours"), side("plain"), lambda: None)


def _linear_pair(N: int, dtype: torch.dtype, peer: Loss) -> Callable[[], Pair]:
    def build() -> Pair:
        torch.manual_seed(0)
        x = torch.randn(N, C).to(dtype).requires_grad_()
        weight = (torch.randn(V, C) * 0.02).to(dtype).requires_grad_()
        target = torch.randint(V, (N,))

        def side(loss_of: Loss) -> tuple[Tensor, ...]:
            loss = loss_of(x, weight, target)
            return loss, *torch.autograd.grad(loss, (x, weight))

        return pair_of(
            lambda: side(ops.linear_cross_entropy), lambda: side(peer), tolerance_of(dtype)
        )

    return build


def _logits_cases(quick: bool) -> Iterator[Case]:
    N = 512 if quick else 4096
    fp32, bf16 = torch.float32, torch.bfloat16
    for name, peer_name, build, dtype, target in (
        ("fwd+bwd fp32", "F.cross_entropy", _logits_pair(N, fp32), fp32, 2.7),
        ("fwd+bwd bf16", "F.cross_entropy", _logits_pair(N, bf16), bf16, 2.0),
        ("fwd+bwd fp32, warm memory", "log_softmax + nll_loss", _warm_pair(N, fp32), fp32, 2.7),
    ):
        n_bytes, shape = 3 * N * V * dtype.itemsize, f"({N}, {V})"
        yield Case("cross_entropy", name, shape, peer_name, build, n_bytes=n_bytes, target=target)


def _linear_case(N: int, dtype: torch.dtype, peer_name: str, peer: Loss) -> Case:
    return Case(
        "linear_cross_entropy",
        f"fwd+bwd {dtype_name(dtype)}",
        f"({N}, {C})x({V}, {C})",
        peer_name,
        _linear_pair(N, dtype, peer),
        flops=6 * N * C * V,
        target=1.28 if dtype == torch.float32 else 0.0,
        products=dtype_name(dtype),
    )


def _linear_cases(quick: bool) -> Iterator[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    N = 512 if quick else 2048
    two_steps = ("linear + cross_entropy", _linear_then_cross_entropy)
    fused = ("F.linear_cross_entropy", F.linear_cross_entropy)
    yield _linear_case(N, fp32, *two_steps)
    if not quick:
        yield _linear_case(N, fp32, *fused)
        yield _linear_case(4096, fp32, *two_steps)
    yield _linear_case(N, bf16, *two_steps)
    if not quick:
        yield _linear_case(N, bf16, *fused)
        if level() in ("avx512_bf16", "amx"):
            yield _linear_case(4096, bf16, *two_steps)
            yield _linear_case(4096, bf16, *fused)


def _lower_bound_cases(quick: bool) -> Iterator[Case]:
    """Yield time against the bare products, and memory against the size of the logits."""
    op = "linear_cross_entropy"
    for N in [512] if quick else [2048, 4096]:
        shape = f"({N}, {C})x({V}, {C})"
        name, peer_name = "fwd+bwd fp32", "three bare torch.mm"
        build, flops, target = _bare_products(N), 6 * N * C * V, 1 / 1.08
        yield Case(op, name, shape, peer_name, build, flops=flops, target=target)
        # The plain way holds the logits and their gradient at once; 128 MB is what ours may take.
        target = 0.0 if quick else 2 * 4 * N * V / 2**20 / 128
        name, peer_name = "memory beyond inputs and gradients", "linear + cross_entropy"
        yield Case(
            op,
            name,
            shape,
            peer_name,
            _memory_pair(N),
            target=target,
            unit="bytes",
            returns_cost=True,
        )


def cases(quick: bool) -> Iterator[Case]:
    """Yield forward and backward from the logits and from the hidden state, fp32 and bf16."""
    yield from _logits_cases(quick)
    yield from _linear_cases(quick)
    yield from _lower_bound_cases(quick)


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_cross_entropy(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
