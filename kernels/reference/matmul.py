"""The product of bf16 matrices by a CPU's matrix engine, in plain PyTorch.

    out = a b, in blocks of 32 terms. Of each block, the products of the even terms are added one
    after the other, from 0; so are those of the odd terms; the sum of both is added to out.
Products of two bf16 numbers are exact in fp32, in which the sums are rounded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_TERMS = 32


def tile_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a (M, K) b (K, N) in fp32, to the bit as the matrix engine of Intel's CPUs (AMX) does.

    a and b are bf16 and have no numbers below the smallest normal one, which the engine takes for
    0.
    """
    padding = -a.shape[1] % BLOCK_TERMS
    a, b = F.pad(a.float(), (0, padding)), F.pad(b.float(), (0, 0, 0, padding))
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    for begin in range(0, a.shape[1], BLOCK_TERMS):
        even, odd = torch.zeros_like(out), torch.zeros_like(out)
        for k in range(begin, begin + BLOCK_TERMS, 2):
            even = even + torch.outer(a[:, k], b[k])
            odd = odd + torch.outer(a[:, k + 1], b[k + 1])
        out = out + (even + odd)
    return out
