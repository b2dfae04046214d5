"""Sampling without a sort; kernels/reference/sampling.py is the definition.

One program a row, in phases: the extremes of the row; at temperature 0 the greedy token; else the
cut by top_k, the cut by top_p, and the draw. The row stays in the L1 or L2 cache for as many passes
as its parameters ask for. A cut is one number, the code of the last token kept: a token's code
orders all tokens by rank and is unique, so ties need no rules of their own (sampling_codes.py).

The k-th largest of BLOCK maxima bounds the k-th logit from below. The few tokens above this bound
are collected in a list, in id order; if they fit, everything after happens in the list, where each
token is compared to each. Otherwise the cuts are searched over the row (sampling_cuts.py). Weights
are whole numbers up to 2^40; their int64 sums are exact, whatever BLOCK is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.reference import sampling as reference
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
    load_kept,
    load_logits,
    rank_list,
)
from gptfast.kernels.triton.sampling_cuts import (
    bound_of_top_k,
    cut_by_top_k,
    cut_by_top_p,
    top_p_goal,
)
from gptfast.kernels.triton.target import arch

# Tokens that fit the list, in which each is compared to each.
LIST_SIZE = 256
# arch: (BLOCK, UNROLL, num_warps) for a vocabulary of up to MAX_SHORT_V, and for a longer one.
MAX_SHORT_V = 2048
TILES = {
    "sm_80": ((2048, 1, 8), (4096, 4, 16)),
    "sm_90": ((2048, 1, 8), (4096, 4, 16)),
    "sm_100": ((2048, 1, 8), (4096, 4, 16)),
    "gfx942": ((2048, 1, 4), (4096, 4, 8)),
}


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
            x, _, _ = load_logits(row, start + j * BLOCK, GRANULE, BLOCK)
            maxima = tl.maximum(maxima, x, propagate_nan=tl.PropagateNan.ALL)
            minima = tl.minimum(minima, tl.where(x > float("-inf"), x, float("inf")))
    return maxima, minima


@triton.jit
def _greedy(row, top, GRANULE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first id whose logit is top."""
    id = tl.full([], -1, tl.int64)
    at = 0
    while (id < 0) & (at < end_of(row)):
        x, ids, inside = load_logits(row, at, GRANULE, BLOCK)
        found = tl.min(tl.where(inside & (x == top), ids, MAX_ID), 0).to(tl.int64)
        id = tl.where(found < MAX_ID, found, -1)
        at += BLOCK
    return id


@triton.jit
def _draw_uniform(seed_ptr, position_ptr):
    """Return the number in [0, 1) that the reference draws for this seed and position."""
    position = tl.load(position_ptr)
    zero = position * 0
    word, _, _, _ = philox(position, position >> 32, zero, zero, tl.load(seed_ptr))
    return uniform(word)


@triton.jit
def _target(u, total):
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
    drawn = tl.cumsum(weight, 0) > _target(u, total)
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
    rest = _target(u, total)
    at = 0
    mass = tl.load(mass_ptr)
    while (mass <= rest) & (at + BLOCK < end_of(row)):
        rest -= mass
        at += BLOCK
        mass = tl.load(mass_ptr + at // BLOCK)
    code, weight = load_kept(row, at, cut, min_weight, top, scale, GRANULE, BLOCK)
    return tl.min(tl.where(tl.cumsum(weight, 0) > rest, id_of(code), MAX_ID), 0), total


@triton.jit
def sample_fwd_kernel(
    logits_ptr, first, stride, V,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    ids_ptr, list_ptr, mass_ptr, mass_stride,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, LIST_SIZE: tl.constexpr,
):  # fmt: skip
    # int64: b * stride overflows int32 at 42,731 rows of GPT-2 logits.
    b = tl.program_id(0).to(tl.int64)
    begin = first + b * stride
    aligned = begin // GRANULE * GRANULE
    row = (logits_ptr + aligned, (begin - aligned).to(tl.int32), V)
    temperature = tl.load(temperature_ptr + b)

    maxima, minima = _extremes(row, GRANULE, BLOCK, UNROLL)
    top = tl.max(tl.where(maxima == maxima, maxima, float("inf")), 0)
    id = tl.full([], -1, tl.int64)
    if (top > float("-inf")) & (top < float("inf")):
        if temperature == 0.0:
            id = _greedy(row, top, GRANULE, BLOCK)
        else:
            list_ptr += b * (2 * LIST_SIZE)
            mass_ptr += b * mass_stride
            scale = 1.0 / temperature.to(tl.float64)
            k = tl.minimum(tl.maximum(tl.load(top_k_ptr + b), 1), V).to(tl.int32)

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
                u = _draw_uniform(seed_ptr + b, position_ptr + b)
                top_p = tl.load(top_p_ptr + b)
                min_p = tl.load(min_p_ptr + b)
                found, total = _draw_from_list(
                    list_ptr, n, k, top, scale, top_p, min_p, u, LIST_SIZE
                )
            else:
                if k < V:
                    cut = cut_by_top_k(
                        row, list_ptr, top, lowest, scale, cut, n, k, GRANULE, BLOCK, LIST_SIZE
                    )
                top_p = tl.load(top_p_ptr + b)
                if top_p < 1.0:
                    cut = cut_by_top_p(
                        row, list_ptr, mass_ptr, top, lowest, temperature, scale, cut, k, top_p,
                        GRANULE, BLOCK, LIST_SIZE,
                    )  # fmt: skip
                u = _draw_uniform(seed_ptr + b, position_ptr + b)
                min_p = tl.load(min_p_ptr + b)
                found, total = _draw_from_row(
                    row, mass_ptr, cut, min_p * WEIGHT_ONE, top, scale, u, GRANULE, BLOCK
                )
            # On a GPU parameters are not checked: they may leave no token to draw.
            id = tl.where(total > 0, found.to(tl.int64), -1)
    tl.store(ids_ptr + b, id)


def tile(V: int) -> tuple[int, int, int]:
    """Return (BLOCK, UNROLL, num_warps) for rows of V logits."""
    short, long = TILES[arch()]
    return short if V <= MAX_SHORT_V else long


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """Draw a token from each row of logits (B, V); all else is (B,).

    Return ids (B,) int64; -1 for a row that cannot be sampled.
    """
    parameters = [x.contiguous() for x in (temperature, top_k, top_p, min_p, seed, position)]
    if not triton.knobs.runtime.interpret:
        return sample_fwd(logits, *parameters)
    # On a CPU the parameters are checked, here by the reference on a vocabulary of one.
    reference.sample(logits.new_zeros(logits.shape[0], 1), *parameters)
    ids = sample_fwd(logits, *parameters)
    reference.check_rows(ids < 0)
    return ids


def sample_fwd(logits: Tensor, *parameters: Tensor) -> Tensor:
    """Return what `sample` returns, without the checks that a CPU can afford."""
    B, V = logits.shape
    ids = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B == 0:
        return ids
    if logits.stride(1) != 1 and V > 1:
        logits = logits.contiguous()
    first = 0
    if logits.data_ptr() % 16:
        # Pass the start of the memory, which is aligned, so that the kernel can align its loads.
        first = int(logits.storage_offset())
        logits = logits.as_strided((B, V), logits.stride(), 0)
    BLOCK, unroll, num_warps = tile(V)
    granule = 16 // logits.element_size()
    blocks = triton.cdiv(V + granule - 1, BLOCK)
    # Per row: the codes in the list, then their weights.
    lists = torch.empty(B, 2, LIST_SIZE, dtype=torch.int64, device=logits.device)
    masses = torch.empty(B, blocks, dtype=torch.int64, device=logits.device)
    sample_fwd_kernel[(B,)](
        logits, first, logits.stride(0), V, *parameters, ids, lists, masses, blocks,
        GRANULE=granule, BLOCK=BLOCK, UNROLL=unroll, LIST_SIZE=LIST_SIZE, num_warps=num_warps,
    )  # fmt: skip
    return ids
