"""Every operation of gptfast once, for the checks of bench/gpu.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from gptfast import AdamW, ops
from gptfast.kernels.reference.decode_linear import quantize


def _tensors(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def operations(dtype: torch.dtype, small: bool) -> dict[str, Callable[[], list[Tensor]]]:
    """Return every operation by name: forward and backward on fixed data, which is made here."""
    torch.manual_seed(0)
    T, V, N = (20, 101, 20) if small else (500, 50257, 2000)
    (qkv,) = _tensors((2, T, 3 * 128), dtype=dtype)
    x, w, logits = _tensors((N, 64), (V, 64), (N, V), dtype=dtype)
    (wide,) = _tensors((3, 8195), dtype=dtype)
    wide.requires_grad_(False)
    fc_bias, *norm_parts = (torch.randn(n).to(dtype) for n in (V, 64, 64))
    norm = (*norm_parts, 1e-5)
    rounded, scale = quantize(w.detach())
    target = torch.randint(V, (N,))
    target[::7] = -100
    query, cache = (torch.randn(2, 2, n, 64).to(dtype) for n in (1, 333))
    kv_len = torch.tensor([7, 333])

    def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss.float().sum(), leaves)]

    def adamw() -> list[Tensor]:
        params = [p.detach().clone().requires_grad_() for p in (qkv, w)]
        optimizer = AdamW(params, max_norm=1.0)
        for p in params:
            p.grad = p.detach() * 3
        optimizer.step()
        return [*(p.detach() for p in params), optimizer.grad_norm]

    return {
        "attention": lambda: gradients(ops.attention_qkv(qkv, 2), qkv),
        "attention dropout": lambda: gradients(
            ops.attention_qkv(qkv, 2, dropout_p=0.1, seed=5), qkv
        ),
        "attention decode": lambda: [ops.attention(query, cache, cache, kv_len=kv_len)],
        "cross_entropy": lambda: gradients(ops.cross_entropy(logits, target), logits),
        "linear_cross_entropy": lambda: gradients(ops.linear_cross_entropy(x, w, target), x, w),
        "embedding": lambda: gradients(ops.embedding(target.clamp(0), w)[0], w),
        "adamw": adamw,
        "decode_linear": lambda: [ops.decode_linear(x[:5].detach(), w.detach(), gelu=True)],
        "decode_linear int8": lambda: [
            ops.decode_linear(x[:n].detach(), rounded, scale=scale, fp32_out=True)
            for n in (5, 17, N)
        ],
        "sample": lambda: [ops.sample(logits.detach(), top_k=50, top_p=0.9, seed=3)],
        "sample by slices": lambda: [ops.sample(wide, top_k=4000, top_p=0.9, seed=3)],
        "linear": lambda: gradients(ops.linear(x, w, norm=norm), x, w),
        "mlp": lambda: gradients(ops.mlp(x, w, fc_bias, w.T, norm[1], norm=norm, residual=True), x),
    }
