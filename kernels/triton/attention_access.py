"""What the attention kernels share: their programs, rows, keys and probabilities.

A view is (pointer, stride of b, stride of h, stride of t) of a (B, H, T, D) tensor. dropout is None
or (pointer to the seed, p, 1 / (1 - p)).
"""

import triton
import triton.language as tl

from gptfast.kernels.triton.philox import in_order, philox, uniform

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Scores, in units of log2, from which on fp32 is a step of 1 or more apart: P would be wrong by a
# factor of 2 and, further up, be 0 for each key. attention_nonfinite.py computes such rows.
LIMIT = tl.constexpr(16777216.0)
# The backward keeps three numbers per query, each in rows that are padded to a multiple of this:
# the largest BLOCK_M. So blocks of them are loaded aligned, and without a mask.
ROW = tl.constexpr(128)


@triton.jit
def number_of(parts, NUMBER: tl.constexpr):
    """Return a number from its two fp32 parts."""
    number = tl.full([], parts[0], NUMBER)
    if NUMBER == tl.float64:
        number += tl.full([], parts[1], NUMBER)
    return number


@triton.jit
def program(n_blocks, n_heads, group):
    """Return the head and the block of this program; one group of heads comes after the other."""
    pid = tl.program_id(0)
    first = pid // (group * n_blocks) * group
    rest = pid - first * n_blocks
    size = tl.minimum(group, n_heads - first)
    return first + rest % size, rest // size


@triton.jit
def rows_of(view, head, H, rows, BLOCK_D: tl.constexpr):
    """Return pointers to (rows, BLOCK_D) of one head."""
    # int64: long sequences, above all packed ones, have more than 2^31 elements.
    start = view[0] + (head // H).to(tl.int64) * view[1] + (head % H).to(tl.int64) * view[2]
    return start + rows.to(tl.int64)[:, None] * view[3] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def step_of(view, BLOCK: tl.constexpr):
    """Return how far the rows of one block are from those of the next, in elements."""
    return tl.full([], BLOCK, tl.int64) * view[3]


@triton.jit
def length_of(kv_len_ptr, head, H, Tk):
    """Return the length that the last query is aligned to, and the number of keys."""
    if kv_len_ptr is None:
        return Tk, Tk
    else:
        # Beyond these bounds nothing changes, and sums of int32 stay below 2^31.
        length = tl.load(kv_len_ptr + head // H)
        length = tl.minimum(tl.maximum(length, -(1 << 30)), 1 << 30).to(tl.int32)
        return length, tl.minimum(length, Tk)


@triton.jit
def key_range(first, length, n_keys, Tq, BLOCK_M: tl.constexpr):
    """Return the last key each query of a block sees, and how many keys all and any of them see."""
    last = tl.minimum(length - Tq + first + tl.arange(0, BLOCK_M), n_keys - 1)
    full = tl.minimum(length - Tq + first + 1, n_keys)
    return last, full, tl.minimum(length - Tq + tl.minimum(first + BLOCK_M, Tq), n_keys)


@triton.jit
def keep(dropout, head, position, key, BLOCK_N: tl.constexpr):
    """Return whether dropout keeps the probabilities of these queries for BLOCK_N keys."""
    counters = (key // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    zeros = tl.zeros([position.shape[0], BLOCK_N // 4], tl.int32)
    seed = tl.load(dropout[0])
    words = philox(zeros + counters, zeros + position[:, None], zeros + head, zeros + 1, seed)
    return uniform(in_order(words[0], words[1], words[2], words[3])) >= dropout[1]


@triton.jit
def kept_one(dropout, head, position, key):
    """Return whether dropout keeps the probabilities of these queries for one key."""
    four = keep(dropout, head, position, key // 4 * 4, 4)  # (queries, 4)
    return tl.sum(tl.where((tl.arange(0, 4) == key % 4)[None, :], four.to(tl.int32), 0), 1) > 0


@triton.jit
def wide(x, NUMBER: tl.constexpr):
    """Return a tile as the kernel multiplies it: in fp64 if NUMBER is fp64, else as it is."""
    if NUMBER == tl.float64:
        return x.to(tl.float64)
    else:
        return x


@triton.jit
def dot(a, b, acc):
    """Return acc + a b."""
    if a.dtype == tl.float64:
        return tl.dot(a, b, acc, out_dtype=tl.float64)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def exponential(s, c, shift, rest, EXACT: tl.constexpr):
    """Return exp2(c (s - shift) - rest) if EXACT, else exp2(c s - rest).

    c s, rounded, is off by |c s| * 6e-8, and the result with it. The difference of s and shift is
    exact where the result is large.
    """
    if EXACT:
        return tl.exp2((s - shift) * c - rest)
    else:
        return tl.exp2(s * c - rest)


@triton.jit
def divide(x, y):
    """Return x / y, rounded once: `/` is off by two ulp in fp32 on a GPU."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def split_lse(lse_ptrs, mask, c, NUMBER: tl.constexpr, EXACT: tl.constexpr):
    """Return shift and rest, with which `exponential` gives P.

    lse is fp64: in fp32 it would be off by |lse| * 6e-8, and every P with it. Where it is beyond
    LIMIT, rest is NaN, so that no sum with such a P passes for a number.
    """
    lse = tl.load(lse_ptrs, mask=mask, other=-float("inf")) * LOG2E
    # P is 0 for a query that sees no key, or only keys whose score is -inf.
    empty = lse == -float("inf")
    lse = tl.where(empty, 0.0, lse)
    beyond = ~(tl.abs(lse) < LIMIT)
    if EXACT:
        shift = (lse / c).to(NUMBER)
        rest = (lse - shift.to(tl.float64) * c).to(NUMBER)
    else:
        shift = lse.to(NUMBER)
        rest = shift
    rest = tl.where(beyond, float("nan"), rest)
    return shift, tl.where(empty, float("inf"), rest)


@triton.jit
def stats_of(stats, head, n_heads, Tq):
    """Return pointers to a head's rest, delta and, if EXACT, shift."""
    length = tl.cdiv(Tq, ROW) * ROW
    rest_ptr = stats + head.to(tl.int64) * length
    n = n_heads.to(tl.int64) * length
    return rest_ptr, rest_ptr + n, rest_ptr + 2 * n


@triton.jit
def exact_stats_of(stats, head, n_heads, Tq, EXACT: tl.constexpr):
    """Return pointers to a head's rest, delta and shift in fp64: see attention_nonfinite.py."""
    n = n_heads.to(tl.int64) * tl.cdiv(Tq, ROW) * ROW
    after = (stats + (3 if EXACT else 2) * n).to(tl.pointer_type(tl.float64))
    rest_ptr = after + head.to(tl.int64) * Tq
    n = n_heads.to(tl.int64) * Tq
    return rest_ptr, rest_ptr + n, rest_ptr + 2 * n


@triton.jit
def load_stats(ptrs, queries, EXACT: tl.constexpr):
    """Return rest, delta and shift of a block of queries; ptrs are those of `stats_of`."""
    rest = tl.load(ptrs[0] + queries)
    shift = tl.load(ptrs[2] + queries) if EXACT else rest
    return rest, tl.load(ptrs[1] + queries), shift


@triton.jit
def store_stats(ptrs, first, Tq, rest, delta, shift, EXACT: tl.constexpr):
    """Store the stats of a block of queries; with those past the last query, P is 0."""
    queries = first + tl.arange(0, rest.shape[0])
    tl.store(ptrs[0] + queries, rest)
    tl.store(ptrs[1] + queries, delta)
    if EXACT:
        tl.store(ptrs[2] + queries, shift)
    end = first + rest.shape[0]
    if end >= Tq:
        rows = end + tl.arange(0, ROW)
        inside = rows < tl.cdiv(Tq, ROW) * ROW
        tl.store(ptrs[0] + rows, float("inf"), mask=inside)
        tl.store(ptrs[1] + rows, 0.0, mask=inside)
        if EXACT:
            tl.store(ptrs[2] + rows, 0.0, mask=inside)


@triton.jit
def p_of_one_key(lse_ptrs, mask):
    """Return P of queries that see one key: 1, or 0 where the score is -inf."""
    lse = tl.load(lse_ptrs, mask=mask, other=0.0)
    return tl.where(lse == -float("inf"), 0.0, 1.0 + (lse - lse))
