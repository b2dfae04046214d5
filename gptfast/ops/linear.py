"""A linear layer with an optional layer norm before it: schema, fake, autograd, public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptfast.kernels.reference import linear as reference
from gptfast.ops.autograd import gradients, needs_reference, register_autograd
from gptfast.ops.library import autocast_enabled, register, register_autocast

Norm = tuple[Tensor, Tensor, float]
"""weight (C,), bias (C,) and eps of a layer norm."""

_NORM = "Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps"


def stats_fake(x: Tensor, norm_weight: Tensor | None) -> Tensor:
    """Return an empty tensor for a norm's mean and reciprocal deviation per row, or for no norm."""
    rows = 0 if norm_weight is None else x.shape[0]
    return x.new_empty(rows, 2, dtype=torch.promote_types(x.dtype, torch.float32))


def gradient_fake(needed: bool, x: Tensor | None, weight: Tensor) -> Tensor:
    """Return an empty gradient of x, without elements unless x is there and needs one."""
    return x.new_empty(x.shape) if needed and x is not None else weight.new_empty(0)


def result_fake(x: Tensor, weight: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return an empty result of a layer whose product has this dtype, plus a residual."""
    wide = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    return x.new_empty(x.shape[0], weight.shape[0], dtype=wide)


def _fwd_fake(x, norm_weight, norm_bias, eps, weight, bias, residual, dtype):  # type: ignore[no-untyped-def]
    y = result_fake(x, weight, residual, dtype or weight.dtype)
    return y, stats_fake(x, norm_weight)


def _bwd_fake(  # type: ignore[no-untyped-def]
    dy, x, norm_weight, norm_bias, eps, weight, bias, stats, need_dx, need_dweight, dtype
):
    gradients = [
        (need_dx, x),
        (need_dx, norm_weight),
        (need_dx, norm_bias),
        (need_dweight, weight),
        (need_dweight, bias),
    ]
    return tuple(gradient_fake(*pair, weight) for pair in gradients)


_fwd = register(
    f"linear_fwd({_NORM}, Tensor weight, Tensor? bias, Tensor? residual, ScalarType? dtype) "
    "-> (Tensor y, Tensor stats)",
    reference.linear_fwd,
    _fwd_fake,
)
_bwd = register(
    f"linear_bwd(Tensor dy, {_NORM}, Tensor weight, Tensor? bias, Tensor stats, bool need_dx, "
    "bool need_dweight, ScalarType? dtype) "
    "-> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dweight, Tensor dbias)",
    reference.linear_bwd,
    _bwd_fake,
)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, norm_weight, norm_bias, ctx.eps, weight, bias, _, ctx.dtype = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _forward(
    eps: float, dtype: torch.dtype | None, x: Tensor, *parameters: Tensor | None
) -> Tensor:
    """Return the reference's y without a residual, whose gradient is dy."""
    norm_weight, norm_bias, weight, bias = parameters
    return reference.linear_fwd(x, norm_weight, norm_bias, eps, weight, bias, None, dtype)[0]


def _backward(ctx, dy, dstats):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 8
    x, norm_weight, norm_bias, weight, bias, stats = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if needs_reference():
        inputs = x, norm_weight, norm_bias, weight, bias
        # A residual in fp32 makes y and dy fp32 too.
        low = dy.to(ctx.dtype or weight.dtype)
        grads = gradients(lambda *inputs: _forward(ctx.eps, ctx.dtype, *inputs), inputs, low)
    else:
        options = any(needs[:3]), any(needs[4:6]), ctx.dtype
        grads = _bwd(dy, x, norm_weight, norm_bias, ctx.eps, weight, bias, stats, *options)
    dx, dnorm_weight, dnorm_bias, dweight, dbias = grads
    return tuple(
        grad if need else None
        for grad, need in zip(
            (dx, dnorm_weight, dnorm_bias, None, dweight, dbias, dy, None), needs, strict=True
        )
    )


register_autograd(_fwd, _backward, _setup)
# The norm stays in fp32, as F.layer_norm does under autocast; its result takes the product's dtype.
register_autocast(_fwd, tensors=(4, 5), dtype=7)


def check_fit(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> None:
    """Raise ValueError unless x (..., C), weight (O, C) and bias (O,) fit a linear layer."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name} needs x (..., C) and weights (O, C), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}'s bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_kind(x: Tensor, others: Sequence[Tensor | None], name: str) -> None:
    """Raise ValueError unless x and the others have one device and one floating dtype."""
    for other in others:
        if other is not None and (
            other.device != x.device or (other.dtype != x.dtype and not autocast_enabled(x))
        ):
            raise ValueError(
                f"{name}'s inputs need one dtype and one device, got {x.dtype} on {x.device} and "
                f"{other.dtype} on {other.device}"
            )
    if not x.is_floating_point():
        raise ValueError(f"{name} needs floating-point tensors, got {x.dtype}")


def check_layer(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> None:
    """Raise ValueError unless x (..., C), weight (O, C) and bias (O,) make a linear layer."""
    check_fit(x, weight, bias, name)
    check_kind(x, (weight, bias), name)


def norm_arguments(x: Tensor, norm: Norm | None, name: str) -> tuple:
    """Return a norm as the three arguments of an operator, checked."""
    if norm is None:
        return None, None, 0.0
    weight, bias, eps = norm
    for part in (weight, bias):
        if part.shape != x.shape[-1:] or part.device != x.device:
            raise ValueError(
                f"{name}'s norm must be weight and bias of shape ({x.shape[-1]},) on {x.device}, "
                f"got {tuple(part.shape)} on {part.device}"
            )
    return weight, bias, float(eps)


def fuses_residual(residual: Tensor, weight: Tensor) -> bool:
    """Return whether an operator of ours adds this residual to its product with weight."""
    return residual.dtype == (torch.float32 if autocast_enabled(residual) else weight.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return F.linear(x, weight, bias), after a layer norm and plus a residual if they are given.

    x: (..., C); weight: (O, C); bias: (O,); norm: (weight (C,), bias (C,), eps), applied to x as
    F.layer_norm; residual: (..., O). One floating dtype, any under autocast, which gives the
    product its dtype; the norm is computed in fp32. Returns (..., O), in fp32 under autocast with a
    residual in fp32. The backward computes the normalised input again.

    Raises ValueError for inputs that do not fit.
    """
    check_layer(x, weight, bias, "linear")
    n_out, rows = weight.shape[0], x.reshape(-1, x.shape[-1])  # (N, C)
    if residual is not None and residual.shape != (*x.shape[:-1], n_out):
        raise ValueError(
            f"linear's residual must be {(*x.shape[:-1], n_out)}, got {tuple(residual.shape)}"
        )
    fused = residual is not None and fuses_residual(residual, weight)
    passed = residual.reshape(-1, n_out) if residual is not None and fused else None
    y = _fwd(rows, *norm_arguments(x, norm, "linear"), weight, bias, passed, None)[0]
    y = y.view(*x.shape[:-1], n_out)
    return y if fused or residual is None else residual + y
