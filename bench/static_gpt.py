"""Plain PyTorch by gpt-fast's method: the peer of generation on a GPU.

The cache is static and as long as the text will be. Positions are tensors, so that a decode step is
one graph, which torch.compile fuses and captures as a CUDA graph. Attention is written as plain
products, which the compiler fuses too. int8 applies to weights only, with a scale for each output;
the compiler chooses the tiles. Tokens stay on the device.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from plain_gpt import PlainGPT
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Int8Linear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(1) / 127
        self.register_buffer("weight", torch.round(weight / scale[:, None]).to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class StaticGPT(nn.Module):
    """PlainGPT for B rows of the same length, up to `size`. int8 rounds the layers in place."""

    def __init__(self, plain: PlainGPT, B: int, size: int, int8: bool) -> None:
        super().__init__()
        config, weight = plain.config, plain.wte.weight
        C, V = config.n_embd, config.vocab_size
        self.plain, self.n_head = plain, config.n_head
        self.head = nn.Linear(C, V, bias=False, dtype=weight.dtype)
        self.head.weight = weight
        shape = (config.n_layer, 2, B, config.n_head, size, C // config.n_head)
        self.register_buffer("cache", weight.new_zeros(shape))
        self.register_buffer("mask", torch.ones(size, size, dtype=torch.bool).tril())
        if int8:
            self.head = Int8Linear(self.head)
            for block in plain.h:
                for part in (block.attn, block.mlp):
                    for name, linear in list(part.named_children()):
                        setattr(part, name, Int8Linear(linear))

    def logits(self, ids: Tensor, time: Tensor) -> Tensor:
        """Return logits (B, V) after the last of ids (B, T), which stand at positions time (T,)."""
        B, T = ids.shape
        x = self.plain.wte(ids) + self.plain.wpe(time)
        for block, (k, v) in zip(self.plain.h, self.cache, strict=True):
            qkv = block.attn.c_attn(block.ln_1(x)).view(B, T, 3, self.n_head, -1)
            q, new_k, new_v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D)
            k[:, :, time], v[:, :, time] = new_k, new_v
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[time])
            x = x + block.attn.c_proj(out.transpose(1, 2).reshape(B, T, -1))
            x = x + block.mlp(block.ln_2(x))
        return self.head(self.plain.ln_f(x)[:, -1])

    def forward(self, ids: Tensor, time: Tensor) -> Tensor:
        return self.logits(ids, time).argmax(-1, keepdim=True)  # (B, 1)


Step = Callable[[Tensor, Tensor], Tensor]


def compiled_step(model: StaticGPT) -> Step:
    """Return model.forward, compiled for one token a row. The next call overwrites its ids."""
    # The settings of mode="reduce-overhead" and of gpt-fast's compiler, for this function alone.
    options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    return torch.compile(model, fullgraph=True, options=options)


@torch.no_grad()
def generate(model: StaticGPT, step: Step, idx: Tensor, n: int) -> list[list[int]]:
    """Return n greedy tokens after idx (B, T); step is model.forward, compiled."""
    time = torch.arange(idx.shape[1], device=idx.device)
    new = [model(idx, time)]
    time = time[-1:] + 1
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(n - 1):
            new.append(step(new[-1], time).clone())
            time = time + 1
    return torch.cat(new, 1).tolist()
