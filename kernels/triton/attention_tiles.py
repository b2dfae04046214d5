"""The tiles of the attention kernels, by architecture, bytes of an element and padded head dim.

A tile is (BLOCK_M queries, BLOCK_N keys, num_warps, num_stages, maxnreg).
"""

import torch
import triton
from gptfast.kernels.triton import target

# Head dims past it are served by the reference.
MAX_D = 256

Tile = tuple[int, int, int, int, int | None]
Tiles = dict[tuple[str, int], dict[int, Tile]]

# Tensor cores: 128 queries, two programs a multiprocessor of 128 registers a thread.
_FWD_SM_90 = {
    16: (128, 64, 8, 3, 128),
    32: (128, 64, 8, 3, 128),
    64: (128, 64, 8, 3, 128),
    128: (128, 64, 8, 3, None),
    256: (64, 64, 4, 2, None),
}
_DQ_SM_90 = {
    16: (128, 64, 8, 3, 128),
    32: (128, 64, 8, 3, 128),
    64: (128, 64, 8, 3, 128),
    128: (64, 64, 4, 3, None),
    256: (64, 32, 4, 2, None),
}
_DK_DV_SM_90 = {
    16: (64, 64, 4, 3, None),
    32: (64, 64, 4, 3, None),
    64: (64, 64, 4, 3, None),
    128: (64, 64, 4, 3, None),
    256: (32, 64, 4, 2, None),
}
# fp32: no tensor cores, so what holds the products is registers, and few.
_FWD_FP32 = {
    16: (64, 32, 8, 1, None),
    32: (64, 32, 8, 1, None),
    64: (64, 32, 8, 1, None),
    128: (32, 16, 8, 1, None),
    256: (16, 16, 8, 1, None),
}
_BWD_FP32 = {
    16: (64, 32, 8, 1, None),
    32: (64, 32, 8, 1, None),
    64: (32, 32, 8, 1, None),
    128: (32, 32, 8, 1, None),
    256: (16, 16, 8, 1, None),
}

FWD: Tiles = {("sm_90", 2): _FWD_SM_90, ("sm_90", 4): _FWD_FP32}
BWD_DQ: Tiles = {("sm_90", 2): _DQ_SM_90, ("sm_90", 4): _BWD_FP32}
BWD_DK_DV: Tiles = {("sm_90", 2): _DK_DV_SM_90, ("sm_90", 4): _BWD_FP32}


def tile(table: Tiles, dtype: torch.dtype, D: int) -> tuple[dict[str, int], dict[str, int]]:
    """The constexprs that shape a kernel, and the options of its launch."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    BLOCK_M, BLOCK_N, warps, stages, registers = table[target.arch(), dtype.itemsize][BLOCK_D]
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "EVEN_D": BLOCK_D == D}
    options = {"num_warps": warps, "num_stages": stages}
    return blocks, options if registers is None else options | {"maxnreg": registers}
