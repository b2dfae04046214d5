"""Sampling: the code of the last token that top_k, or top_p, keeps.

top_k keeps the tokens with fewer than k tokens above them; top_p keeps those with less than a goal
of mass above them. Both are one search: an interval of codes [lo, hi) that holds the last token is
narrowed by four pivots a pass, until at most LIST_SIZE tokens are in it; these are ranked.
"""

import triton
import triton.language as tl

from gptfast.kernels.triton.sampling_codes import (
    CODE_OF_MINUS_INF,
    code_above,
    collect,
    end_of,
    fold,
    kept_mass,
    load_codes,
    logit_of,
    lowest_code_of,
    rank_list,
    weight_of,
)

# The pivots divide an interval into five parts.
N_PIVOTS = tl.constexpr(4)
N_PARTS = tl.constexpr(5)
# A turn leaves at most a fifth of the codes, except that the first ones divide by logits: 30 turns
# leave LIST_SIZE of 2^64 codes.
TURNS_BY_LOGIT = tl.constexpr(3)
MAX_TURNS = tl.constexpr(40)
# The limit of bound_of_top_k, which searches int32 keys.
MAX_BOUND_TURNS = tl.constexpr(24)
# exp(-30) * 2^40 rounds to 0.1: a logit this many temperatures below the top has no weight.
TEMPERATURES_TO_ZERO = tl.constexpr(30.0)
# Whole numbers below it are exact in fp64.
TWO_TO_53 = tl.constexpr(2**53)


@triton.jit
def _pivot(lo, hi, low, high, turn, PART: tl.constexpr):
    """Return a code in (lo, hi), PART fifths of the way from lo to hi; hi > lo + 1.

    low and high are logits of this interval.
    """
    # Steps of equal logits arrive sooner; steps of equal codes narrow any interval.
    x = low * (1.0 - PART / 5.0) + high * (PART / 5.0)
    x = tl.where(x == x, x, 0.0)
    by_code = lo + ((hi >> 3) - (lo >> 3)) // N_PARTS * (8 * PART)
    code = tl.where(turn < TURNS_BY_LOGIT, lowest_code_of(x), by_code)
    return tl.minimum(tl.maximum(code, lo + 1), hi - 1)


@triton.jit
def _pivots(lo, hi, lowest, top, turn):
    """Return four codes in (lo, hi), in ascending order; the row's logits are in [lowest, top]."""
    low = tl.maximum(logit_of(lo), lowest)
    high = tl.minimum(logit_of(hi), top)
    return (
        _pivot(lo, hi, low, high, turn, 1),
        _pivot(lo, hi, low, high, turn, 2),
        _pivot(lo, hi, low, high, turn, 3),
        _pivot(lo, hi, low, high, turn, 4),
    )


@triton.jit
def bound_of_top_k(maxima, top, k, BLOCK: tl.constexpr):
    """Return a code that at least k of the row's tokens reach, and few more; k <= BLOCK.

    maxima: the largest logit of each of BLOCK parts of the row. Where one reaches a code, so does
    at least one token.
    """
    code = lowest_code_of(maxima)
    lowest = tl.min(tl.where(maxima > float("-inf"), maxima, float("inf")), 0)
    lo = tl.full([], CODE_OF_MINUS_INF, tl.int64)
    hi = code_above(top)
    n = tl.full([], BLOCK, tl.int32)
    turn = 0
    while (n > k + k // 4 + 8) & ((hi >> 32) - (lo >> 32) > 1) & (turn < MAX_BOUND_TURNS):
        pivots = _pivots(lo, hi, lowest, top, turn)
        # Four counts in one sum, 16 bits each.
        counts = (code >= pivots[0]).to(tl.int64) + ((code >= pivots[1]).to(tl.int64) << 16)
        counts += ((code >= pivots[2]).to(tl.int64) << 32) + (
            (code >= pivots[3]).to(tl.int64) << 48
        )
        counts = tl.sum(counts, 0)
        for j in tl.static_range(N_PIVOTS):
            count = ((counts >> (16 * j)) & 0xFFFF).to(tl.int32)
            n = tl.where(count >= k, count, n)
            lo = tl.where(count >= k, pivots[j], lo)
            hi = tl.where((count < k) & (pivots[j] < hi), pivots[j], hi)
        turn += 1
    return lo


@triton.jit
def _add_above(sums, pivots, code, x, BLOCK: tl.constexpr):
    """Return the four sums plus x of those tokens whose code reaches the pivot."""
    return (
        sums[0] + fold(tl.where(code >= pivots[0], x, 0), BLOCK),
        sums[1] + fold(tl.where(code >= pivots[1], x, 0), BLOCK),
        sums[2] + fold(tl.where(code >= pivots[2], x, 0), BLOCK),
        sums[3] + fold(tl.where(code >= pivots[3], x, 0), BLOCK),
    )


@triton.jit
def _total(sums):
    return tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0), tl.sum(sums[3], 0)


@triton.jit
def _above(
    row, pivots, top, scale,
    BY_MASS: tl.constexpr, GRANULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return how many tokens reach each pivot, and their mass (without BY_MASS, their number)."""
    zero = tl.zeros([BLOCK // 8], tl.int32)
    counts = (zero, zero, zero, zero)
    zero = tl.zeros([BLOCK // 8], tl.int64)
    masses = (zero, zero, zero, zero)
    for at in range(0, end_of(row), BLOCK):
        x, code = load_codes(row, at, GRANULE, BLOCK)
        counts = _add_above(counts, pivots, code, 1, BLOCK)
        if BY_MASS:
            weight = weight_of(x, top, scale).to(tl.int64)
            masses = _add_above(masses, pivots, code, weight, BLOCK)
    counts = _total(counts)
    if BY_MASS:
        masses = _total(masses)
    else:
        masses = (
            counts[0].to(tl.int64),
            counts[1].to(tl.int64),
            counts[2].to(tl.int64),
            counts[3].to(tl.int64),
        )
    return counts, masses


@triton.jit
def _search(
    row, list_ptr, top, lowest, scale, cut, n, goal,
    BY_MASS: tl.constexpr, GRANULE: tl.constexpr, BLOCK: tl.constexpr, LIST_SIZE: tl.constexpr,
):  # fmt: skip
    """Return the code of the last token with less than `goal` tokens (BY_MASS: mass) above it.

    At most n tokens have a code >= cut; they reach the goal together.
    """
    lo = cut
    hi = code_above(top)
    n_lo = n
    n_hi = tl.full([], 0, tl.int32)
    mass_hi = tl.full([], 0, tl.int64)
    turn = 0
    while (n_lo - n_hi > LIST_SIZE) & (turn < MAX_TURNS):
        pivots = _pivots(lo, hi, lowest, top, turn)
        counts, masses = _above(row, pivots, top, scale, BY_MASS, GRANULE, BLOCK)
        for j in tl.static_range(N_PIVOTS):
            reached = masses[j] >= goal
            n_lo = tl.where(reached, counts[j], n_lo)
            lo = tl.where(reached, pivots[j], lo)
            missed = (masses[j] < goal) & (pivots[j] < hi)
            n_hi = tl.where(missed, counts[j], n_hi)
            mass_hi = tl.where(missed, masses[j], mass_hi)
            hi = tl.where(missed, pivots[j], hi)
        turn += 1
    n = collect(row, lo, hi, list_ptr, GRANULE, BLOCK, LIST_SIZE)
    code, _, rank, mass_above = rank_list(list_ptr, n, top, scale, LIST_SIZE)
    above = mass_above if BY_MASS else rank.to(tl.int64)
    kept = (tl.arange(0, LIST_SIZE) < n) & (mass_hi + above < goal)
    return tl.min(tl.where(kept, code, hi), 0)


@triton.jit
def top_p_goal(top_p, total):
    """Return the least whole mass >= 1 whose fp64 is not below fp64(top_p) * fp64(total)."""
    limit = tl.where(top_p > 0.0, top_p, 0.0).to(tl.float64) * total.to(tl.float64)
    hi = limit.to(tl.int64)
    hi += (hi.to(tl.float64) < limit).to(tl.int64)
    # From 2^53 on, the fp64 of a mass is rounded, by at most 256 for 2^22 tokens.
    lo = tl.where(hi < TWO_TO_53, hi, hi - 511)
    while lo < hi:
        middle = (lo + hi) >> 1
        enough = middle.to(tl.float64) >= limit
        hi = tl.where(enough, middle, hi)
        lo = tl.where(enough, lo, middle + 1)
    return tl.maximum(hi, 1)


@triton.jit
def cut_by_top_k(
    row, list_ptr, top, lowest, scale, cut, n, k,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, LIST_SIZE: tl.constexpr,
):  # fmt: skip
    """Return the code of the k-th token; n tokens, at least k, have a code >= cut."""
    return _search(
        row, list_ptr, top, lowest, scale, cut, n, k.to(tl.int64),
        False, GRANULE, BLOCK, LIST_SIZE,
    )  # fmt: skip


@triton.jit
def cut_by_top_p(
    row, list_ptr, mass_ptr, top, lowest, temperature, scale, cut, n, top_p,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, LIST_SIZE: tl.constexpr,
):  # fmt: skip
    """Return the code of the last token that top_p keeps of the n tokens with code >= cut."""
    # Tokens further down have no weight.
    lowest = tl.maximum(lowest, top - TEMPERATURES_TO_ZERO * temperature)
    total = kept_mass(row, mass_ptr, cut, 0.0, top, scale, GRANULE, BLOCK)
    if total > 0:
        cut = _search(
            row, list_ptr, top, lowest, scale, cut, n, top_p_goal(top_p, total),
            True, GRANULE, BLOCK, LIST_SIZE,
        )  # fmt: skip
    return cut
