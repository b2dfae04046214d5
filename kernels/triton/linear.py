"""A linear layer, after a layer norm or not; kernels/reference/linear.py is the definition.

    y = norm(x) weight^T + bias + residual

The library computes the products, the first with the bias in its epilogue. The norm's kernels
(norm.py) read x and write what the products read, each in its own dtype, so nothing is cast in
between; the bias's gradient is summed in two launches (column_sums.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.kernels.reference import linear as reference
from gptfast.kernels.triton.column_sums import column_sums
from gptfast.kernels.triton.norm import norm_bwd, norm_fwd


def with_residual(y: Tensor, residual: Tensor | None) -> Tensor:
    """Return y plus the residual, in fp32 if that is; may write to y."""
    if residual is None:
        return y
    # Not torch.addmm(residual, ...): it copies the residual, which moves as many bytes.
    return y.add_(residual) if residual.dtype == y.dtype else y + residual


def linear_fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y (N, O), and stats (N, 2) of the norm, as the reference does."""
    if torch.float64 in (x.dtype, weight.dtype) or dtype is not None:  # autocast casts on GPUs
        return reference.linear_fwd(x, norm_weight, norm_bias, eps, weight, bias, residual, dtype)
    a, stats = norm_fwd(x, norm_weight, norm_bias, eps, weight.dtype)
    y = F.linear(a, weight, bias)
    return with_residual(y, residual), stats


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    need_dx: bool,
    need_dweight: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dnorm_weight, dnorm_bias, dweight and dbias, as the reference does."""
    if torch.float64 in (x.dtype, weight.dtype) or dtype is not None:
        options = need_dx, need_dweight, dtype
        return reference.linear_bwd(
            dy, x, norm_weight, norm_bias, eps, weight, bias, stats, *options
        )
    dy = dy.to(weight.dtype).contiguous()
    a = None
    if need_dx:
        da = torch.mm(dy, weight)
        dx, dnorm_weight, dnorm_bias, a = norm_bwd(
            da, x, norm_weight, norm_bias, stats, with_a=need_dweight
        )
    else:
        dx, dnorm_weight, dnorm_bias = (dy.new_empty(0) for _ in range(3))
    if need_dweight and a is None:
        a = norm_fwd(x, norm_weight, norm_bias, eps, weight.dtype)[0]
    dweight = torch.mm(dy.t(), a) if a is not None else dy.new_empty(0)
    dbias = column_sums(dy) if need_dweight and bias is not None else dy.new_empty(0)
    return dx, dnorm_weight, dnorm_bias, dweight, dbias
