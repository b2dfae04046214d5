"""Philox-4x32-10, the counter-based random number generator of all backends.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. Ten rounds turn
four 32-bit counter words and a 64-bit key into four random words:

    hi0, lo0 = 0xD2511F53 * c0;  hi1, lo1 = 0xCD9E8D57 * c2
    c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0;  k0 += 0x9E3779B9;  k1 += 0xBB67AE85

Words are int64 tensors holding values in [0, 2^32).
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low half of the 64-bit product."""
    # The product may overflow int64; its bits are still right.
    product = word * constant
    return (product >> 32) & MASK, product & MASK


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """Return four random words per counter. All arguments are int64 and broadcast together."""
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        hi0, lo0 = _multiply(0xD2511F53, c0)
        hi1, lo1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def uniform(word: Tensor) -> Tensor:
    """Return words as fp32 in [0, 1), mapped as by Triton's `uint_to_uniform_float`."""
    return torch.where(word > MASK >> 1, MASK - word, word).to(torch.float32) * 4.6566127342e-10
