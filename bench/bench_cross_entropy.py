"""cross_entropy against `F.cross_entropy`, linear_cross_entropy against linear + cross entropy.

Bytes counted for cross_entropy: the logits read forward, read backward and the gradient written
(3 N V). FLOPs counted for linear_cross_entropy: its three products, 6 N C V.
The gradient is new memory on each call, as in a training step.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from harness import Case, Pair, both_sides, dtype_name, pair_of, tolerance_of
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


def cases(quick: bool) -> Iterator[Case]:
    """Forward and backward, on logits and from the hidden state, fp32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        N = 512 if quick else 4096
        yield Case(
            "cross_entropy",
            f"fwd+bwd {dtype_name(dtype)}",
            f"({N}, {V})",
            "F.cross_entropy",
            _logits_pair(N, dtype),
            n_bytes=3 * N * V * dtype.itemsize,
        )
    peers: dict[str, Loss] = {"linear + cross_entropy": _linear_then_cross_entropy}
    if not quick:
        peers["F.linear_cross_entropy"] = F.linear_cross_entropy
    for N, dtype in [
        (512 if quick else 2048, torch.float32),
        *([] if quick else [(4096, torch.float32)]),
        (512 if quick else 2048, torch.bfloat16),
    ]:
        for peer_name, peer in peers.items():
            yield Case(
                "linear_cross_entropy",
                f"fwd+bwd {dtype_name(dtype)}",
                f"({N}, {C})x({V}, {C})",
                peer_name,
                _linear_pair(N, dtype, peer),
                flops=6 * N * C * V,
            )


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_cross_entropy(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
