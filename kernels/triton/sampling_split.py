"""Sampling: a token from each of a few long rows, by several programs a row, in four launches.

A program of the first three has a slice of the row, one of the last a row:

  extremes    the largest and the lowest logit of each slice; clears the histogram
  histogram   the number and the mass of the row's tokens in N_BINS bins, by their logit
  collect     the bins that hold the cuts by top_k and top_p; the mass of the bins above, for each
              slice; a list of the tokens in the bins of the cuts
  draw        the cut, by comparing each token of the list to each; the slice in which the draw
              ends, and there the token

With a small top_k, the list holds every token that may be kept, and weights are computed for these
alone. Programs add to the histogram and to the list in any order. The histogram's sums are of whole
numbers, and nothing depends on the order of the list. Where the list does not hold the bins of the
cuts (thousands of equal logits), the last launch draws from the row by one program.

A row's memory between the launches is an int64 array, in this order: the masses and the counts of
the bins, the length of the list, the cuts, the list (codes, then weights), and the masses of the
slices. sample_extremes_kernel clears what it has up to the length.
"""

import triton
import triton.language as tl

from gptfast.kernels.triton.sampling_codes import (
    CODE_ABOVE_ALL,
    CODE_OF_MINUS_INF,
    CODE_OUTSIDE,
    MAX_ID,
    WEIGHT_ONE,
    id_of,
    load_codes,
    load_kept,
    load_logits,
    logit_of,
    rank_list,
    row_at,
    weight_of,
)
from gptfast.kernels.triton.sampling_cuts import TEMPERATURES_TO_ZERO, top_p_goal
from gptfast.kernels.triton.sampling_draw import (
    add_extremes,
    draw_row,
    draw_uniform,
    first_of,
    largest,
    target,
)

# The length of the list, the six numbers of `_load_cuts`, and what aligns the list to 128 bytes.
N_CUTS = tl.constexpr(16)
# Slices that a row has at most.
MAX_SLICES = tl.constexpr(64)
# More than the rounding of a product of a mass below 2^62 and a number below 1.
MASS_ROUNDING = tl.constexpr(2048)


def words_per_row(n_bins: int, list_size: int) -> int:
    """Return the int64 numbers of a row's memory between the launches."""
    return 2 * n_bins + N_CUTS.value + 2 * list_size + MAX_SLICES.value


@triton.jit
def _load_extremes(extremes_ptr, n_slices):
    """Return the row's largest logit, inf if one is NaN, and the lowest above -inf."""
    s = tl.arange(0, MAX_SLICES)
    maxima = tl.load(extremes_ptr + s, mask=s < n_slices, other=float("-inf"))
    minima = tl.load(extremes_ptr + MAX_SLICES + s, mask=s < n_slices, other=float("inf"))
    return tl.max(maxima, 0), tl.min(minima, 0)


@triton.jit
def _bins_per_logit(top, lowest, temperature, N_BINS: tl.constexpr):
    """Return how many bins one unit of the logits has.

    All bins but the last lie between the row's extremes. The last is for what is -inf or has no
    weight.
    """
    reach = tl.minimum(top - lowest, temperature * TEMPERATURES_TO_ZERO)
    return tl.where(reach > 0.0, tl.minimum((N_BINS - 1.5) / reach, 1e30), 0.0)


@triton.jit
def _bin_of(x, top, bins_per_logit, N_BINS: tl.constexpr):
    """Return the bin of each logit. Bin 0 holds the largest; equal logits have one bin."""
    distance = (top - x) * bins_per_logit
    # inf * 0 is NaN: x is -inf.
    return tl.where(distance < N_BINS - 1, tl.maximum(distance, 0.0), N_BINS - 1).to(tl.int32)


@triton.jit
def _listed_by_top_k(k, V, LIST_SIZE: tl.constexpr):
    """Return whether the list holds all tokens down to the bin of the k-th.

    Then the histogram has no masses.
    """
    return (k < V) & (k <= LIST_SIZE // 2)


@triton.jit
def _add_to_histogram(
    row, at, top, bins_per_logit, scale, memory_ptr, by_count, by_mass,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, N_BINS: tl.constexpr,
):  # fmt: skip
    """Add the tokens of a block to the counts, or to the masses, of their bins, or to both."""
    x, _, inside = load_logits(row, at, GRANULE, BLOCK)
    bin = _bin_of(x, top, bins_per_logit, N_BINS)
    counted = inside & (bin < N_BINS - 1)
    if by_mass:
        mass = weight_of(x, top, scale).to(tl.int64)
        tl.atomic_add(memory_ptr + bin, mass, mask=counted, sem="relaxed")
    if by_count:
        one = tl.full([BLOCK], 1, tl.int64)
        tl.atomic_add(memory_ptr + N_BINS + bin, one, mask=counted, sem="relaxed")


@triton.jit
def _find_cuts(memory_ptr, k, V, top_p, N_BINS: tl.constexpr, LIST_SIZE: tl.constexpr):
    """Return which bins hold the cuts, and what lies above them:

    the bin of the k-th token, N_BINS if top_k removes no weight; the tokens and the mass above it;
    the first and the last bin in which the cut by top_p may be; the mass above the first.
    """
    bins = tl.arange(0, N_BINS)
    masses = tl.load(memory_ptr + bins)
    k_bin = tl.full([], N_BINS, tl.int32)
    n_above = tl.full([], 0, tl.int64)
    if k < V:
        up_to = tl.cumsum(tl.load(memory_ptr + N_BINS + bins), 0)
        missed = up_to < k
        n_bins = tl.sum(missed.to(tl.int32), 0)
        k_bin = tl.where(n_bins < N_BINS - 1, n_bins, N_BINS)
        n_above = tl.max(tl.where(missed, up_to, 0), 0)
    mass_above_k = tl.sum(tl.where(bins < k_bin, masses, 0), 0)
    first = tl.full([], N_BINS, tl.int32)
    last = tl.full([], -1, tl.int32)
    mass_above_first = tl.full([], 0, tl.int64)
    # Without masses, these are all bins down to the k-th token's.
    if (top_p < 1.0) | _listed_by_top_k(k, V, LIST_SIZE):
        # top_k keeps all, or a part, of the k-th token's bin.
        mass_to_k = mass_above_k + tl.sum(tl.where(bins == k_bin, masses, 0), 0)
        p = tl.maximum(top_p, 0.0).to(tl.float64)
        least = (p * mass_above_k.to(tl.float64)).to(tl.int64) - MASS_ROUNDING
        most = (p * mass_to_k.to(tl.float64)).to(tl.int64) + MASS_ROUNDING
        mass_up_to = tl.cumsum(masses, 0)
        first = tl.sum((mass_up_to < least).to(tl.int32), 0)
        last = tl.sum((mass_up_to < most).to(tl.int32), 0)
        last = tl.minimum(last, tl.minimum(k_bin, N_BINS - 2))
        mass_above_first = tl.max(tl.where(mass_up_to < least, mass_up_to, 0), 0)
    return k_bin, n_above, mass_above_k, first, last, mass_above_first


@triton.jit
def _store_cuts(ptr, cuts):
    """Store what `_load_cuts` loads."""
    for i in tl.static_range(6):
        tl.store(ptr + i, cuts[i].to(tl.int64))


@triton.jit
def _load_cuts(ptr):
    """Return what `_find_cuts` found."""
    k_bin, n_above, mass_above_k = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)
    first, last, mass_above_first = tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5)
    return k_bin, n_above, mass_above_k, first, last, mass_above_first


@triton.jit
def _append(found, code, n_ptr, list_ptr, LIST_SIZE: tl.constexpr):
    """Append the codes that were found to the row's list; count those that do not fit."""
    n = tl.sum(found.to(tl.int32), 0)
    if n > 0:
        start = tl.atomic_add(n_ptr, n.to(tl.int64), sem="relaxed")
        place = start + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(list_ptr + place, code, mask=found & (place < LIST_SIZE))


@triton.jit
def _cut_in_list(
    list_ptr, n, cuts, k, V, top_p, min_weight, top, scale, bins_per_logit,
    N_BINS: tl.constexpr, LIST_SIZE: tl.constexpr,
):  # fmt: skip
    """Return the code of the last token kept, and replace the weights in the list.

    Tokens of the list that are not kept, or are below min_weight, get the weight 0.
    """
    k_bin, n_above, mass_above_k, first, last, mass_above_first = cuts
    code, weight, rank, mass_above = rank_list(list_ptr, n, top, scale, LIST_SIZE)
    i = tl.arange(0, LIST_SIZE)
    listed = i < n
    bin = _bin_of(logit_of(code), top, bins_per_logit, N_BINS)
    in_k_bin = listed & (bin == k_bin)
    n_before = tl.sum((listed & (bin < k_bin)).to(tl.int32), 0)
    kept = listed & ((bin != k_bin) | (n_above + rank - n_before < k))
    if top_p < 1.0:
        unsummed = kept & (in_k_bin | _listed_by_top_k(k, V, LIST_SIZE))
        mass = mass_above_k + tl.sum(tl.where(unsummed, weight, 0), 0)
        goal = top_p_goal(top_p, mass)
        kept &= (bin <= last) & (mass_above_first + mass_above < goal)
    # In rank_list, all threads read the weights.
    tl.debug_barrier()
    weight = tl.where(kept & (weight.to(tl.float32) >= min_weight), weight, 0)
    tl.store(list_ptr + LIST_SIZE + i, weight)
    tl.debug_barrier()
    return tl.min(tl.where(kept, code, CODE_ABOVE_ALL), 0)


@triton.jit
def _draw_from_slices(
    row, list_ptr, n, masses_ptr, n_slices, slice_length, cut, min_weight, top, scale, u,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, LIST_SIZE: tl.constexpr,
):  # fmt: skip
    """Draw among the tokens with code >= cut and weight >= min_weight; return the id or -1.

    The masses of the slices are those without the n tokens of the list.
    """
    row_skip = row[1]
    s = tl.arange(0, MAX_SLICES)
    mass = tl.load(masses_ptr + s, mask=s < n_slices, other=0)
    STEP: tl.constexpr = LIST_SIZE if LIST_SIZE < 32 else 32
    for start in range(0, n, STEP):
        j = start + tl.arange(0, STEP)
        code = tl.load(list_ptr + j)
        weight = tl.load(list_ptr + LIST_SIZE + j)
        its_slice = (id_of(code).to(tl.int32) + row_skip) // slice_length
        mass += tl.sum(tl.where(its_slice[:, None] == s[None, :], weight[:, None], 0), 0)
    up_to = tl.cumsum(mass, 0)
    rest = target(u, tl.sum(mass, 0))
    before = up_to <= rest
    at = tl.sum(before.to(tl.int32), 0) * slice_length
    rest -= tl.max(tl.where(before, up_to, 0), 0)
    # On a GPU parameters are not checked: they may leave no token to draw.
    end = tl.minimum(at + slice_length, row_skip + row[2])
    id = tl.full([], -1, tl.int64)
    while (id < 0) & (at < end):
        code, weight = load_kept(row, at, cut, min_weight, top, scale, GRANULE, BLOCK)
        found = tl.min(tl.where(tl.cumsum(weight, 0) > rest, id_of(code), MAX_ID), 0)
        id = tl.where(found < MAX_ID, found, -1)
        rest -= tl.sum(weight, 0)
        at += BLOCK
    return id


@triton.jit
def sample_extremes_kernel(
    logits_ptr, first, limit, stride, V, slice_length, extremes_ptr, memory_ptr, words,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, N_BINS: tl.constexpr,
):  # fmt: skip
    s, b = tl.program_id(0), tl.program_id(1)
    row = row_at(logits_ptr, first, limit, stride, V, b, GRANULE)
    for at in range(s * BLOCK, 2 * N_BINS + 1, tl.num_programs(0) * BLOCK):
        i = at + tl.arange(0, BLOCK)
        zero = tl.zeros([BLOCK], tl.int64)
        tl.store(memory_ptr + b * words + i, zero, mask=i < 2 * N_BINS + 1)
    maxima = tl.full([BLOCK], float("-inf"), tl.float32)
    minima = tl.full([BLOCK], float("inf"), tl.float32)
    for at in range(s * slice_length, (s + 1) * slice_length, BLOCK):
        x, _, _ = load_logits(row, at, GRANULE, BLOCK)
        maxima, minima = add_extremes(maxima, minima, x)
    extremes_ptr += b * (2 * MAX_SLICES) + s
    tl.store(extremes_ptr, largest(maxima))
    tl.store(extremes_ptr + MAX_SLICES, tl.min(minima, 0))


@triton.jit
def sample_histogram_kernel(
    logits_ptr, first, limit, stride, V, slice_length, extremes_ptr, memory_ptr, words,
    temperature_ptr, top_k_ptr, top_p_ptr,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, N_BINS: tl.constexpr, LIST_SIZE: tl.constexpr,
):  # fmt: skip
    s, b = tl.program_id(0), tl.program_id(1)
    row = row_at(logits_ptr, first, limit, stride, V, b, GRANULE)
    memory_ptr += b * words
    temperature = tl.load(temperature_ptr + b)
    top, lowest = _load_extremes(extremes_ptr + b * (2 * MAX_SLICES), tl.num_programs(0))
    k = tl.load(top_k_ptr + b)
    by_count = k < V
    by_mass = (tl.load(top_p_ptr + b) < 1.0) & (not _listed_by_top_k(k, V, LIST_SIZE))
    drawn = (top > float("-inf")) & (top < float("inf")) & (temperature != 0.0)
    if drawn & (by_count | by_mass):
        scale = 1.0 / temperature.to(tl.float64)
        bins_per_logit = _bins_per_logit(top, lowest, temperature, N_BINS)
        for at in range(s * slice_length, (s + 1) * slice_length, BLOCK):
            _add_to_histogram(
                row, at, top, bins_per_logit, scale, memory_ptr, by_count, by_mass,
                GRANULE, BLOCK, N_BINS,
            )  # fmt: skip


@triton.jit
def sample_collect_kernel(
    logits_ptr, first, limit, stride, V, slice_length, extremes_ptr, memory_ptr, words,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, N_BINS: tl.constexpr, LIST_SIZE: tl.constexpr,
):  # fmt: skip
    s, b = tl.program_id(0), tl.program_id(1)
    row = row_at(logits_ptr, first, limit, stride, V, b, GRANULE)
    memory_ptr += b * words
    n_ptr = memory_ptr + 2 * N_BINS
    list_ptr = n_ptr + N_CUTS
    temperature = tl.load(temperature_ptr + b)
    top, lowest = _load_extremes(extremes_ptr + b * (2 * MAX_SLICES), tl.num_programs(0))
    if (top > float("-inf")) & (top < float("inf")) & (temperature != 0.0):
        scale = 1.0 / temperature.to(tl.float64)
        bins_per_logit = _bins_per_logit(top, lowest, temperature, N_BINS)
        k = tl.maximum(tl.load(top_k_ptr + b), 1)
        cuts = _find_cuts(memory_ptr, k, V, tl.load(top_p_ptr + b), N_BINS, LIST_SIZE)
        k_bin, _, _, p_first, p_last, _ = cuts
        if s == 0:
            _store_cuts(n_ptr + 1, cuts)
        min_weight = tl.load(min_p_ptr + b) * WEIGHT_ONE
        first_bin = tl.minimum(k_bin, p_first)
        mass = tl.zeros([BLOCK], tl.int64)
        for at in range(s * slice_length, (s + 1) * slice_length, BLOCK):
            x, code = load_codes(row, at, GRANULE, BLOCK)
            inside = code > CODE_OUTSIDE
            bin = _bin_of(x, top, bins_per_logit, N_BINS)
            if first_bin > 0:
                weight = weight_of(x, top, scale)
                kept = inside & (bin < first_bin) & (weight >= min_weight)
                mass += tl.where(kept, weight, 0.0).to(tl.int64)
            if first_bin < N_BINS:
                found = ((bin >= p_first) & (bin <= p_last)) | (bin == k_bin)
                _append(inside & found, code, n_ptr, list_ptr, LIST_SIZE)
        tl.store(list_ptr + 2 * LIST_SIZE + s, tl.sum(mass, 0))


@triton.jit
def sample_draw_kernel(
    logits_ptr, first, limit, stride, V, slice_length, n_slices, extremes_ptr, memory_ptr, words,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    ids_ptr, masses_ptr, masses_stride,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, N_BINS: tl.constexpr, LIST_SIZE: tl.constexpr,
    ROW_BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    row = row_at(logits_ptr, first, limit, stride, V, b, GRANULE)
    n_ptr = memory_ptr + b * words + 2 * N_BINS
    list_ptr = n_ptr + N_CUTS
    extremes_ptr += b * (2 * MAX_SLICES)
    temperature = tl.load(temperature_ptr + b)
    top, lowest = _load_extremes(extremes_ptr, n_slices)
    id = tl.full([], -1, tl.int64)
    if (top > float("-inf")) & (top < float("inf")):
        if temperature == 0.0:
            s = tl.arange(0, MAX_SLICES)
            maxima = tl.load(extremes_ptr + s, mask=s < n_slices, other=float("-inf"))
            at = tl.min(tl.where(maxima == top, s, MAX_SLICES), 0) * slice_length
            id = first_of(row, at, top, GRANULE, BLOCK)
        else:
            n = tl.load(n_ptr).to(tl.int32)
            if n <= LIST_SIZE:
                scale = 1.0 / temperature.to(tl.float64)
                bins_per_logit = _bins_per_logit(top, lowest, temperature, N_BINS)
                min_weight = tl.load(min_p_ptr + b) * WEIGHT_ONE
                cut = tl.full([], CODE_OF_MINUS_INF, tl.int64)
                if n > 0:
                    k = tl.maximum(tl.load(top_k_ptr + b), 1)
                    cut = _cut_in_list(
                        list_ptr, n, _load_cuts(n_ptr + 1), k, V,
                        tl.load(top_p_ptr + b), min_weight, top, scale, bins_per_logit,
                        N_BINS, LIST_SIZE,
                    )  # fmt: skip
                u = draw_uniform(seed_ptr + b, position_ptr + b)
                id = _draw_from_slices(
                    row, list_ptr, n, list_ptr + 2 * LIST_SIZE, n_slices, slice_length, cut,
                    min_weight, top, scale, u, GRANULE, BLOCK, LIST_SIZE,
                )  # fmt: skip
            else:
                parameters = (
                    temperature_ptr + b,
                    top_k_ptr + b,
                    top_p_ptr + b,
                    min_p_ptr + b,
                    seed_ptr + b,
                    position_ptr + b,
                )
                id = draw_row(
                    row, parameters, list_ptr, masses_ptr + b * masses_stride,
                    GRANULE, ROW_BLOCK, UNROLL, LIST_SIZE,
                )  # fmt: skip
    tl.store(ids_ptr + b, id)
