"""The perceptron of a GPT-2 block: schema, fake, autograd, public function."""

import torch
from torch import Tensor

from gptfast.kernels.reference import mlp as reference
from gptfast.ops.autograd import gradients, needs_reference, register_autograd
from gptfast.ops.library import register, register_autocast
from gptfast.ops.linear import (
    Norm,
    check_layer,
    fuses_residual,
    gradient_fake,
    norm_arguments,
    result_fake,
    stats_fake,
)

_NORM = "Tensor? norm_weight, Tensor? norm_bias, float eps"
_LAYERS = "Tensor fc_weight, Tensor fc_bias, Tensor proj_weight, Tensor proj_bias"


def _fwd_fake(  # type: ignore[no-untyped-def]
    x, norm_weight, norm_bias, eps, fc_weight, fc_bias, proj_weight, proj_bias, residual, dtype
):
    dtype = dtype or fc_weight.dtype
    y = result_fake(x, proj_weight, x if residual else None, dtype)
    h = result_fake(x, fc_weight, None, dtype)
    return y, h, stats_fake(x, norm_weight)


def _bwd_fake(  # type: ignore[no-untyped-def]
    dy, x, h, stats, norm_weight, norm_bias, eps, fc_weight, fc_bias, proj_weight, proj_bias,
    residual, need_dx, need_dfc, need_dproj, dtype,
):  # fmt: skip
    gradients = [
        (need_dx, x),
        (need_dx, norm_weight),
        (need_dx, norm_bias),
        (need_dfc, fc_weight),
        (need_dfc, fc_bias),
        (need_dproj, proj_weight),
        (need_dproj, proj_bias),
    ]
    return tuple(gradient_fake(*pair, fc_weight) for pair in gradients)


_fwd = register(
    f"mlp_fwd(Tensor x, {_NORM}, {_LAYERS}, bool residual, ScalarType? dtype) "
    "-> (Tensor y, Tensor h, Tensor stats)",
    reference.mlp_fwd,
    _fwd_fake,
)
_bwd = register(
    f"mlp_bwd(Tensor dy, Tensor x, Tensor h, Tensor stats, {_NORM}, {_LAYERS}, "
    "bool residual, bool need_dx, bool need_dfc, bool need_dproj, ScalarType? dtype) "
    "-> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, "
    "Tensor dfc_weight, Tensor dfc_bias, Tensor dproj_weight, Tensor dproj_bias)",
    reference.mlp_bwd,
    _bwd_fake,
)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, norm_weight, norm_bias, ctx.eps, *layers, ctx.residual, ctx.dtype = inputs
    _, h, stats = output
    ctx.save_for_backward(x, h, stats, norm_weight, norm_bias, *layers)
    ctx.mark_non_differentiable(h, stats)
    ctx.set_materialize_grads(False)


def _forward(eps: float, residual: bool, dtype: torch.dtype | None, *inputs: Tensor) -> Tensor:
    """Return the reference's y."""
    return reference.mlp_fwd(*inputs[:3], eps, *inputs[3:], residual, dtype)[0]


def _backward(ctx, dy, dh, dstats):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 10
    x, h, stats, norm_weight, norm_bias, *layers = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if needs_reference():
        inputs = x, norm_weight, norm_bias, *layers
        options = ctx.eps, ctx.residual, ctx.dtype
        grads = gradients(lambda *i: _forward(*options, *i), inputs, dy)
    else:
        norm = norm_weight, norm_bias, ctx.eps
        needed = any(needs[:3]), any(needs[4:6]), any(needs[6:8])
        grads = _bwd(dy, x, h, stats, *norm, *layers, ctx.residual, *needed, ctx.dtype)
    places = *grads[:3], None, *grads[3:], None, None
    return tuple(grad if need else None for grad, need in zip(places, needs, strict=True))


register_autograd(_fwd, _backward, _setup)
# The norm stays in fp32, as F.layer_norm does under autocast; its result takes the products' dtype.
register_autocast(_fwd, tensors=range(4, 8), dtype=9)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    *,
    norm: Norm | None = None,
    residual: bool = False,
) -> Tensor:
    """Return gelu(norm(x) fc_weight^T + fc_bias) proj_weight^T + proj_bias, GELU in its tanh form.

    With residual, x is added to it, which then needs O = C.

    x: (..., C); fc_weight: (F, C), fc_bias: (F,); proj_weight: (O, F), proj_bias: (O,); norm:
    (weight (C,), bias (C,), eps) or None. One floating dtype, any under autocast, which gives the
    products their dtype; the norm is computed in fp32. Returns (..., O), in fp32 under autocast
    with a residual in fp32. Only the GELU's input (N, F) is kept for the backward.

    Raises ValueError for inputs that do not fit.
    """
    check_layer(x, fc_weight, fc_bias, "mlp")
    if proj_weight.dim() != 2 or proj_weight.shape[1] != fc_weight.shape[0]:
        raise ValueError(
            f"mlp needs fc_weight (F, C) and proj_weight (O, F), got {tuple(fc_weight.shape)} and "
            f"{tuple(proj_weight.shape)}"
        )
    check_layer(fc_weight.T, proj_weight, proj_bias, "mlp")
    rows = x.reshape(-1, x.shape[-1])  # (N, C)
    layers = fc_weight, fc_bias, proj_weight, proj_bias
    if residual and proj_weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"mlp's residual needs proj_weight ({x.shape[-1]}, F), got {tuple(proj_weight.shape)}"
        )
    fused = residual and fuses_residual(x, proj_weight)
    y = _fwd(rows, *norm_arguments(x, norm, "mlp"), *layers, fused, None)[0]
    y = y.view(*x.shape[:-1], proj_weight.shape[0])
    return x + y if residual and not fused else y
