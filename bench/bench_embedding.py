"""Measure the token embedding of a tied head against F.embedding and its autograd.

The backward starts from the head's gradient (V, C), which exists on both sides. Ours adds the rows
of the tokens to it. Autograd fills a second (V, C) gradient with zeros, adds the rows to that one
and then adds the two gradients.

Bytes counted: the ids; in the forward each distinct row once and x; in the backward dx once, and
each distinct row of the gradient read and written. The ids follow Zipf's law, as words do.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from harness import Case, Pair, both_sides, dtype_name, pair_of, tolerance_of
from torch import Tensor

from gptfast import ops

V = 50257


def _ids(N: int) -> Tensor:
    torch.manual_seed(0)
    return torch.multinomial(1 / torch.arange(1.0, V + 1), N, replacement=True)


def _forward(N: int, C: int, dtype: torch.dtype) -> Callable[[], Pair]:
    def build() -> Pair:
        idx, weight = _ids(N), torch.randn(V, C, dtype=dtype)
        return pair_of(
            lambda: [ops.embedding(idx, weight)[0]], lambda: [F.embedding(idx, weight)], 0.0
        )

    return build


def _backward(N: int, C: int, dtype: torch.dtype) -> Callable[[], Pair]:
    def build() -> Pair:
        idx, dx = _ids(N), torch.randn(N, C, dtype=dtype)
        dhead = torch.randn(V, C, dtype=dtype)
        ours, peer = dhead.clone(), dhead.clone()

        def add_rows() -> list[Tensor]:
            torch.ops.gptfast.embedding_bwd(ours, dx, idx)
            return [ours]

        def add_gradients() -> list[Tensor]:
            peer.add_(torch.ops.aten.embedding_dense_backward(dx, idx, V, -1, False))
            return [peer]

        return pair_of(add_rows, add_gradients, tolerance_of(dtype))

    return build


def cases(quick: bool) -> Iterator[Case]:
    """Yield steps of 1024 and of 16384 tokens with GPT-2's vocabulary and width."""
    C = 128 if quick else 768
    for N, dtype in ((1024, torch.float32), (16384, torch.float32), (1024, torch.bfloat16)):
        distinct, size = _ids(N).unique().numel(), dtype.itemsize
        shape = f"N={N} V={V} C={C}"
        yield Case(
            "embedding",
            f"fwd {dtype_name(dtype)}",
            shape,
            "F.embedding",
            _forward(N, C, dtype),
            n_bytes=8 * N + (N + distinct) * C * size,
        )
        yield Case(
            "embedding",
            f"bwd into dhead {dtype_name(dtype)}",
            shape,
            "zero-fill + rows + add",
            _backward(N, C, dtype),
            n_bytes=8 * N + (N + 2 * distinct) * C * size,
        )


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_embedding(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
