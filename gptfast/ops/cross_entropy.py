"""Cross entropy, alone and with the LM head: schema, fake, autograd, public functions."""

from contextlib import nullcontext

import torch
from torch import Tensor

from gptfast.kernels.reference import cross_entropy as reference
from gptfast.ops.autograd import gradients, is_batch, needs_reference, register_autograd
from gptfast.ops.library import autocast_enabled, register, register_autocast
from gptfast.ops.linear import gradient_fake
from gptfast.torch_private import keeps_graph

_OPTIONS = "int ignore_index, float label_smoothing, float z_loss"
_LINEAR_OPTIONS = f"{_OPTIONS}, float skip_below=0.0"


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fwd_fake(logits, target, ignore_index, label_smoothing, z_loss):  # type: ignore[no-untyped-def]
    loss = logits.new_empty(logits.shape[0], dtype=_loss_dtype(logits))
    return loss, loss.new_empty(loss.shape[0], 2, dtype=torch.float64)


def _bwd_fake(dloss, logits, target, stats, ignore_index, label_smoothing, z_loss):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _linear_fwd_fake(  # type: ignore[no-untyped-def]
    input, linear_weight, target, ignore_index, label_smoothing, z_loss, skip_below=0.0
):
    return input.new_empty(input.shape[0], dtype=_loss_dtype(input))


def _linear_fwd_bwd_fake(  # type: ignore[no-untyped-def]
    input,
    linear_weight,
    target,
    dloss,
    ignore_index,
    label_smoothing,
    z_loss,
    skip_below=0.0,
    need_dweight=True,
):
    total = input.new_empty((), dtype=_loss_dtype(input))
    dlinear_weight = gradient_fake(need_dweight, linear_weight, linear_weight)
    return total, input.new_empty(input.shape), dlinear_weight


def _scale_fake(dinput, dlinear_weight, target, factor, ignore_index):  # type: ignore[no-untyped-def]
    return None


_fwd = register(
    f"cross_entropy_fwd(Tensor logits, Tensor target, {_OPTIONS}) -> (Tensor loss, Tensor stats)",
    reference.cross_entropy_fwd,
    _fwd_fake,
)
_bwd = register(
    f"cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor stats, {_OPTIONS}) "
    "-> Tensor dlogits",
    reference.cross_entropy_bwd,
    _bwd_fake,
)
_linear_fwd = register(
    "linear_cross_entropy_fwd(Tensor input, Tensor linear_weight, Tensor target, "
    f"{_LINEAR_OPTIONS}) -> Tensor loss",
    reference.linear_cross_entropy_fwd,
    _linear_fwd_fake,
)
_linear_fwd_bwd = register(
    "linear_cross_entropy_fwd_bwd(Tensor input, Tensor linear_weight, Tensor target, Tensor dloss, "
    f"{_LINEAR_OPTIONS}, bool need_dweight=True) "
    "-> (Tensor total, Tensor dinput, Tensor dlinear_weight)",
    reference.linear_cross_entropy_fwd_bwd,
    _linear_fwd_bwd_fake,
)
_scale = register(
    "scale_(Tensor(a!) dinput, Tensor(b!) dlinear_weight, Tensor target, Tensor factor, "
    "int ignore_index) -> ()",
    reference.scale_,
    _scale_fake,
)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, target, *ctx.options = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, dstats):  # type: ignore[no-untyped-def]
    if dloss is None:
        return (None,) * 5
    logits, target, stats = ctx.saved_tensors
    if needs_reference():
        forward = lambda x: reference.cross_entropy_fwd(x, target, *ctx.options)[0]  # noqa: E731
        return *gradients(forward, (logits,), dloss), None, None, None, None
    return _bwd(dloss, logits, target, stats, *ctx.options), None, None, None, None


def _linear_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    input, linear_weight, target, *ctx.options = inputs
    ctx.save_for_backward(input, linear_weight, target)


def _linear_backward(ctx, dloss):  # type: ignore[no-untyped-def]
    input, linear_weight, target = ctx.saved_tensors
    if needs_reference():
        grads = _linear_gradients(input, linear_weight, target, dloss, ctx.options)
    else:
        needed = ctx.needs_input_grad[1]
        arguments = (input, linear_weight, target, dloss, *ctx.options, needed)
        dinput, dlinear_weight = _linear_fwd_bwd(*arguments)[1:]
        grads = [dinput, dlinear_weight if needed else None]
    return *grads, *(None,) * 5


def _linear_gradients(
    input: Tensor, linear_weight: Tensor, target: Tensor, dloss: Tensor, options: list
) -> list[Tensor | None]:
    """Return dinput and dlinear_weight, which can be differentiated again."""
    return gradients(
        lambda x, weight: reference.linear_cross_entropy_fwd(x, weight, target, *options),
        (input, linear_weight),
        dloss,
    )


def _fused_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    # Else autograd would fill a (V, C) gradient with zeros for each output without one.
    ctx.set_materialize_grads(False)
    input, linear_weight, target, dloss, *ctx.options, ctx.has_dweight = inputs
    # The inputs are for a second derivative.
    ctx.save_for_backward(input, linear_weight, target, dloss, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _fused_backward(ctx, dtotal, _, __):  # type: ignore[no-untyped-def]
    if dtotal is None:
        return (None,) * 9
    input, linear_weight, target, dloss, *grads = ctx.saved_tensors
    if ctx.needs_input_grad[3]:
        raise RuntimeError(
            "linear_cross_entropy_fwd_bwd has no derivative with respect to dloss; "
            'use linear_cross_entropy with reduction="none"'
        )
    if ctx.needs_input_grad[1] and not ctx.has_dweight:
        raise RuntimeError("need_dweight=False left out the gradient of linear_weight")
    if needs_reference():
        scaled = dloss * dtotal.to(dloss.dtype)
        grads = _linear_gradients(input, linear_weight, target, scaled, ctx.options)
    # The forward computed both gradients for dtotal = 1.
    elif _owned(dtotal):
        _scale(*grads, target, dtotal, ctx.options[0])
    else:
        factors = reference.gradient_factors(target, dtotal, ctx.options[0])
        grads = [grad * f.to(grad.dtype) for grad, f in zip(grads, factors, strict=True)]
    dinput, dlinear_weight = grads
    return dinput, dlinear_weight if ctx.has_dweight else None, *(None,) * 7


def _owned(dtotal: Tensor) -> bool:
    """Return whether the saved gradients may be changed and returned, without a (V, C) copy.

    They may not while tracing, where only functional code is allowed, nor where another backward
    will use the graph again, nor for a batch of dtotal.
    """
    return type(dtotal) is Tensor and not keeps_graph() and not is_batch(dtotal)


register_autograd(_fwd, _backward, _setup)
register_autograd(_linear_fwd, _linear_backward, _linear_setup)
register_autograd(_linear_fwd_bwd, _fused_backward, _fused_setup)
# The kernels accumulate in fp32 whatever the logits' dtype, so `_fwd` has nothing to cast.
# The weight is cast inside the operator, so that its gradient can be added up in its own dtype.
register_autocast(_linear_fwd, tensors=range(1))
register_autocast(_linear_fwd_bwd, tensors=range(1))


def _check(
    x: Tensor, target: Tensor, label_smoothing: float, z_loss: float, reduction: str
) -> None:
    if not x.is_floating_point():
        raise ValueError(f"cross entropy needs floating-point inputs, got {x.dtype}")
    if target.dtype != torch.int64 or target.shape != x.shape[:-1]:
        raise ValueError(
            f"target must be int64 of shape {tuple(x.shape[:-1])}, "
            f"got {target.dtype} of shape {tuple(target.shape)}"
        )
    if target.device != x.device:
        raise ValueError(f"target is on {target.device}, the input on {x.device}; move one of them")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must be >= 0, got {z_loss}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _result_dtype(x: Tensor) -> torch.dtype:
    # As F.cross_entropy: the input's dtype, fp32 under autocast.
    autocast = autocast_enabled(x) and x.dtype != torch.float64
    return torch.float32 if autocast else x.dtype


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return softmax cross entropy, with the values and gradients of `F.cross_entropy`.

    logits: (N, V) floating; target: (N,) int64 in [0, V) or equal to ignore_index.
    z_loss adds z_loss * logsumexp(logits)^2 to each row that counts (PaLM, section 5).
    reduction: "mean" over the rows that count (all ignored: NaN with zero gradient), "sum", "none".

    Returns a scalar, or (N,) for "none", accumulated in fp32 and given in the logits' dtype (fp32
    under autocast). Raises ValueError for inputs that do not fit and, on the CPU, IndexError for a
    target out of range; on a GPU its loss is NaN.
    """
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be (N, V) with V >= 1, got {tuple(logits.shape)}")
    _check(logits, target, label_smoothing, z_loss, reduction)
    loss = _fwd(logits, target, ignore_index, label_smoothing, z_loss)[0]
    if reduction == "mean":
        loss = loss.sum(dtype=torch.float64) / (target != ignore_index).sum()
    elif reduction == "sum":
        loss = loss.sum(dtype=torch.float64)
    return loss.to(_result_dtype(logits))


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    skip_below: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return the `cross_entropy` of the logits input @ linear_weight.T, which never exist at once.

    input: (..., C); linear_weight: (V, C) in the same dtype; target: (...) int64. The N rows are
    handled in chunks. For "mean" and "sum" the forward computes the gradient too, so that a
    training step costs three matrix products, or two if linear_weight requires no gradient.
    skip_below, in [0, 1): gradients of logits that are at most skip_below times their row's share
    of the loss (1 / N for the mean) may count as 0, which saves up to two of the products late in
    training. With dloss_i that share, the errors are bounded:
        |error of dinput[i, c]| <= skip_below * |dloss_i| * sum_v |linear_weight[v, c]|
        |error of dlinear_weight[v, c]| <= skip_below * sum_i |dloss_i input[i, c]|
    2^-24 = 6e-8 is fp32's own rounding beside a probability of 1.

    The other arguments, the result and the errors are `cross_entropy`'s; "none" returns (...).
    """
    _check_linear(input, linear_weight)
    _check(input, target, label_smoothing, z_loss, reduction)
    if not 0.0 <= skip_below < 1.0:
        raise ValueError(f"skip_below must be in [0, 1), got {skip_below}")
    x, flat_target = input.reshape(-1, input.shape[-1]), target.reshape(-1)  # (N, C), (N,)
    options = (ignore_index, label_smoothing, z_loss, skip_below)
    if reduction == "none":
        loss = _linear_fwd(x, linear_weight, flat_target, *options).view(target.shape)
        return loss.to(_result_dtype(input))
    share = torch.ones((), dtype=_loss_dtype(x), device=x.device)
    if reduction == "mean":
        share = share / (flat_target != ignore_index).sum()
    if _gradient_in_forward(x, linear_weight):
        shares = share.expand(flat_target.shape)
        needed = linear_weight.requires_grad
        loss = _linear_fwd_bwd(x, linear_weight, flat_target, shares, *options, needed)[0]
    else:
        loss = _linear_fwd(x, linear_weight, flat_target, *options)
        loss = (loss * share).sum(dtype=torch.float64)
    if reduction == "mean":
        loss = loss.where(share.isfinite(), torch.nan)
    return loss.to(_result_dtype(input))


def _check_linear(input: Tensor, linear_weight: Tensor) -> None:
    weight_fits = linear_weight.dim() == 2 and linear_weight.shape[0] >= 1
    if not weight_fits or input.dim() < 1 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            "linear_cross_entropy needs input (..., C) and linear_weight (V, C) with V >= 1, "
            f"got {tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    mixed = input.dtype != linear_weight.dtype and not autocast_enabled(input)
    if input.device != linear_weight.device or mixed:
        raise ValueError(
            f"input and linear_weight need one dtype and one device, got {input.dtype} on "
            f"{input.device} and {linear_weight.dtype} on {linear_weight.device}"
        )


def _gradient_in_forward(x: Tensor, linear_weight: Tensor) -> bool:
    """Return whether the forward computes the gradients too."""
    autocast = autocast_enabled(x)
    # In fp16 a gradient computed before the loss is scaled (GradScaler) would underflow.
    is_fp16 = (torch.get_autocast_dtype(x.device.type) if autocast else x.dtype) == torch.float16
    differentiable = x.requires_grad or linear_weight.requires_grad
    # torch.jit.trace runs the function again, without gradients, and compares the graphs.
    traced = torch.jit.is_tracing()
    return torch.is_grad_enabled() and differentiable and not is_fp16 and not traced


def fp32_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return `linear_cross_entropy`, in fp32 for 16-bit inputs too.

    The result of 16-bit inputs is in their own dtype; under autocast to it, it is in fp32.
    """
    is_16_bit = input.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(input.device.type, dtype=input.dtype) if is_16_bit else nullcontext():
        return linear_cross_entropy(
            input, linear_weight, target, ignore_index=ignore_index, reduction=reduction
        )
