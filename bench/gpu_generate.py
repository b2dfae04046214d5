"""What `make gpu` measures of generation: the engine's rows beside gpt-fast's method.

Counted: every matrix once a token, the head's included; keys and values not.
"""

from collections.abc import Callable, Iterator

import torch
from gpu_cases import Built, GpuCase, close, dtype_of
from plain_gpt import PlainGPT
from static_gpt import StaticGPT, generate

from gptfast import GPT, GPTConfig
from gptfast.engine.gpu import GraphRows
from gptfast.engine.gpu_model import GpuModel
from gptfast.options import Options

N_NEW = 128
"""Tokens that are generated."""


def _generate(B: int, dtype: str) -> Callable[[bool], Built]:
    """Greedy tokens by the engine's rows, read by the host one by one, as they are streamed."""

    def build(smoke: bool) -> Built:
        small = GPTConfig(vocab_size=101, block_size=16, n_layer=1, n_head=2, n_embd=32)
        config = small if smoke else GPTConfig()
        n, prompt = (3, 4) if smoke else (N_NEW, 32)
        model, plain = GPT(config).to(dtype_of(smoke)), PlainGPT(config).to(dtype_of(smoke))
        plain.load_state_dict(model.state_dict())
        idx = torch.randint(config.vocab_size, (B, prompt))
        rows = GraphRows(GpuModel(model, dtype, dtype_of(smoke)), B)
        held, texts = [rows.new() for _ in range(B)], idx.tolist()
        like = torch.empty(B, 0)
        sampling = [*Options(temperature=0.0).sampling(like).values()]

        def ours() -> list[list[int]]:
            for row in held:
                rows.truncate(row, 0)
            new, drawn = texts, []
            for i in range(n):
                _, ids = rows.forward(held, new, None, sampling, [prompt + i] * B)
                drawn.append(ids.tolist())
                new = [[i] for i in drawn[-1]]
            return drawn

        peer = StaticGPT(plain, B, dtype == "int8").eval()
        step = peer
        if not smoke:
            step = torch.compile(peer, mode="reduce-overhead", fullgraph=True)

        @torch.no_grad()
        def check() -> None:
            logits = peer.logits(idx, torch.arange(prompt))
            for row in held:
                rows.truncate(row, 0)
            close(rows.forward(held, texts)[0], logits)

        by_compiler = "torch.compile, as gpt-fast"
        return Built({"gptfast": ours, by_compiler: lambda: generate(peer, step, idx, n)}, check)

    return build


def generation_cases() -> Iterator[GpuCase]:
    """One stream in bf16 and int8, and a batch."""
    matrices = 12 * 12 * 768**2 + 50257 * 768
    for rows, dtype, n_bytes in ((1, "bf16", 2), (1, "int8", 1), (8, "bf16", 2)):
        yield GpuCase(
            f"generate {N_NEW} tokens, GPT-2 124M {dtype} B={rows}, wall time",
            _generate(rows, dtype),
            n_bytes=n_bytes * matrices * N_NEW,
            target="1.2x",
            wall=True,
            rounds=10,
            seconds=45,
            smoke=rows == 1,
        )
