"""Causal attention: schema, fake, autograd, public functions."""

import math

import torch
from torch import Tensor

from gptfast.kernels.reference import attention as reference
from gptfast.ops.autograd import gradients, needs_reference, register_autograd
from gptfast.ops.library import autocast_enabled, register, register_autocast

_OPTIONS = "float scale, float dropout_p, Tensor? seed, Tensor? kv_len"


def _fwd_fake(q, k, v, scale, dropout_p, seed, kv_len):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float64)


def _bwd_fake(dout, q, k, v, out, lse, scale, dropout_p, seed, kv_len):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _qkv_fwd_fake(qkv, n_head, scale, dropout_p, seed, kv_len):  # type: ignore[no-untyped-def]
    B, T, C3 = qkv.shape
    return qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, n_head, T, dtype=torch.float64)


def _qkv_bwd_fake(dout, qkv, out, lse, n_head, scale, dropout_p, seed, kv_len):  # type: ignore[no-untyped-def]
    return qkv.new_empty(qkv.shape)


_fwd = register(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    reference.attention_fwd,
    _fwd_fake,
)
_bwd = register(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    reference.attention_bwd,
    _bwd_fake,
)
_qkv_fwd = register(
    f"attention_qkv_fwd(Tensor qkv, int n_head, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    reference.attention_qkv_fwd,
    _qkv_fwd_fake,
)
_qkv_bwd = register(
    "attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int n_head, "
    f"{_OPTIONS}) -> Tensor dqkv",
    reference.attention_qkv_bwd,
    _qkv_bwd_fake,
)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, ctx.scale, ctx.dropout_p, seed, kv_len = inputs
    ctx.save_for_backward(q, k, v, *output, seed, kv_len)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    if dout is None:
        return (None,) * 7
    q, k, v, out, lse, seed, kv_len = ctx.saved_tensors
    options = ctx.scale, ctx.dropout_p, seed, kv_len
    if needs_reference():
        forward = lambda *inputs: reference.attention_fwd(*inputs, *options)[0]  # noqa: E731
        return *gradients(forward, (q, k, v), dout), None, None, None, None
    return *_bwd(dout, q, k, v, out, lse, *options), None, None, None, None


def _qkv_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    qkv, ctx.n_head, ctx.scale, ctx.dropout_p, seed, kv_len = inputs
    ctx.save_for_backward(qkv, *output, seed, kv_len)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _qkv_backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    if dout is None:
        return (None,) * 6
    qkv, out, lse, seed, kv_len = ctx.saved_tensors
    options = ctx.n_head, ctx.scale, ctx.dropout_p, seed, kv_len
    if needs_reference():
        forward = lambda qkv: reference.attention_qkv_fwd(qkv, *options)[0]  # noqa: E731
        return *gradients(forward, (qkv,), dout), None, None, None, None, None
    return _qkv_bwd(dout, qkv, out, lse, *options), None, None, None, None, None


register_autograd(_fwd, _backward, _setup)
register_autograd(_qkv_fwd, _qkv_backward, _qkv_setup)
register_autocast(_fwd, tensors=range(3))
register_autocast(_qkv_fwd, tensors=range(1))


def _check_options(dropout_p: float, kv_len: Tensor | None, B: int, device: torch.device) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if kv_len is None:
        return
    if kv_len.shape != (B,) or kv_len.dtype != torch.int64 or kv_len.device != device:
        raise ValueError(
            f"kv_len must be ({B},) int64 on {device}, got {tuple(kv_len.shape)} {kv_len.dtype} "
            f"on {kv_len.device}"
        )


def _dense(kv_len: Tensor | None) -> Tensor | None:
    return None if kv_len is None else kv_len.contiguous()


def _check_floats(**tensors: Tensor) -> None:
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor.dim() != first.dim() or not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor of {first.dim()} dimensions")
        mixed = tensor.dtype != first.dtype and not autocast_enabled(first)
        if mixed or tensor.device != first.device:
            listed = ", ".join(f"{n} {t.dtype} on {t.device}" for n, t in tensors.items())
            raise ValueError(f"all inputs need one dtype and one device, got {listed}")


def _seed_tensor(seed: int | Tensor, dropout_p: float, device: torch.device) -> Tensor | None:
    if dropout_p == 0:
        return None
    return (
        seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)
    )


def _default_scale(D: int) -> float:
    return 1.0 / math.sqrt(max(D, 1))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
    kv_len: Tensor | None = None,
) -> Tensor:
    """Return causal attention (Vaswani et al., 2017), tiled as in FlashAttention (Dao, 2023).

    q: (B, H, Tq, D), k and v: (B, H, Tk, D), Tq <= Tk, one floating dtype, any strides with a
    contiguous last dimension. Aligned bottom-right: query i sees keys 0 .. Tk-Tq+i, so training,
    prefill and cached decode are one operation.
    scale: multiplies the scores; None is 1/sqrt(D), and 1 for D = 0.
    dropout_p: in [0, 1), applied to the probabilities; the mask is a pure function of seed (int or
    0-d int64 tensor) and position, the same on every backend.
    kv_len: (B,) int64, keys in use per row of the batch; None is Tk for all.

    Returns (B, H, Tq, D) in q's dtype; a query that sees no key, or only keys whose score is -inf,
    gives zeros. NaN and inf in a key or a value reach only the queries that see it. Raises
    ValueError for shapes, dtypes, devices or options that do not fit.
    """
    _check_floats(q=q, k=k, v=v)
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "attention needs q (B, H, Tq, D) and k, v (B, H, Tk, D), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"attention needs Tq <= Tk, got Tq={q.shape[2]}, Tk={k.shape[2]}")
    _check_options(dropout_p, kv_len, q.shape[0], q.device)
    scale = _default_scale(q.shape[3]) if scale is None else float(scale)
    mask_seed = _seed_tensor(seed, dropout_p, q.device)
    return _fwd(q, k, v, scale, dropout_p, mask_seed, _dense(kv_len))[0]


def attention_qkv(
    qkv: Tensor,
    n_head: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
    kv_len: Tensor | None = None,
) -> Tensor:
    """Return `attention` of a packed projection, without a copy: qkv (B, T, 3C) -> (B, T, C).

    Channels are q, k, v in this order, each split into n_head heads; the gradient is written packed
    too. The other arguments and errors are `attention`'s.
    """
    _check_floats(qkv=qkv)
    if qkv.dim() != 3 or n_head < 1 or qkv.shape[2] % (3 * n_head):
        raise ValueError(
            f"attention_qkv needs qkv (B, T, 3C) with C divisible by n_head={n_head}, "
            f"got {tuple(qkv.shape)}"
        )
    _check_options(dropout_p, kv_len, qkv.shape[0], qkv.device)
    D = qkv.shape[2] // (3 * n_head)
    scale = _default_scale(D) if scale is None else float(scale)
    mask_seed = _seed_tensor(seed, dropout_p, qkv.device)
    return _qkv_fwd(qkv, n_head, scale, dropout_p, mask_seed, _dense(kv_len))[0]
