"""Cross entropy over rows of logits, alone or after the LM head, in plain PyTorch.

For a row with target t, smoothing e and vocabulary size V:
    top = max_j x_j,  s_j = x_j - top,  exp_sum = sum_j exp(s_j),  lse = top + log(exp_sum)
    log p_j = s_j - log(exp_sum)
    loss = -(1 - e) * log p_t - e * mean_j log p_j + z_loss * lse^2
    dx_j = dloss * (p_j - (1 - e) [j = t] - e / V + 2 z_loss lse p_j)
Only z_loss has lse as a whole: next to a large top the sum would round away. A row whose target is
ignore_index has loss 0 and gradient 0 for any logits and any dloss.
"""

import torch
from torch import Tensor

from gptfast.kernels.reference.matmul import product
from gptfast.kernels.reference.readable import is_readable


def check_targets(target: Tensor, V: int, ignore_index: int) -> None:
    """Raise IndexError for a target outside [0, V), where targets can be read."""
    if not is_readable(target):
        return
    bad = target[((target < 0) | (target >= V)) & (target != ignore_index)]
    if bad.numel():
        raise IndexError(
            f"target {bad[0].item()} is out of range for a vocabulary of {V}; "
            f"targets lie in [0, {V}) or equal ignore_index ({ignore_index})"
        )


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Return loss (N,), fp32 (fp64 for fp64 logits), and stats (N, 2), fp64.

    logits: (N, V), target: (N,). stats holds top and exp_sum of each row, 0 if it is ignored.
    The loss can be differentiated any number of times.
    """
    V = logits.shape[-1]
    check_targets(target, V, ignore_index)
    ignored = target == ignore_index
    in_range = (target >= 0) & (target < V)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Autograd multiplies a gradient of 0 by what an ignored row holds, NaN for example.
    x = torch.where(ignored[:, None], 0.0, x)
    # The result would be the same for any other top, so it is a constant to autograd.
    top = x.detach().amax(-1)
    s = x - top[:, None]
    exp_sum = s.exp().sum(-1)
    log_p = s - exp_sum.log()[:, None]
    loss = -log_p.gather(-1, target.where(in_range, 0)[:, None])[:, 0]
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(-1)
    if z_loss > 0:
        # From x anew: so autograd rounds the sum of both gradients once, as the formula does.
        lse = top + (x - top[:, None]).logsumexp(-1)
        loss = loss + z_loss * lse.square()
    # A target may be out of range where it could not be read, on a GPU for example: NaN.
    loss = torch.where(in_range, loss, torch.nan)
    stats = torch.stack([top, exp_sum], -1).double()
    return torch.where(ignored, 0.0, loss), torch.where(ignored[:, None], 0.0, stats)


def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Return dlogits (N, V) in the logits' dtype for dloss (N,)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    V = logits.shape[-1]
    p = torch.softmax(logits.to(dtype), -1)
    onehot = torch.arange(V, device=logits.device) == target[:, None]
    share = label_smoothing / V
    dlogits = p - torch.full_like(p, share).masked_fill(onehot, 1 - label_smoothing + share)
    if z_loss > 0:
        top, exp_sum = stats.unbind(-1)
        lse = (top + exp_sum.log()).to(dtype)
        dlogits = dlogits + 2 * z_loss * lse[:, None] * p
    dlogits = dlogits * dloss.to(dtype)[:, None]
    ignored = (target == ignore_index)[:, None]
    return dlogits.masked_fill(ignored, 0.0).to(logits.dtype).contiguous()


def linear_cross_entropy_fwd(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    skip_below: float = 0.0,
) -> Tensor:
    """Return loss (N,), fp32 (fp64 for fp64 input).

    input: (N, C), linear_weight: (V, C), rounded to the input's dtype, target: (N,). skip_below is
    for the gradient.
    """
    logits = product(input, linear_weight.to(input.dtype).T)
    return cross_entropy_fwd(logits, target, ignore_index, label_smoothing, z_loss)[0]


def linear_cross_entropy_fwd_bwd(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    dloss: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    skip_below: float = 0.0,
    need_dweight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum(loss * dloss), dinput (N, C) and dlinear_weight (V, C) for dloss (N,).

    linear_weight is rounded to the input's dtype; its gradient has the dtype of linear_weight. To
    save products, a kernel may replace entries of dlogits by 0 if they are at most
    skip_below * |dloss|; the reference does not. need_dweight: False computes no gradient of
    linear_weight, and returns one of shape (0,).
    """
    weight = linear_weight.to(input.dtype)
    logits = product(input, weight.T)
    options = (ignore_index, label_smoothing, z_loss)
    loss, stats = cross_entropy_fwd(logits, target, *options)
    dlogits = cross_entropy_bwd(dloss, logits, target, stats, *options)
    dtype = linear_weight.dtype
    if need_dweight:
        dlinear_weight = product(dlogits.to(dtype).T, input.to(dtype))
    else:
        dlinear_weight = linear_weight.new_empty(0)
    return (loss * dloss).sum(), product(dlogits, weight), dlinear_weight


def gradient_factors(target: Tensor, factor: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return what to multiply dinput (N, C) and dlinear_weight (V, C) by, for a scalar factor.

    It is 1 where the gradient is 0 because of ignored targets: 0 times inf or NaN would be NaN.
    """
    counts = target != ignore_index
    return torch.where(counts, factor, 1.0)[:, None], torch.where(counts.any(), factor, 1.0)


def scale_(
    dinput: Tensor, dlinear_weight: Tensor, target: Tensor, factor: Tensor, ignore_index: int
) -> None:
    """Multiply both gradients by a scalar, in place; a factor of 1 writes nothing.

    The gradient of ignored rows stays 0, whatever the factor.
    """
    # Only on the CPU: reading the factor of a GPU would synchronise.
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return
    dinput_factor, dweight_factor = gradient_factors(target, factor, ignore_index)
    dinput.mul_(dinput_factor.to(dinput.dtype))
    dlinear_weight.mul_(dweight_factor.to(dlinear_weight.dtype))
