"""Sums of columns in two launches: a bias's gradient, and the second half of a norm's.

    sums_c = sum over rows of x_nc

Each program of the first launch adds ROWS_PER_PROGRAM rows in fp32 and stores its sums in
`partial`; the second launch adds those. Which numbers are added to which depends on shapes alone:
there are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.triton import target
from gptfast.kernels.triton.launch import launch
from gptfast.kernels.triton.launch_series import repeat, scratch

# Rows that a program of the first launch adds: 128 programs a column block for 16,384 tokens.
ROWS_PER_PROGRAM = 128
# arch: (ROWS, BLOCK_C, num_warps). "sums" has 16 elements a thread, two 128-bit loads of 16-bit
# numbers. "totals" takes few steps: the partial sums are few, and each step waits for memory.
TILES = {
    "sm_80": {"sums": (16, 128, 4), "totals": (256, 32, 8)},
    "sm_90": {"sums": (16, 128, 4), "totals": (256, 32, 8)},
    "sm_100": {"sums": (16, 128, 4), "totals": (256, 32, 8)},
    "gfx942": {"sums": (16, 128, 4), "totals": (256, 32, 4)},
}


def tile(kind: str) -> dict[str, int]:
    """Return the tile of a launch, "sums" or "totals"."""
    names = ("ROWS", "BLOCK_C", "num_warps")
    return dict(zip(names, TILES[target.arch()][kind], strict=True))


@triton.jit
def column_sums_kernel(
    partial_ptr,  # fp32 (programs, C)
    x_ptr,
    N,
    C,
    ROWS_PER_PROGRAM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # The rows are on the first axis: the second one ends at 65,535 programs.
    first = tl.program_id(0) * ROWS_PER_PROGRAM
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    fits = (column < C)[None, :]
    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for begin in range(first, tl.minimum(first + ROWS_PER_PROGRAM, N), ROWS):
        row = begin + tl.arange(0, ROWS)
        # int64: row * C overflows int32 at 2^31 elements.
        at = row.to(tl.int64)[:, None] * C + column[None, :]
        sums += tl.load(x_ptr + at, mask=(row < N)[:, None] & fits, other=0.0).to(tl.float32)
    partial_ptr += tl.program_id(0).to(tl.int64) * C
    tl.store(partial_ptr + column, tl.sum(sums, 0), mask=column < C)


@triton.jit
def column_totals_kernel(
    partial_ptr,  # fp32 (programs, 1 or 2 kinds of sums, C)
    first_ptr,
    second_ptr,
    programs,
    C,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    fits = column < C
    kind = tl.program_id(1)
    partial_ptr += kind * C
    stride = tl.num_programs(1) * C
    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for begin in range(0, programs, ROWS):
        row = begin + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * stride + column[None, :]
        sums += tl.load(partial_ptr + at, mask=(row < programs)[:, None] & fits[None, :], other=0.0)
    total = tl.sum(sums, 0)
    if kind == 0:
        tl.store(first_ptr + column, total.to(first_ptr.dtype.element_ty), mask=fits)
    if second_ptr is not None:
        if kind == 1:
            tl.store(second_ptr + column, total.to(second_ptr.dtype.element_ty), mask=fits)


def column_totals(partial: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Fill first (C,), and second (C,), with the sums over partial (programs, 1 or 2, C).

    It only launches, so functions that are repeated may call it.
    """
    programs, kinds, C = partial.shape
    shape = tile("totals")
    grid = (triton.cdiv(C, shape["BLOCK_C"]), kinds)
    launch(column_totals_kernel, grid, partial, first, second, programs, C, **shape)


def column_sums(x: Tensor) -> Tensor:
    """Return the sums (C,) of the columns of x (N, C), contiguous, added in fp32."""
    sums = x.new_empty(x.shape[1])
    if sums.numel():
        repeat(_launch_sums, (sums, x))
    return sums


def _launch_sums(sums: Tensor, x: Tensor) -> None:
    (N, C), shape = x.shape, tile("sums")
    programs = triton.cdiv(N, ROWS_PER_PROGRAM)
    partial = scratch(x, (programs, 1, C), torch.float32)
    if programs:
        grid = (programs, triton.cdiv(C, shape["BLOCK_C"]))
        args, rows = (partial, x, N, C), ROWS_PER_PROGRAM
        launch(column_sums_kernel, grid, *args, ROWS_PER_PROGRAM=rows, **shape)
    column_totals(partial, sums)
