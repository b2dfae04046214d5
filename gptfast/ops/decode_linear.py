"""A linear layer for generation, without a backward kernel: schema, fake, public function."""

import torch
from torch import Tensor

from gptfast.kernels.reference import decode_linear as reference
from gptfast.ops.autograd import register_reference_autograd
from gptfast.ops.library import register
from gptfast.ops.linear import Norm, norm_arguments


def _fake(x, norm_weight, norm_bias, eps, weight, scale, bias, residual, gelu, fp32_out):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(x.dtype, torch.float32) if fp32_out else x.dtype
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


_op = register(
    "decode_linear(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, "
    "Tensor? scale, Tensor? bias, Tensor? residual, bool gelu, bool fp32_out) -> Tensor",
    reference.decode_linear,
    _fake,
)
register_reference_autograd(_op)


def _check(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"decode_linear needs x (..., C) and weight (O, C), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not x.is_floating_point() or weight.dtype not in (torch.int8, x.dtype):
        raise ValueError(
            f"decode_linear needs floating-point x and a weight of its dtype or int8, got "
            f"{x.dtype} and {weight.dtype}"
        )
    n_out = weight.shape[0]
    shapes = {"scale": (n_out,), "bias": (n_out,), "residual": (*x.shape[:-1], n_out)}
    dtypes = {"scale": torch.promote_types(x.dtype, torch.float32)}
    for name, given in (("scale", scale), ("bias", bias), ("residual", residual)):
        expected = shapes[name], dtypes.get(name, x.dtype), x.device
        if given is not None and (given.shape, given.dtype, given.device) != expected:
            raise ValueError(
                f"decode_linear's {name} must be {shapes[name]} {expected[1]} on {x.device}, got "
                f"{tuple(given.shape)} {given.dtype} on {given.device}"
            )
    if (scale is not None) != (weight.dtype == torch.int8):
        raise ValueError(
            f"decode_linear needs a scale for an int8 weight only, got {weight.dtype} "
            f"{'without a scale' if scale is None else 'with a scale'}"
        )


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gelu: bool = False,
    fp32_out: bool = False,
) -> Tensor:
    """Return a linear layer of x, after a layer norm, with GELU and a residual, if asked for.

    y = scale * (norm(x) weight^T) + bias, then GELU in its tanh form, then + residual.

    x: (..., C) floating; weight: (O, C) in x's dtype, or int8 with scale (O,) fp32, as `quantize`
    in kernels/reference/decode_linear.py makes them; bias: (O,), residual: (..., O) in x's dtype;
    norm: (weight (C,), bias (C,), eps). Returns (..., O) in x's dtype, with fp32_out in fp32, in
    which all is computed. For inference: where a gradient is asked for, the reference computes it.

    Raises ValueError for inputs that do not fit.
    """
    _check(x, weight, scale, bias, residual)
    n_out = weight.shape[0]
    passed = None if residual is None else residual.reshape(-1, n_out)
    rows, norms = x.reshape(-1, x.shape[-1]), norm_arguments(x, norm, "decode_linear")
    y = _op(rows, *norms, weight, scale, bias, passed, gelu, fp32_out)
    return y.view(*x.shape[:-1], n_out)
