"""A GPT trained as nanoGPT does it, in plain PyTorch: the script that docs/drop_in.md starts from.

python examples/plain.py
"""

from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        gelu = nn.GELU(approximate="tanh")
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), gelu, nn.Linear(4 * n_embd, n_embd))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(
        self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(Block(n_embd, n_head) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, idx: Tensor, target: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        x = self.ln_f(self.blocks(x))
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), target.flatten())


def train(
    steps: int = 200,
    *,
    batch_size: int = 8,
    block_size: int = 128,
    n_layer: int = 4,
    n_head: int = 4,
    n_embd: int = 128,
    vocab_size: int = 256,
) -> Iterator[float]:
    """The loss of each step, on the bytes of the text behind Python's help()."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    data = torch.tensor(list("".join(topics.values()).encode()))
    model = GPT(vocab_size, block_size, n_layer, n_head, n_embd)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        start = torch.randint(len(data) - block_size, (batch_size,), generator=draw).tolist()
        idx = torch.stack([data[i : i + block_size] for i in start])
        target = torch.stack([data[i + 1 : i + 1 + block_size] for i in start])
        loss = model(idx, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    for step, loss in enumerate(train(), 1):
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.4f}")
