"""The perceptron of a GPT-2 block; kernels/reference/mlp.py is the definition.

    h = norm(x) fc_weight^T + fc_bias;  y = gelu(h) proj_weight^T + proj_bias [+ x]

As in linear.py, the library computes the products and our kernels everything between them. GELU
has its own launches: the library could compute it with the first product, but would not return h,
which the backward needs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.kernels.reference import mlp as reference
from gptfast.kernels.triton.column_sums import column_sums
from gptfast.kernels.triton.gelu import gelu_bwd_, gelu_fwd
from gptfast.kernels.triton.linear import with_residual
from gptfast.kernels.triton.norm import norm_bwd, norm_fwd


def mlp_fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    residual: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (N, O), h (N, F) and stats (N, 2)."""
    if torch.float64 in (x.dtype, fc_weight.dtype) or dtype is not None:  # as in linear.py
        layers = fc_weight, fc_bias, proj_weight, proj_bias
        return reference.mlp_fwd(x, norm_weight, norm_bias, eps, *layers, residual, dtype)
    a, stats = norm_fwd(x, norm_weight, norm_bias, eps, fc_weight.dtype)
    h = F.linear(a, fc_weight, fc_bias)
    y = F.linear(gelu_fwd(h), proj_weight, proj_bias)
    return with_residual(y, x if residual else None), h, stats


def mlp_bwd(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    residual: bool,
    need_dx: bool,
    need_dfc: bool,
    need_dproj: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dnorm_weight, dnorm_bias, dfc_weight, dfc_bias, dproj_weight and dproj_bias."""
    norm = norm_weight, norm_bias
    if torch.float64 in (x.dtype, fc_weight.dtype) or dtype is not None:
        layers = fc_weight, fc_bias, proj_weight, proj_bias
        needs = need_dx, need_dfc, need_dproj
        return reference.mlp_bwd(dy, x, h, stats, *norm, eps, *layers, residual, *needs, dtype)
    dresidual = dy.contiguous() if residual else None
    dy, h = dy.to(fc_weight.dtype).contiguous(), h.contiguous()
    if need_dx or need_dfc:
        dg = torch.mm(dy, proj_weight)
        dh, g, dfc_bias = gelu_bwd_(dg, h, with_g=need_dproj, with_sums=need_dfc)
    else:
        dh, g, dfc_bias = dy.new_empty(0), gelu_fwd(h), dy.new_empty(0)
    dproj = torch.mm(dy.t(), g) if need_dproj else dy.new_empty(0)
    dproj_bias = column_sums(dy) if need_dproj else dy.new_empty(0)
    del g  # one of the largest tensors; the rest can use its memory
    a = None
    if need_dx:
        da = torch.mm(dh, fc_weight)
        dx, dnorm_weight, dnorm_bias, a = norm_bwd(
            da, x, *norm, stats, dresidual=dresidual, with_a=need_dfc
        )
    else:
        dx, dnorm_weight, dnorm_bias = (dy.new_empty(0) for _ in range(3))
    if need_dfc and a is None:
        a = norm_fwd(x, *norm, eps, fc_weight.dtype)[0]
    dfc = torch.mm(dh.t(), a) if a is not None else dy.new_empty(0)
    return dx, dnorm_weight, dnorm_bias, dfc, dfc_bias, dproj, dproj_bias
