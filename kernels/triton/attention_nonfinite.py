"""Attention's sums where inputs are not finite, term by term.

In the products of tiles, a pair of query and key that is not visible has the factor 0, which an inf
or a NaN makes NaN. A kernel whose sums hold a number that is not finite computes such numbers again
here, from visible pairs alone: slowly, and only then. Everything is loaded anew, so that the main
loops keep no registers for this.
"""

import triton
import triton.language as tl

from gptfast.kernels.triton.attention_access import (
    exponential,
    keep,
    limited,
    rows_of,
    split_lse,
)


@triton.jit
def any_nonfinite(x):
    """Return whether a tile holds an inf or a NaN."""
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1), 0) > 0


@triton.jit
def merged(x, again):
    """Return x where it is finite, else what was computed again."""
    return tl.where(tl.abs(x) < float("inf"), x, again)


@triton.jit
def _tile(view, head, H, rows, n, D, BLOCK_D: tl.constexpr, NUMBER: tl.constexpr):
    """Return rows below n of one head."""
    mask = (rows < n)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(rows_of(view, head, H, rows, BLOCK_D), mask=mask, other=0.0).to(NUMBER)


@triton.jit
def _kept(dropout, head, position, key):
    """Return whether dropout keeps these queries' probabilities for one key each."""
    four = keep(dropout, head, position, key // 4 * 4, 4)  # (queries, 4)
    return tl.sum(tl.where((tl.arange(0, 4) == key % 4)[None, :], four.to(tl.int32), 0), 1) > 0


@triton.jit
def out_of_visible(
    q, k, v, head, H, queries, last, end, position, Tq, D, c, shift, rest, dropout,
    BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr, NUMBER: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return sum_j P_j v_j for a block of queries."""
    q_tile = _tile(q, head, H, queries, Tq, D, BLOCK_D, NUMBER)
    if NEGATIVE:
        q_tile = -q_tile
    acc = tl.zeros([queries.shape[0], BLOCK_D], NUMBER)
    for key in tl.range(0, end):
        row = key + tl.arange(0, 1)
        s = tl.sum(q_tile * _tile(k, head, H, row, end, D, BLOCK_D, NUMBER), 1)
        p = exponential(limited(s, NUMBER), c, shift, rest, EXACT)
        if dropout is not None:
            p = tl.where(_kept(dropout, head, position, key), p, 0.0)
        term = p[:, None] * _tile(v, head, H, row, end, D, BLOCK_D, NUMBER)
        acc += tl.where((key <= last)[:, None], term, 0.0)
    return acc


@triton.jit
def dq_of_visible(
    dout, q, k, v, head, H, queries, last, end, position, Tq, D, c, shift, rest, delta, dropout,
    BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr, NUMBER: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return sum_j dS_j k_j for a block of queries."""
    q_tile = _tile(q, head, H, queries, Tq, D, BLOCK_D, NUMBER)
    dout_tile = _tile(dout, head, H, queries, Tq, D, BLOCK_D, NUMBER)
    if NEGATIVE:
        q_tile = -q_tile
    acc = tl.zeros([queries.shape[0], BLOCK_D], NUMBER)
    for key in tl.range(0, end):
        row = key + tl.arange(0, 1)
        k_tile = _tile(k, head, H, row, end, D, BLOCK_D, NUMBER)
        dp = tl.sum(dout_tile * _tile(v, head, H, row, end, D, BLOCK_D, NUMBER), 1)
        if dropout is not None:
            dp = tl.where(_kept(dropout, head, position, key), dp * dropout[2], 0.0)
        s = limited(tl.sum(q_tile * k_tile, 1), NUMBER)
        p = exponential(s, c, shift, rest, EXACT)
        term = (p * (dp - delta))[:, None] * k_tile
        acc += tl.where((key <= last)[:, None], term, 0.0)
    return acc


@triton.jit
def dk_dv_of_visible(
    dout, q, k, v, lse_ptr, delta_ptr, total_ptr, head, H, key, first, length, n_keys, Tk, Tq, D, c,
    dropout, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr,
    NUMBER: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return sum_i dS_i q_i and sum_i P_i dout_i for a block of keys."""
    keys = key + tl.arange(0, BLOCK_N)
    k_tile = _tile(k, head, H, keys, n_keys, D, BLOCK_D, NUMBER)
    v_tile = _tile(v, head, H, keys, n_keys, D, BLOCK_D, NUMBER)
    if NEGATIVE:
        k_tile = -k_tile
    dk = tl.zeros([BLOCK_N, BLOCK_D], NUMBER)
    dv = tl.zeros([BLOCK_N, BLOCK_D], NUMBER)
    for query in tl.range(first, Tq):
        row = query + tl.arange(0, 1)
        q_tile = _tile(q, head, H, row, Tq, D, BLOCK_D, NUMBER)
        dout_tile = _tile(dout, head, H, row, Tq, D, BLOCK_D, NUMBER)
        shift, rest = split_lse(lse_ptr + row, row < Tq, c, NUMBER, EXACT)
        s = limited(tl.sum(k_tile * q_tile, 1), NUMBER)
        p = exponential(s, c, shift, rest, EXACT)
        if total_ptr is not None:
            p /= tl.load(total_ptr + row)
        dp = tl.sum(v_tile * dout_tile, 1)
        kept = p
        if dropout is not None:
            kept_at = tl.sum(keep(dropout, head, Tk - Tq + row, key, BLOCK_N).to(tl.int32), 0) > 0
            kept = tl.where(kept_at, p, 0.0)
            dp = tl.where(kept_at, dp * dropout[2], 0.0)
        last = tl.minimum(length - Tq + query, n_keys - 1)
        seen = (keys <= last)[:, None]
        dv += tl.where(seen, kept[:, None] * dout_tile, 0.0)
        ds = p * (dp - tl.load(delta_ptr + row))
        # dS is exactly 0 for a query that sees one key, as in the kernels.
        dk += tl.where(seen & (last > 0), ds[:, None] * q_tile, 0.0)
    return dk, dv
