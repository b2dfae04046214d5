"""The perceptron of a GPT-2 block, in plain PyTorch.

    h = norm(x) fc_weight^T + fc_bias;  y = gelu(h) proj_weight^T + proj_bias [+ x]
The norm and the dtypes are those of linear.py, GELU has its tanh form (Hendrycks & Gimpel, 2016).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.kernels.reference.linear import column_sums, norm_bwd, norm_fwd
from gptfast.kernels.reference.matmul import linear_product, product


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
    """Return y (N, O), h (N, F) and stats (N, 2).

    x: (N, C), fc_weight: (F, C), proj_weight: (O, F). dtype: of the products; None for the
    weights'. y has it, or fp32 with a residual in fp32.
    """
    dtype = dtype or fc_weight.dtype
    a, stats = norm_fwd(x, norm_weight, norm_bias, eps, dtype)
    h = linear_product(a, fc_weight.to(dtype), fc_bias.to(dtype))
    g = F.gelu(h, approximate="tanh")
    y = linear_product(g, proj_weight.to(dtype), proj_bias.to(dtype))
    return (x + y if residual else y), h, stats


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
    """Return dx, dnorm_weight, dnorm_bias, dfc_weight, dfc_bias, dproj_weight and dproj_bias.

    A gradient is empty if it is not needed or its parameter is None.
    """
    dtype = dtype or fc_weight.dtype
    dresidual, dy = dy.to(x.dtype), dy.to(dtype)
    dh = torch.ops.aten.gelu_backward(product(dy, proj_weight.to(dtype)), h, approximate="tanh")
    dx, dnorm_weight, dnorm_bias = (fc_weight.new_empty(0) for _ in range(3))
    dfc, dfc_bias, dproj, dproj_bias = (fc_weight.new_empty(0) for _ in range(4))
    if need_dproj:
        dproj = product(dy.T, F.gelu(h, approximate="tanh")).to(proj_weight.dtype)
        dproj_bias = column_sums(dy, proj_bias.dtype)
    if need_dfc:
        a = norm_fwd(x, norm_weight, norm_bias, eps, dtype)[0]
        dfc, dfc_bias = product(dh.T, a).to(fc_weight.dtype), column_sums(dh, fc_bias.dtype)
    if need_dx:
        da = product(dh, fc_weight.to(dtype))
        dx, dnorm_weight, dnorm_bias = norm_bwd(da, x, norm_weight, norm_bias, stats)
        dx = dx + dresidual if residual else dx
    return dx, dnorm_weight, dnorm_bias, dfc, dfc_bias, dproj, dproj_bias
