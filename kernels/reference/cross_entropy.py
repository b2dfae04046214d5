"""Cross entropy over rows of logits, alone or after the LM head, in plain PyTorch.

For a row with target t, smoothing e and vocabulary size V:
    lse = log sum_j exp(x_j)
    loss = (1 - e) * (lse - x_t) + e * (lse - mean_j x_j) + z_loss * lse^2
    p_j = exp(x_j - lse)
    dx_j = dloss * ((1 - e) * (p_j - [j = t]) + e * (p_j - 1 / V) + 2 z_loss lse p_j)
A row whose target is ignore_index has loss 0 and gradient 0 for any dloss.
"""

import torch
from torch import Tensor

from gptfast.kernels.reference.vmap import is_batched


def check_targets(target: Tensor, V: int, ignore_index: int) -> None:
    """Raise IndexError for a target outside [0, V), on the CPU and not under vmap.

    A GPU would have to synchronise.
    """
    if target.device.type != "cpu" or is_batched(target):
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
    """Return loss (N,), fp32 (fp64 for fp64 logits), and lse (N,), fp64.

    logits: (N, V), target: (N,).
    """
    V = logits.shape[-1]
    check_targets(target, V, ignore_index)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = torch.logsumexp(x, -1)
    ignored = target == ignore_index
    in_range = (target >= 0) & (target < V)
    picked = x.gather(-1, target.where(in_range, 0)[:, None])[:, 0]
    loss = (1 - label_smoothing) * (lse - picked)
    if label_smoothing > 0:
        loss = loss + label_smoothing * (lse - x.mean(-1))
    if z_loss > 0:
        loss = loss + z_loss * lse.square()
    # Only on a GPU or under vmap can a target be out of range here; its loss becomes NaN.
    loss = torch.where(in_range, loss, torch.nan)
    return torch.where(ignored, 0.0, loss), lse.double()


def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Return dlogits (N, V) in the logits' dtype for dloss (N,)."""
    V = logits.shape[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p = torch.softmax(logits.to(dtype), -1)
    onehot = torch.arange(V, device=logits.device) == target[:, None]
    dlogits = (1 - label_smoothing) * (p - onehot.to(dtype))
    if label_smoothing > 0:
        dlogits = dlogits + label_smoothing * (p - 1 / V)
    if z_loss > 0:
        dlogits = dlogits + 2 * z_loss * lse.to(dtype)[:, None] * p
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
    logits = input @ linear_weight.to(input.dtype).T
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum(loss * dloss), dinput (N, C) and dlinear_weight (V, C) for dloss (N,).

    linear_weight is rounded to the input's dtype; its gradient has the dtype of linear_weight. To
    save products, a kernel may replace entries of dlogits by 0 if they are at most
    skip_below * |dloss|; the reference does not.
    """
    weight = linear_weight.to(input.dtype)
    logits = input @ weight.T
    options = (ignore_index, label_smoothing, z_loss)
    loss, lse = cross_entropy_fwd(logits, target, *options)
    dlogits = cross_entropy_bwd(dloss, logits, target, lse, *options)
    dtype = linear_weight.dtype
    return (loss * dloss).sum(), dlogits @ weight, dlogits.to(dtype).T @ input.to(dtype)


def scale_(x: list[Tensor], factor: Tensor) -> None:
    """Multiply every x by a scalar, in place; a factor of 1 writes nothing."""
    # Only on the CPU: reading the factor of a GPU would synchronise.
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return
    for t in x:
        t.mul_(factor.to(t.dtype))
