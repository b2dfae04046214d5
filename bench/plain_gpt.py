"""GPT-2 in plain PyTorch, as one would write it: the peer of training and generation benchmarks.

It uses SDPA, `F.cross_entropy` and, for generation, a preallocated KV cache. The parameters have
`gptfast.GPT`'s names, so that its state_dict loads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast import GPTConfig


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in (q, k, v))  # (B, H, T, D)
        if cache is not None:  # (2, B, H, block_size, D)
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            k, v = cache[:, :, :, : start + T]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # (B, H, T, D)
        return self.c_proj(out.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """GPT-2 with a tied head and no dropout."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def hidden(self, idx: Tensor, caches: Tensor | None = None, start: int = 0) -> Tensor:
        """Return (B, T, C) for idx (B, T); the caches (n_layer, 2, B, H, block_size, D) hold the
        `start` tokens before it."""
        x = self.wte(idx) + self.wpe(torch.arange(start, start + idx.shape[1]))
        for i, block in enumerate(self.h):
            x = block(x, None if caches is None else caches[i], start)
        return self.ln_f(x)

    def forward(self, idx: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(self.hidden(idx), self.wte.weight)  # (B, T, V)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.view(-1))

    @torch.inference_mode()
    def generate(self, idx: Tensor, max_new_tokens: int) -> list[list[int]]:
        """Return idx (B, T) with max_new_tokens greedy tokens after each row."""
        config, (B, start) = self.config, (idx.shape[0], 0)
        head_dim = config.n_embd // config.n_head
        caches = torch.empty(config.n_layer, 2, B, config.n_head, config.block_size, head_dim)
        new = idx
        for _ in range(max_new_tokens):
            x = self.hidden(new, caches, start)[:, -1]  # (B, C)
            start += new.shape[1]
            new = F.linear(x, self.wte.weight).argmax(-1, keepdim=True)  # (B, 1)
            idx = torch.cat((idx, new), dim=1)
        return idx.tolist()


def decay_groups(model: nn.Module) -> list[dict]:
    """Return AdamW's two groups: matrices and embeddings decay, biases and norms do not."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
