"""Measure sampling one token per row against the same in plain PyTorch.

Bytes counted: the logits, read once. The logits are normal with deviation 3 (top_p=0.9 then keeps
hundreds to thousands of tokens). The peers mask logits of the vocabulary's width and draw with
`multinomial`, as nanoGPT and transformers do; "topk of k" computes the softmax of the k tokens only
and draws among them, which is the shortest top-k in plain PyTorch. The two sides draw different
tokens by design: ours must equal the reference's and be a token that the peer could have drawn.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from harness import Case, Pair, both_sides
from torch import Tensor

from gptfast import ops, use_backend

V, K, P, TEMPERATURE = 50257, 50, 0.9, 0.8


def _mask_top_k(logits: Tensor) -> Tensor:
    kth = logits.topk(K).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def _mask_top_p(logits: Tensor) -> Tensor:
    ordered, order = logits.sort(descending=True)  # (B, V)
    probs = ordered.softmax(-1)
    beyond = probs.cumsum(-1) - probs >= P
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)


def _draw(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def _draw_among_top_k(logits: Tensor) -> Tensor:
    values, ids = logits.topk(K)  # (B, K)
    return ids.gather(1, torch.multinomial(values.softmax(-1), 1))[:, 0]


def _unmasked(logits: Tensor) -> Tensor:
    return logits


def _mask_both(logits: Tensor) -> Tensor:
    return _mask_top_p(_mask_top_k(logits / TEMPERATURE))


def _pair(
    B: int, options: dict, mask: Callable[[Tensor], Tensor], peer_draw: Callable[[Tensor], Tensor]
) -> Callable[[], Pair]:
    def build() -> Pair:
        torch.manual_seed(0)
        logits = torch.randn(B, V) * 3

        @torch.inference_mode()
        def ours() -> Tensor:
            return ops.sample(logits, seed=0, **options)

        @torch.inference_mode()
        def peer() -> Tensor:
            return peer_draw(logits)

        def check() -> None:
            with use_backend("reference"):
                expected = ours()
            ids = ours()
            assert torch.equal(ids, expected), "ours and the reference draw different tokens"
            assert mask(logits).gather(1, ids[:, None]).isfinite().all(), "a token beyond the mask"

        return Pair(ours, peer, check)

    return build


TARGETS = {"plain": 25.0, "top_k=50": 28.0, "top_p=0.9": 50.0, "both, temperature": 50.0}


def cases(quick: bool) -> Iterator[Case]:
    """Yield plain, top-k and top-p sampling, and both with a temperature; one row and several."""
    top_k, top_p = {"top_k": K}, {"top_p": P}
    both = {"temperature": TEMPERATURE, **top_k, **top_p}
    kinds = [
        ("plain", {}, _unmasked, "softmax+multinomial", _draw),
        ("top_k=50", top_k, _mask_top_k, "topk+softmax+multinomial", None),
        ("top_k=50", top_k, _mask_top_k, "topk of k", _draw_among_top_k),
        ("top_p=0.9", top_p, _mask_top_p, "sort+softmax+multinomial", None),
        ("both, temperature", both, _mask_both, "topk+sort+softmax+multinomial", None),
    ]
    for B in (1, 8 if quick else 64):
        for name, options, mask, peer_name, draw in kinds:
            peer_draw = draw or (lambda logits, mask=mask: _draw(mask(logits)))
            build = _pair(B, options, mask, peer_draw)
            # The shortest pipeline has no target; the usual ones do.
            yield Case(
                "sampling",
                name,
                f"({B}, {V})",
                peer_name,
                build,
                n_bytes=4 * B * V,
                target=0.0 if draw is _draw_among_top_k else TARGETS[name],
                reads_only=True,
            )


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_sampling(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
