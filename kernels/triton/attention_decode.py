"""Attention of one query per row over a cache of keys and values, for decoding.

    S_j = q k_j;  peak = max S;  total = sum exp2(c (S - peak));  acc = sum exp2(c (S - peak)) v_j

Reading the cache takes the time, so there are no tensor cores here. A program takes CHUNK keys of
one head in blocks of BLOCK_N. Every slot of a block keeps its own peak, total and acc, so that
threads exchange only the sums over D; the slots are merged at the end. A second kernel merges the
chunks, in order. Where a chunk begins depends on CHUNK alone, so a row's result depends neither on
the other rows nor on the length of the cache.

fp32 inputs are computed with in fp64, which costs nothing beside the reading: of so few numbers,
single roundings decide the largest error.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.triton.attention_access import LN2, LOG2E, length_of, number_of
from gptfast.kernels.triton.attention_nonfinite import (
    any_nonfinite,
    nan_beyond,
    store_out_of_visible,
)
from gptfast.kernels.triton.launch import launch
from gptfast.kernels.triton.launch_series import scratch

# Keys that a program takes.
CHUNK = 256
# Elements of K in a block of keys, and as many of V; half of them in fp64.
BLOCK_ELEMENTS = 4096
# Chunks that the second kernel merges at once.
BLOCK_C = 16


@triton.jit
def _shift(peak):
    """Return peak, or 0 where it is -inf."""
    # A slot that has seen no key would otherwise compute -inf - -inf, which is NaN.
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def _merge(peak, total, acc, c):
    """Merge all slots to one."""
    top = tl.max(peak, 0)
    rescale = tl.exp2((peak - _shift(top)) * c)
    return top, tl.sum(total * rescale, 0), tl.sum(acc * rescale[:, None], 0)


@triton.jit
def _head(view, head, H):
    """Return a pointer to the first element of a head; view is (pointer, strides of b, h and t)."""
    return view[0] + (head // H).to(tl.int64) * view[1] + (head % H).to(tl.int64) * view[2]


@triton.jit
def _finish(
    peak, total, acc, q, k, v, out, lse_ptr, head, H, n_keys, D, parts,
    NEGATIVE: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Store the output and the lse of one row."""
    d = tl.arange(0, acc.shape[0])
    c = number_of(parts, NUMBER)
    total = tl.where(total == 0.0, 1.0, total)
    out_ptr = _head(out, head, H)
    tl.store(out_ptr + d, (acc / total).to(out_ptr.dtype.element_ty), mask=d < D)
    natural = peak.to(tl.float64) * (c.to(tl.float64) * LN2)
    tl.store(lse_ptr + head, natural + tl.log(total.to(tl.float64)))
    if NUMBER == tl.float32:
        if any_nonfinite(acc + nan_beyond(peak, c, n_keys > 0)):
            tl.debug_barrier()  # other threads may have stored what is written here
            store_out_of_visible(
                q, k, v, out, lse_ptr, head, H, 0, n_keys, n_keys, n_keys, n_keys, 1, D, parts,
                None, 1, acc.shape[0], NEGATIVE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["Tk", "H", "n_chunks"])
def attention_decode_kernel(
    q, k, v, out, lse_ptr, acc_ptr, peak_ptr, total_ptr, Tk, H, n_chunks, D, c, kv_len_ptr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    NEGATIVE: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    head, chunk = tl.program_id(0), tl.program_id(1)
    parts, c = c, number_of(c, NUMBER)
    n_keys = length_of(kv_len_ptr, head, H, Tk)[1]
    d = tl.arange(0, BLOCK_D)
    query = tl.load(_head(q, head, H) + d, mask=d < D, other=0.0).to(NUMBER)
    if NEGATIVE:
        query = -query
    slots = tl.arange(0, BLOCK_N)
    k_ptrs = _head(k, head, H) + slots.to(tl.int64)[:, None] * k[3] + d[None, :]
    v_ptrs = _head(v, head, H) + slots.to(tl.int64)[:, None] * v[3] + d[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_D], NUMBER)
    total = tl.zeros([BLOCK_N], NUMBER)
    peak = tl.full([BLOCK_N], -float("inf"), NUMBER)
    for start in tl.range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, n_keys), BLOCK_N):
        row = tl.cast(start, tl.int64)
        inside = start + slots < n_keys
        mask = inside[:, None] if EVEN_D else inside[:, None] & (d < D)[None, :]
        key = tl.load(k_ptrs + row * k[3], mask=mask, other=0.0)
        value = tl.load(v_ptrs + row * v[3], mask=mask, other=0.0)
        s = tl.sum(key.to(NUMBER) * query[None, :], 1)
        s = tl.where(inside, s, -float("inf"))
        new_peak = tl.maximum(peak, s)
        shift = _shift(new_peak)
        p = tl.exp2((s - shift) * c)
        rescale = tl.exp2((peak - shift) * c)
        total = total * rescale + p
        acc = acc * rescale[:, None] + p[:, None] * value.to(NUMBER)
        peak = new_peak
    peak, total, acc = _merge(peak, total, acc, c)
    if acc_ptr is None:
        _finish(
            peak, total, acc, q, k, v, out, lse_ptr, head, H, n_keys, D, parts, NEGATIVE, NUMBER
        )  # fmt: skip
    else:
        at = head.to(tl.int64) * n_chunks + chunk
        tl.store(acc_ptr + at * D + d, acc, mask=d < D)
        tl.store(peak_ptr + at, peak)
        tl.store(total_ptr + at, total)


@triton.jit(do_not_specialize=["Tk", "H", "n_chunks"])
def attention_combine_kernel(
    q, k, v, out, lse_ptr, acc_ptr, peak_ptr, total_ptr, Tk, H, n_chunks, D, c, kv_len_ptr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    parts, c = c, number_of(c, NUMBER)
    d = tl.arange(0, BLOCK_D)
    first = head.to(tl.int64) * n_chunks
    acc = tl.zeros([BLOCK_C, BLOCK_D], NUMBER)
    total = tl.zeros([BLOCK_C], NUMBER)
    peak = tl.full([BLOCK_C], -float("inf"), NUMBER)
    for start in tl.range(0, n_chunks, BLOCK_C):
        chunks = start + tl.arange(0, BLOCK_C)
        inside = chunks < n_chunks
        at = first + chunks
        mask = inside[:, None] & (d < D)[None, :]
        more = tl.load(acc_ptr + at[:, None] * D + d[None, :], mask=mask, other=0.0)
        more_peak = tl.load(peak_ptr + at, mask=inside, other=-float("inf"))
        more_total = tl.load(total_ptr + at, mask=inside, other=0.0)
        new_peak = tl.maximum(peak, more_peak)
        rescale = tl.exp2((peak - _shift(new_peak)) * c)
        more_rescale = tl.exp2((more_peak - _shift(new_peak)) * c)
        total = total * rescale + more_total * more_rescale
        acc = acc * rescale[:, None] + more * more_rescale[:, None]
        peak = new_peak
    peak, total, acc = _merge(peak, total, acc, c)
    n_keys = length_of(kv_len_ptr, head, H, Tk)[1]
    _finish(
        peak, total, acc, q, k, v, out, lse_ptr, head, H, n_keys, D, parts, NEGATIVE, NUMBER
    )  # fmt: skip


View = tuple[Tensor, int, int, int]


def parts_of(x: float) -> tuple[float, float]:
    """Return x as two fp32 parts, of which kernels in fp32 take the first: see `number_of`."""
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high


def factor_of(scale: float) -> tuple[float, float]:
    """Return c = |scale| log2(e) in two parts."""
    # exp2(c (S - max)) needs c > 0: a negative sign goes to q. 2^-120 makes every P 1 except
    # that of a score of -inf.
    return parts_of(max(abs(scale) * LOG2E.value, 2.0**-120))


def attention_decode(
    q: View, k: View, v: View, out: View, lse: Tensor, scale: float, kv_len: Tensor | None
) -> None:
    """Fill out (B, H, 1, D) and lse (B, H, 1)."""
    B, H, _, D = q[0].shape
    Tk = k[0].shape[2]
    n_chunks = triton.cdiv(Tk, CHUNK)
    fp64 = q[0].dtype == torch.float32
    number = tl.float64 if fp64 else tl.float32
    acc = peak = total = None
    if n_chunks > 1:
        dtype = torch.float64 if fp64 else torch.float32
        acc = scratch(lse, (B * H, n_chunks, D), dtype)
        peak, total = scratch(lse, (2, B * H, n_chunks), dtype)
    common = (q, k, v, out, lse, acc, peak, total, Tk, H, n_chunks, D, factor_of(scale), kv_len)
    kinds = {"NEGATIVE": scale < 0, "NUMBER": number}
    BLOCK_D = max(16, triton.next_power_of_2(D))
    BLOCK_N = min(64, BLOCK_ELEMENTS // BLOCK_D // (2 if fp64 else 1))
    launch(
        attention_decode_kernel, (B * H, n_chunks),
        *common, CHUNK=CHUNK, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, EVEN_D=BLOCK_D == D, **kinds,
        num_warps=4,
    )  # fmt: skip
    if n_chunks > 1:
        launch(
            attention_combine_kernel, (B * H,),
            *common, BLOCK_C=BLOCK_C, BLOCK_D=BLOCK_D, **kinds, num_warps=4,
        )  # fmt: skip
