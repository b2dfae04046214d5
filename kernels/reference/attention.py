"""Causal attention with dropout, and its gradients, in plain PyTorch.

    S = scale * Q K^T, key j visible to query i iff j <= len - Tq + i   (bottom-right alignment)
    lse = log sum_j exp(S_ij);  P = softmax(S);  P' = P * mask / (1 - p);  O = P' V
    dV = P'^T dO;  dP = (dO V^T) * mask / (1 - p);  delta = sum_j P * dP  (= sum_d dO * O)
    dS = P * (dP - delta);  dQ = scale * dS K;  dK = scale * dS^T Q

len is Tk, or kv_len[b] if it is given. For a query that sees no key, out is 0 and lse is -inf.
"""

import torch
from torch import Tensor

from gptfast.kernels.reference.philox import philox, uniform


def _visible(q: Tensor, k: Tensor, kv_len: Tensor | None) -> Tensor:
    """Return which keys each query sees, (Tq, Tk) or, with kv_len, (B, 1, Tq, Tk)."""
    Tq, Tk = q.shape[-2], k.shape[-2]
    query = torch.arange(Tq, device=q.device)[:, None]
    key = torch.arange(Tk, device=q.device)
    if kv_len is None:
        return key <= Tk - Tq + query  # (Tq, Tk)
    return key <= kv_len[:, None, None, None] - Tq + query  # (B, 1, Tq, Tk)


def dropout_scale(q: Tensor, k: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Return the factors of dropout for P, 0 or 1 / (1 - dropout_p), fp32 (B, H, Tq, Tk)."""
    B, H, Tq, _ = q.shape
    Tk = k.shape[-2]
    key = torch.arange(Tk, device=q.device)
    query = torch.arange(Tk - Tq, Tk, device=q.device)[:, None]
    head = torch.arange(B * H, device=q.device).view(B, H, 1, 1)
    words = philox(key >> 2, query, head, torch.ones_like(key), seed.to(q.device))
    word = torch.stack(words, -1).gather(-1, (key & 3).expand(B, H, Tq, Tk)[..., None])[..., 0]
    return (uniform(word) >= dropout_p).to(torch.float32) / (1.0 - dropout_p)


def _probabilities(
    q: Tensor, k: Tensor, scale: float, kv_len: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return P (B, H, Tq, Tk), and lse (B, H, Tq)."""
    visible = _visible(q, k, kv_len)
    scores = ((q @ k.transpose(-2, -1)) * scale).masked_fill(~visible, -torch.inf)
    # Not exp(scores - lse): rounding lse to fp32 is an error of |lse| * 6e-8 in all of P.
    p = torch.softmax(scores, -1).masked_fill(~visible, 0.0)
    return p, torch.logsumexp(scores, -1)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return out (B, H, Tq, D) in q's dtype and lse (B, H, Tq), natural log, fp32 or fp64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    p, lse = _probabilities(q.to(dtype), k.to(dtype), scale, kv_len)
    if dropout_p > 0:
        assert seed is not None
        p = p * dropout_scale(q, k, dropout_p, seed)
    return (p @ v.to(dtype)).to(q.dtype), lse


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
    input_dtype = q.dtype
    q, k, v, dout = (t.to(lse.dtype) for t in (q, k, v, dout))
    p, _ = _probabilities(q, k, scale, kv_len)
    dropped, dp = p, dout @ v.transpose(-2, -1)
    if dropout_p > 0:
        assert seed is not None
        keep = dropout_scale(q, k, dropout_p, seed)
        dropped, dp = p * keep, dp * keep
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    grads = ds @ k, ds.transpose(-2, -1) @ q, dropped.transpose(-2, -1) @ dout
    dq, dk, dv = (t.to(input_dtype).contiguous() for t in grads)
    return dq, dk, dv


def _unpack(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of q, k and v, each (B, H, T, D), in contiguous qkv (B, T, 3C)."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
    return q, k, v


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)


def attention_qkv_fwd(
    qkv: Tensor,
    n_head: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return out (B, T, C) and lse (B, H, T) for qkv (B, T, 3C)."""
    q, k, v = _unpack(qkv.contiguous(), n_head)
    out, lse = attention_fwd(q, k, v, scale, dropout_p, seed, kv_len)
    return _merge_heads(out), lse


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
    q, k, v = _unpack(qkv.contiguous(), n_head)
    split = [t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in (dout, out)]  # (B, H, T, D)
    grads = attention_bwd(split[0], q, k, v, split[1], lse, scale, dropout_p, seed, kv_len)
    return torch.cat([_merge_heads(grad) for grad in grads], -1)
