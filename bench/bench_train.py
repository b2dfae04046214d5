"""A whole training step, forward, backward, clipping and AdamW, against plain PyTorch's.

FLOPs counted: 6 per parameter of a matrix (the head's included, the embeddings' not) and token, and
14 D per (query, visible key) and head of attention. Both sides start from the same weights and see
the same batch; the losses before and after an update must agree.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from harness import Case, Pair, both_sides
from plain_gpt import PlainGPT, decay_groups
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from gptfast import GPT, AdamW, GPTConfig

LR, MAX_NORM = 1e-4, 1.0


def _pair(config: GPTConfig, B: int, T: int) -> Callable[[], Pair]:
    def build() -> Pair:
        torch.manual_seed(0)
        model = GPT(config)
        plain = PlainGPT(config)
        plain.load_state_dict(model.state_dict())
        optimizer = AdamW(decay_groups(model), lr=LR, max_norm=MAX_NORM)
        plain_params = list(plain.parameters())
        plain_optimizer = torch.optim.AdamW(decay_groups(plain), lr=LR, fused=True)
        idx, target = torch.randint(config.vocab_size, (2, B, T))

        def ours() -> Tensor:
            optimizer.zero_grad()
            loss = model(idx, target)
            loss.backward()
            optimizer.step()
            return loss

        def peer() -> Tensor:
            plain_optimizer.zero_grad()
            loss = plain(idx, target)
            loss.backward()
            clip_grad_norm_(plain_params, MAX_NORM)
            plain_optimizer.step()
            return loss

        def check() -> None:
            for _ in range(2):
                torch.testing.assert_close(ours(), peer(), rtol=0, atol=1e-4)

        return Pair(ours, peer, check)

    return build


def _flops(config: GPTConfig, B: int, T: int) -> float:
    C = config.n_embd
    in_matrices = config.n_layer * 12 * C * C + config.vocab_size * C
    return B * T * (6 * in_matrices + 14 * config.n_layer * C * (T + 1) / 2)


def cases(quick: bool) -> Iterator[Case]:
    """GPT-2 124M at two batch shapes, or a model of 4 layers and width 256."""
    config, name = GPTConfig(), "GPT-2 124M"
    if quick:
        config, name = GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256), "4 layers of 256"
    for B, T in [(4, 256)] if quick else [(2, 1024), (4, 256)]:
        yield Case(
            "train",
            f"step {name} fp32",
            f"B={B} T={T}",
            "plain PyTorch",
            _pair(config, B, T),
            flops=_flops(config, B, T),
        )


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_train(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
