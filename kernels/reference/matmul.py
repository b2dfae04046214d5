"""Matrix products by the bf16 arithmetic of CPUs, in plain PyTorch.

    out = a b, in blocks of 32 terms. Of each block, the products of the even terms are added one
    after the other, from 0; so are those of the odd terms; the sum of both is added to out.
Products of two bf16 numbers are exact in fp32, in which the sums are rounded.

An fp32 number is the sum of three bf16 parts, x = x1 + x2 + x3, each what is left of x, rounded.
PyTorch's setting for fp32 products, `torch.set_float32_matmul_precision`, says how many of the
products of parts are added:
    highest   a1 b3 + a1 b2 + a2 b2 + a2 b1 + a3 b1 + a1 b1, as exact as fp32 products, or those
    high      a1 b2 + a1 b1 + a2 b1
    medium    a1 b1
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_TERMS = 32
N_PARTS = {"highest": 3, "high": 2, "medium": 1}
PASSES = {
    "highest": ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0)),
    "high": ((0, 1), (0, 0), (1, 0)),
    "medium": ((0, 0),),
}
"""The products of parts of a and b, in the order in which each block of terms adds them."""
SCALE = 2.0**24
"""What numbers are multiplied by before they are split, so that no part is below bf16's smallest
normal number."""


def matmul_precision() -> str:
    """Return PyTorch's setting for fp32 products on CPUs: "highest", "high" or "medium"."""
    mkldnn: Any = torch.backends.mkldnn  # its attributes are made when it is imported
    return {"tf32": "high", "bf16": "medium"}.get(mkldnn.matmul.fp32_precision, "highest")


def parts_of(x: Tensor, n: int) -> list[Tensor]:
    """Return the first n bf16 parts of fp32 numbers, times SCALE, in fp32."""
    parts, rest = [], x * SCALE
    for _ in range(n):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    return parts


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a (..., M, K) b (..., K, N); of fp32 numbers on a CPU, in PyTorch's setting.

    With "highest", the product is in fp32. So are sums that are not finite, because numbers or
    their parts are not: one number changes how its row or column is computed, and no other.
    """
    precision = matmul_precision()
    if precision == "highest" or a.dtype != torch.float32 or a.device.type != "cpu":
        return a @ b
    a_parts, b_parts = (parts_of(x, N_PARTS[precision]) for x in (a, b))
    products = [a_parts[i] @ b_parts[j] for i, j in PASSES[precision]]
    out = torch.stack(products).sum(0)
    return torch.where(out.isfinite(), out / SCALE**2, a @ b)


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (N, C) weight^T + bias as `product` computes it; weight: (O, C), bias: (O,)."""
    if matmul_precision() == "highest" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    y = product(x, weight.T)
    return y if bias is None else y + bias


def tile_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a (M, K) b (K, N) in fp32, to the bit as the matrix engine of Intel's CPUs (AMX) does.

    a and b are bf16 and have no numbers below the smallest normal one, which the engine takes for
    0.
    """
    return _tile_sums([a.float()], [b.float()], PASSES["medium"])


def tile_parts_product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """Return a (M, K) b (K, N) by bf16 parts, to the bit as the matrix engine does.

    a and b are fp32 and of a size at which no part or sum is infinite.
    """
    a_parts, b_parts = (parts_of(x, N_PARTS[precision]) for x in (a, b))
    return _tile_sums(a_parts, b_parts, PASSES[precision]) / SCALE**2


def _tile_sums(
    a_parts: list[Tensor], b_parts: list[Tensor], passes: tuple[tuple[int, int], ...]
) -> Tensor:
    M, K, N = len(a_parts[0]), a_parts[0].shape[1], b_parts[0].shape[1]
    padding = -K % BLOCK_TERMS
    a_parts = [F.pad(a, (0, padding)) for a in a_parts]
    b_parts = [F.pad(b, (0, 0, 0, padding)) for b in b_parts]
    out = torch.zeros(M, N, dtype=torch.float32, device=a_parts[0].device)
    for begin in range(0, K, BLOCK_TERMS):
        for i, j in passes:
            even, odd = torch.zeros_like(out), torch.zeros_like(out)
            for k in range(begin, begin + BLOCK_TERMS, 2):
                even = even + torch.outer(a_parts[i][:, k], b_parts[j][k])
                odd = odd + torch.outer(a_parts[i][:, k + 1], b_parts[j][k + 1])
            out = out + (even + odd)
    return out
