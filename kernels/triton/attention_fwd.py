"""The attention forward. attention.py has the maths, attention_access.py what a view is."""

import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.triton.attention_access import (
    LN2,
    divide,
    dot,
    exponential,
    keep,
    key_range,
    length_of,
    number_of,
    program,
    rows_of,
    step_of,
    wide,
)
from gptfast.kernels.triton.attention_decode import attention_decode, factor_of
from gptfast.kernels.triton.attention_nonfinite import (
    any_nonfinite,
    nan_beyond,
    store_out_of_visible,
)
from gptfast.kernels.triton.attention_tiles import FWD, number, tile
from gptfast.kernels.triton.launch import launch
from gptfast.kernels.triton.target import stepping_down

# Bytes of keys and values of the heads of one group: a third of an H100's L2 cache.
GROUP_BYTES = 16 << 20


@triton.jit(do_not_specialize=["Tq", "Tk", "H", "n_heads", "group"])
def attention_fwd_kernel(
    q, k, v, out, lse_ptr, Tq, Tk, H, n_heads, group, D, c, dropout, kv_len_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    NEGATIVE: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    parts, c = c, number_of(c, NUMBER)
    n_blocks = tl.cdiv(Tq, BLOCK_M)
    head, block = program(n_blocks, n_heads, group)
    first = (n_blocks - 1 - block) * BLOCK_M
    queries = first + tl.arange(0, BLOCK_M)
    length, n_keys = length_of(kv_len_ptr, head, H, Tk)
    last, full, end = key_range(first, length, n_keys, Tq, BLOCK_M)
    in_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    q_mask = (queries < Tq)[:, None] & in_d
    q_tile = tl.load(rows_of(q, head, H, queries, BLOCK_D), mask=q_mask, other=0.0)
    EXACT: tl.constexpr = q_tile.dtype == tl.float32
    q_tile = wide(q_tile, NUMBER)
    if NEGATIVE:
        q_tile = -q_tile
    k_ptrs = rows_of(k, head, H, tl.arange(0, BLOCK_N), BLOCK_D)
    v_ptrs = rows_of(v, head, H, tl.arange(0, BLOCK_N), BLOCK_D)
    k_step, v_step = step_of(k, BLOCK_N), step_of(v, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_D], NUMBER)
    total = tl.zeros([BLOCK_M], NUMBER)
    peak = tl.full([BLOCK_M], -float("inf"), NUMBER)
    for start in tl.range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        mask = (keys < n_keys)[:, None] if EVEN_D else (keys < n_keys)[:, None] & in_d
        k_tile = wide(tl.load(k_ptrs, mask=mask, other=0.0), NUMBER)
        v_tile = wide(tl.load(v_ptrs, mask=mask, other=0.0), NUMBER)
        s = dot(q_tile, tl.trans(k_tile), tl.zeros([BLOCK_M, BLOCK_N], NUMBER))
        if start + BLOCK_N > full:
            s = tl.where(keys[None, :] <= last[:, None], s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        # For a query that has seen no key yet, -inf - -inf would be NaN.
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        rest = tl.zeros_like(shift) if EXACT else shift * c
        p = exponential(s, c, shift[:, None], rest[:, None], EXACT)
        rescale = tl.exp2((peak - shift) * c)
        total = total * rescale + tl.sum(p, 1)
        if dropout is not None:
            p = tl.where(keep(dropout, head, Tk - Tq + queries, start, BLOCK_N), p, 0.0)
        acc = dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None])
        peak = new_peak
        k_ptrs += k_step
        v_ptrs += v_step

    # For a query that sees no key, out is 0 and lse is -inf.
    total = tl.where(total == 0.0, 1.0, total)
    factor = 1.0 if dropout is None else dropout[2]
    out_tile = divide(acc * factor, total[:, None]) if EXACT else acc * (factor / total)[:, None]
    out_tile = out_tile.to(out[0].dtype.element_ty)
    tl.store(rows_of(out, head, H, queries, BLOCK_D), out_tile, mask=q_mask)
    lse_ptrs = lse_ptr + head.to(tl.int64) * Tq + queries
    binary = tl.log2(total.to(tl.float64) if EXACT else total).to(tl.float64)
    lse = (peak.to(tl.float64) * c.to(tl.float64) + binary) * LN2
    tl.store(lse_ptrs, lse, mask=queries < Tq)
    if any_nonfinite(acc + nan_beyond(peak, c, last >= 0)[:, None]):
        tl.debug_barrier()  # other threads may have stored what is read and written here
        store_out_of_visible(
            q, k, v, out, lse_ptr, head, H, first, length, n_keys, end, Tk, Tq, D, parts, dropout,
            BLOCK_M, BLOCK_D, NEGATIVE,
        )  # fmt: skip


def view_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return the view of a (B, H, T, D) tensor, copied if its last dimension is not contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1), x.stride(2)


def group_of(k: Tensor) -> int:
    """Return how many heads' keys and values share the L2 cache."""
    return max(1, GROUP_BYTES // max(1, 2 * k.shape[2] * k.shape[3] * k.element_size()))


def dropout_of(dropout_p: float, seed: Tensor | None) -> tuple[Tensor, float, float] | None:
    """Return dropout as the kernels take it."""
    if seed is None or dropout_p == 0:
        return None
    return seed, dropout_p, 1.0 / (1.0 - dropout_p)


def decodes(Tq: int, dropout_p: float) -> bool:
    """Return whether the decoding kernel serves the forward."""
    return Tq == 1 and dropout_p == 0


@stepping_down
def fill_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> None:
    """Fill out (B, H, Tq, D) and lse (B, H, Tq)."""
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    if decodes(Tq, dropout_p):
        attention_decode(view_of(q), view_of(k), view_of(v), view_of(out), lse, scale, kv_len)
        return
    blocks, options = tile(FWD, q.dtype, D, dropout_p > 0, number(q, Tk))
    launch(
        attention_fwd_kernel,
        (triton.cdiv(Tq, blocks["BLOCK_M"]) * B * H,),
        view_of(q),
        view_of(k),
        view_of(v),
        view_of(out),
        lse,
        Tq,
        Tk,
        H,
        B * H,
        group_of(k),
        D,
        factor_of(scale),
        dropout_of(dropout_p, seed),
        kv_len,
        **blocks,
        NEGATIVE=scale < 0,
        NUMBER=number(q, Tk),
        **options,
    )
