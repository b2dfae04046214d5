"""GELU in its tanh form, and its gradient; kernels/reference/mlp.py is the definition.

    g = h s,  s = 1 / (1 + exp(-2 u)),  u = sqrt(2 / pi) (h + 0.044715 h^3)
    dh = dg (s + h s (1 - s) 2 u')

h s equals h (1 + tanh u) / 2 without its cancellation. exp gets -|2 u|, so it never overflows, and
the smaller one of s and 1 - s is exact to its own last digits. The backward adds up the columns of
dh, the gradient of the bias in h, as column_sums.py does, while it has them in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.triton import target
from gptfast.kernels.triton.column_sums import ROWS_PER_PROGRAM, column_totals
from gptfast.kernels.triton.launch import launch
from gptfast.kernels.triton.launch_series import repeat, scratch

# arch: "fwd": (elements a program, num_warps), "bwd": (ROWS, BLOCK_C, num_warps).
TILES = {
    "sm_80": {"fwd": (2048, 4), "bwd": (16, 128, 4)},
    "sm_90": {"fwd": (2048, 4), "bwd": (16, 128, 4)},
    "sm_100": {"fwd": (2048, 4), "bwd": (16, 128, 4)},
    "gfx942": {"fwd": (2048, 2), "bwd": (16, 128, 4)},
}

CUBIC = tl.constexpr(0.044715)
# 2 u = h (SLOPE + SLOPE * CUBIC h^2); exp(2 u) = 2^power, power = h (SLOPE_2 + ...).
SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
SLOPE_2 = tl.constexpr(2.302208198144325)  # the same divided by log 2
# From this |h| on, s is 0 or 1 to every digit; the square of a larger h might overflow.
FAR = tl.constexpr(64.0)


@triton.jit
def _sigmoids(h):
    """Return s and s (1 - s)."""
    power = h * (SLOPE_2 + SLOPE_2 * CUBIC * (h * h))
    e = tl.exp2(-tl.abs(power))
    larger = 1.0 / (1.0 + e)
    # The device's quotient may be 2 ulp off; a step of Newton's makes 1 / 1 exactly 1.
    larger *= 2.0 - (1.0 + e) * larger
    smaller = e * larger
    return tl.where(power >= 0.0, larger, smaller), larger * smaller


@triton.jit
def gelu_fwd_kernel(g_ptr, h_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    s, _ = _sigmoids(h)
    tl.store(g_ptr + at, (h * s).to(g_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def gelu_bwd_kernel(
    dh_ptr,  # may be dg_ptr
    g_ptr,  # None: nobody needs it
    partial_ptr,  # fp32 (programs, F); None: nobody needs the sums
    dg_ptr,
    h_ptr,
    N,
    F,
    ROWS_PER_PROGRAM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # The rows are on the first axis: the second one ends at 65,535 programs.
    first = tl.program_id(0) * ROWS_PER_PROGRAM
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    fits = (column < F)[None, :]
    dtype = dh_ptr.dtype.element_ty
    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for begin in range(first, tl.minimum(first + ROWS_PER_PROGRAM, N), ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & fits
        # int64: row * F overflows int32 at 700,000 tokens of GPT-2.
        at = row.to(tl.int64)[:, None] * F + column[None, :]
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dg = tl.load(dg_ptr + at, mask=inside, other=0.0).to(tl.float32)
        s, product = _sigmoids(h)
        g = h * s
        near = tl.minimum(tl.abs(h), FAR)
        slope = SLOPE + 3.0 * SLOPE * CUBIC * (near * near)
        dh = (dg * (s + h * product * slope)).to(dtype)
        tl.store(dh_ptr + at, dh, mask=inside)
        if g_ptr is not None:
            tl.store(g_ptr + at, g.to(dtype), mask=inside)
        # The sums are of what was stored, as in the reference.
        sums += dh.to(tl.float32)
    if partial_ptr is not None:
        partial_ptr += tl.program_id(0).to(tl.int64) * F
        tl.store(partial_ptr + column, tl.sum(sums, 0), mask=column < F)


def gelu_fwd(h: Tensor) -> Tensor:
    """Return GELU of h (N, F), contiguous."""
    g = torch.empty_like(h)
    if h.numel():
        repeat(_launch_fwd, (g, h))
    return g


def _launch_fwd(g: Tensor, h: Tensor) -> None:
    block, num_warps = TILES[target.arch()]["fwd"]
    grid = (triton.cdiv(h.numel(), block),)
    launch(gelu_fwd_kernel, grid, g, h, h.numel(), BLOCK=block, num_warps=num_warps)


def gelu_bwd_(
    dg: Tensor, h: Tensor, *, with_g: bool, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh (N, F), which takes dg's memory, g (N, F), and the sums (F,) of dh's columns.

    dg, h: (N, F), contiguous, in one dtype. What is not asked for is empty.
    """
    N, F = h.shape
    g, sums = h.new_empty((N, F) if with_g else 0), h.new_empty(F if with_sums else 0)
    if F:
        repeat(_launch_bwd, (dg, h, g if with_g else None, sums if with_sums else None))
    return dg, g, sums


def _launch_bwd(dg: Tensor, h: Tensor, g: Tensor | None, sums: Tensor | None) -> None:
    N, F = h.shape
    programs = triton.cdiv(N, ROWS_PER_PROGRAM)
    partial = None if sums is None else scratch(h, (programs, 1, F), torch.float32)
    rows, block, num_warps = TILES[target.arch()]["bwd"]
    if N:
        launch(
            gelu_bwd_kernel,
            (programs, triton.cdiv(F, block)),
            dg,
            g,
            partial,
            dg,
            h,
            N,
            F,
            ROWS_PER_PROGRAM=ROWS_PER_PROGRAM,
            ROWS=rows,
            BLOCK_C=block,
            num_warps=num_warps,
        )
    if partial is not None and sums is not None:
        column_totals(partial, sums)
