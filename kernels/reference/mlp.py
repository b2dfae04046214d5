"""The perceptron of a GPT-2 block, in plain PyTorch.

    h = norm(x) fc_weight^T + fc_bias;  y = gelu(h) proj_weight^T + proj_bias [+ x]
The norm is that of linear.py, GELU has its tanh form (Hendrycks & Gimpel, 2016).
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (N, O), h (N, F) and stats (N, 2).

    x: (N, C), fc_weight: (F, C), proj_weight: (O, F).
    """
    a, stats = norm_fwd(x, norm_weight, norm_bias, eps, fc_weight.dtype)
    h = linear_product(a, fc_weight, fc_bias)
    y = linear_product(F.gelu(h, approximate="tanh"), proj_weight, proj_bias)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dnorm_weight, dnorm_bias, dfc_weight, dfc_bias, dproj_weight and dproj_bias.

    A gradient is empty if it is not needed or its parameter is None.
    """
    dy = dy.to(fc_weight.dtype)
    dh = torch.ops.aten.gelu_backward(product(dy, proj_weight), h, approximate="tanh")
    dx, dnorm_weight, dnorm_bias = (dy.new_empty(0) for _ in range(3))
    dfc, dfc_bias, dproj, dproj_bias = (dy.new_empty(0) for _ in range(4))
    if need_dproj:
        dproj = product(dy.T, F.gelu(h, approximate="tanh"))
        dproj_bias = column_sums(dy)
    if need_dfc:
        dfc = product(dh.T, norm_fwd(x, norm_weight, norm_bias, eps, fc_weight.dtype)[0])
        dfc_bias = column_sums(dh)
    if need_dx:
        dx, dnorm_weight, dnorm_bias = norm_bwd(
            product(dh, fc_weight), x, norm_weight, norm_bias, stats
        )
        dx = dx + dy if residual else dx
    return dx, dnorm_weight, dnorm_bias, dfc, dfc_bias, dproj, dproj_bias
