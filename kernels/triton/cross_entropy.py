"""Cross entropy, alone or after the LM head; kernels/reference/cross_entropy.py is the definition.

    loss = log sum - (x_target - top);  dx_j = dloss * (exp(x_j - top) / sum - [j = target])
    logits = input weight^T;  dinput = dlogits weight;  dweight = dlogits^T input

With the head, a chunk of rows is computed at a time: torch.mm writes the logits to a padded buffer,
one kernel computes the loss and replaces the logits by dlogits (cross_entropy_rows.py), torch.mm
computes dinput, and dweight adds up in fp32. The library computes this sum for fp32 inputs, our own
kernel for 16 bits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.reference.cross_entropy import check_targets
from gptfast.kernels.triton import target as compiled_for
from gptfast.kernels.triton.cross_entropy_rows import (
    cross_entropy_bwd_kernel,
    cross_entropy_fwd_kernel,
    linear_cross_entropy_rows_kernel,
    row_tile,
)
from gptfast.kernels.triton.launch import launch
from gptfast.kernels.triton.launch_series import repeat

# Bytes of logits, later dlogits, in a chunk, read at each call: 4,096 rows of GPT-2's in 16 bits. A
# chunk's dinput must have enough tiles for all multiprocessors, and each chunk reads and writes all
# sums of dweight. Where memory is short, set it to less: with 64 << 20 a chunk has 640 rows.
CHUNK_BYTES = 400 << 20
# The chunk's rows are padded to a multiple of it: they are aligned, and tiles of the vocabulary
# need no mask.
PAD = 128

# arch: (BLOCK_V, BLOCK_C, BLOCK_N, num_warps, num_stages) of dweight's product, by the form of the
# sums: in two halves they take more registers than in fp32. BLOCK_V is a divisor of PAD.
WEIGHT_TILES = {
    "sm_75": {"halves": (64, 64, 32, 8, 2), "fp32": (64, 64, 32, 8, 2)},
    "sm_80": {"halves": (128, 128, 32, 8, 4), "fp32": (128, 128, 32, 8, 4)},
    "sm_90": {"halves": (128, 128, 64, 8, 4), "fp32": (128, 256, 64, 16, 3)},
    "sm_100": {"halves": (128, 128, 64, 8, 3), "fp32": (128, 128, 64, 8, 3)},
    "gfx942": {"halves": (128, 128, 64, 8, 2), "fp32": (128, 128, 64, 8, 2)},
}


def weight_tile(kind: str) -> dict[str, int]:
    """Return the tile of dweight's product for sums in "halves" or "fp32"."""
    names = ("BLOCK_V", "BLOCK_C", "BLOCK_N", "num_warps", "num_stages")
    tiles = WEIGHT_TILES[compiled_for.fitting(("linear_cross_entropy_dweight", kind))]
    return dict(zip(names, tiles[kind], strict=True))


@triton.jit
def _sums(dweight_ptr, low_ptr, at, inside):
    """Return the fp32 sums of the previous chunks."""
    sums = tl.load(dweight_ptr + at, mask=inside, other=0)
    if low_ptr is not None:
        low = tl.load(low_ptr + at, mask=inside, other=0)
        bits = (sums.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)
        sums = bits.to(tl.float32, bitcast=True)
    return sums


@triton.jit
def linear_cross_entropy_dweight_kernel(
    dlogits_ptr,
    input_ptr,
    dweight_ptr,
    low_ptr,
    N,
    V,
    C,
    dlogits_stride,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add dlogits (N, V).T @ input (N, C) of one chunk to dweight (V, C), in fp32.

    Between chunks, a 16-bit dweight holds the upper half of each fp32 sum, and low the lower half.
    """
    # The tiles of one block of the vocabulary are neighbours: they read its dlogits only once.
    tiles = tl.cdiv(C, BLOCK_C)
    v0 = tl.program_id(0) // tiles * BLOCK_V
    c0 = tl.program_id(0) % tiles * BLOCK_C
    v = tl.arange(0, BLOCK_V)
    c = tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    # int64: V * C may overflow int32; offsets within a tile, and within a step of rows, do not.
    tile = v0.to(tl.int64) * C + c0
    at = v[:, None] * C + c[None, :]
    inside_c = (c < C - c0)[None, :]
    inside = (v < V - v0)[:, None] & inside_c
    dweight_ptr += tile
    if low_ptr is not None:
        low_ptr += tile
    if FIRST:
        acc = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    else:
        acc = _sums(dweight_ptr, low_ptr, at, inside)
    dlogits_ptr += v0
    input_ptr += c0
    dlogits_at = v[:, None] + n[None, :] * dlogits_stride
    input_at = n[:, None] * C + c[None, :]
    for begin in range(0, N, BLOCK_N):
        # The padded columns hold anything: they become rows of acc that are not stored.
        dlogits = tl.load(dlogits_ptr + dlogits_at, mask=(n < N - begin)[None, :], other=0.0)
        x = tl.load(input_ptr + input_at, mask=(n < N - begin)[:, None] & inside_c, other=0.0)
        acc = tl.dot(dlogits, x, acc)
        dlogits_ptr += BLOCK_N * dlogits_stride
        input_ptr += BLOCK_N * C
    if low_ptr is None:
        tl.store(dweight_ptr + at, acc, mask=inside)
    elif LAST:
        rounded = acc.to(input_ptr.dtype.element_ty).to(tl.int16, bitcast=True)
        tl.store(dweight_ptr + at, rounded, mask=inside)
    else:
        bits = acc.to(tl.int32, bitcast=True)
        tl.store(dweight_ptr + at, (bits >> 16).to(tl.int16), mask=inside)
        tl.store(low_ptr + at, bits.to(tl.int16), mask=inside)


@triton.jit
def _any_counts(target_ptr, N, ignore_index, BLOCK: tl.constexpr):
    counts = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, N, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + at, mask=at < N, other=ignore_index)
        counts = tl.maximum(counts, (target != ignore_index).to(tl.int32))
    return tl.max(counts, 0) > 0


@triton.jit
def scale_kernel(x_ptr, factor_ptr, target_ptr, n, N, ignore_index, BLOCK: tl.constexpr):
    """Multiply each group of n elements by the factor, unless it is 1.

    The gradients of a group come from N targets. If these are all ignored, the group is 0 and stays
    0 if the factor is not finite.
    """
    factor = tl.load(factor_ptr).to(tl.float32)
    group = tl.program_id(0).to(tl.int64)
    finite = tl.abs(factor) < float("inf")
    if finite == 0:
        counts = _any_counts(target_ptr + group * N, N, ignore_index, BLOCK)
        factor = tl.where(counts, factor, 1.0)
    if factor != 1.0:
        x_ptr += group * n
        first = tl.program_id(1).to(tl.int64) * BLOCK
        step = tl.num_programs(1).to(tl.int64) * BLOCK
        for begin in range(first, n, step):
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < n)


def _rows(x: Tensor) -> Tensor:
    """Return x (N, M), copied if its rows are not contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _aligned(x: Tensor) -> tuple[Tensor, int]:
    """Return x's memory from the 16-byte boundary before its first value, and the distance to it.

    The distance is counted in values.
    """
    shift = x.data_ptr() % 16 // x.element_size()
    offset = x.storage_offset() - shift
    # If the memory starts between two boundaries (torch's own does not), values are read singly.
    if not shift or offset < 0:
        return x, 0
    return x.as_strided((1,), (1,), offset), shift


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Return loss (N,), fp32, and stats (N, 2), fp64, for logits (N, V) and target (N,)."""
    N, V = logits.shape
    check_targets(target, V, ignore_index)
    loss = logits.new_empty(N, dtype=torch.float32)
    stats = logits.new_empty(N, 2, dtype=torch.float64)
    _loss(_rows(logits), target.contiguous(), loss, stats, ignore_index, label_smoothing, z_loss)
    return loss, stats


def _loss(
    logits: Tensor,
    target: Tensor,
    loss: Tensor,
    stats: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """Fill loss (N,) and, unless it is None, stats (N, 2)."""
    N, V = logits.shape
    if not N:
        return
    memory, shift = _aligned(logits)
    numbers = (V, shift, logits.stride(0), ignore_index, label_smoothing, z_loss)
    repeat(_launch_fwd, (memory, target, loss, stats), *numbers)


def _launch_fwd(
    memory: Tensor, target: Tensor, loss: Tensor, stats: Tensor | None, *numbers: float
) -> None:
    """Launch the kernel; numbers are its own, of which the last but one is label_smoothing."""
    tile = row_tile("fwd", memory.dtype)
    args = (memory, target, loss, stats, *numbers)
    launch(cross_entropy_fwd_kernel, loss.shape, *args, SMOOTHING=numbers[-2] > 0, **tile)


def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Return dlogits (N, V), contiguous, for dloss (N,)."""
    N, V = logits.shape
    check_targets(target, V, ignore_index)
    logits = _rows(logits)
    dlogits = logits.new_empty(N, V)
    if not N:
        return dlogits
    memory, shift = _aligned(logits)
    numbers = (V, shift, logits.stride(0), dloss.stride(0), ignore_index, label_smoothing, z_loss)
    tensors = (dloss, memory, target.contiguous(), stats.contiguous(), dlogits)
    repeat(_launch_bwd, tensors, *numbers)
    return dlogits


def _launch_bwd(
    dloss: Tensor, memory: Tensor, target: Tensor, stats: Tensor, dlogits: Tensor, *numbers: float
) -> None:
    """Launch the kernel; numbers are its own."""
    V, shift, stride, *_ = numbers
    tile = row_tile("bwd", memory.dtype)
    same = shift == 0 and (stride - V) % tile["A"] == 0
    args = (dloss, memory, target, stats, dlogits, *numbers)
    launch(cross_entropy_bwd_kernel, dloss.shape, *args, SAME_RAGGED=same, **tile)


def chunk_rows(N: int, V: int, itemsize: int) -> int:
    """Return the rows of a chunk: chunks are of about one size, a multiple of 64 if 64 rows fit."""
    fit = max(1, CHUNK_BYTES // (triton.cdiv(V, PAD) * PAD * itemsize))
    unit = 64 if fit >= 64 else 1
    chunks = max(1, triton.cdiv(N, fit // unit * unit))
    return triton.cdiv(triton.cdiv(N, chunks), unit) * unit or 1


def _each_chunk(input: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each chunk and their logits (n, V), which are in the same buffer."""
    N, V = len(input), len(weight)
    step = chunk_rows(N, V, input.element_size())
    buffer = input.new_empty(min(step, N), triton.cdiv(V, PAD) * PAD)
    for begin in range(0, N, step):
        rows = slice(begin, min(begin + step, N))
        logits = buffer[: rows.stop - begin, :V]
        torch.mm(input[rows], weight.t(), out=logits)
        yield rows, logits


def linear_cross_entropy_fwd(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    skip_below: float = 0.0,
) -> Tensor:
    """Return loss (N,), fp32, for input (N, C) and linear_weight (V, C)."""
    check_targets(target, len(linear_weight), ignore_index)
    weight, target = _rows(linear_weight.to(input.dtype)), target.contiguous()
    loss = input.new_empty(len(input), dtype=torch.float32)
    for rows, logits in _each_chunk(_rows(input), weight):
        _loss(logits, target[rows], loss[rows], None, ignore_index, label_smoothing, z_loss)
    return loss


def linear_cross_entropy_fwd_bwd(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    dloss: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    skip_below: float = 0.0,
    need_dweight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum(loss * dloss), dinput (N, C) and dlinear_weight (V, C). Nothing is skipped."""
    check_targets(target, len(linear_weight), ignore_index)
    weight, target = _rows(linear_weight.to(input.dtype)), target.contiguous()
    input = _rows(input)
    loss = input.new_empty(len(input), dtype=torch.float32)
    dinput = input.new_empty(input.shape)
    N = len(input)
    split = linear_weight.dtype == input.dtype != torch.float32
    chunked = N > chunk_rows(N, len(weight), input.element_size())
    dtype = linear_weight.dtype if split else torch.float32
    # Without rows, no chunk writes to it.
    shape = weight.shape if need_dweight else (0,)
    dweight = (torch.empty if N else torch.zeros)(shape, dtype=dtype, device=weight.device)
    low = torch.empty_like(dweight, dtype=torch.int16) if split and chunked else None
    for rows, logits in _each_chunk(input, weight):
        tensors = (logits, target[rows], dloss[rows], loss[rows])
        repeat(_launch_rows, tensors, ignore_index, label_smoothing, z_loss)
        torch.mm(logits, weight, out=dinput[rows])
        if need_dweight:
            _add_dweight(dweight, low, logits, input[rows], rows.start == 0, rows.stop == N)
    total = (loss.double() * dloss).sum().float()
    return total, dinput, dweight.to(linear_weight.dtype)


def _launch_rows(
    logits: Tensor,
    target: Tensor,
    dloss: Tensor,
    loss: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    strides = (logits.stride(0), dloss.stride(0))
    args = (logits, target, dloss, loss, logits.shape[1], *strides, ignore_index)
    launch(
        linear_cross_entropy_rows_kernel,
        loss.shape,
        *args,
        label_smoothing,
        z_loss,
        SMOOTHING=label_smoothing > 0,
        **row_tile("in place", logits.dtype),
    )


@compiled_for.stepping_down
def _add_dweight(
    dweight: Tensor, low: Tensor | None, dlogits: Tensor, input: Tensor, first: bool, last: bool
) -> None:
    """Add dlogits.T @ input to dweight; for the first chunk, dweight is overwritten."""
    if dweight.dtype == input.dtype and low is None:
        # In fp32, or with one chunk, the library's product adds up as ours does.
        torch.addmm(dweight, dlogits.t(), input, beta=float(not first), out=dweight)
        return
    sums = dweight if low is None else dweight.view(torch.int16)
    repeat(_launch_dweight, (dlogits, input.contiguous(), sums, low), first, last)


def _launch_dweight(
    dlogits: Tensor, input: Tensor, sums: Tensor, low: Tensor | None, first: bool, last: bool
) -> None:
    (N, V), C = dlogits.shape, input.shape[1]
    tile = weight_tile("fp32" if low is None else "halves")
    grid = (triton.cdiv(V, tile["BLOCK_V"]) * triton.cdiv(C, tile["BLOCK_C"]),)
    launch(
        linear_cross_entropy_dweight_kernel,
        grid,
        dlogits,
        input,
        sums,
        low,
        N,
        V,
        C,
        dlogits.stride(0),
        FIRST=first,
        LAST=last,
        **tile,
    )


def scale_(
    dinput: Tensor, dlinear_weight: Tensor, target: Tensor, factor: Tensor, ignore_index: int
) -> None:
    """Multiply both gradients by a scalar, in place; those of ignored rows stay 0."""
    repeat(_launch_scale, (dinput, dlinear_weight, target.contiguous(), factor), ignore_index)


def _launch_scale(
    dinput: Tensor, dlinear_weight: Tensor, target: Tensor, factor: Tensor, ignore_index: int
) -> None:
    # Each row of dinput comes from one target, dlinear_weight from all.
    for x, groups, block in ((dinput, len(target), 1024), (dlinear_weight, 1, 4096)):
        if x.numel():
            n = x.numel() // groups
            # Few programs: most often the factor is 1 and there is nothing to do.
            grid = (groups, min(triton.cdiv(n, block), 2048))
            args = (x, factor, target, n, len(target) // groups, ignore_index)
            launch(scale_kernel, grid, *args, BLOCK=block, num_warps=block // 512)
