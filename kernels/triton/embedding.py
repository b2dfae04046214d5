"""The token embedding and its weight's gradient; kernels/reference/embedding.py is the definition.

    x_n = weight[idx_n];  dweight_v += sum over n with idx_n = v of dx_n

For the gradient, a stable sort of the ids puts the rows of one token side by side in `order`:
    ids = 3 3 7 7 7 7 | 7 7 7 9 9 9 | 9 ...        a run per token, cut at every SEGMENT positions
A program sums one piece of a run in fp32. Most runs have one piece, which is added to its row of
dweight at once. The pieces of longer runs go to `partial`, which has two slots per segment: slot 0
for the piece of a run that began earlier, slot 1 for the piece that begins a run. A second launch
adds them up, run by run. All orders depend on the ids alone: there are no atomics.
Ids outside [0, V) give rows of NaN and no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.reference.embedding import check_ids
from gptfast.kernels.triton.launch import launch
from gptfast.kernels.triton.launch_series import repeat

# The most positions that a program of the first launch sums, ROWS of them at a time.
SEGMENT = 128


@triton.jit
def embedding_fwd_kernel(
    x_ptr, weight_ptr, idx_ptr, N, V, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    # int64: row * C overflows int32 at 2.8 million tokens of GPT-2; ids are int64 already.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.load(idx_ptr + row, mask=row < N, other=-1)
    fits = (column < C)[None, :]
    there = (token >= 0) & (token < V)
    x = tl.load(
        weight_ptr + token[:, None] * C + column[None, :],
        mask=there[:, None] & fits,
        other=float("nan"),
    )
    tl.store(x_ptr + row[:, None] * C + column[None, :], x, mask=(row < N)[:, None] & fits)


@triton.jit
def embedding_bwd_kernel(
    dweight_ptr,
    dx_ptr,
    ids_ptr,
    order_ptr,
    partial_ptr,
    N,
    V,
    C,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start = tl.program_id(0)
    token = tl.load(ids_ptr + start)
    # Before the first id and after the last, -1 stands for an id that no token has.
    begins = tl.load(ids_ptr + start - 1, mask=start > 0, other=-1) != token
    if (token < 0) | (token >= V) | ((start % SEGMENT != 0) & (begins == 0)):
        return
    segment = start // SEGMENT
    end = tl.minimum(segment * SEGMENT + SEGMENT, N)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    fits = column < C
    rows = tl.zeros([ROWS, BLOCK_C], tl.float32)
    position = start
    more = position < end
    while more:
        places = position + tl.arange(0, ROWS)
        inside = places < end
        same = inside & (tl.load(ids_ptr + places, mask=inside, other=-1) == token)
        row = tl.load(order_ptr + places, mask=same, other=0)
        dx = tl.load(
            dx_ptr + row[:, None] * C + column[None, :],
            mask=same[:, None] & fits[None, :],
            other=0.0,
        )
        rows += dx.to(tl.float32)
        position += ROWS
        more = (position < end) & (tl.sum(same.to(tl.int32), 0) == ROWS)
    total = tl.sum(rows, 0)
    after = tl.load(ids_ptr + end, mask=end < N, other=-1)
    if begins & (after != token):
        ptrs = dweight_ptr + token * C + column
        old = tl.load(ptrs, mask=fits, other=0.0).to(tl.float32)
        tl.store(ptrs, (old + total).to(dweight_ptr.dtype.element_ty), mask=fits)
    else:
        slot = segment.to(tl.int64) * 2 + begins.to(tl.int64)
        tl.store(partial_ptr + slot * C + column, total, mask=fits)


@triton.jit
def embedding_bwd_runs_kernel(
    dweight_ptr,
    ids_ptr,
    partial_ptr,
    N,
    V,
    C,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # This program adds up the run that crosses the end of its segment, if the run begins there.
    segment = tl.program_id(0)
    next_start = segment * SEGMENT + SEGMENT
    token = tl.load(ids_ptr + next_start)
    crosses = tl.load(ids_ptr + next_start - 1) == token
    before = next_start - SEGMENT - 1
    inherited = tl.load(ids_ptr + before, mask=before >= 0, other=-1) == token
    if (token < 0) | (token >= V) | (crosses == 0) | inherited:
        return
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    fits = column < C
    slot = segment.to(tl.int64) * 2 + 1
    total = tl.load(partial_ptr + slot * C + column, mask=fits, other=0.0)
    pieces = tl.zeros([ROWS, BLOCK_C], tl.float32)
    segment += 1
    more = segment * SEGMENT < N
    while more:
        segments = segment + tl.arange(0, ROWS)
        inside = segments * SEGMENT < N
        same = inside & (tl.load(ids_ptr + segments * SEGMENT, mask=inside, other=-1) == token)
        slots = segments.to(tl.int64) * 2
        pieces += tl.load(
            partial_ptr + slots[:, None] * C + column[None, :],
            mask=same[:, None] & fits[None, :],
            other=0.0,
        )
        segment += ROWS
        more = (segment * SEGMENT < N) & (tl.sum(same.to(tl.int32), 0) == ROWS)
    total += tl.sum(pieces, 0)
    ptrs = dweight_ptr + token * C + column
    old = tl.load(ptrs, mask=fits, other=0.0).to(tl.float32)
    tl.store(ptrs, (old + total).to(dweight_ptr.dtype.element_ty), mask=fits)


def tile(C: int) -> tuple[int, int]:
    """Return (ROWS, BLOCK_C) for all dtypes and GPUs.

    Larger tiles would spill if rows are unaligned, as their loads are single elements.
    """
    return (32, 64) if C <= 64 else (32, 128) if C <= 128 else (16, 256)


def embedding_fwd(weight: Tensor, idx: Tensor) -> Tensor:
    """Return x (..., C) for weight (V, C) and idx (...)."""
    V, C = weight.shape
    check_ids(idx, V)
    weight, idx = weight.contiguous(), idx.contiguous()
    x = torch.empty((*idx.shape, C), dtype=weight.dtype, device=weight.device)
    if x.numel():
        repeat(_launch_fwd, (x, weight, idx))
    return x


def _launch_fwd(x: Tensor, weight: Tensor, idx: Tensor) -> None:
    (V, C), N = weight.shape, idx.numel()
    rows, block = tile(C)
    grid = (triton.cdiv(N, rows), triton.cdiv(C, block))
    args = (x, weight, idx, N, V, C)
    launch(embedding_fwd_kernel, grid, *args, ROWS=rows, BLOCK_C=block, num_warps=4)


def embedding_bwd(dweight: Tensor, dx: Tensor, idx: Tensor) -> None:
    """Add the rows of dx (..., C) to the rows of dweight (V, C) that idx (...) names, in place."""
    V, C = dweight.shape
    check_ids(idx, V)
    dx, N = dx.contiguous(), idx.numel()
    if not dx.numel():
        return
    ids, order = torch.sort(idx.reshape(-1), stable=True)
    partial = torch.empty((triton.cdiv(N, SEGMENT), 2, C), dtype=torch.float32, device=dx.device)
    repeat(_launch_bwd, (dweight, dx, ids, order, partial))


def _launch_bwd(dweight: Tensor, dx: Tensor, ids: Tensor, order: Tensor, partial: Tensor) -> None:
    (V, C), N, segments = dweight.shape, len(ids), len(partial)
    rows, block = tile(C)
    columns = triton.cdiv(C, block)
    options = {"SEGMENT": SEGMENT, "ROWS": rows, "BLOCK_C": block, "num_warps": 4}
    launch(embedding_bwd_kernel, (N, columns), dweight, dx, ids, order, partial, N, V, C, **options)
    if segments > 1:
        args = (dweight, ids, partial, N, V, C)
        launch(embedding_bwd_runs_kernel, (segments - 1, columns), *args, **options)
