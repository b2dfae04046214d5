"""Causal attention in tiles; kernels/reference/attention.py is the definition.

    S = Q K^T;  P = exp2(c S - max);  O = P V / sum P                    c = scale log2(e)
    P = exp2(c S - log2(e) lse);  delta = sum_d dO O;  dS = P (dP - delta)
    dQ = scale dS K;  dK = scale dS^T Q;  dV = P^T dO                    (FlashAttention-2)

The backward is two kernels: a program of the first computes the dQ of a block of queries, one of
the second the dK and dV of a block of keys. They compute S and dP twice, seven products instead of
five. With five, each block of keys would write a partial dQ, which costs as much at T = 1024 and
more beyond. Scores are masked only in the blocks that need it. A branch decides this: before a
second loop, the pipeline of loads would run empty.

Programs start with the longest rows, so that all multiprocessors finish at about the same time.
They run in groups of heads whose keys and values fit the L2 cache together and are read from memory
once.
"""

import torch
from torch import Tensor

from gptfast.kernels.reference import attention as reference
from gptfast.kernels.triton.attention_bwd import fill_bwd
from gptfast.kernels.triton.attention_fwd import decodes, fill_fwd
from gptfast.kernels.triton.attention_tiles import has_tile
from gptfast.kernels.triton.launch_series import repeat


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return out (B, H, Tq, D) in q's dtype and lse (B, H, Tq), natural log, fp64."""
    sizes = q.shape[2], k.shape[2], q.shape[3]
    if not has_tile(q.dtype, *sizes, decoding=decodes(sizes[0], dropout_p)):
        return reference.attention_fwd(q, k, v, scale, dropout_p, seed, kv_len)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float64)
    repeat(_fill_fwd, (q, k, v, out, lse, seed, kv_len), scale, dropout_p)
    return out, lse


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, contiguous, in the inputs' dtype."""
    options = (scale, dropout_p, seed, kv_len)
    if not has_tile(q.dtype, q.shape[2], k.shape[2], q.shape[3]):
        return reference.attention_bwd(dout, q, k, v, out, lse, *options)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    repeat(_fill_bwd, (dout, q, k, v, out, lse, *grads, seed, kv_len), scale, dropout_p)
    return grads


def _fill_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    kv_len: Tensor | None,
    scale: float,
    dropout_p: float,
) -> None:
    fill_fwd(q, k, v, out, lse, scale, dropout_p, seed, kv_len)


def _fill_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    seed: Tensor | None,
    kv_len: Tensor | None,
    scale: float,
    dropout_p: float,
) -> None:
    fill_bwd(dout, q, k, v, out, lse, (dq, dk, dv), scale, dropout_p, seed, kv_len)


def _heads(x: Tensor, n_head: int) -> Tensor:
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)


def _unpack(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of q, k and v, each (B, H, T, D), in qkv (B, T, 3C)."""
    q, k, v = (_heads(x, n_head) for x in qkv.chunk(3, -1))
    return q, k, v


def attention_qkv_fwd(
    qkv: Tensor,
    n_head: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return out (B, T, C) and lse (B, H, T) for qkv (B, T, 3C), which is not copied."""
    B, T, C3 = qkv.shape
    sizes = T, T, C3 // (3 * n_head)
    if not has_tile(qkv.dtype, *sizes, decoding=decodes(T, dropout_p)):
        return reference.attention_qkv_fwd(qkv, n_head, scale, dropout_p, seed, kv_len)
    out = qkv.new_empty(B, T, C3 // 3)
    lse = qkv.new_empty(B, n_head, T, dtype=torch.float64)
    repeat(_fill_qkv_fwd, (qkv, out, lse, seed, kv_len), n_head, scale, dropout_p)
    return out, lse


def _fill_qkv_fwd(
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    kv_len: Tensor | None,
    n_head: int,
    scale: float,
    dropout_p: float,
) -> None:
    heads = _unpack(qkv, n_head)
    fill_fwd(*heads, _heads(out, n_head), lse, scale, dropout_p, seed, kv_len)


def attention_qkv_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_head: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return dqkv (B, T, 3C)."""
    options = (scale, dropout_p, seed, kv_len)
    T, C3 = qkv.shape[1:]
    if not has_tile(qkv.dtype, T, T, C3 // (3 * n_head)):
        return reference.attention_qkv_bwd(dout, qkv, out, lse, n_head, *options)
    dqkv = qkv.new_empty(qkv.shape)
    tensors = (dout, qkv, out, lse, dqkv, seed, kv_len)
    repeat(_fill_qkv_bwd, tensors, n_head, scale, dropout_p)
    return dqkv


def _fill_qkv_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    dqkv: Tensor,
    seed: Tensor | None,
    kv_len: Tensor | None,
    n_head: int,
    scale: float,
    dropout_p: float,
) -> None:
    q, k, v = _unpack(qkv, n_head)
    dout, out = _heads(dout, n_head), _heads(out, n_head)
    grads = _unpack(dqkv, n_head)
    fill_bwd(dout, q, k, v, out, lse, grads, scale, dropout_p, seed, kv_len)
