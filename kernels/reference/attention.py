"""Causal attention with dropout, and its gradients, in plain PyTorch.

    S = scale * Q K^T, key j visible to query i iff j <= len - Tq + i   (bottom-right alignment)
    lse = log sum_j exp(S_ij);  P = softmax(S);  P' = P * mask / (1 - p);  O = P' V
    dV = P'^T dO;  dP = (dO V^T) * mask / (1 - p);  delta = sum_j P * dP  (= sum_d dO * O)
    dS = P * (dP - delta);  dQ = scale * dS K;  dK = scale * dS^T Q

len is Tk, or kv_len[b] if it is given. For a query that sees no key, or only keys whose score is
-inf, out and dS are 0 and lse is -inf. The sums in O, dQ, dK and dV are over visible pairs: NaN and
inf reach nothing across a pair that is not visible. The six products of fp32 numbers on a CPU are
as exact as PyTorch's setting asks for: see matmul.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gptfast.kernels.reference.matmul import product
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
    """Return the factors of dropout for P, 0 or 1 / (1 - dropout_p), fp64 (B, H, Tq, Tk)."""
    B, H, Tq, _ = q.shape
    Tk = k.shape[-2]
    key = torch.arange(Tk, device=q.device)
    query = torch.arange(Tk - Tq, Tk, device=q.device)[:, None]
    head = torch.arange(B * H, device=q.device).view(B, H, 1, 1)
    words = philox(key >> 2, query, head, torch.ones_like(key), seed.to(q.device))
    word = torch.stack(words, -1).gather(-1, (key & 3).expand(B, H, Tq, Tk)[..., None])[..., 0]
    return (uniform(word) >= dropout_p).double() / (1.0 - dropout_p)


Product = Callable[[Tensor, Tensor], Tensor]


def _product_of(dtype: torch.dtype) -> Product:
    """Return the product for inputs of a dtype. 16-bit inputs are multiplied in fp32 throughout."""
    return product if dtype == torch.float32 else torch.matmul


def _probabilities(
    q: Tensor, k: Tensor, scale: float, visible: Tensor, multiply: Product
) -> tuple[Tensor, Tensor]:
    """Return P (B, H, Tq, Tk), and lse (B, H, Tq)."""
    scores = (multiply(q, k.transpose(-2, -1)) * scale).masked_fill(~visible, -torch.inf)
    # The softmax of nothing but -inf would be NaN, and so would its gradient.
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    p = torch.softmax(scores, -1).masked_fill(empty | ~visible, 0.0)
    return p, torch.logsumexp(scores, -1).masked_fill(empty[..., 0], -torch.inf)


def _visible_product(weights: Tensor, visible: Tensor, x: Tensor, multiply: Product) -> Tensor:
    """Return weights @ x, whose terms are those of visible pairs: 0 * NaN of others is no term."""
    finite = x.isfinite()
    met = visible.to(x.dtype) @ (~finite).to(x.dtype) > 0
    # Detached: where() would multiply the gradient of what it leaves out, 0, by NaN.
    constant = weights.detach() @ x.detach()
    return torch.where(met, constant, multiply(weights, torch.where(finite, x, 0.0)))


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
    visible, multiply = _visible(q, k, kv_len), _product_of(q.dtype)
    dtype = torch.promote_types(q.dtype, torch.float32)
    p, lse = _probabilities(q.to(dtype), k.to(dtype), scale, visible, multiply)
    if dropout_p > 0:
        assert seed is not None
        p = p * dropout_scale(q, k, dropout_p, seed).to(dtype)
    return _visible_product(p, visible, v.to(dtype), multiply).to(q.dtype), lse.double()


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
    input_dtype, multiply = q.dtype, _product_of(q.dtype)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v, dout = (t.to(dtype) for t in (q, k, v, dout))
    visible = _visible(q, k, kv_len)
    p, _ = _probabilities(q, k, scale, visible, multiply)
    dropped, dp = p, multiply(dout, v.transpose(-2, -1)).masked_fill(~visible, 0.0)
    if dropout_p > 0:
        assert seed is not None
        keep = dropout_scale(q, k, dropout_p, seed).to(dtype)
        dropped, dp = p * keep, dp * keep
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    ds = ds.masked_fill(~visible, 0.0)  # delta may be NaN
    seen = visible.transpose(-2, -1)  # (Tk, Tq) or (B, 1, Tk, Tq)
    dq = _visible_product(ds, visible, k, multiply)
    dk = _visible_product(ds.transpose(-2, -1), seen, q, multiply)
    dv = _visible_product(dropped.transpose(-2, -1), seen, dout, multiply)
    dq, dk, dv = (t.to(input_dtype).contiguous() for t in (dq, dk, dv))
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
    """Return out (B, T, C) and lse (B, H, T), fp64, for qkv (B, T, 3C)."""
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
    split = [t.unflatten(-1, (n_head, q.shape[-1])).transpose(1, 2) for t in (dout, out)]
    grads = attention_bwd(split[0], q, k, v, split[1], lse, scale, dropout_p, seed, kv_len)
    return torch.cat([_merge_heads(grad) for grad in grads], -1)
