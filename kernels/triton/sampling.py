"""Sampling without a sort; kernels/reference/sampling.py is the definition.

One program a row, which stays in the L1 or L2 cache for as many passes as its parameters ask for.
A token's code orders all tokens by rank and is unique: its logit's bits, mapped to a monotone
integer, above its inverted id. So top_k and top_p both end as one number, the code of the last
token kept, and ties need no rules of their own.

The k-th largest of BLOCK strided maxima bounds the k-th logit from below; the few tokens above it
are compacted, in id order, and everything after happens among them: each is compared to each, which
gives its rank and the mass before it. Where more than SMALL tokens survive, the last code is
searched over the row by counts (top_k) or masses (top_p) of the tokens above four pivots a pass.
Weights are whole numbers up to 2^40; their sums in int64 are exact, whatever BLOCK is.
"""

import torch
import triton
import triton.language as tl
from gptfast.kernels.reference import sampling as reference
from gptfast.kernels.triton.philox import philox, uniform
from gptfast.kernels.triton.target import arch
from torch import Tensor

# Tokens that are compared each to each.
SMALL = 256
# arch: (BLOCK, UNROLL, num_warps) for a vocabulary of up to 2048, and for a longer one.
TILES = {
    "sm_80": ((2048, 1, 8), (4096, 4, 16)),
    "sm_90": ((2048, 1, 8), (4096, 4, 16)),
    "sm_100": ((2048, 1, 8), (4096, 4, 16)),
    "gfx942": ((2048, 1, 4), (4096, 4, 8)),
}

# Keys: below every logit, of -inf, and above every id.
_OUTSIDE = tl.constexpr(-(2**31))
_LOWEST = tl.constexpr(-2139095041)
_LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _key(x):
    """fp32 without NaN as int32 of the same order; -0.0 equals 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _code_value(code):
    return _value((code >> 32).to(tl.int32))


@triton.jit
def _code_id(code):
    return (code & 0xFFFFFFFF) ^ _LAST


@triton.jit
def _end(row):
    _, skip, V = row
    return skip + V


@triton.jit
def _load(row, at, GRANULE: tl.constexpr, BLOCK: tl.constexpr):
    """Logits (BLOCK,) fp32, -inf outside the row; their ids; whether they are of the row."""
    row_ptr, skip, V = row
    # An odd V misaligns rows: row_ptr is the aligned address below, and masks are constant over the
    # 16 bytes of a load.
    offset = at + tl.arange(0, BLOCK)
    granule = offset // GRANULE * GRANULE
    near = (granule + GRANULE > skip) & (granule < skip + V)
    x = tl.load(row_ptr + offset, mask=near, other=float("-inf")).to(tl.float32)
    inside = (offset >= skip) & (offset < skip + V)
    return tl.where(inside, x, float("-inf")), offset - skip, inside


@triton.jit
def _load_codes(row, at, GRANULE: tl.constexpr, BLOCK: tl.constexpr):
    x, id, inside = _load(row, at, GRANULE, BLOCK)
    code = (_key(x).to(tl.int64) << 32) + (id ^ _LAST).to(tl.int64)
    return x, tl.where(inside, code, _OUTSIDE << 32)


@triton.jit
def _weight(x, top, scale):
    """round(exp((x - top) / T) * 2^40) as fp32, in [0, 2^40] whatever comes; scale is 1 / T."""
    # Exactly the fp32 quotient, which is never as close to the middle of two fp32 numbers as this
    # product may be to the quotient (2^-52); without the slow path of a division in each token.
    d = (x - top).to(tl.float64) * scale
    d = tl.where(d > -88.0, d, -88.0).to(tl.float32)
    d = tl.where(d < 0.0, d, 0.0)
    # exp as csrc/simd.h has it, within an ulp: tl.exp is off by more at -20.
    z = tl.fma(d, 1.44269504088896341, 12582912.0)
    n = z - 12582912.0
    r = tl.fma(n, -0.693359375, d)
    r = tl.fma(n, 2.12194440e-4, r)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    p = tl.fma(p, r * r, r) + 1.0
    power = (z.to(tl.int32, bitcast=True) + 40) << 23
    w = (p.to(tl.int32, bitcast=True) + power).to(tl.float32, bitcast=True)
    # To nearest even; from 2^23 on, fp32 is whole anyway.
    return tl.where(w < 8388608.0, (w + 8388608.0) - 8388608.0, w)


@triton.jit
def _pivot(lo, hi, low, high, part: tl.constexpr, turn):
    """A code in (lo, hi), where hi > lo + 1: part/5 of the way from lo to hi."""
    # In steps of the logit, which finds its way faster; in the end in steps of the code, which
    # narrows any interval.
    x = low * (1.0 - part / 5.0) + high * (part / 5.0)
    x = tl.where(x == x, x, 0.0)
    even = lo + ((hi >> 3) - (lo >> 3)) // 5 * (8 * part)
    code = tl.where(turn < 3, _key(x).to(tl.int64) << 32, even)
    return tl.minimum(tl.maximum(code, lo + 1), hi - 1)


@triton.jit
def _bound(lanes, top, k, BLOCK: tl.constexpr):
    """A code that at least k of the row's tokens reach, for k <= BLOCK; few more do."""
    code = _key(lanes).to(tl.int64) << 32
    low = tl.min(tl.where(lanes > float("-inf"), lanes, float("inf")), 0)
    lo = tl.full([], _LOWEST, tl.int64) << 32
    hi = (_key(top).to(tl.int64) + 1) << 32
    n = tl.full([], BLOCK, tl.int32)
    turn = 0
    while (n > k + k // 4 + 8) & ((hi >> 32) - (lo >> 32) > 1) & (turn < 24):
        start = tl.maximum(_code_value(lo), low)
        end = tl.minimum(_code_value(hi), top)
        p1 = _pivot(lo, hi, start, end, 1, turn)
        p2 = _pivot(lo, hi, start, end, 2, turn)
        p3 = _pivot(lo, hi, start, end, 3, turn)
        p4 = _pivot(lo, hi, start, end, 4, turn)
        # Four counts in one sum, 16 bits each.
        counts = (code >= p1).to(tl.int64) + ((code >= p2).to(tl.int64) << 16)
        counts += ((code >= p3).to(tl.int64) << 32) + ((code >= p4).to(tl.int64) << 48)
        counts = tl.sum(counts, 0)
        for j in tl.static_range(4):
            p = p1 if j == 0 else p2 if j == 1 else p3 if j == 2 else p4
            count = ((counts >> (16 * j)) & 0xFFFF).to(tl.int32)
            n = tl.where(count >= k, count, n)
            lo = tl.where(count >= k, p, lo)
            hi = tl.where((count < k) & (p < hi), p, hi)
        turn += 1
    return lo


@triton.jit
def _fold(x, BLOCK: tl.constexpr):
    # Eight neighbours, which one thread holds, become one: fewer registers between the blocks.
    return tl.sum(tl.reshape(x, [BLOCK // 8, 8]), 1)


@triton.jit
def _above(
    row, p1, p2, p3, p4, by_mass, top, scale,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many tokens reach each pivot, and their mass; without by_mass the number again."""
    c1 = tl.zeros([BLOCK // 8], tl.int32)
    c2, c3, c4 = c1, c1, c1
    m1 = tl.zeros([BLOCK // 8], tl.int64)
    m2, m3, m4 = m1, m1, m1
    for at in range(0, _end(row), BLOCK):
        x, code = _load_codes(row, at, GRANULE, BLOCK)
        c1 += _fold((code >= p1).to(tl.int32), BLOCK)
        c2 += _fold((code >= p2).to(tl.int32), BLOCK)
        c3 += _fold((code >= p3).to(tl.int32), BLOCK)
        c4 += _fold((code >= p4).to(tl.int32), BLOCK)
        if by_mass:
            w = _weight(x, top, scale).to(tl.int64)
            m1 += _fold(tl.where(code >= p1, w, 0), BLOCK)
            m2 += _fold(tl.where(code >= p2, w, 0), BLOCK)
            m3 += _fold(tl.where(code >= p3, w, 0), BLOCK)
            m4 += _fold(tl.where(code >= p4, w, 0), BLOCK)
    n1, n2, n3, n4 = tl.sum(c1, 0), tl.sum(c2, 0), tl.sum(c3, 0), tl.sum(c4, 0)
    l1, l2, l3, l4 = n1.to(tl.int64), n2.to(tl.int64), n3.to(tl.int64), n4.to(tl.int64)
    if by_mass:
        l1, l2, l3, l4 = tl.sum(m1, 0), tl.sum(m2, 0), tl.sum(m3, 0), tl.sum(m4, 0)
    return n1, n2, n3, n4, l1, l2, l3, l4


@triton.jit
def _collect(
    row, lo, hi, list_ptr,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Write the first SMALL codes in [lo, hi) to the list, in id order; how many there are."""
    n = 0
    for at in range(0, _end(row), BLOCK):
        _, code = _load_codes(row, at, GRANULE, BLOCK)
        found = (code >= lo) & (code < hi)
        place = n + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(list_ptr + place, code, mask=found & (place < SMALL))
        n += tl.sum(found.to(tl.int32), 0)
    tl.debug_barrier()
    return n


@triton.jit
def _rank(list_ptr, n, top, scale, SMALL: tl.constexpr):
    """Of each code in the list: itself, its weight, the number and the mass of those above it."""
    i = tl.arange(0, SMALL)
    code = tl.load(list_ptr + i, mask=i < n, other=_OUTSIDE << 32)
    weight = _weight(_code_value(code), top, scale).to(tl.int64)
    weight = tl.where(i < n, weight, 0)
    # Through memory, or each thread would weigh every token.
    tl.store(list_ptr + SMALL + i, weight)
    tl.debug_barrier()
    rank = tl.zeros([SMALL], tl.int32)
    before = tl.zeros([SMALL], tl.int64)
    for start in range(0, n, 32):
        j = start + tl.arange(0, 32)
        other = tl.load(list_ptr + j, mask=j < n, other=_OUTSIDE << 32)
        w = tl.load(list_ptr + SMALL + j, mask=j < n, other=0)
        # The sums run over the first dimension, that is within threads.
        ahead = (other[:, None] > code[None, :]) & (j < n)[:, None]
        rank += tl.sum(ahead.to(tl.int32), 0)
        before += tl.sum(tl.where(ahead, w[:, None], 0), 0)
    return code, weight, rank, before


@triton.jit
def _search(
    row, list_ptr, top, low, scale, cut, n, goal, by_mass,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """The code of the last token with less than `goal` tokens, or mass, before it.

    It is sought among the tokens, at most n, with code >= cut; they reach the goal.
    """
    lo = cut
    hi = (_key(top).to(tl.int64) + 1) << 32
    n_lo = n
    n_hi = tl.full([], 0, tl.int32)
    base = tl.full([], 0, tl.int64)
    turn = 0
    # Each turn leaves at most a fifth of the codes and some: 30 turns leave SMALL of 2^64.
    while (n_lo - n_hi > SMALL) & (turn < 40):
        start = tl.maximum(_code_value(lo), low)
        end = tl.minimum(_code_value(hi), top)
        p1 = _pivot(lo, hi, start, end, 1, turn)
        p2 = _pivot(lo, hi, start, end, 2, turn)
        p3 = _pivot(lo, hi, start, end, 3, turn)
        p4 = _pivot(lo, hi, start, end, 4, turn)
        c1, c2, c3, c4, m1, m2, m3, m4 = _above(
            row, p1, p2, p3, p4, by_mass, top, scale, GRANULE, BLOCK
        )
        for j in tl.static_range(4):
            p = p1 if j == 0 else p2 if j == 1 else p3 if j == 2 else p4
            c = c1 if j == 0 else c2 if j == 1 else c3 if j == 2 else c4
            m = m1 if j == 0 else m2 if j == 1 else m3 if j == 2 else m4
            reached = m >= goal
            n_lo = tl.where(reached, c, n_lo)
            lo = tl.where(reached, p, lo)
            missed = (m < goal) & (p < hi)
            n_hi = tl.where(missed, c, n_hi)
            base = tl.where(missed, m, base)
            hi = tl.where(missed, p, hi)
        turn += 1
    n = _collect(row, lo, hi, list_ptr, GRANULE, BLOCK, SMALL)
    code, _, rank, before = _rank(list_ptr, n, top, scale, SMALL)
    before = tl.where(by_mass, before, rank.to(tl.int64))
    kept = (tl.arange(0, SMALL) < n) & (base + before < goal)
    return tl.min(tl.where(kept, code, hi), 0)


@triton.jit
def _goal(top_p, total):
    """The least whole mass, at least 1, whose fp64 is not below fp64(top_p) * fp64(total)."""
    limit = tl.where(top_p > 0.0, top_p, 0.0).to(tl.float64) * total.to(tl.float64)
    hi = limit.to(tl.int64)
    hi += (hi.to(tl.float64) < limit).to(tl.int64)
    # From 2^53 on, the fp64 of a mass is rounded, by at most 256 for 2^22 tokens.
    lo = tl.where(hi < 9007199254740992, hi, hi - 511)
    while lo < hi:
        middle = (lo + hi) >> 1
        enough = middle.to(tl.float64) >= limit
        hi = tl.where(enough, middle, hi)
        lo = tl.where(enough, lo, middle + 1)
    return tl.maximum(hi, 1)


@triton.jit
def _target(u, total):
    return (u.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def _draw_from_list(list_ptr, n, k, top, scale, top_p, min_p, u, SMALL: tl.constexpr):
    code, weight, rank, before = _rank(list_ptr, n, top, scale, SMALL)
    weight = tl.where(rank < k, weight, 0)
    total = tl.sum(weight, 0)
    goal = tl.where(top_p >= 1.0, total + 1, _goal(top_p, total))
    weight = tl.where(before < goal, weight, 0)
    weight = tl.where(weight.to(tl.float32) >= min_p * 1099511627776.0, weight, 0)
    total = tl.sum(weight, 0)
    drawn = tl.cumsum(weight, 0) > _target(u, total)
    return tl.min(tl.where(drawn, _code_id(code), _LAST), 0), total


@triton.jit
def _masses(
    row, mass_ptr, cut, least, top, scale,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mass of the tokens with code >= cut and weight >= least; each block's goes to mass_ptr."""
    total = tl.full([], 0, tl.int64)
    for at in range(0, _end(row), BLOCK):
        x, code = _load_codes(row, at, GRANULE, BLOCK)
        w = _weight(x, top, scale)
        mass = tl.sum(_fold(tl.where((code >= cut) & (w >= least), w, 0.0).to(tl.int64), BLOCK), 0)
        tl.store(mass_ptr + at // BLOCK, mass)
        total += mass
    tl.debug_barrier()
    return total


@triton.jit
def _draw_from_row(
    row, mass_ptr, cut, least, top, scale, u,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = _masses(row, mass_ptr, cut, least, top, scale, GRANULE, BLOCK)
    rest = _target(u, total)
    at = 0
    mass = tl.load(mass_ptr)
    while (mass <= rest) & (at + BLOCK < _end(row)):
        rest -= mass
        at += BLOCK
        mass = tl.load(mass_ptr + at // BLOCK)
    x, code = _load_codes(row, at, GRANULE, BLOCK)
    w = _weight(x, top, scale)
    w = tl.where((code >= cut) & (w >= least), w, 0.0).to(tl.int64)
    return tl.min(tl.where(tl.cumsum(w, 0) > rest, _code_id(code), _LAST), 0), total


@triton.jit
def sample_fwd_kernel(
    logits_ptr, first, stride, V,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    ids_ptr, list_ptr, mass_ptr, mass_stride,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    # int64: b * stride overflows int32 at 42,731 rows of GPT-2 logits.
    b = tl.program_id(0).to(tl.int64)
    begin = first + b * stride
    aligned = begin // GRANULE * GRANULE
    row = (logits_ptr + aligned, (begin - aligned).to(tl.int32), V)
    temperature = tl.load(temperature_ptr + b)

    lanes = tl.full([BLOCK], float("-inf"), tl.float32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    # UNROLL loads in flight a thread.
    for start in range(0, _end(row), UNROLL * BLOCK):
        for j in tl.static_range(UNROLL):
            x, _, _ = _load(row, start + j * BLOCK, GRANULE, BLOCK)
            lanes = tl.maximum(lanes, x, propagate_nan=tl.PropagateNan.ALL)
            lowest = tl.minimum(lowest, tl.where(x > float("-inf"), x, float("inf")))
    top = tl.max(tl.where(lanes == lanes, lanes, float("inf")), 0)
    id = tl.full([], -1, tl.int64)
    if (top > float("-inf")) & (top < float("inf")):
        if temperature == 0.0:
            at = 0
            while (id < 0) & (at < _end(row)):
                x, ids, inside = _load(row, at, GRANULE, BLOCK)
                found = tl.min(tl.where(inside & (x == top), ids, _LAST), 0).to(tl.int64)
                id = tl.where(found < _LAST, found, -1)
                at += BLOCK
        else:
            list_ptr += b * (2 * SMALL)
            mass_ptr += b * mass_stride
            top_p = tl.load(top_p_ptr + b)
            min_p = tl.load(min_p_ptr + b)
            position = tl.load(position_ptr + b)
            word, _, _, _ = philox(position, position >> 32, position * 0, position * 0,
                                   tl.load(seed_ptr + b))  # fmt: skip
            u = uniform(word)
            scale = 1.0 / temperature.to(tl.float64)
            k = tl.minimum(tl.maximum(tl.load(top_k_ptr + b), 1), V).to(tl.int32)
            cut = tl.full([], _LOWEST, tl.int64) << 32
            n = tl.full([], 0, tl.int32) + V
            if (V > SMALL) & (k < V) & (k <= BLOCK // 4 * 3):
                cut = _bound(lanes, top, k, BLOCK)
            hi = (_key(top).to(tl.int64) + 1) << 32
            low = tl.min(lowest, 0)
            if (k <= SMALL) | (V <= SMALL):
                n = _collect(row, cut, hi, list_ptr, GRANULE, BLOCK, SMALL)
            if n <= SMALL:
                found, total = _draw_from_list(list_ptr, n, k, top, scale, top_p, min_p, u, SMALL)
            else:
                # top_k, then top_p.
                for turn in range(2):
                    by_mass = turn == 1
                    wanted = k < V
                    goal = k.to(tl.int64)
                    if by_mass:
                        n = k
                        wanted = top_p < 1.0
                        # Tokens further down weigh nothing.
                        low = tl.maximum(low, top - 30.0 * temperature)
                        if wanted:
                            total = _masses(row, mass_ptr, cut, 0.0, top, scale, GRANULE, BLOCK)
                            goal = _goal(top_p, total)
                            wanted = total > 0
                    if wanted:
                        cut = _search(
                            row, list_ptr, top, low, scale, cut, n, goal, by_mass,
                            GRANULE, BLOCK, SMALL,
                        )  # fmt: skip
                least = min_p * 1099511627776.0
                found, total = _draw_from_row(
                    row, mass_ptr, cut, least, top, scale, u, GRANULE, BLOCK
                )
            # Parameters out of range, unchecked on a GPU, may leave nothing to draw from.
            id = tl.where(total > 0, found.to(tl.int64), -1)
    tl.store(ids_ptr + b, id)


def tile(V: int) -> tuple[int, int, int]:
    """(BLOCK, UNROLL, num_warps) for rows of V logits."""
    return TILES[arch()][V > 2048]


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """logits (B, V), all else (B,) -> ids (B,) int64; -1 for a row that cannot be sampled."""
    parameters = [x.contiguous() for x in (temperature, top_k, top_p, min_p, seed, position)]
    if not triton.knobs.runtime.interpret:
        return sample_fwd(logits, *parameters)
    # On a CPU the parameters are checked, here by the reference on a vocabulary of one.
    reference.sample(logits.new_zeros(logits.shape[0], 1), *parameters)
    ids = sample_fwd(logits, *parameters)
    reference.check_rows(ids < 0)
    return ids


def sample_fwd(logits: Tensor, *parameters: Tensor) -> Tensor:
    """`sample` without the errors a CPU raises."""
    B, V = logits.shape
    ids = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B == 0:
        return ids
    if logits.stride(1) != 1 and V > 1:
        logits = logits.contiguous()
    first = 0
    if logits.data_ptr() % 16:
        # From the start of the memory, which is aligned, so that the kernel can align its loads.
        first = logits.storage_offset()
        logits = logits.as_strided((B, V), logits.stride(), 0)
    BLOCK, unroll, num_warps = tile(V)
    granule = 16 // logits.element_size()
    blocks = triton.cdiv(V + granule - 1, BLOCK)
    tokens = torch.empty(B, 2, SMALL, dtype=torch.int64, device=logits.device)
    masses = torch.empty(B, blocks, dtype=torch.int64, device=logits.device)
    sample_fwd_kernel[(B,)](
        logits, first, logits.stride(0), V, *parameters, ids, tokens, masses, blocks,
        GRANULE=granule, BLOCK=BLOCK, UNROLL=unroll, SMALL=SMALL, num_warps=num_warps,
    )  # fmt: skip
    return ids
