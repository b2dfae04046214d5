"""Measure greedy generation with a KV cache against plain PyTorch's.

Bytes counted per token: every matrix once, with the tied head, without keys and values. FLOPs
counted per token and row: 2 for each parameter of a matrix. Both sides must write the same tokens.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from harness import Case, Pair, both_sides
from plain_gpt import PlainGPT

from gptfast import GPT, GPTConfig, generate

PROMPT = 32


def _pair(config: GPTConfig, B: int, n_new: int) -> Callable[[], Pair]:
    def build() -> Pair:
        torch.manual_seed(0)
        model = GPT(config).eval()
        plain = PlainGPT(config).eval()
        plain.load_state_dict(model.state_dict())
        idx = torch.randint(config.vocab_size, (B, PROMPT))

        def ours() -> list[list[int]]:
            return generate(model, idx, n_new, temperature=0.0)

        def peer() -> list[list[int]]:
            return plain.generate(idx, n_new)

        def check() -> None:
            assert ours() == peer(), "the two sides write different tokens"

        return Pair(ours, peer, check)

    return build


def cases(quick: bool) -> Iterator[Case]:
    """One stream and a batch, GPT-2 124M or a model of 4 layers and width 256."""
    config, name, n_new = GPTConfig(), "GPT-2 124M", 128
    if quick:
        config, name, n_new = GPTConfig(n_layer=4, n_head=4, n_embd=256), "4 layers of 256", 64
    in_matrices = config.n_layer * 12 * config.n_embd**2 + config.vocab_size * config.n_embd
    for B in (1, 8):
        yield Case(
            "generate",
            f"{n_new} tokens {name} fp32",
            f"B={B} prompt={PROMPT}",
            "plain PyTorch",
            _pair(config, B, n_new),
            n_bytes=4 * in_matrices * n_new,
            flops=2 * B * in_matrices * n_new,
            reads_only=True,
            working_set=4 * in_matrices,
        )


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_generate(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
