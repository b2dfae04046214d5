"""Attention's sums where inputs are not finite, term by term.

In the products of tiles, a pair of query and key that is not visible has the factor 0, which an inf
or a NaN makes NaN. A kernel whose sums hold a number that is not finite computes them again here,
from visible pairs alone: slowly, and only then. Everything is loaded anew and kept as it is in
memory, so that this costs the main loops no registers.
"""

import triton
import triton.language as tl

from gptfast.kernels.triton.attention_access import (
    exponential,
    keep,
    kept_one,
    load_stats,
    p_of_one_key,
    rows_of,
    split_lse,
    stats_of,
)

# Queries, or keys, that the backward computes at a time.
ROWS = tl.constexpr(4)


@triton.jit
def any_nonfinite(x):
    """Return whether a tile holds an inf or a NaN."""
    # 0 x is NaN where x is not finite, and takes one instruction per number.
    return tl.sum(x * 0.0) != 0.0


@triton.jit
def _tile(view, head, H, rows, n, D, BLOCK_D: tl.constexpr):
    """Return rows below n of one head."""
    mask = (rows < n)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(rows_of(view, head, H, rows, BLOCK_D), mask=mask, other=0.0)


@triton.jit
def _dots(tile, row, NUMBER: tl.constexpr):
    """Return the products of the rows of a tile with one row."""
    return tl.sum(tile.to(NUMBER) * row.to(NUMBER), 1)


@triton.jit
def _p(
    tile, row, c, shift, rest, NEGATIVE: tl.constexpr, NUMBER: tl.constexpr, EXACT: tl.constexpr
):
    """Return P of a tile's rows with one row: of queries with a key, or of keys with a query."""
    s = _dots(tile, row, NUMBER)
    return exponential(-s if NEGATIVE else s, c, shift, rest, EXACT)


@triton.jit(noinline=True)
def store_out_of_visible(
    q, k, v, out, lse_ptr, head, H, first, length, n_keys, end, Tk, Tq, D, c, dropout,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr, NUMBER: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Store out = sum_j P_j v_j of a block of queries, a few at a time."""
    lse_ptr += head.to(tl.int64) * Tq
    in_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    for start in tl.range(first, tl.minimum(first + BLOCK_M, Tq), ROWS):
        queries = start + tl.arange(0, ROWS)
        inside = queries < Tq
        q_tile = _tile(q, head, H, queries, Tq, D, BLOCK_D)
        shift, rest = split_lse(lse_ptr + queries, inside, c, NUMBER, EXACT)
        last = tl.minimum(length - Tq + queries, n_keys - 1)
        acc = tl.zeros([ROWS, BLOCK_D], NUMBER)
        for key in tl.range(0, end):
            row = key + tl.arange(0, 1)
            k_tile = _tile(k, head, H, row, end, D, BLOCK_D)
            p = _p(q_tile, k_tile, c, shift, rest, NEGATIVE, NUMBER, EXACT)
            if dropout is not None:
                p = tl.where(kept_one(dropout, head, Tk - Tq + queries, key), p * dropout[2], 0.0)
            term = p[:, None] * _tile(v, head, H, row, end, D, BLOCK_D).to(NUMBER)
            acc += tl.where((key <= last)[:, None], term, 0.0)
        out_tile = acc.to(out[0].dtype.element_ty)
        tl.store(rows_of(out, head, H, queries, BLOCK_D), out_tile, mask=inside[:, None] & in_d)


@triton.jit(noinline=True)
def store_dq_of_visible(
    dout, q, k, v, stats, dq, head, H, n_heads, first, length, n_keys, end, Tk, Tq, D, scale, c,
    dropout, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr,
    NUMBER: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Store dq = scale sum_j dS_j k_j of a block of queries, a few at a time."""
    stats_ptrs = stats_of(stats, head, n_heads, Tq)
    in_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    for start in tl.range(first, tl.minimum(first + BLOCK_M, Tq), ROWS):
        queries = start + tl.arange(0, ROWS)
        inside = queries < Tq
        q_tile = _tile(q, head, H, queries, Tq, D, BLOCK_D)
        dout_tile = _tile(dout, head, H, queries, Tq, D, BLOCK_D)
        rest, delta, shift = load_stats(stats_ptrs, queries, EXACT)
        last = tl.minimum(length - Tq + queries, n_keys - 1)
        acc = tl.zeros([ROWS, BLOCK_D], NUMBER)
        for key in tl.range(0, end):
            row = key + tl.arange(0, 1)
            k_tile = _tile(k, head, H, row, end, D, BLOCK_D)
            dp = _dots(dout_tile, _tile(v, head, H, row, end, D, BLOCK_D), NUMBER)
            if dropout is not None:
                kept_at = kept_one(dropout, head, Tk - Tq + queries, key)
                dp = tl.where(kept_at, dp * dropout[2], 0.0)
            p = _p(q_tile, k_tile, c, shift, rest, NEGATIVE, NUMBER, EXACT)
            term = (p * (dp - delta))[:, None] * k_tile.to(NUMBER)
            # dS is exactly 0 for a query that sees one key, as in the kernel.
            acc += tl.where(((key <= last) & (last > 0))[:, None], term, 0.0)
        dq_tile = (acc * scale).to(dq[0].dtype.element_ty)
        tl.store(rows_of(dq, head, H, queries, BLOCK_D), dq_tile, mask=inside[:, None] & in_d)


@triton.jit(noinline=True)
def store_dk_dv_of_visible(
    dout, q, k, v, lse_ptr, stats, dk, dv, head, H, n_heads, key, first, length, n_keys, Tk, Tq, D,
    scale, c, dropout, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr,
    NUMBER: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Store dk = scale sum_i dS_i q_i and dv = sum_i P_i dout_i of a block, a few keys at a time.

    lse_ptr is that of the head.
    """
    stats_ptrs = stats_of(stats, head, n_heads, Tq)
    in_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    for start in tl.range(key, tl.minimum(key + BLOCK_N, n_keys), ROWS):
        keys = start + tl.arange(0, ROWS)
        k_tile = _tile(k, head, H, keys, n_keys, D, BLOCK_D)
        v_tile = _tile(v, head, H, keys, n_keys, D, BLOCK_D)
        dk_acc = tl.zeros([ROWS, BLOCK_D], NUMBER)
        dv_acc = tl.zeros([ROWS, BLOCK_D], NUMBER)
        for query in tl.range(first, Tq):
            row = query + tl.arange(0, 1)
            q_tile = _tile(q, head, H, row, Tq, D, BLOCK_D)
            dout_tile = _tile(dout, head, H, row, Tq, D, BLOCK_D)
            rest, delta, shift = load_stats(stats_ptrs, row, EXACT)
            p = _p(k_tile, q_tile, c, shift, rest, NEGATIVE, NUMBER, EXACT)
            last = tl.minimum(length - Tq + query, n_keys - 1)
            if last == 0:
                p = tl.zeros_like(p) + p_of_one_key(lse_ptr + row, row < Tq).to(NUMBER)
            dp = _dots(v_tile, dout_tile, NUMBER)
            kept = p
            if dropout is not None:
                kept_at = keep(dropout, head, Tk - Tq + row, start, ROWS).to(tl.int32)
                kept = tl.where(tl.sum(kept_at, 0) > 0, p, 0.0)
                dp = tl.where(tl.sum(kept_at, 0) > 0, dp * dropout[2], 0.0)
            seen = (keys <= last)[:, None]
            dv_acc += tl.where(seen, kept[:, None] * dout_tile.to(NUMBER), 0.0)
            ds = p * (dp - delta)
            # dS is exactly 0 for a query that sees one key, as in the kernel.
            dk_acc += tl.where(seen & (last > 0), ds[:, None] * q_tile.to(NUMBER), 0.0)
        mask = (keys < n_keys)[:, None] & in_d
        if dropout is not None:
            dv_acc *= dropout[2]
        dk_tile = (dk_acc * scale).to(dk[0].dtype.element_ty)
        tl.store(rows_of(dk, head, H, keys, BLOCK_D), dk_tile, mask=mask)
        dv_tile = dv_acc.to(dv[0].dtype.element_ty)
        tl.store(rows_of(dv, head, H, keys, BLOCK_D), dv_tile, mask=mask)
