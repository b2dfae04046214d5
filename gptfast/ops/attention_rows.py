"""Attention over some rows of a batch, with the dropout that these rows have in the whole batch.

Attention keys its dropout by batch * H + head, counted from the first row that it is given. So the
rows before ours are given too, as views of ours that take no memory, and with no keys in use, which
makes them cost next to nothing. What is computed for them, zeros, is dropped at once.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptfast.ops.attention import (
    _bwd,
    _check_options,
    _default_scale,
    _fwd,
    _seed_tensor,
    attention_qkv,
)
from gptfast.ops.library import autocast_enabled, define_opaque


class _Layout:
    """How B rows of H heads stand after `first` others: in `before` + `ours` groups of heads."""

    def __init__(self, first: int, B: int, H: int) -> None:
        group = math.gcd(first, B)
        self.before, self.ours, self.heads = first // group, B // group, group * H

    def placed(self, x: Tensor) -> Tensor:
        """Return x (B, H, ...) as the last rows of a larger batch, (before + ours, heads, ...)."""
        x = x.reshape(self.ours, self.heads, *x.shape[2:])
        rest = (-1,) * (x.dim() - 1)
        if self.ours == 1:
            return x.expand(self.before + 1, *rest)
        return torch.cat([x[:1].expand(self.before, *rest), x])

    def taken(self, x: Tensor, B: int) -> Tensor:
        """Return our rows (B, H, ...) of a larger batch, without the memory of the others."""
        return x[self.before :].reshape(B, -1, *x.shape[2:]).clone()

    def kv_len(self, x: Tensor) -> Tensor:
        """Return how many keys each row of the larger batch has: those of x (B, H, T, D), or 0."""
        lengths = torch.zeros(self.before + self.ours, dtype=torch.int64, device=x.device)
        lengths[self.before :] = x.shape[2]
        return lengths


def _heads(packed: Tensor, n: int, n_head: int) -> list[Tensor]:
    """Return the n parts of packed (B, T, nC), each (B, H, T, D)."""
    return list(packed.unflatten(2, (n, n_head, -1)).permute(2, 0, 3, 1, 4).unbind())


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)


def _rows_fwd(
    qkv: Tensor, n_head: int, first: int, scale: float, dropout_p: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Return out (B, T, C) and lse (B, H, T)."""
    B = qkv.shape[0]
    q, k, v = _heads(qkv, 3, n_head)
    layout = _Layout(first, B, n_head)
    options = scale, dropout_p, seed, layout.kv_len(q)
    out, lse = (layout.taken(x, B) for x in _fwd(*map(layout.placed, (q, k, v)), *options))
    return _merged(out).contiguous(), lse


def _rows_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_head: int,
    first: int,
    scale: float,
    dropout_p: float,
    seed: Tensor,
) -> Tensor:
    """Return dqkv (B, T, 3C) for dout and out (B, T, C)."""
    B = qkv.shape[0]
    layout = _Layout(first, B, n_head)
    dout, q, k, v, out = (
        *_heads(dout, 1, n_head),
        *_heads(qkv, 3, n_head),
        *_heads(out, 1, n_head),
    )
    options = scale, dropout_p, seed, layout.kv_len(q)
    gradients = _bwd(*map(layout.placed, (dout, q, k, v, out, lse)), *options)
    return torch.cat([_merged(layout.taken(x, B)) for x in gradients], 2)


def _rows_fwd_fake(qkv, n_head, first, scale, dropout_p, seed):  # type: ignore[no-untyped-def]
    B, T, C3 = qkv.shape
    lse = qkv.new_empty((B, n_head, T), dtype=torch.float64)
    return qkv.new_empty((B, T, C3 // 3)), lse


# Operators, so that torch.compile need not follow them.
_OPTIONS = "SymInt n_head, SymInt first, float scale, float dropout_p, Tensor seed"
define_opaque(
    f"attention_rows_fwd(Tensor qkv, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    _rows_fwd,
    _rows_fwd_fake,
)
define_opaque(
    "attention_rows_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> Tensor dqkv",
    _rows_bwd,
    lambda dout, qkv, *_: qkv.new_empty(qkv.shape),
)


class _AttentionRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        n_head: int,
        first: int,
        scale: float,
        dropout_p: float,
        seed: Tensor,
    ) -> Tensor:
        ctx.options = n_head, first, scale, dropout_p
        out, lse = torch.ops.gptfast.attention_rows_fwd(qkv, *ctx.options, seed)
        ctx.save_for_backward(qkv, out, lse, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seed = ctx.saved_tensors
        dqkv = torch.ops.gptfast.attention_rows_bwd(dout, *tensors, *ctx.options, seed)
        return dqkv, None, None, None, None, None


def attention_qkv_rows(
    qkv: Tensor, n_head: int, first: int, *, dropout_p: float, seed: int | Tensor
) -> Tensor:
    """Return `attention_qkv` of the rows of a batch from number `first` on.

    qkv: (B, T, 3C), these rows alone. The result (B, T, C) and the gradient are those of these rows
    in `attention_qkv` of the whole batch. There is no second derivative.
    """
    if first == 0 or dropout_p == 0:
        return attention_qkv(qkv, n_head, dropout_p=dropout_p, seed=seed)
    if first < 0:
        raise ValueError(f"first must be >= 0, got {first}")
    _check_options(dropout_p, None, qkv.shape[0], qkv.device)
    if autocast_enabled(qkv):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    scale = _default_scale(qkv.shape[2] // (3 * n_head))
    mask_seed = _seed_tensor(seed, dropout_p, qkv.device)
    return _AttentionRows.apply(qkv, n_head, first, scale, dropout_p, mask_seed)
