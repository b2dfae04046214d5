"""Drawing one token per row against what PyTorch code does for it.

Bytes counted: the logits, once. The logits are normal with deviation 3 (top_p=0.9 keeps some
hundreds to thousands of tokens). Peers: the masks keep the vocabulary's width and `multinomial`
draws from it, as nanoGPT and transformers do; "topk of k" softmaxes and draws among the k only, the
shortest plain PyTorch there is for top-k. The draws differ by design: ours must equal the
reference's and be a token the peer could have drawn.
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


def _among_top_k(logits: Tensor) -> Tensor:
    values, ids = logits.topk(K)  # (B, K)
    return ids.gather(1, torch.multinomial(values.softmax(-1), 1))[:, 0]


def _all(logits: Tensor) -> Tensor:
    return logits


def _both(logits: Tensor) -> Tensor:
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
    """Plain, top-k, top-p and both with temperature; one row and a batch of rows."""
    top_k, top_p = {"top_k": K}, {"top_p": P}
    both = {"temperature": TEMPERATURE, **top_k, **top_p}
    kinds = [
        ("plain", {}, _all, "softmax+multinomial", _draw),
        ("top_k=50", top_k, _mask_top_k, "topk+softmax+multinomial", None),
        ("top_k=50", top_k, _mask_top_k, "topk of k", _among_top_k),
        ("top_p=0.9", top_p, _mask_top_p, "sort+softmax+multinomial", None),
        ("both, temperature", both, _both, "topk+sort+softmax+multinomial", None),
    ]
    for B in (1, 8 if quick else 64):
        for name, options, mask, peer_name, draw in kinds:
            peer_draw = draw or (lambda logits, mask=mask: _draw(mask(logits)))
            build = _pair(B, options, mask, peer_draw)
            # The leanest pipeline has no target; the usual ones do.
            target = 0.0 if draw is _among_top_k else TARGETS[name]
            shape = f"({B}, {V})"
            yield Case("sampling", name, shape, peer_name, build, n_bytes=4 * B * V, target=target)


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_sampling(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
