"""A linear layer for few rows; kernels/reference/decode_linear.py is the definition.

    y = scale * (norm(x) weight^T) + bias, then GELU, then + residual

With up to MAX_ROWS rows, reading the weights takes the time. A program loads whole rows of the
weight into registers, all loads in flight at once, and takes the rows of x one after the other,
each with its norm, which then needs no launch. So a row's result does not depend on other rows.
More rows go through tensor cores, after a launch for the norm. Tiles of an int8 weight are
converted in registers, exactly; they are the first factor, which may come from registers. A weight
of x's dtype goes to the library, except for an fp32 result, which the library would round to that
dtype. One tile has up to 64 rows of x, so that such a weight, the head, is read once for them.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.reference import decode_linear as reference
from gptfast.kernels.triton.launch import launch
from gptfast.kernels.triton.launch_series import repeat
from gptfast.kernels.triton.norm import norm_fwd

# Rows of x that the first kernel takes.
MAX_ROWS = 8
# Elements of the weight that a program of the first kernel holds.
WEIGHT_ELEMENTS = 4096
# The reference computes layers with longer rows.
MAX_C = 16384


@triton.jit
def _gelu(y):
    """Return GELU by tanh(z) = 2 sigmoid(2 z) - 1, z = sqrt(2 / pi) (y + 0.044715 y^3)."""
    return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))


# Triton compiles a variant for N = 1: without the loop it takes half the registers.
@triton.jit
def decode_linear_rows_kernel(
    y_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr,
    N, C, n_out, eps, GELU: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    in_o, in_c = o < n_out, c < C
    # int64: a vocabulary times the channels may overflow int32.
    at = o.to(tl.int64)[:, None] * C + c[None, :]
    weight = tl.load(weight_ptr + at, mask=in_o[:, None] & in_c[None, :], other=0)
    share = tl.div_rn(1.0, C * 1.0)
    for n in range(N):
        x = tl.load(x_ptr + n * C + c, mask=in_c, other=0.0).to(tl.float32)
        if norm_weight_ptr is not None:
            x = tl.where(in_c, x - tl.sum(x, 0) * share, 0.0)
            x *= tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) * share + eps))
            x *= tl.load(norm_weight_ptr + c, mask=in_c, other=0.0).to(tl.float32)
            x += tl.load(norm_bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
        y = tl.sum(weight.to(tl.float32) * x[None, :], 1)
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + o, mask=in_o, other=0.0)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)
        if GELU:
            y = _gelu(y)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + n * n_out + o, mask=in_o, other=0.0).to(tl.float32)
        tl.store(y_ptr + n * n_out + o, y.to(y_ptr.dtype.element_ty), mask=in_o)


@triton.jit
def decode_linear_tiles_kernel(
    y_ptr, x_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, N, C, n_out,
    GELU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    in_n, in_o = n < N, o < n_out
    x_ptrs = x_ptr + n.to(tl.int64)[:, None] * C + c[None, :]
    weight_ptrs = weight_ptr + o.to(tl.int64)[:, None] * C + c[None, :]
    acc = tl.zeros([BLOCK_O, BLOCK_N], tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        in_c = (start + c < C)[None, :]
        weight = tl.load(weight_ptrs + start, mask=in_o[:, None] & in_c, other=0)
        x = tl.load(x_ptrs + start, mask=in_n[:, None] & in_c, other=0.0)
        acc = tl.dot(weight.to(x.dtype), tl.trans(x), acc, input_precision="ieee")
    y = acc
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + o, mask=in_o, other=0.0)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)[:, None]
    if GELU:
        y = _gelu(y)
    at = n.to(tl.int64)[None, :] * n_out + o[:, None]
    inside = in_o[:, None] & in_n[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def tile(
    N: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the constexprs that shape the second kernel, and the options of its launch."""
    # Few rows: narrow tiles, so that every multiprocessor has a program, and deep, for few steps.
    blocks, warps, stages = (16, 16, 256), 4, 3
    if dtype == torch.float32:
        blocks, warps, stages = (32, 32, 32), 4, 2
    elif weight_dtype == dtype:
        # This is the head, which is long enough for wide tiles. With four warps, sm_80 spills.
        blocks, warps, stages = (64, 128, 64), 8, 3
    elif N > 16:
        blocks, warps, stages = (64, 128, 64), 4, 3
    names = ("BLOCK_N", "BLOCK_O", "BLOCK_C")
    return dict(zip(names, blocks, strict=True)), {"num_warps": warps, "num_stages": stages}


def _by_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool
) -> Tensor:
    """Return the layer without a norm, computed by PyTorch."""
    y = F.linear(x, weight, bias)
    y = F.gelu(y, approximate="tanh") if gelu else y
    return y if residual is None else residual + y


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
    """Return y (N, O) for x (N, C), in x's dtype, or in fp32 if fp32_out."""
    (N, C), n_out = x.shape, weight.shape[0]
    if C > MAX_C:
        layer = (weight, scale, bias, residual, gelu, fp32_out)
        return reference.decode_linear(x, norm_weight, norm_bias, eps, *layer)
    dtype = torch.float32 if fp32_out else x.dtype
    y = x.new_empty(N, n_out, dtype=dtype)
    if not y.numel():
        return y
    x, weight = x.contiguous(), weight.contiguous()
    norm = [None if t is None else t.contiguous() for t in (norm_weight, norm_bias)]
    scale, bias, residual = (None if t is None else t.contiguous() for t in (scale, bias, residual))
    if N <= MAX_ROWS:
        repeat(_launch_rows, (y, x, *norm, weight, scale, bias, residual), eps, gelu)
        return y
    if norm_weight is not None:
        x = norm_fwd(x, norm_weight, norm_bias, eps, x.dtype)[0]
    if scale is None and x.dtype == dtype:
        return _by_library(x, weight, bias, residual, gelu)
    repeat(_launch_tiles, (y, x, weight, scale, bias, residual), gelu)
    return y


def _launch_rows(
    y: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    gelu: bool,
) -> None:
    (N, C), n_out = x.shape, len(weight)
    BLOCK_C = triton.next_power_of_2(C)
    BLOCK_O = min(64, max(1, WEIGHT_ELEMENTS // BLOCK_C))
    launch(
        decode_linear_rows_kernel, (triton.cdiv(n_out, BLOCK_O),),
        y, x, norm_weight, norm_bias, weight, scale, bias, residual, N, C, n_out, eps, GELU=gelu,
        BLOCK_O=BLOCK_O, BLOCK_C=BLOCK_C, num_warps=max(4, BLOCK_C * BLOCK_O // 1024),
    )  # fmt: skip


def _launch_tiles(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
) -> None:
    (N, C), n_out = x.shape, len(weight)
    blocks, options = tile(N, x.dtype, weight.dtype)
    grid = (triton.cdiv(N, blocks["BLOCK_N"]), triton.cdiv(n_out, blocks["BLOCK_O"]))
    args = (y, x, weight, scale, bias, residual, N, C, n_out)
    launch(decode_linear_tiles_kernel, grid, *args, GELU=gelu, **blocks, **options)
