"""Sampling: a token from one row, by one program.

The phases: the extremes of the row; at temperature 0 the greedy token; else the cut by top_k, the
cut by top_p, and the draw. The row stays in the L1 or L2 cache for as many passes as its parameters
ask for. A cut is one number, the code of the last token kept (sampling_codes.py).

The k-th largest of BLOCK maxima bounds the k-th logit from below. The few tokens above this bound
are collected in a list, in id order; if they fit, everything after happens in the list, where each
token is compared to each. Otherwise the cuts are searched over the row (sampling_cuts.py).
"""

import triton
import triton.language as tl

from gptfast.kernels.triton.philox import philox, uniform
from gptfast.kernels.triton.sampling_codes import (
    CODE_OF_MINUS_INF,
    MAX_ID,
    WEIGHT_ONE,
    code_above,
    collect,
    end_of,
    id_of,
    kept_mass,
    load_granules,
    load_kept,
    load_logits,
    load_tail,
    rank_list,
)
from gptfast.kernels.triton.sampling_cuts import (
    bound_of_top_k,
    cut_by_top_k,
    cut_by_top_p,
    top_p_goal,
)


@triton.jit
def add_extremes(maxima, minima, x):
    """Return the maxima and the minima above -inf with x added to each; the maxima keep a NaN."""
    maxima = tl.maximum(maxima, x, propagate_nan=tl.PropagateNan.ALL)
    return maxima, tl.minimum(minima, tl.where(x > float("-inf"), x, float("inf")))


@triton.jit
def _extremes(row, GRANULE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Return the maxima and the minima above -inf of BLOCK strided parts of the row, each (BLOCK,).

    A part with a NaN has the maximum NaN.
    """
    maxima = tl.full([BLOCK], float("-inf"), tl.float32)
    minima = tl.full([BLOCK], float("inf"), tl.float32)
    # UNROLL loads in flight a thread.
    for start in range(0, end_of(row), UNROLL * BLOCK):
        for j in tl.static_range(UNROLL):
            x, _, _ = load_granules(row, start + j * BLOCK, GRANULE, BLOCK)
            maxima, minima = add_extremes(maxima, minima, x)
    _, _, _, whole = row
    if whole < end_of(row):
        maxima, minima = add_extremes(maxima, minima, load_tail(row, whole, BLOCK))
    return maxima, minima


@triton.jit
def largest(maxima):
    """Return the largest of the maxima; inf if one is NaN."""
    return tl.max(tl.where(maxima == maxima, maxima, float("inf")), 0)


@triton.jit
def first_of(row, at, top, GRANULE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first id from position `at` on whose logit is top; -1 if there is none."""
    id = tl.full([], -1, tl.int64)
    while (id < 0) & (at < end_of(row)):
        x, ids, inside = load_logits(row, at, GRANULE, BLOCK)
        found = tl.min(tl.where(inside & (x == top), ids, MAX_ID), 0).to(tl.int64)
        id = tl.where(found < MAX_ID, found, -1)
        at += BLOCK
    return id


@triton.jit
def draw_uniform(seed_ptr, position_ptr):
    """Return the number in [0, 1) that the reference draws for this seed and position."""
    position = tl.load(position_ptr)
    zero = position * 0
    word, _, _, _ = philox(position, position >> 32, zero, zero, tl.load(seed_ptr))
    return uniform(word)


@triton.jit
def target(u, total):
    """Return the mass at which a draw of u in [0, 1) stops."""
    return (u.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def _draw_from_list(list_ptr, n, k, top, scale, top_p, min_p, u, LIST_SIZE: tl.constexpr):
    """Cut the n tokens of the list by top_k, top_p and min_p; return the drawn id and the mass."""
    code, weight, rank, mass_above = rank_list(list_ptr, n, top, scale, LIST_SIZE)
    weight = tl.where(rank < k, weight, 0)
    total = tl.sum(weight, 0)
    goal = tl.where(top_p >= 1.0, total + 1, top_p_goal(top_p, total))
    weight = tl.where(mass_above < goal, weight, 0)
    weight = tl.where(weight.to(tl.float32) >= min_p * WEIGHT_ONE, weight, 0)
    total = tl.sum(weight, 0)
    drawn = tl.cumsum(weight, 0) > target(u, total)
    return tl.min(tl.where(drawn, id_of(code), MAX_ID), 0), total


@triton.jit
def _draw_from_row(
    row, mass_ptr, cut, min_weight, top, scale, u,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw among the tokens with code >= cut and weight >= min_weight; return the id and the mass.

    The mass is that of all these tokens.
    """
    total = kept_mass(row, mass_ptr, cut, min_weight, top, scale, GRANULE, BLOCK)
    rest = target(u, total)
    at = 0
    mass = tl.load(mass_ptr)
    while (mass <= rest) & (at + BLOCK < end_of(row)):
        rest -= mass
        at += BLOCK
        mass = tl.load(mass_ptr + at // BLOCK)
    code, weight = load_kept(row, at, cut, min_weight, top, scale, GRANULE, BLOCK)
    return tl.min(tl.where(tl.cumsum(weight, 0) > rest, id_of(code), MAX_ID), 0), total


@triton.jit
def draw_row(
    row, parameters, list_ptr, mass_ptr,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, LIST_SIZE: tl.constexpr,
):  # fmt: skip
    """Return the id drawn from a row; -1 if it cannot be sampled.

    parameters: pointers to the row's temperature, top_k, top_p, min_p, seed and position.
    """
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr = parameters
    V = row[2]
    temperature = tl.load(temperature_ptr)
    maxima, minima = _extremes(row, GRANULE, BLOCK, UNROLL)
    top = largest(maxima)
    id = tl.full([], -1, tl.int64)
    if (top > float("-inf")) & (top < float("inf")):
        if temperature == 0.0:
            id = first_of(row, tl.full([], 0, tl.int32), top, GRANULE, BLOCK)
        else:
            scale = 1.0 / temperature.to(tl.float64)
            k = tl.minimum(tl.maximum(tl.load(top_k_ptr), 1), V).to(tl.int32)

            # n tokens, at least k, have a code >= cut.
            cut = tl.full([], CODE_OF_MINUS_INF, tl.int64)
            n = tl.full([], 0, tl.int32) + V
            lowest = tl.min(minima, 0)
            # With a larger k, the bound would leave most of the row.
            if (V > LIST_SIZE) & (k < V) & (k <= BLOCK // 4 * 3):
                cut = bound_of_top_k(maxima, top, k, BLOCK)
            if (k <= LIST_SIZE) | (V <= LIST_SIZE):
                n = collect(row, cut, code_above(top), list_ptr, GRANULE, BLOCK, LIST_SIZE)
            # The rest is loaded where it is used: the searches leave few registers.
            if n <= LIST_SIZE:
                u = draw_uniform(seed_ptr, position_ptr)
                top_p = tl.load(top_p_ptr)
                min_p = tl.load(min_p_ptr)
                found, total = _draw_from_list(
                    list_ptr, n, k, top, scale, top_p, min_p, u, LIST_SIZE
                )
            else:
                if k < V:
                    cut = cut_by_top_k(
                        row, list_ptr, top, lowest, scale, cut, n, k, GRANULE, BLOCK, LIST_SIZE
                    )
                top_p = tl.load(top_p_ptr)
                if top_p < 1.0:
                    cut = cut_by_top_p(
                        row, list_ptr, mass_ptr, top, lowest, temperature, scale, cut, k, top_p,
                        GRANULE, BLOCK, LIST_SIZE,
                    )  # fmt: skip
                u = draw_uniform(seed_ptr, position_ptr)
                min_p = tl.load(min_p_ptr)
                found, total = _draw_from_row(
                    row, mass_ptr, cut, min_p * WEIGHT_ONE, top, scale, u, GRANULE, BLOCK
                )
            # On a GPU parameters are not checked: they may leave no token to draw.
            id = tl.where(total > 0, found.to(tl.int64), -1)
    return id
