"""Cross entropy on the GPU, alone or behind the LM head; kernels/reference/cross_entropy.py defines it.

One program a row. Forward: each thread keeps the largest logit it saw and the sum of exponentials
relative to it, both rescaled once in 16 bytes of the row; only the last step joins the threads.
Backward: dx_j = exp(x_j - lse) * factor - offset, and at the target what is left of 1.
A row of odd V starts anywhere within 16 bytes (a granule of A values): whole granules move by
128-bit instructions, the values of the row's two ragged ends, if any, by a small vector of 2 A.
With the head, rows go in chunks: logits by torch.mm into a padded buffer, loss and dlogits in place
by one kernel, then both gradients, dlinear_weight's added up in fp32 from chunk to chunk.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.reference.cross_entropy import check_targets
from gptfast.kernels.triton import target as target_module

# Bytes of logits, then dlogits, that the linear ones hold at once: 640 rows of GPT-2's in 16 bits.
CHUNK = 64 << 20
# The chunk's rows are padded to whole tiles of the vocabulary: aligned, and nothing to mask there.
PAD = 128

# Logits a step and warps. "in place" reads a row again: with few rows at work they stay in the L2.
ROW_TILES = {
    "sm_80": {"fwd": (4096, 8), "bwd": (4096, 8), "in place": (8192, 16)},
    "sm_90": {"fwd": (4096, 8), "bwd": (4096, 8), "in place": (8192, 16)},
    "sm_100": {"fwd": (4096, 8), "bwd": (4096, 8), "in place": (8192, 16)},
    "gfx942": {"fwd": (4096, 4), "bwd": (4096, 4), "in place": (8192, 8)},
}
# BLOCK_V (a divisor of PAD), BLOCK_C, BLOCK_N, warps, stages of dlinear_weight's product.
WEIGHT_TILES = {
    "sm_80": (128, 128, 32, 8, 4),
    "sm_90": (128, 256, 64, 16, 3),
    "sm_100": (128, 256, 64, 8, 3),
    "gfx942": (128, 128, 32, 8, 2),
}


def row_tile(kind: str, dtype: torch.dtype) -> dict[str, int]:
    block, num_warps = ROW_TILES[target_module.arch()][kind]
    # Two loads of 16 bytes a thread in 16 bits, and in fp32.
    return {"BLOCK": block * 2 // dtype.itemsize, "A": 16 // dtype.itemsize, "num_warps": num_warps}


def weight_tile() -> dict[str, int]:
    names = ("BLOCK_V", "BLOCK_C", "BLOCK_N", "num_warps", "num_stages")
    return dict(zip(names, WEIGHT_TILES[target_module.arch()], strict=True))


@triton.jit
def _row(row, x_ptr, shift, stride, A: tl.constexpr):
    """The granule in which a row starts, and where in it."""
    # int64: row * V overflows int32 at 42,731 rows of GPT-2 logits.
    start = row * stride + shift
    granule = start // A * A
    return x_ptr + granule, (start - granule).to(tl.int32)


@triton.jit
def _ragged(lo, hi, A: tl.constexpr):
    """Positions in the first and the last granule, and which are the row's, not in a whole one."""
    i = tl.arange(0, 2 * A)
    last = hi // A * A
    at = tl.where(i < A, i, last + i - A)
    inside = tl.where(i < A, (lo > 0) & (i >= lo), (lo == 0) | (last > 0)) & (at < hi)
    return at, inside


@triton.jit
def _row_loss(
    x_ptr,
    lo,
    V,
    target,
    in_range,
    wanted,
    label_smoothing,
    z_loss,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    """A row's loss, were it not ignored, its lse and its target's logit, all fp64."""
    picked = tl.load(x_ptr + lo + tl.where(in_range, target, 0)).to(tl.float32)
    # The mean is taken relative to one logit: sums of large numbers would round.
    finite = (picked > float("-inf")) & (picked < float("inf"))
    pivot = tl.where(finite, picked, 0.0)
    hi = lo + V
    at_ragged, inside = _ragged(lo, hi, A)
    ragged = tl.load(x_ptr + at_ragged, mask=inside & wanted, other=float("-inf")).to(tl.float32)
    top = tl.full([BLOCK // A], float("-inf"), tl.float32)
    exps = tl.full([BLOCK // A], 0.0, tl.float32)
    values = tl.full([BLOCK // A], 0.0, tl.float32)
    for begin in range(0, hi, BLOCK):
        granule = begin + tl.arange(0, BLOCK // A) * A
        whole = ((granule >= lo) & (granule + A <= hi) & wanted)[:, None]
        at = granule[:, None] + tl.arange(0, A)[None, :]
        x = tl.load(x_ptr + at, mask=whole, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 1))
        # -inf - -inf would be NaN; relative to any finite number, exp(-inf) is 0.
        safe = tl.where(new == float("-inf"), 0.0, new)
        exps = exps * tl.exp(top - safe) + tl.sum(tl.exp(x - safe[:, None]), 1)
        top = new
        if SMOOTHING:
            values += tl.sum(tl.where(whole, x - pivot, 0.0), 1)
    highest = tl.maximum(tl.max(top, 0), tl.max(ragged, 0))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    exp_sum = tl.sum(exps * tl.exp(top - safe), 0) + tl.sum(tl.exp(ragged - safe), 0)
    # fp64 once a row: in fp32 a logit of 1e4 would cost the loss 5e-4.
    lse = highest.to(tl.float64) + tl.log(exp_sum.to(tl.float64))
    picked = picked.to(tl.float64)
    loss = (1.0 - label_smoothing) * (lse - picked)
    if SMOOTHING:
        value_sum = tl.sum(values, 0) + tl.sum(tl.where(inside, ragged - pivot, 0.0), 0)
        loss += label_smoothing * (lse - pivot.to(tl.float64) - value_sum.to(tl.float64) / V)
    loss += z_loss * lse * lse
    # Out of range can only be seen on a GPU: on the CPU it raised.
    return tl.where(in_range, loss, float("nan")), lse, picked


@triton.jit
def _store_gradient(
    dx_ptr,
    x_ptr,
    lo,
    V,
    target,
    in_range,
    ignored,
    dloss,
    lse,
    picked,
    label_smoothing,
    z_loss,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    """The row's gradient at dx_ptr + lo, from its logits at x_ptr + lo; zeros if ignored."""
    # lse in two parts: its fp32 rounding alone is 5e-4 at 1e4, a relative error of every p.
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    scale = dloss.to(tl.float64) * (1.0 + 2.0 * z_loss * lse)
    share = dloss.to(tl.float64) * label_smoothing / V
    # In fp64, for it cancels when the target is nearly certain.
    dtarget = tl.exp(picked - lse) * scale - share - dloss.to(tl.float64) * (1.0 - label_smoothing)
    # An ignored row reads -inf for its logits: exp(-inf - 0) * 0 - 0, whatever dloss and lse are.
    high = tl.where(ignored, 0.0, high)
    factor = tl.where(ignored, 0.0, (scale * tl.exp(-low).to(tl.float64)).to(tl.float32))
    offset = tl.where(ignored, 0.0, share.to(tl.float32))
    dtarget = dtarget.to(tl.float32)
    target_at = tl.where(in_range & (ignored == 0), lo + target, -1)
    hi = lo + V
    dtype = dx_ptr.dtype.element_ty
    for begin in range(0, hi, BLOCK):
        granule = begin + tl.arange(0, BLOCK // A) * A
        whole = ((granule >= lo) & (granule + A <= hi))[:, None]
        at = granule[:, None] + tl.arange(0, A)[None, :]
        x = tl.load(x_ptr + at, mask=whole & (ignored == 0), other=float("-inf")).to(tl.float32)
        dx = tl.where(at == target_at, dtarget, tl.exp(x - high) * factor - offset)
        tl.store(dx_ptr + at, dx.to(dtype), mask=whole)
    at, inside = _ragged(lo, hi, A)
    x = tl.load(x_ptr + at, mask=inside & (ignored == 0), other=float("-inf")).to(tl.float32)
    dx = tl.where(at == target_at, dtarget, tl.exp(x - high) * factor - offset)
    tl.store(dx_ptr + at, dx.to(dtype), mask=inside)


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    lse_ptr,
    V,
    shift,
    stride,
    ignore_index,
    label_smoothing,
    z_loss,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    in_range = (target >= 0) & (target < V)
    x_ptr, lo = _row(row, logits_ptr, shift, stride, A)
    # Without lse to be stored, nobody asks for an ignored row's logits.
    wanted = (ignored == 0) | (lse_ptr is not None)
    loss, lse, _ = _row_loss(
        x_ptr, lo, V, target, in_range, wanted, label_smoothing, z_loss, SMOOTHING, BLOCK, A
    )
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss).to(tl.float32))
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse)


@triton.jit
def cross_entropy_bwd_kernel(
    dloss_ptr,
    logits_ptr,
    target_ptr,
    lse_ptr,
    dlogits_ptr,
    V,
    shift,
    stride,
    dloss_stride,
    ignore_index,
    label_smoothing,
    z_loss,
    SAME_RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    # Last rows first: the forward read them last, so the L2 still has some.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    in_range = (target >= 0) & (target < V)
    dx_ptr, lo = _row(row, dlogits_ptr, 0, V, A)
    if SAME_RAGGED:
        x_ptr, lo = _row(row, logits_ptr, shift, stride, A)
    else:
        x_ptr = logits_ptr + (row * stride + shift - lo)
    picked = tl.load(x_ptr + lo + tl.where(in_range, target, 0)).to(tl.float64)
    _store_gradient(
        dx_ptr,
        x_ptr,
        lo,
        V,
        target,
        in_range,
        ignored,
        tl.load(dloss_ptr + row * dloss_stride).to(tl.float32),
        tl.load(lse_ptr + row),
        picked,
        label_smoothing,
        z_loss,
        BLOCK,
        A,
    )


@triton.jit
def linear_cross_entropy_rows_kernel(
    logits_ptr,
    target_ptr,
    dloss_ptr,
    loss_ptr,
    V,
    stride,
    dloss_stride,
    ignore_index,
    label_smoothing,
    z_loss,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    """A chunk's loss; its logits become dlogits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    in_range = (target >= 0) & (target < V)
    x_ptr, lo = _row(row, logits_ptr, 0, stride, A)
    loss, lse, picked = _row_loss(
        x_ptr, lo, V, target, in_range, ignored == 0, label_smoothing, z_loss, SMOOTHING, BLOCK, A
    )
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss).to(tl.float32))
    dloss = tl.load(dloss_ptr + row * dloss_stride).to(tl.float32)
    # Every thread has read the target's logit, and its part of the row, before one is overwritten.
    tl.debug_barrier()
    _store_gradient(
        x_ptr,
        x_ptr,
        lo,
        V,
        target,
        in_range,
        ignored,
        dloss,
        lse,
        picked,
        label_smoothing,
        z_loss,
        BLOCK,
        A,
    )


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
    input_stride,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dweight (V, C) += dlogits (N, V).T @ input (N, C) in fp32, for one chunk.

    Between chunks a 16-bit dweight holds the upper half of each fp32 sum and low its lower half.
    """
    # The tiles of one block of the vocabulary are neighbours: its dlogits come from memory once.
    tiles = tl.cdiv(C, BLOCK_C)
    v = tl.program_id(0) // tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    at = v[:, None].to(tl.int64) * C + c[None, :]
    inside = (v < V)[:, None] & (c < C)[None, :]
    if not FIRST:
        # Asked for here, used after the product: the wait hides behind it.
        before = tl.load(dweight_ptr + at, mask=inside, other=0)
        if low_ptr is not None:
            low = tl.load(low_ptr + at, mask=inside, other=0)
    rows = tl.arange(0, BLOCK_N)
    # int64: neither a row nor a step of rows need fit int32.
    dlogits_at = dlogits_ptr + (rows.to(tl.int64) * dlogits_stride)[:, None] + v[None, :]
    input_at = input_ptr + (rows.to(tl.int64) * input_stride)[:, None] + c[None, :]
    step = tl.full([], BLOCK_N, tl.int64)
    acc = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    for begin in range(0, N, BLOCK_N):
        inside_n = (begin + rows < N)[:, None]
        # The padding's columns may hold anything: they are rows of acc that are not stored.
        dlogits = tl.load(dlogits_at, mask=inside_n, other=0.0)
        x = tl.load(input_at, mask=inside_n & (c < C)[None, :], other=0.0)
        acc = tl.dot(tl.trans(dlogits), x, acc)
        dlogits_at += step * dlogits_stride
        input_at += step * input_stride
    if not FIRST:
        if low_ptr is not None:
            bits = (before.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)
            acc += bits.to(tl.float32, bitcast=True)
        else:
            acc += before
    if low_ptr is None:
        tl.store(dweight_ptr + at, acc, mask=inside)
    elif LAST:
        tl.store(
            dweight_ptr + at,
            acc.to(input_ptr.dtype.element_ty).to(tl.int16, bitcast=True),
            mask=inside,
        )
    else:
        bits = acc.to(tl.int32, bitcast=True)
        tl.store(dweight_ptr + at, (bits >> 16).to(tl.int16), mask=inside)
        tl.store(low_ptr + at, bits.to(tl.int16), mask=inside)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for begin in range(first, n, step):
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < n)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _aligned(x: Tensor) -> tuple[Tensor, int]:
    """x's memory from the 16-byte boundary below its first value, and the values between."""
    shift = x.data_ptr() % 16 // x.element_size()
    offset = x.storage_offset() - shift
    # Memory that begins off a boundary (not torch's own) is read value by value.
    if not shift or offset < 0:
        return x, 0
    return x.as_strided((1,), (1,), offset), shift


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    N, V = logits.shape
    check_targets(target, V, ignore_index)
    loss = logits.new_empty(N, dtype=torch.float32)
    lse = logits.new_empty(N, dtype=torch.float64)
    _loss(_rows(logits), target.contiguous(), loss, lse, ignore_index, label_smoothing, z_loss)
    return loss, lse


def _loss(
    logits: Tensor,
    target: Tensor,
    loss: Tensor,
    lse: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    N, V = logits.shape
    if not N:
        return
    memory, shift = _aligned(logits)
    cross_entropy_fwd_kernel[(N,)](
        memory,
        target,
        loss,
        lse,
        V,
        shift,
        logits.stride(0),
        ignore_index,
        label_smoothing,
        z_loss,
        SMOOTHING=label_smoothing > 0,
        **row_tile("fwd", logits.dtype),
    )


def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    N, V = logits.shape
    check_targets(target, V, ignore_index)
    logits = _rows(logits)
    dlogits = logits.new_empty(N, V)
    if not N:
        return dlogits
    memory, shift = _aligned(logits)
    tile = row_tile("bwd", logits.dtype)
    cross_entropy_bwd_kernel[(N,)](
        dloss,
        memory,
        target.contiguous(),
        lse.contiguous(),
        dlogits,
        V,
        shift,
        logits.stride(0),
        dloss.stride(0),
        ignore_index,
        label_smoothing,
        z_loss,
        SAME_RAGGED=shift == 0 and (logits.stride(0) - V) % tile["A"] == 0,
        **tile,
    )
    return dlogits


def chunk_rows(N: int, V: int, itemsize: int) -> int:
    """Rows a chunk, all of about one size; whole tiles of 64 where more than that fit."""
    fit = max(1, CHUNK // (triton.cdiv(V, PAD) * PAD * itemsize))
    rows = triton.cdiv(N, triton.cdiv(N, fit)) if N else 1
    return min(triton.cdiv(rows, 64) * 64, max(fit // 64 * 64, rows))


def _each_chunk(input: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk and their logits (n, V), in one buffer."""
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
) -> Tensor:
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
) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(target, len(linear_weight), ignore_index)
    weight, target = _rows(linear_weight.to(input.dtype)), target.contiguous()
    input = _rows(input)
    loss = input.new_empty(len(input), dtype=torch.float32)
    dinput = input.new_empty(input.shape)
    N = len(input)
    split = linear_weight.dtype == input.dtype != torch.float32
    chunked = N > chunk_rows(N, len(weight), input.element_size())
    dtype = linear_weight.dtype if split else torch.float32
    # With no rows, no chunk writes it.
    dweight = (torch.empty if N else torch.zeros)(weight.shape, dtype=dtype, device=weight.device)
    low = torch.empty_like(dweight, dtype=torch.int16) if split and chunked else None
    for rows, logits in _each_chunk(input, weight):
        linear_cross_entropy_rows_kernel[(len(logits),)](
            logits,
            target[rows],
            dloss[rows],
            loss[rows],
            logits.shape[1],
            logits.stride(0),
            dloss.stride(0),
            ignore_index,
            label_smoothing,
            z_loss,
            SMOOTHING=label_smoothing > 0,
            **row_tile("in place", logits.dtype),
        )
        torch.mm(logits, weight, out=dinput[rows])
        _add_dweight(dweight, low, logits, input[rows], rows.start == 0, rows.stop == N)
    total = (loss.double() * dloss).sum().float()
    return total, dinput, dweight.to(linear_weight.dtype)


def _add_dweight(
    dweight: Tensor, low: Tensor | None, dlogits: Tensor, input: Tensor, first: bool, last: bool
) -> None:
    """dweight += dlogits.T @ input, or = for the first chunk."""
    if dweight.dtype == input.dtype and low is None:
        # In fp32, or with nothing to add to, the library's product adds up as ours does.
        torch.addmm(dweight, dlogits.t(), input, beta=float(not first), out=dweight)
        return
    (N, V), C = dlogits.shape, input.shape[1]
    tile = weight_tile()
    grid = (triton.cdiv(V, tile["BLOCK_V"]) * triton.cdiv(C, tile["BLOCK_C"]),)
    linear_cross_entropy_dweight_kernel[grid](
        dlogits,
        input,
        dweight if low is None else dweight.view(torch.int16),
        low,
        N,
        V,
        C,
        dlogits.stride(0),
        input.stride(0),
        FIRST=first,
        LAST=last,
        **tile,
    )


def scale_(x: list[Tensor], factor: Tensor) -> None:
    for t in x:
        n = t.numel()
        if n:
            # A few programs, for most often the factor is 1.
            scale_kernel[(min(triton.cdiv(n, 4096), 2048),)](t, factor, n, BLOCK=4096, num_warps=8)
