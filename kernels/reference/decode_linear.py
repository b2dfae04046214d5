"""A linear layer of a model that only generates, in plain PyTorch.

    a = norm(x);  y = scale * (a weight^T) + bias;  y = gelu(y) if gelu;  y = y + residual
The norm is that of linear.py, GELU has its tanh form (Hendrycks & Gimpel, 2016), and everything
from x to y is fp32. The weight has x's dtype and no scale, or it is int8 with a scale per output:
    scale_o = max_c |w_oc| / 127, or 1 for a row of zeros;  weight_oc = round(w_oc / scale_o)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.kernels.reference.linear import norm_fwd


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a floating weight (O, C) as int8 in [-127, 127], and its scale (O,), fp32."""
    exact = weight.float()
    scale = exact.abs().amax(1) / 127
    scale = scale.where(scale > 0, 1.0)
    return torch.round(exact / scale[:, None]).clamp(-127, 127).to(torch.int8), scale


def decode_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    fp32_out: bool,
) -> Tensor:
    """Return y (N, O) in x's dtype, or in fp32 if fp32_out (fp64 for fp64 x).

    x: (N, C), weight: (O, C), scale and bias: (O,), residual: (N, O).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = norm_fwd(x, norm_weight, norm_bias, eps, dtype)[0] @ weight.to(dtype).T
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    if gelu:
        y = F.gelu(y, approximate="tanh")
    if residual is not None:
        y = y + residual
    return y if fp32_out else y.to(x.dtype)
