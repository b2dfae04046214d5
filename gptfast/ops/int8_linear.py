"""A linear layer with a frozen weight in int8: autograd, public function.

    y = norm(x) w^T + bias + residual,  w = weight * scale
The layer is `ops.linear` of w, which exists while a product is computed: the forward makes it and
keeps it no longer, and the backward makes it again. `quantize` is the rule by which the engine
packs its int8 weights.
"""

import torch
from torch import Tensor

from gptfast.kernels.reference import linear as reference
from gptfast.kernels.reference.decode_linear import quantize as quantize
from gptfast.ops.autograd import gradients, needs_reference
from gptfast.ops.library import autocast_enabled, casts_itself
from gptfast.ops.linear import Norm, check_fit, check_kind, fuses_residual, norm_arguments

_linear_fwd = torch.ops.gptfast.linear_fwd.default
_linear_bwd = torch.ops.gptfast.linear_bwd.default


def widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what int8 weight (O, C) and scale (O,) stand for, rounded once, to dtype."""
    # An int8 number is exact in every floating dtype, and the product is computed in fp32 at least.
    return weight.to(dtype).mul_(scale[:, None])


class _Int8Linear(torch.autograd.Function):
    """Its graph holds the int8 weight, and a wide one only where it is differentiated twice."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, scale, bias, residual, dtypes):  # type: ignore[no-untyped-def]
        wide = widen(weight, scale, dtypes[0])
        y, stats = _linear_fwd(x, norm_weight, norm_bias, eps, wide, bias, residual, dtypes[1])
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, scale, stats)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.dtypes = eps, dtypes
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad
        if dy is None or not any(needs[:3]):
            return *(None,) * 7, dy, None
        x, norm_weight, norm_bias, weight, scale, stats = ctx.saved_tensors
        wide, eps, dtype = widen(weight, scale, ctx.dtypes[0]), ctx.eps, ctx.dtypes[1]
        if needs_reference():
            inputs, low = (x, norm_weight, norm_bias), dy.to(dtype or wide.dtype)
            grads = gradients(lambda *i: _forward(eps, wide, dtype, *i), inputs, low)
        else:
            options = True, False, dtype  # the gradients of x and the norm alone
            grads = _linear_bwd(dy, x, norm_weight, norm_bias, eps, wide, None, stats, *options)
        grads = [grad if need else None for grad, need in zip(grads, needs[:3], strict=False)]
        return *grads, *(None,) * 4, dy if needs[7] else None, None


def _forward(eps: float, weight: Tensor, dtype: torch.dtype | None, *x_and_norm: Tensor) -> Tensor:
    """Return the reference's y without a bias and a residual, whose gradient is dy."""
    return reference.linear_fwd(*x_and_norm, eps, weight, None, None, dtype)[0]


def _dtypes(x: Tensor, scale: Tensor) -> tuple[torch.dtype, torch.dtype | None]:
    """Return the dtype of the wide weight, and that of the product if it is another one."""
    if not autocast_enabled(x) or x.dtype == torch.float64:
        return x.dtype, None
    device = x.device.type
    low = torch.get_autocast_dtype(device)
    return (torch.float32, low) if casts_itself(device, [scale]) else (low, None)


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    check_fit(x, weight, bias, "int8_linear")
    check_kind(x, [bias], "int8_linear")
    kinds = weight.dtype, scale.dtype, scale.shape, weight.device, scale.device
    wide = torch.promote_types(scale.dtype, torch.float32)
    if kinds != (torch.int8, wide, weight.shape[:1], x.device, x.device):
        raise ValueError(
            f"int8_linear needs an int8 weight and its scale ({weight.shape[0]},) in fp32 on "
            f"{x.device}, got {weight.dtype} on {weight.device} and {scale.dtype} "
            f"{tuple(scale.shape)} on {scale.device}; change a model's dtype before it is in int8"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (scale, bias)):
        raise ValueError("int8_linear has no gradient of its scale and bias: freeze them")


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return `ops.linear` of the weight that an int8 one stands for, without keeping that weight.

    weight: (O, C) int8 and scale: (O,) fp32, as `quantize` returns them; both, and bias, are
    frozen. The rest is as for `ops.linear`. The product has x's dtype, or autocast's.

    Raises ValueError for inputs that do not fit and for a scale or bias that wants a gradient.
    """
    _check(x, weight, scale, bias)
    shape = *x.shape[:-1], weight.shape[0]
    if residual is not None and residual.shape != shape:
        raise ValueError(f"int8_linear's residual must be {shape}, got {tuple(residual.shape)}")
    fused = residual is not None and fuses_residual(residual, x)
    added = residual.reshape(-1, shape[-1]) if residual is not None and fused else None
    norms, rows = norm_arguments(x, norm, "int8_linear"), x.reshape(-1, x.shape[-1])  # (N, C)
    tensors = weight, scale, bias, added
    y = _Int8Linear.apply(rows, *norms, *tensors, _dtypes(x, scale)).view(shape)
    return y if fused or residual is None else residual + y
