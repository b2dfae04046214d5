"""A layer norm and its gradients; kernels/reference/linear.py is the definition.

    xhat = (x - mean) / deviation;  a = weight * xhat + bias
    dx = (weight da - mean(weight da) - xhat * mean(weight da xhat)) / deviation + dresidual
    dweight = sum over rows of da * xhat;  dbias = sum over rows of da

A program holds whole rows in registers, so memory is read once; the deviation comes from
differences to the mean. The backward computes a again while it has the row: the weight gradient of
the layer after the norm needs it. A program of the backward adds up dweight and dbias of
ROWS_PER_PROGRAM rows in fp32, and a second launch adds the programs' sums (column_sums.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.reference import linear as reference
from gptfast.kernels.triton import target
from gptfast.kernels.triton.column_sums import column_totals
from gptfast.kernels.triton.launch import launch
from gptfast.kernels.triton.launch_series import repeat, scratch

# The reference computes norms of longer rows: they would not fit in the backward's registers.
MAX_C = 4096
# Rows that a program of the backward takes: 512 programs for 16,384 tokens, four for each
# multiprocessor of an H100. Their sums are 1/8 of x's bytes.
ROWS_PER_PROGRAM = 32
# arch: (least rows at once, elements a warp). The forward has a row within one warp up to 2048
# channels, so its sums need no barrier. In the backward, which holds five rows' worth of numbers
# for each, a thread has 16 elements of x.
TILES = {
    "sm_80": {"fwd": (1, 2048), "bwd": (2, 512)},
    "sm_90": {"fwd": (1, 2048), "bwd": (2, 512)},
    "sm_100": {"fwd": (1, 2048), "bwd": (2, 512)},
    "gfx942": {"fwd": (1, 2048), "bwd": (2, 1024)},
}


def tile(kind: str, C: int) -> dict[str, int]:
    """Return the tile of the forward, "fwd", or the backward, "bwd", for rows of C channels."""
    least_rows, per_warp = TILES[target.arch()][kind]
    block = max(16, triton.next_power_of_2(C))
    rows = max(least_rows, per_warp // block)
    if kind == "bwd":
        rows = min(rows, ROWS_PER_PROGRAM)
    return {"ROWS": rows, "BLOCK_C": block, "num_warps": max(1, rows * block // per_warp)}


@triton.jit
def norm_fwd_kernel(
    a_ptr,
    stats_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    N,
    C,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    inside = (row < N)[:, None] & (c < C)[None, :]
    # int64: row * C overflows int32 at 2.8 million tokens of GPT-2.
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C
    # Far from 0 that sum has rounded; the sum of the differences corrects it.
    mean += tl.sum(tl.where(inside, x - mean[:, None], 0.0), 1) / C
    difference = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(difference * difference, 1) / C
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    # As the backward computes it, to the bit.
    a = difference * inverse[:, None] * weight[None, :] + bias[None, :]
    tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=inside)
    tl.store(stats_ptr + row.to(tl.int64) * 2, mean, mask=row < N)
    tl.store(stats_ptr + row.to(tl.int64) * 2 + 1, inverse, mask=row < N)


@triton.jit
def norm_bwd_kernel(
    dx_ptr,
    a_ptr,  # None: nobody needs it
    partial_ptr,  # fp32 (programs, 2, C): sums for dweight, then for dbias
    da_ptr,
    dresidual_ptr,  # None: there is no residual
    x_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    N,
    C,
    ROWS_PER_PROGRAM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    in_c = c < C
    weight = tl.load(weight_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    if a_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)
    first = program * ROWS_PER_PROGRAM
    for begin in range(first, tl.minimum(first + ROWS_PER_PROGRAM, N), ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & in_c[None, :]
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + row.to(tl.int64) * 2, mask=row < N, other=0.0)
        inverse = tl.load(stats_ptr + row.to(tl.int64) * 2 + 1, mask=row < N, other=0.0)
        # Outside the row it could overflow, and infinity times da's 0 is NaN.
        xhat = tl.where(inside, (x - mean[:, None]) * inverse[:, None], 0.0)
        if a_ptr is not None:
            a = xhat * weight[None, :] + bias[None, :]
            tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=inside)
        dweight += tl.sum(da * xhat, 0)
        dbias += tl.sum(da, 0)
        da *= weight[None, :]
        along_x = tl.sum(da * xhat, 1) / C
        along_1 = tl.sum(da, 1) / C
        dx = (da - along_1[:, None] - xhat * along_x[:, None]) * inverse[:, None]
        if dresidual_ptr is not None:
            dx += tl.load(dresidual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    partial_ptr += program.to(tl.int64) * 2 * C
    tl.store(partial_ptr + c, dweight, mask=in_c)
    tl.store(partial_ptr + C + c, dbias, mask=in_c)


def norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return x (N, C) normalised, in dtype, and stats (N, 2): mean, 1 / standard deviation.

    Without a weight, return x in dtype and empty stats.
    """
    N, C = x.shape
    if weight is None or bias is None or not 0 < C <= MAX_C:
        return reference.norm_fwd(x, weight, bias, eps, dtype)
    a, stats = x.new_empty(N, C, dtype=dtype), x.new_empty(N, 2, dtype=torch.float32)
    if N:
        tensors = (a, stats, x.contiguous(), weight.contiguous(), bias.contiguous())
        repeat(_launch_fwd, tensors, eps)
    return a, stats


def _launch_fwd(
    a: Tensor, stats: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> None:
    (N, C), shape = x.shape, tile("fwd", x.shape[1])
    grid = (triton.cdiv(N, shape["ROWS"]),)
    launch(norm_fwd_kernel, grid, a, stats, x, weight, bias, N, C, eps, **shape)


class NormGradients(NamedTuple):
    """What `norm_bwd` returns; a is None unless it was asked for."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    a: Tensor | None


def norm_bwd(
    da: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    *,
    dresidual: Tensor | None = None,
    with_a: bool = False,
) -> NormGradients:
    """Return the gradients of `norm_fwd`, dx plus dresidual, and a in da's dtype if with_a.

    da and dresidual: (N, C), contiguous. Without a weight, dx is da and the others are empty.
    """
    N, C = x.shape
    if weight is None or bias is None or not 0 < C <= MAX_C:
        dx, dweight, dbias = reference.norm_bwd(da, x, weight, bias, stats)
        return NormGradients(dx if dresidual is None else dx + dresidual, dweight, dbias, None)
    dx, dweight, dbias = x.new_empty(N, C), torch.empty_like(weight), torch.empty_like(bias)
    a = torch.empty_like(da) if with_a else None
    given = (t.contiguous() for t in (x, stats, weight, bias))
    repeat(_launch_bwd, (dx, a, dweight, dbias, da, dresidual, *given))
    return NormGradients(dx, dweight, dbias, a)


def _launch_bwd(
    dx: Tensor,
    a: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    da: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> None:
    N, C = x.shape
    programs = triton.cdiv(N, ROWS_PER_PROGRAM)
    partial = scratch(x, (programs, 2, C), torch.float32)
    if programs:
        launch(
            norm_bwd_kernel,
            (programs,),
            dx,
            a,
            partial,
            da,
            dresidual,
            x,
            stats,
            weight,
            bias,
            N,
            C,
            ROWS_PER_PROGRAM=ROWS_PER_PROGRAM,
            **tile("bwd", C),
        )
    column_totals(partial, dweight, dbias)
