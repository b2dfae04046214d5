"""The attention backward: one kernel for dQ, one for dK and dV. attention.py has the maths."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.triton.attention_access import (
    LOG2E,
    ROW,
    divide,
    dot,
    exponential,
    keep,
    kept_one,
    key_range,
    length_of,
    load_stats,
    number_of,
    p_of_one_key,
    program,
    rows_of,
    split_lse,
    stats_of,
    step_of,
    store_stats,
    wide,
)
from gptfast.kernels.triton.attention_decode import factor_of, parts_of
from gptfast.kernels.triton.attention_fwd import dropout_of, group_of, view_of
from gptfast.kernels.triton.attention_nonfinite import (
    any_nonfinite,
    store_dk_dv_of_visible,
    store_dq_of_visible,
)
from gptfast.kernels.triton.attention_tiles import BWD_DK_DV, BWD_DQ, number, tile
from gptfast.kernels.triton.launch import launch
from gptfast.kernels.triton.launch_series import scratch
from gptfast.kernels.triton.target import stepping_down


@triton.jit
def _dq_blocks(
    dq, total, delta, q_tile, dout_tile, k_ptrs, v_ptrs, k, v, shift, rest, last, full, end, n_keys,
    D, c, dropout, head, position, BLOCK_N: tl.constexpr, EVEN_D: tl.constexpr, SUMS: tl.constexpr,
    NUMBER: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Loop over the keys: add to total = sum P and delta = sum P dP if SUMS, else to dq = dS K."""
    in_d = (tl.arange(0, q_tile.shape[1]) < D)[None, :]
    k_step, v_step = step_of(k, BLOCK_N), step_of(v, BLOCK_N)
    for start in tl.range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        mask = (keys < n_keys)[:, None] if EVEN_D else (keys < n_keys)[:, None] & in_d
        k_tile = wide(tl.load(k_ptrs, mask=mask, other=0.0), NUMBER)
        v_tile = wide(tl.load(v_ptrs, mask=mask, other=0.0), NUMBER)
        if EXACT:
            # Bit for bit the products of the other kernel; these shapes also take fewer registers.
            zeros = tl.zeros([BLOCK_N, q_tile.shape[0]], NUMBER)
            s = tl.trans(dot(k_tile, tl.trans(q_tile), zeros))
            dp = tl.trans(dot(v_tile, tl.trans(dout_tile), zeros))
        else:
            s = tl.dot(q_tile, tl.trans(k_tile))
            dp = tl.dot(dout_tile, tl.trans(v_tile))
        p = exponential(s, c, shift[:, None], rest[:, None], EXACT)
        if start + BLOCK_N > full:
            visible = keys[None, :] <= last[:, None]
            p = tl.where(visible, p, 0.0)
            if SUMS:
                dp = tl.where(visible, dp, 0.0)
        if dropout is not None:
            dp = tl.where(keep(dropout, head, position, start, BLOCK_N), dp * dropout[2], 0.0)
        if SUMS:
            total += tl.sum(p, 1)
            delta += tl.sum(p * dp, 1)
        else:
            ds = p * (dp - delta[:, None])
            dq = dot(ds.to(k_tile.dtype), k_tile, dq)
        k_ptrs += k_step
        v_ptrs += v_step
    return dq, total, delta


@triton.jit(do_not_specialize=["Tq", "Tk", "H", "n_heads", "group"])
def attention_bwd_dq_kernel(
    dout, q, k, v, out, lse_ptr, dq, stats, Tq, Tk, H, n_heads, group, D, scale, c, dropout,
    kv_len_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, NEGATIVE: tl.constexpr, NUMBER: tl.constexpr, EXACT: tl.constexpr,
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
    q_tile = wide(tl.load(rows_of(q, head, H, queries, BLOCK_D), mask=q_mask, other=0.0), NUMBER)
    dout_ptrs = rows_of(dout, head, H, queries, BLOCK_D)
    dout_tile = wide(tl.load(dout_ptrs, mask=q_mask, other=0.0), NUMBER)
    if NEGATIVE:
        q_tile = -q_tile
    lse_ptrs = lse_ptr + head.to(tl.int64) * Tq + queries
    shift, rest = split_lse(lse_ptrs, queries < Tq, c, NUMBER, EXACT)
    k_ptrs = rows_of(k, head, H, tl.arange(0, BLOCK_N), BLOCK_D)
    v_ptrs = rows_of(v, head, H, tl.arange(0, BLOCK_N), BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_D], NUMBER)
    total = tl.zeros([BLOCK_M], NUMBER)
    delta = tl.zeros([BLOCK_M], NUMBER)
    if EXACT:
        # out is rounded, and delta with it; these products may round other scores than the forward.
        # So the sums of P and P dP are computed again.
        acc, total, delta = _dq_blocks(
            acc, total, delta, q_tile, dout_tile, k_ptrs, v_ptrs, k, v, shift, rest, last, full,
            end, n_keys, D, c, dropout, head, Tk - Tq + queries, BLOCK_N, EVEN_D, True, NUMBER,
            EXACT,
        )  # fmt: skip
        total = tl.where(total == 0.0, 1.0, total)
        delta = divide(delta, total)
        rest += (tl.log(total.to(tl.float64)) * LOG2E).to(NUMBER)
    else:
        out_tile = tl.load(rows_of(out, head, H, queries, BLOCK_D), mask=q_mask, other=0.0)
        delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    # dS is exactly 0 for a query that sees one key. dP - delta would be the difference of two
    # roundings, so P is made 0, here and in the other kernel.
    rest = tl.where(last > 0, rest, float("inf"))
    store_stats(stats_of(stats, head, n_heads, Tq), first, Tq, rest, delta, shift, EXACT)
    acc, _, _ = _dq_blocks(
        acc, total, delta, q_tile, dout_tile, k_ptrs, v_ptrs, k, v, shift, rest, last, full, end,
        n_keys, D, c, dropout, head, Tk - Tq + queries, BLOCK_N, EVEN_D, False, NUMBER, EXACT,
    )  # fmt: skip
    dq_tile = (acc * number_of(scale, NUMBER)).to(dq[0].dtype.element_ty)
    tl.store(rows_of(dq, head, H, queries, BLOCK_D), dq_tile, mask=q_mask)
    if any_nonfinite(acc):
        tl.debug_barrier()  # other threads may store, or have stored, what is read and written here
        store_dq_of_visible(
            dout, q, k, v, stats, dq, head, H, n_heads, first, length, n_keys, end, Tk, Tq, D,
            scale, parts, dropout, BLOCK_M, BLOCK_D, NEGATIVE, EXACT,
        )  # fmt: skip


@triton.jit
def _dv_of_one_key(
    dout, lse_ptr, head, H, length, n_keys, Tk, Tq, D, dropout, keys, BLOCK_D: tl.constexpr,
    NUMBER: tl.constexpr,
):  # fmt: skip
    """Return what the query that sees key 0 alone adds to dV of the block (keys, BLOCK_D)."""
    # No other query sees one key alone.
    query = tl.maximum(Tq - length, 0) + tl.arange(0, 1)
    last = tl.minimum(length - Tq + query, n_keys - 1)
    in_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    mask = ((last == 0) & (query < Tq))[:, None]
    row = tl.load(rows_of(dout, head, H, query, BLOCK_D), mask=mask & in_d, other=0.0).to(NUMBER)
    p = p_of_one_key(lse_ptr + query, query < Tq).to(NUMBER)
    if dropout is not None:
        p = tl.where(kept_one(dropout, head, Tk - Tq + query, 0), p, 0.0)
    return tl.where((keys == 0)[:, None] & mask, p[:, None] * row, 0.0)


@triton.jit(do_not_specialize=["Tq", "Tk", "H", "n_heads", "group"])
def attention_bwd_dk_dv_kernel(
    dout, q, k, v, lse_ptr, stats, dk, dv, Tq, Tk, H, n_heads, group, D, scale, c, dropout,
    kv_len_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, NEGATIVE: tl.constexpr, NUMBER: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    parts, c = c, number_of(c, NUMBER)
    head, block = program(tl.cdiv(Tk, BLOCK_N), n_heads, group)
    key = block * BLOCK_N
    keys = key + tl.arange(0, BLOCK_N)
    length, n_keys = length_of(kv_len_ptr, head, H, Tk)
    in_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    k_mask = (keys < n_keys)[:, None] & in_d
    k_tile = wide(tl.load(rows_of(k, head, H, keys, BLOCK_D), mask=k_mask, other=0.0), NUMBER)
    v_tile = wide(tl.load(rows_of(v, head, H, keys, BLOCK_D), mask=k_mask, other=0.0), NUMBER)
    if NEGATIVE:
        k_tile = -k_tile
    # Queries before `first` see none of the keys; those from `full` on see all of them.
    # Keys that no query sees have no loop. It is `stop` that says so: BLOCK_M divides `first`, and
    # the compiler must know this to load more than one number of the stats at once.
    first = tl.maximum(key - (length - Tq), 0) // BLOCK_M * BLOCK_M
    stop = tl.where(key < n_keys, Tq, first)
    full = tl.minimum(key + BLOCK_N, n_keys) - 1 - (length - Tq)
    queries = first + tl.arange(0, BLOCK_M)
    q_ptrs = rows_of(q, head, H, queries, BLOCK_D)
    dout_ptrs = rows_of(dout, head, H, queries, BLOCK_D)
    q_step, dout_step = step_of(q, BLOCK_M), step_of(dout, BLOCK_M)
    stats_ptrs = stats_of(stats, head, n_heads, Tq)

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], NUMBER)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], NUMBER)
    for start in tl.range(first, stop, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        mask = (queries < Tq)[:, None] if EVEN_D else (queries < Tq)[:, None] & in_d
        q_tile = wide(tl.load(q_ptrs, mask=mask, other=0.0), NUMBER)
        dout_tile = wide(tl.load(dout_ptrs, mask=mask, other=0.0), NUMBER)
        rest, delta, shift = load_stats(stats_ptrs, queries, EXACT)
        # (keys, queries), like everything below: P and dS then do not go through shared memory.
        zeros = tl.zeros([BLOCK_N, BLOCK_M], NUMBER)
        s = dot(k_tile, tl.trans(q_tile), zeros)
        dp = dot(v_tile, tl.trans(dout_tile), zeros)
        p = exponential(s, c, shift[None, :], rest[None, :], EXACT)
        if start < full:
            last = tl.minimum(length - Tq + queries, n_keys - 1)
            p = tl.where(keys[:, None] <= last[None, :], p, 0.0)
        kept = p
        if dropout is not None:
            kept_at = tl.trans(keep(dropout, head, Tk - Tq + queries, key, BLOCK_N))
            kept = tl.where(kept_at, p, 0.0)
            dp = tl.where(kept_at, dp * dropout[2], 0.0)
        dv_acc = dot(kept.to(dout_tile.dtype), dout_tile, dv_acc)
        ds = p * (dp - delta[None, :])
        dk_acc = dot(ds.to(q_tile.dtype), q_tile, dk_acc)
        q_ptrs += q_step
        dout_ptrs += dout_step
    lse_ptr += head.to(tl.int64) * Tq
    if key == 0:
        dv_acc += _dv_of_one_key(
            dout, lse_ptr, head, H, length, n_keys, Tk, Tq, D, dropout, keys, BLOCK_D, NUMBER
        )

    nonfinite = any_nonfinite(dk_acc) or any_nonfinite(dv_acc)
    k_mask = (keys < Tk)[:, None] & in_d
    seen = (keys < n_keys)[:, None]
    dv_scale = 1.0 if dropout is None else dropout[2]
    dk_tile = tl.where(seen, dk_acc * number_of(scale, NUMBER), 0.0).to(dk[0].dtype.element_ty)
    dv_tile = tl.where(seen, dv_acc * dv_scale, 0.0).to(dv[0].dtype.element_ty)
    tl.store(rows_of(dk, head, H, keys, BLOCK_D), dk_tile, mask=k_mask)
    tl.store(rows_of(dv, head, H, keys, BLOCK_D), dv_tile, mask=k_mask)
    if nonfinite:
        tl.debug_barrier()  # other threads may have stored what is written here
        store_dk_dv_of_visible(
            dout, q, k, v, lse_ptr, stats, dk, dv, head, H, n_heads, key, first, length, n_keys,
            Tk, Tq, D, scale, parts, dropout, BLOCK_N, BLOCK_D, NEGATIVE, EXACT,
        )  # fmt: skip


def stats_scratch(lse: Tensor, NUMBER: tl.dtype, EXACT: bool) -> Tensor:
    """Return memory for the stats of `stats_of` and, behind them, of `exact_stats_of`."""
    dtype = torch.float64 if NUMBER == tl.float64 else torch.float32
    length = triton.cdiv(lse.shape[-1], ROW.value) * ROW.value
    n = lse.shape[0] * lse.shape[1] * length * (3 if EXACT else 2)
    return scratch(lse, (n + 3 * lse.numel() * (8 // dtype.itemsize),), dtype)


@stepping_down
def fill_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> None:
    """Fill grads: dq (B, H, Tq, D), dk and dv (B, H, Tk, D)."""
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    dout_view, q_view, k_view, v_view = (view_of(x) for x in (dout, q, k, v))
    dq, dk, dv = (view_of(x) for x in grads)
    lse = lse.contiguous()
    NUMBER, EXACT = number(q, Tk), q.dtype == torch.float32
    stats = stats_scratch(lse, NUMBER, EXACT)
    factors = parts_of(scale), factor_of(scale)
    common = (Tq, Tk, H, B * H, group_of(k), D, *factors, dropout_of(dropout_p, seed), kv_len)
    kinds = {"NEGATIVE": scale < 0, "NUMBER": NUMBER, "EXACT": EXACT}
    blocks, options = tile(BWD_DQ, q.dtype, D, dropout_p > 0, NUMBER)
    launch(
        attention_bwd_dq_kernel, (triton.cdiv(Tq, blocks["BLOCK_M"]) * B * H,),
        dout_view, q_view, k_view, v_view, view_of(out), lse, dq, stats, *common,
        **blocks, **options, **kinds,
    )  # fmt: skip
    blocks, options = tile(BWD_DK_DV, q.dtype, D, dropout_p > 0, NUMBER)
    launch(
        attention_bwd_dk_dv_kernel, (triton.cdiv(Tk, blocks["BLOCK_N"]) * B * H,),
        dout_view, q_view, k_view, v_view, lse, stats, dk, dv, *common,
        **blocks, **options, **kinds,
    )  # fmt: skip
