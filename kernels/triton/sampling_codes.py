"""Sampling: the code and the weight of a token, and passes over a row of logits.

A token's code is an int64. Its upper half is the key of the logit: the fp32 bits, mapped to an
int32 of the same order. Its lower half is the inverted id. So codes are unique, and the order of
the codes is the order of the ranks: by logit, then by the lower id.

A token's weight is round(exp((logit - top) / temperature) * 2^40), top being the row's largest
logit. Weights are whole numbers, so their int64 sums are exact in any order.

A row is the tuple (row_ptr, skip, V, whole): its V logits start `skip` elements after row_ptr,
which is aligned to 16 bytes. GRANULE is the number of logits in 16 bytes, which a load takes at
once. Granules are whole up to the position `whole`; only a row at the very end of the tensor's
memory has logits after it, its tail.
"""

import triton
import triton.language as tl

MAX_ID = tl.constexpr(2**31 - 1)
# Below every token's code: the key is smaller than that of -inf.
CODE_OUTSIDE = tl.constexpr(-(2**31) << 32)
# Above every token's code.
CODE_ABOVE_ALL = tl.constexpr(2**63 - 1)
# Every token reaches it: the key is that of -inf.
CODE_OF_MINUS_INF = tl.constexpr(-2139095041 << 32)

# The weight of the largest logit.
WEIGHT_BITS = tl.constexpr(40)
WEIGHT_ONE = tl.constexpr(2.0**40)
# Below it, exp(x) * 2^40 rounds to 0.
MIN_EXPONENT = tl.constexpr(-88.0)
LOG2E = tl.constexpr(1.44269504088896341)
# ln 2 in two parts: n * LN2_HIGH is exact for every whole n that occurs.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)
# fp32 numbers from 2^23 on are whole, so adding and subtracting one of these rounds to a whole
# number. The second also takes negative numbers.
TWO_TO_23 = tl.constexpr(8388608.0)
ROUND_SIGNED = tl.constexpr(12582912.0)


@triton.jit
def key_of(x):
    """Return fp32 x, which is not NaN, as int32 of the same order; -0.0 and 0.0 are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def lowest_code_of(x):
    """Return a code that every token with a logit >= x reaches, and no other token."""
    return key_of(x).to(tl.int64) << 32


@triton.jit
def code_above(top):
    """Return a code that is larger than every code of a row whose largest logit is top."""
    return (key_of(top).to(tl.int64) + 1) << 32


@triton.jit
def logit_of(code):
    """Return the logit of a code, fp32."""
    key = (code >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def id_of(code):
    """Return the token's id of a code, int64."""
    return (code & 0xFFFFFFFF) ^ MAX_ID


@triton.jit
def weight_of(x, top, scale):
    """Return round(exp((x - top) * scale) * 2^40) as fp32, in [0, 2^40] whatever the arguments are.

    scale is 1 / temperature in fp64.
    """
    # The product is rounded to the fp32 quotient (x - top) / temperature, without the slow path of
    # a division: a quotient of fp32 numbers is never as close to the middle of two fp32 numbers as
    # the product's error, 2^-52.
    d = (x - top).to(tl.float64) * scale
    d = tl.where(d > MIN_EXPONENT, d, MIN_EXPONENT).to(tl.float32)
    d = tl.where(d < 0.0, d, 0.0)
    # The exp of csrc/maths.h, within one ulp; tl.exp is less exact at -20. exp(d) = 2^n * exp(r),
    # with n whole and exp(r) by a polynomial.
    z = tl.fma(d, LOG2E, ROUND_SIGNED)
    n = z - ROUND_SIGNED
    r = tl.fma(n, -LN2_HIGH, d)
    r = tl.fma(n, -LN2_LOW, r)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    p = tl.fma(p, r * r, r) + 1.0
    # The low bits of z are n: moved to the exponent, they multiply p by 2^(n + 40).
    power = (z.to(tl.int32, bitcast=True) + WEIGHT_BITS) << 23
    w = (p.to(tl.int32, bitcast=True) + power).to(tl.float32, bitcast=True)
    return tl.where(w < TWO_TO_23, (w + TWO_TO_23) - TWO_TO_23, w)


@triton.jit
def row_at(logits_ptr, first, limit, stride, V, b, GRANULE: tl.constexpr):
    """Return row b, which starts at `first` + b * stride.

    The tensor's memory, which starts at logits_ptr, has `limit` elements.
    """
    # int64: b * stride overflows int32 at 42,731 rows of GPT-2 logits.
    begin = first + b.to(tl.int64) * stride
    aligned = begin // GRANULE * GRANULE
    skip = (begin - aligned).to(tl.int32)
    last = tl.minimum((skip + V + GRANULE - 1).to(tl.int64), limit - aligned)
    return logits_ptr + aligned, skip, V, (last // GRANULE * GRANULE).to(tl.int32)


@triton.jit
def end_of(row):
    """Return the position after the row's last logit, counted from row_ptr."""
    _, skip, V, _ = row
    return skip + V


@triton.jit
def load_granules(row, at, GRANULE: tl.constexpr, BLOCK: tl.constexpr):
    """Return BLOCK logits from position `at` as fp32, their ids, and which ones are in the row.

    Logits outside the row, and those of its tail, are -inf.
    """
    row_ptr, skip, V, whole = row
    # With an odd V, rows are not aligned. Loads of 16 bytes are still possible if a load starts at
    # the aligned address below the row, and if the mask is the same for all elements of a granule.
    offset = at + tl.arange(0, BLOCK)
    granule = offset // GRANULE * GRANULE
    x = tl.load(row_ptr + offset, mask=granule < whole, other=float("-inf")).to(tl.float32)
    inside = (offset >= skip) & (offset < skip + V)
    return tl.where(inside, x, float("-inf")), offset - skip, inside


@triton.jit
def load_tail(row, at, BLOCK: tl.constexpr):
    """Return BLOCK logits from position `at` as fp32; those outside the row's tail are -inf."""
    row_ptr, skip, V, whole = row
    offset = at + tl.arange(0, BLOCK)
    # A row that is shorter than a granule may have nothing whole.
    mask = (offset >= whole) & (offset >= skip) & (offset < skip + V)
    return tl.load(row_ptr + offset, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def load_logits(row, at, GRANULE: tl.constexpr, BLOCK: tl.constexpr):
    """Return BLOCK logits from position `at` as fp32, their ids, and which ones are in the row.

    Logits outside the row are -inf.
    """
    x, id, inside = load_granules(row, at, GRANULE, BLOCK)
    _, skip, _, whole = row
    if at + BLOCK > whole:
        x = tl.where(id + skip < whole, x, load_tail(row, at, BLOCK))
    return x, id, inside


@triton.jit
def load_codes(row, at, GRANULE: tl.constexpr, BLOCK: tl.constexpr):
    """Return BLOCK logits from position `at` as fp32, and their codes.

    Outside the row, logits are -inf and codes are below every token's.
    """
    x, id, inside = load_logits(row, at, GRANULE, BLOCK)
    code = (key_of(x).to(tl.int64) << 32) + (id ^ MAX_ID).to(tl.int64)
    return x, tl.where(inside, code, CODE_OUTSIDE)


@triton.jit
def fold(x, BLOCK: tl.constexpr):
    """Return x (BLOCK,) summed over groups of eight neighbours, (BLOCK / 8,)."""
    # One thread holds eight neighbours: sums kept from block to block take fewer registers.
    return tl.sum(tl.reshape(x, [BLOCK // 8, 8]), 1)


@triton.jit
def load_kept(
    row, at, cut, min_weight, top, scale,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the codes and the int64 weights of BLOCK tokens from position `at`.

    The weight is 0 unless code >= cut and weight >= min_weight.
    """
    x, code = load_codes(row, at, GRANULE, BLOCK)
    w = weight_of(x, top, scale)
    return code, tl.where((code >= cut) & (w >= min_weight), w, 0.0).to(tl.int64)


@triton.jit
def kept_mass(
    row, mass_ptr, cut, min_weight, top, scale,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the mass of the tokens with code >= cut and weight >= min_weight.

    The mass of each block of the row is written to mass_ptr.
    """
    total = tl.full([], 0, tl.int64)
    for at in range(0, end_of(row), BLOCK):
        _, weight = load_kept(row, at, cut, min_weight, top, scale, GRANULE, BLOCK)
        mass = tl.sum(fold(weight, BLOCK), 0)
        tl.store(mass_ptr + at // BLOCK, mass)
        total += mass
    tl.debug_barrier()
    return total


@triton.jit
def collect(
    row, lo, hi, list_ptr,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, LIST_SIZE: tl.constexpr,
):  # fmt: skip
    """Write the first LIST_SIZE codes in [lo, hi) to the list, in id order; return their number.

    The number counts all codes in [lo, hi), also those that are not in the list.
    """
    n = 0
    for at in range(0, end_of(row), BLOCK):
        _, code = load_codes(row, at, GRANULE, BLOCK)
        found = (code >= lo) & (code < hi)
        place = n + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(list_ptr + place, code, mask=found & (place < LIST_SIZE))
        n += tl.sum(found.to(tl.int32), 0)
    tl.debug_barrier()
    return n


@triton.jit
def rank_list(list_ptr, n, top, scale, LIST_SIZE: tl.constexpr):
    """Rank the n codes of the list by comparing each to each.

    Return for each entry its code, its weight, and the number and the mass of the codes above it.
    """
    i = tl.arange(0, LIST_SIZE)
    code = tl.load(list_ptr + i, mask=i < n, other=CODE_OUTSIDE)
    weight = weight_of(logit_of(code), top, scale).to(tl.int64)
    weight = tl.where(i < n, weight, 0)
    # Through memory, or each thread would compute the weight of every token. What follows the list
    # is written too, so that the loads in the loop need no mask.
    tl.debug_barrier()
    tl.store(list_ptr + i, code)
    tl.store(list_ptr + LIST_SIZE + i, weight)
    tl.debug_barrier()
    STEP: tl.constexpr = LIST_SIZE if LIST_SIZE < 32 else 32
    rank = tl.zeros([LIST_SIZE], tl.int32)
    mass_above = tl.zeros([LIST_SIZE], tl.int64)
    for start in range(0, n, STEP):
        j = start + tl.arange(0, STEP)
        other_code = tl.load(list_ptr + j)
        other_weight = tl.load(list_ptr + LIST_SIZE + j)
        # The sums run over the first dimension, that is within threads.
        above = other_code[:, None] > code[None, :]
        rank += tl.sum(above.to(tl.int32), 0)
        mass_above += tl.sum(tl.where(above, other_weight[:, None], 0), 0)
    return code, weight, rank, mass_above
