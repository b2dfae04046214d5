"""Philox-4x32-10 on the GPU; kernels/reference/philox.py is the definition."""

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Four random uint32 words for each counter; counters are cut to 32 bits, seed is int64."""
    # Counters of 64 bits would silently give Philox-4x64.
    return tl.philox(seed, c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32))


@triton.jit
def in_order(w0, w1, w2, w3):
    """The words of (..., N) counters as (..., 4 N): counter i's words at 4 i .. 4 i + 3."""
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def uniform(word):
    """uint32 words to fp32 in [0, 1)."""
    return tl.uint_to_uniform_float(word)
