"""Philox-4x32-10 on the GPU; kernels/reference/philox.py is the definition."""

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Return four random uint32 words per counter.

    The seed is int64. Counters are truncated to 32 bits.
    """
    # With counters of 64 bits, Triton would use Philox-4x64.
    return tl.philox(seed, c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32))


@triton.jit
def in_order(w0, w1, w2, w3):
    """Return the words of (..., N) counters, (..., 4 N): those of counter i at 4 i to 4 i + 3."""
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def halves_in_order(w0, w1, w2, w3):
    """Return the 16-bit halves of (..., N) counters' words, (..., 8 N), lower halves first."""
    words = in_order(w0, w1, w2, w3)
    return tl.interleave(words & 0xFFFF, words >> 16)


@triton.jit
def uniform(word):
    """Return uint32 words as fp32 in [0, 1)."""
    return tl.uint_to_uniform_float(word)
