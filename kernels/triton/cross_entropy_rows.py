"""The row kernels of cross entropy: the loss, the gradient, and both at once.

    loss = (1 - e) (log sum + (top - x_target)) + e (log sum + (top - mean x)) + z_loss lse^2
    dx_j = exp(x_j - top) * factor - offset, except at the target

where top is the row's maximum, sum that of exp(x_j - top), and lse = top + log sum.

One program a row. In the forward, each thread keeps the largest logit it has seen and the sum of
exponentials relative to it, rescaled once per 16 bytes of the row; threads are joined at the end.
A row of odd V may start anywhere within a granule, 16 bytes of A values. Whole granules are loaded
and stored by 128-bit instructions, the values of the row's two ragged ends by one vector of 2 A.
"""

import torch
import triton
import triton.language as tl

from gptfast.kernels.triton import target as compiled_for

# Logits times it are summed in fp32 without overflow. Products with a power of two are exact.
SMALL = tl.constexpr(2.0**-32)

# arch: (16-bit logits a step, num_warps). "in place" reads a row twice: if few rows are computed at
# once, the second time is from the L2 cache.
ROW_TILES = {
    "sm_80": {"fwd": (4096, 8), "bwd": (4096, 8), "in place": (8192, 16)},
    "sm_90": {"fwd": (4096, 8), "bwd": (4096, 8), "in place": (8192, 16)},
    "sm_100": {"fwd": (4096, 8), "bwd": (4096, 8), "in place": (8192, 16)},
    "gfx942": {"fwd": (4096, 4), "bwd": (4096, 4), "in place": (8192, 8)},
}


def row_tile(kind: str, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of a row kernel, "fwd", "bwd" or "in place"."""
    block, num_warps = ROW_TILES[compiled_for.arch()][kind]
    # The same number of bytes a step in every dtype.
    return {"BLOCK": block * 2 // dtype.itemsize, "A": 16 // dtype.itemsize, "num_warps": num_warps}


@triton.jit
def _row(row, x_ptr, shift, stride, A: tl.constexpr):
    """Return a pointer to the granule in which a row starts, and the row's position in it."""
    # int64: row * V overflows int32 at 42,731 rows of GPT-2 logits.
    start = row * stride + shift
    granule = start // A * A
    return x_ptr + granule, (start - granule).to(tl.int32)


@triton.jit
def _ragged(lo, hi, A: tl.constexpr):
    """Return the positions of the first and the last granule, and which are in a ragged end."""
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
    """Return a row's loss as if it were not ignored, its top, its sum and its target's logit.

    The loss and the sum are fp64.
    """
    picked = tl.load(x_ptr + lo + tl.where(in_range, target, 0)).to(tl.float32)
    # The mean is computed relative to one logit: a sum of large numbers would round.
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
            values += tl.sum(tl.where(whole, x * SMALL - pivot * SMALL, 0.0), 1)
    highest = tl.maximum(tl.max(top, 0), tl.max(ragged, 0))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    exp_sum = tl.sum(exps * tl.exp(top - safe), 0) + tl.sum(tl.exp(ragged - safe), 0)
    # fp64 once a row; log_sum is added to differences of logits, as a large one would swallow it.
    exp_sum = exp_sum.to(tl.float64)
    log_sum = tl.log(exp_sum)
    top64 = highest.to(tl.float64)
    loss = (1.0 - label_smoothing) * (log_sum + (top64 - picked.to(tl.float64)))
    if SMOOTHING:
        at_ends = tl.sum(tl.where(inside, ragged * SMALL - pivot * SMALL, 0.0), 0)
        mean = pivot.to(tl.float64) + (tl.sum(values, 0) + at_ends).to(tl.float64) / SMALL / V
        loss += label_smoothing * (log_sum + (top64 - mean))
    loss += z_loss * (top64 + log_sum) * (top64 + log_sum)
    # Only a GPU gets here with a target out of range: the CPU raises.
    return tl.where(in_range, loss, float("nan")), highest, exp_sum, picked


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
    top,
    exp_sum,
    picked,
    label_smoothing,
    z_loss,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    """Store the row's gradient at dx_ptr + lo, from its logits at x_ptr + lo; 0 if ignored."""
    dloss = dloss.to(tl.float64)
    z = 2.0 * z_loss * (top.to(tl.float64) + tl.log(exp_sum))
    share = dloss * label_smoothing / V
    # In fp64, as it cancels when the target is nearly certain. Then it is the top: exp(0) is exact.
    p = tl.exp(picked - top).to(tl.float64) / exp_sum
    dtarget = dloss * ((p - 1.0) + z * p + label_smoothing) - share
    # An ignored row reads -inf as its logits: exp(-inf - 0) * 0 - 0 is 0 for any dloss and top.
    top = tl.where(ignored, 0.0, top)
    factor = tl.where(ignored, 0.0, (dloss * (1.0 + z) / exp_sum).to(tl.float32))
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
        dx = tl.where(at == target_at, dtarget, tl.exp(x - top) * factor - offset)
        tl.store(dx_ptr + at, dx.to(dtype), mask=whole)
    at, inside = _ragged(lo, hi, A)
    x = tl.load(x_ptr + at, mask=inside & (ignored == 0), other=float("-inf")).to(tl.float32)
    dx = tl.where(at == target_at, dtarget, tl.exp(x - top) * factor - offset)
    tl.store(dx_ptr + at, dx.to(dtype), mask=inside)


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    stats_ptr,
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
    loss, top, exp_sum, _ = _row_loss(
        x_ptr, lo, V, target, in_range, ignored == 0, label_smoothing, z_loss, SMOOTHING, BLOCK, A
    )
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss).to(tl.float32))
    if stats_ptr is not None:
        tl.store(stats_ptr + row * 2, tl.where(ignored, 0.0, top).to(tl.float64))
        tl.store(stats_ptr + row * 2 + 1, tl.where(ignored, 0.0, exp_sum))


@triton.jit
def cross_entropy_bwd_kernel(
    dloss_ptr,
    logits_ptr,
    target_ptr,
    stats_ptr,
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
    # Last rows first: the forward read them last, so some are still in the L2 cache.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    in_range = (target >= 0) & (target < V)
    dx_ptr, lo = _row(row, dlogits_ptr, 0, V, A)
    if SAME_RAGGED:
        x_ptr, lo = _row(row, logits_ptr, shift, stride, A)
    else:
        x_ptr = logits_ptr + (row * stride + shift - lo)
    picked = tl.load(x_ptr + lo + tl.where(in_range, target, 0)).to(tl.float32)
    _store_gradient(
        dx_ptr,
        x_ptr,
        lo,
        V,
        target,
        in_range,
        ignored,
        tl.load(dloss_ptr + row * dloss_stride).to(tl.float32),
        tl.load(stats_ptr + row * 2).to(tl.float32),
        tl.load(stats_ptr + row * 2 + 1),
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
    """Store a chunk's loss and overwrite its logits with dlogits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    in_range = (target >= 0) & (target < V)
    x_ptr, lo = _row(row, logits_ptr, 0, stride, A)
    loss, top, exp_sum, picked = _row_loss(
        x_ptr, lo, V, target, in_range, ignored == 0, label_smoothing, z_loss, SMOOTHING, BLOCK, A
    )
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss).to(tl.float32))
    dloss = tl.load(dloss_ptr + row * dloss_stride).to(tl.float32)
    # All threads read the target's logit and their parts of the row before one overwrites any.
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
        top,
        exp_sum,
        picked,
        label_smoothing,
        z_loss,
        BLOCK,
        A,
    )
