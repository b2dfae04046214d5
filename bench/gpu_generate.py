"""The generation cases of `make gpu`: the engine's rows beside gpt-fast's method.

Bytes counted per token: every matrix once, with the head, without keys and values.
"""

from collections.abc import Callable, Iterator

import torch
from gpu_cases import Built, GpuCase, close, dtype_of
from plain_gpt import PlainGPT
from static_gpt import StaticGPT, compiled_step, generate
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptfast import GPT, GPTConfig
from gptfast.engine.gpu_model import GpuModel
from gptfast.engine.gpu_rows import GraphRows
from gptfast.generation.options import Options

NEW_TOKENS = 128


def _generate(B: int, dtype: str) -> Callable[[bool], Built]:
    """Return greedy generation by the engine's rows; the host reads each token at once."""

    def build(smoke: bool) -> Built:
        small = GPTConfig(vocab_size=101, block_size=8, n_layer=1, n_head=2, n_embd=32)
        config = small if smoke else GPTConfig()
        n, prompt = (3, 4) if smoke else (NEW_TOKENS, 32)
        model, plain = GPT(config).to(dtype_of(smoke)), PlainGPT(config).to(dtype_of(smoke))
        plain.load_state_dict(model.state_dict())
        idx = torch.randint(config.vocab_size, (B, prompt))
        rows = GraphRows(GpuModel(model, dtype, dtype_of(smoke)), B)
        held, texts = [rows.new() for _ in range(B)], idx.tolist()
        sampling = [*Options(temperature=0.0).sampling(B, rows.device).values()]

        def ours() -> list[list[int]]:
            for row in held:
                rows.truncate(row, 0)
            new, drawn = texts, []
            for i in range(n):
                _, ids = rows.forward(held, new, None, sampling, [prompt + i] * B)
                drawn.append(ids.tolist())
                new = [[i] for i in drawn[-1]]
            return drawn

        peer = StaticGPT(plain, B, prompt + n, dtype == "int8").eval()
        step = peer if smoke else compiled_step(peer)

        @torch.no_grad()
        def check() -> None:
            """Compare logits and chosen ids after a prompt and after steps of given tokens."""
            logits = peer.logits(idx, torch.arange(prompt))
            for row in held:
                rows.truncate(row, 0)
            close(rows.forward(held, texts)[0], logits)
            for at in range(prompt, prompt + min(n, 8)):
                new, time = torch.randint(config.vocab_size, (B, 1)), torch.tensor([at])
                logits = peer.logits(new, time)
                mine, drawn = rows.forward(held, new.tolist(), None, sampling, [at + 1] * B)
                close(mine, logits)
                with sdpa_kernel(SDPBackend.MATH):
                    chosen = step(new, time)
                for ids in (chosen, drawn[:, None].to(chosen.device)):
                    close(logits.gather(1, ids), logits.amax(1, keepdim=True))

        by_compiler = "torch.compile, as gpt-fast"
        return Built({"gptfast": ours, by_compiler: lambda: generate(peer, step, idx, n)}, check)

    return build


def generation_cases() -> Iterator[GpuCase]:
    """Yield one row in bf16 and in int8, and a batch."""
    matrices = 12 * 12 * 768**2 + 50257 * 768
    for rows, dtype, n_bytes in ((1, "bf16", 2), (1, "int8", 1), (8, "bf16", 2)):
        yield GpuCase(
            f"generate {NEW_TOKENS} tokens, GPT-2 124M {dtype} B={rows}, wall time",
            _generate(rows, dtype),
            n_bytes=n_bytes * matrices * NEW_TOKENS,
            target="1.3x",
            wall=True,
            device=False,
            rounds=10,
            seconds=110,
            smoke=rows == 1,
        )
