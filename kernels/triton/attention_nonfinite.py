"""Attention of the rows that the kernels' arithmetic cannot hold, in fp64 and pair by pair.

Two kinds of numbers need this. In the products of tiles, a pair of query and key that is not
visible has the factor 0, which an inf or a NaN makes NaN. And finite inputs may have scores beyond
fp32, or so large that fp32 cannot tell them apart. A kernel whose sums are not finite, or whose row
has a maximum of -inf or beyond LIMIT, computes its block again here: slowly, and only then.
Everything is loaded anew, so that this costs the main loops no registers.

fp64 holds every score of finite inputs, but lse, one fp64 number, cannot hold both a large score
and the logarithm of a sum. So the dQ kernel stores a second set of stats, which the dK and dV
kernel reads where lse is beyond LIMIT.
"""

import triton
import triton.language as tl

from gptfast.kernels.triton.attention_access import (
    LIMIT,
    LN2,
    exact_stats_of,
    keep,
    number_of,
    p_of_one_key,
    rows_of,
    split_lse,
    stats_of,
)

# Keys that are computed at a time: as many as Philox gives numbers for dropout.
KEYS = tl.constexpr(4)


@triton.jit
def any_nonfinite(x):
    """Return whether a tile holds an inf or a NaN."""
    # 0 x is NaN where x is not finite, and takes one instruction per number.
    return tl.sum(x * 0.0) != 0.0


@triton.jit
def nan_beyond(peak, c, seen):
    """Return NaN for each row whose largest score is -inf or beyond LIMIT, else 0.

    seen: whether the row sees a key at all.
    """
    return tl.where(seen & ~(tl.abs(peak) * c < LIMIT), float("nan"), 0.0).to(peak.dtype)


@triton.constexpr_function
def _n_queries(BLOCK_D):
    """Return how many queries are computed at a time: few registers, above all for large heads."""
    return max(1, 64 // BLOCK_D)


@triton.jit
def _tile(view, head, H, rows, n, D, BLOCK_D: tl.constexpr):
    """Return rows below n of one head."""
    mask = (rows < n)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(rows_of(view, head, H, rows, BLOCK_D), mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _store(view, head, H, rows, n, D, tile, BLOCK_D: tl.constexpr):
    """Store rows below n of one head."""
    mask = (rows < n)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    ptrs = rows_of(view, head, H, rows, BLOCK_D)
    tl.store(ptrs, tile.to(tl.float32).to(view[0].dtype.element_ty), mask=mask)


@triton.jit
def _dots(a, b):
    """Return the products of the rows of a with the rows of b, (rows of a, rows of b)."""
    return tl.sum(a[:, None, :] * b[None, :, :], 2)


@triton.jit
def _scores(q_tile, k_tile, NEGATIVE: tl.constexpr):
    """Return the scores (queries, keys), with the sign of c."""
    s = _dots(q_tile, k_tile)
    return -s if NEGATIVE else s


@triton.jit
def _mixed(weights, seen, tile):
    """Return weights tile, (rows of weights, BLOCK_D), with no term where `seen` is false."""
    terms = weights[:, :, None] * tile[None, :, :]
    return tl.sum(tl.where(seen[:, :, None], terms, 0.0), 1)


@triton.jit
def _p(s, c, shift, rest):
    """Return P of scores (queries, keys) with the stats of the queries."""
    return tl.exp2((s - shift[:, None]) * c - rest[:, None])


@triton.jit
def _softmax(
    q_tile, k, head, H, last, end, D, c, BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr
):  # fmt: skip
    """Return shift and rest of a few queries, with which `_p` gives P."""
    peak = tl.full([q_tile.shape[0]], -float("inf"), tl.float64)
    total = tl.zeros([q_tile.shape[0]], tl.float64)
    for key in tl.range(0, end, KEYS):
        keys = key + tl.arange(0, KEYS)
        s = _scores(q_tile, _tile(k, head, H, keys, end, D, BLOCK_D), NEGATIVE)
        s = tl.where(keys[None, :] <= last[:, None], s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        # For a query whose scores so far are -inf, -inf - -inf would be NaN.
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        rescale = tl.exp2((peak - shift) * c)
        total = total * rescale + tl.sum(_p(s, c, shift, tl.zeros_like(shift)), 1)
        peak = new_peak
    # P is 0 for a query that sees no key, or only keys whose score is -inf.
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    return shift, tl.where(total == 0.0, float("inf"), tl.log2(total))


@triton.jit
def _dropped(x, dropout, head, position, key):
    """Return x (queries, KEYS) with dropout's factors."""
    if dropout is not None:
        x = tl.where(keep(dropout, head, position, key, KEYS), x * dropout[2], 0.0)
    return x


@triton.jit(noinline=True)
def store_out_of_visible(
    q, k, v, out, lse_ptr, head, H, first, length, n_keys, end, Tk, Tq, D, c, dropout,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Store lse, and out = sum_j P_j v_j, of a block of queries, a few at a time."""
    c = number_of(c, tl.float64)
    lse_ptr += head.to(tl.int64) * Tq
    QUERIES: tl.constexpr = _n_queries(BLOCK_D)
    for start in tl.range(first, tl.minimum(first + BLOCK_M, Tq), QUERIES):
        queries = start + tl.arange(0, QUERIES)
        q_tile = _tile(q, head, H, queries, Tq, D, BLOCK_D)
        last = tl.minimum(length - Tq + queries, n_keys - 1)
        shift, rest = _softmax(q_tile, k, head, H, last, end, D, c, BLOCK_D, NEGATIVE)
        acc = tl.zeros([QUERIES, BLOCK_D], tl.float64)
        for key in tl.range(0, end, KEYS):
            keys = key + tl.arange(0, KEYS)
            s = _scores(q_tile, _tile(k, head, H, keys, end, D, BLOCK_D), NEGATIVE)
            p = _dropped(_p(s, c, shift, rest), dropout, head, Tk - Tq + queries, key)
            seen = keys[None, :] <= last[:, None]
            acc += _mixed(p, seen, _tile(v, head, H, keys, end, D, BLOCK_D))
        _store(out, head, H, queries, Tq, D, acc, BLOCK_D)
        lse = tl.where(rest == float("inf"), -float("inf"), (shift * c + rest) * LN2)
        tl.store(lse_ptr + queries, lse, mask=queries < Tq)


@triton.jit(noinline=True)
def store_dq_of_visible(
    dout, q, k, v, stats, dq, head, H, n_heads, first, length, n_keys, end, Tk, Tq, D, scale, c,
    dropout, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Store the exact stats, and dq = scale sum_j dS_j k_j, of a block, a few queries at a time."""
    c = number_of(c, tl.float64)
    stats_ptrs = exact_stats_of(stats, head, n_heads, Tq, EXACT)
    QUERIES: tl.constexpr = _n_queries(BLOCK_D)
    for start in tl.range(first, tl.minimum(first + BLOCK_M, Tq), QUERIES):
        queries = start + tl.arange(0, QUERIES)
        q_tile = _tile(q, head, H, queries, Tq, D, BLOCK_D)
        dout_tile = _tile(dout, head, H, queries, Tq, D, BLOCK_D)
        last = tl.minimum(length - Tq + queries, n_keys - 1)
        shift, rest = _softmax(q_tile, k, head, H, last, end, D, c, BLOCK_D, NEGATIVE)
        delta = tl.zeros([QUERIES], tl.float64)
        acc = tl.zeros([QUERIES, BLOCK_D], tl.float64)
        n_blocks = tl.cdiv(end, KEYS)
        for step in tl.range(0, 2 * n_blocks):
            # The keys come twice: first for delta = sum_j P_j dP_j, then for dq.
            key = step % n_blocks * KEYS
            keys = key + tl.arange(0, KEYS)
            k_tile = _tile(k, head, H, keys, end, D, BLOCK_D)
            p = _p(_scores(q_tile, k_tile, NEGATIVE), c, shift, rest)
            dp = _dots(dout_tile, _tile(v, head, H, keys, end, D, BLOCK_D))
            dp = _dropped(dp, dropout, head, Tk - Tq + queries, key)
            seen = keys[None, :] <= last[:, None]
            # No branches: the compiler for AMD fails on them.
            delta += tl.sum(tl.where(seen & (step < n_blocks), p * dp, 0.0), 1)
            # dS is exactly 0 for a query that sees one key, as in the kernel.
            seen = seen & (last > 0)[:, None] & (step >= n_blocks)
            acc += _mixed(p * (dp - delta[:, None]), seen, k_tile)
        inside = queries < Tq
        tl.store(stats_ptrs[0] + queries, rest, mask=inside)
        tl.store(stats_ptrs[1] + queries, delta, mask=inside)
        tl.store(stats_ptrs[2] + queries, shift, mask=inside)
        _store(dq, head, H, queries, Tq, D, acc * number_of(scale, tl.float64), BLOCK_D)


@triton.jit
def _stats_of_few(stats, lse_ptrs, head, n_heads, rows, Tq, c, EXACT: tl.constexpr):
    """Return rest, delta and shift of a few queries, in fp64."""
    inside = rows < Tq
    shift, rest = split_lse(lse_ptrs, inside, c, tl.float64, True)
    delta_ptr = stats_of(stats, head, n_heads, Tq)[1]
    delta = tl.load(delta_ptr + rows, mask=inside, other=0.0).to(tl.float64)
    exact = exact_stats_of(stats, head, n_heads, Tq, EXACT)
    beyond = rest != rest
    rest = tl.load(exact[0] + rows, mask=beyond, other=rest)
    delta = tl.load(exact[1] + rows, mask=beyond, other=delta)
    return rest, delta, tl.load(exact[2] + rows, mask=beyond, other=shift)


@triton.jit(noinline=True)
def store_dk_dv_of_visible(
    dout, q, k, v, lse_ptr, stats, dk, dv, head, H, n_heads, key, first, length, n_keys, Tk, Tq, D,
    scale, c, dropout, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Store dk = scale sum_i dS_i q_i and dv = sum_i P_i dout_i of a block, a few keys at a time.

    lse_ptr is that of the head.
    """
    c = number_of(c, tl.float64)
    QUERIES: tl.constexpr = _n_queries(BLOCK_D)
    for start in tl.range(key, tl.minimum(key + BLOCK_N, n_keys), KEYS):
        keys = start + tl.arange(0, KEYS)
        k_tile = _tile(k, head, H, keys, n_keys, D, BLOCK_D)
        v_tile = _tile(v, head, H, keys, n_keys, D, BLOCK_D)
        dk_acc = tl.zeros([KEYS, BLOCK_D], tl.float64)
        dv_acc = tl.zeros([KEYS, BLOCK_D], tl.float64)
        for query in tl.range(first, Tq, QUERIES):
            rows = query + tl.arange(0, QUERIES)
            position = Tk - Tq + rows
            q_tile = _tile(q, head, H, rows, Tq, D, BLOCK_D)
            dout_tile = _tile(dout, head, H, rows, Tq, D, BLOCK_D)
            rest, delta, shift = _stats_of_few(
                stats, lse_ptr + rows, head, n_heads, rows, Tq, c, EXACT
            )
            last = tl.minimum(length - Tq + rows, n_keys - 1)
            p = _p(_scores(q_tile, k_tile, NEGATIVE), c, shift, rest)
            one = p_of_one_key(lse_ptr + rows, rows < Tq)[:, None]
            p = tl.where((last == 0)[:, None], one, p)
            dp = _dropped(_dots(dout_tile, v_tile), dropout, head, position, start)
            kept = _dropped(p, dropout, head, position, start)
            seen = (keys[None, :] <= last[:, None]) & (rows < Tq)[:, None]
            dv_acc += _mixed(tl.trans(kept), tl.trans(seen), dout_tile)
            # dS is exactly 0 for a query that sees one key, as in the kernel.
            ds = p * (dp - delta[:, None])
            dk_acc += _mixed(tl.trans(ds), tl.trans(seen & (last > 0)[:, None]), q_tile)
        _store(dk, head, H, keys, n_keys, D, dk_acc * number_of(scale, tl.float64), BLOCK_D)
        _store(dv, head, H, keys, n_keys, D, dv_acc, BLOCK_D)
