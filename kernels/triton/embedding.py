"""The token embedding and the gradient of its weight; kernels/reference/embedding.py defines them.

The gradient sorts the ids, stably, so that the rows of one token lie side by side in `order`:
    ids = 3 3 7 7 7 7 | 7 7 7 9 9 9 | 9 ...        a run per token, cut at every SEGMENT positions
A program sums one piece of a run in fp32. A run of one piece, which nearly all are, is added to
its row of dweight at once. The pieces of a longer run go to `partial`: per segment one that came
from the segment before (slot 0) and one that begins a run and goes on (slot 1). A second launch
adds them up, run by run. Every order is fixed by the ids alone: no atomics.
Ids outside [0, V) give rows of NaN and no gradient.
"""

import torch
import triton
import triton.language as tl
from gptfast.kernels.reference.embedding import check_ids
from torch import Tensor

# Positions a program of the first launch walks at most, ROWS of them at a time.
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
    # -1, before the first id and behind the last, is no token's id.
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
    # The run that crosses the end of this segment, if it begins here.
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
    """(ROWS, BLOCK_C), whatever the dtype and the GPU.

    With unaligned rows, whose loads are single elements, more would spill.
    """
    return (32, 64) if C <= 64 else (32, 128) if C <= 128 else (16, 256)


def embedding_fwd(weight: Tensor, idx: Tensor) -> Tensor:
    V, C = weight.shape
    check_ids(idx, V)
    weight, idx = weight.contiguous(), idx.contiguous()
    x = torch.empty((*idx.shape, C), dtype=weight.dtype, device=weight.device)
    if x.numel():
        rows, block = tile(C)
        grid = (triton.cdiv(idx.numel(), rows), triton.cdiv(C, block))
        embedding_fwd_kernel[grid](
            x, weight, idx, idx.numel(), V, C, ROWS=rows, BLOCK_C=block, num_warps=4
        )
    return x


def embedding_bwd(dweight: Tensor, dx: Tensor, idx: Tensor) -> None:
    V, C = dweight.shape
    check_ids(idx, V)
    dx, N = dx.contiguous(), idx.numel()
    if not dx.numel():
        return
    ids, order = torch.sort(idx.reshape(-1), stable=True)
    rows, block = tile(C)
    segments, columns = triton.cdiv(N, SEGMENT), triton.cdiv(C, block)
    partial = torch.empty((segments, 2, C), dtype=torch.float32, device=dx.device)
    options = {"SEGMENT": SEGMENT, "ROWS": rows, "BLOCK_C": block, "num_warps": 4}
    embedding_bwd_kernel[(N, columns)](dweight, dx, ids, order, partial, N, V, C, **options)
    if segments > 1:
        embedding_bwd_runs_kernel[(segments - 1, columns)](
            dweight, ids, partial, N, V, C, **options
        )
