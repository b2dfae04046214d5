"""A linear layer, with or without a layer norm before it, in plain PyTorch.

    a = norm_weight * (x - mean(x)) / sqrt(var(x) + eps) + norm_bias
    y = a weight^T + bias + residual
The mean and the variance are over the channels; a is computed in fp32 and rounded to the product's
dtype. Without a norm, a is x in that dtype.

A product has its weight's dtype, or one that autocast asks for, to which its parameters are then
rounded. Their gradients have their own dtypes: a kernel may round the sums of a product to such a
dtype at once, without the product's dtype in between.
"""

import torch
from torch import Tensor

from gptfast.kernels.reference.matmul import linear_product, product


def norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return x (N, C) normalised, in dtype, and stats (N, 2): mean, 1 / standard deviation.

    Without a weight, return x in dtype and empty stats.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight is None:
        return x.to(dtype), x.new_empty(0, 2, dtype=wide)
    assert bias is not None
    y, mean, inverse = torch.native_layer_norm(
        x.to(wide), x.shape[1:], weight.to(wide), bias.to(wide), eps
    )
    return y.to(dtype), torch.cat((mean, inverse), -1)


def norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias; without a weight, dy and two empty tensors."""
    if weight is None:
        return dy.to(x.dtype), dy.new_empty(0), dy.new_empty(0)
    assert bias is not None
    # PyTorch's backward reads both as contiguous tensors.
    mean, inverse = (part.contiguous() for part in stats.split(1, -1))
    wide = stats.dtype
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide),
        x.to(wide),
        x.shape[1:],
        mean,
        inverse,
        weight.to(wide),
        bias.to(wide),
        [True, True, True],
    )
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums (C,) of the columns of x (N, C), added in fp32, in dtype."""
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(dtype)


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
    """Return y (N, O), and the stats of `norm_fwd`.

    x: (N, C), weight: (O, C), bias: (O,), residual: (N, O). dtype: of the product; None for
    weight's. y has it, or fp32 with a residual in fp32.
    """
    dtype = dtype or weight.dtype
    a, stats = norm_fwd(x, norm_weight, norm_bias, eps, dtype)
    y = linear_product(a, weight.to(dtype), None if bias is None else bias.to(dtype))
    return (y if residual is None else residual + y), stats


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
    """Return dx, dnorm_weight, dnorm_bias, dweight and dbias.

    A gradient is empty if it is not needed or its parameter is None.
    """
    dtype = dtype or weight.dtype
    dy = dy.to(dtype)
    dx, dnorm_weight, dnorm_bias, dweight, dbias = (weight.new_empty(0) for _ in range(5))
    if need_dweight:
        dweight = product(dy.T, norm_fwd(x, norm_weight, norm_bias, eps, dtype)[0]).to(weight.dtype)
        if bias is not None:
            dbias = column_sums(dy, bias.dtype)
    if need_dx:
        da = product(dy, weight.to(dtype))
        dx, dnorm_weight, dnorm_bias = norm_bwd(da, x, norm_weight, norm_bias, stats)
    return dx, dnorm_weight, dnorm_bias, dweight, dbias
