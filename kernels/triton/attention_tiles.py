"""The tiles of the attention kernels, by architecture, kind of element and padded head dim.

A tile is (BLOCK_M queries, BLOCK_N keys, num_warps, num_stages, registers a thread at most). What
decided, on sm_90 with 16 bits and a head dim of 64: two programs a multiprocessor, for while one
takes exponentials the other can multiply; 128 queries a program in the forward and the dQ kernel,
as with 64 the keys and values read from L2 alone would take as long as the products may; wgmma's
64 keys for 4 warps in the other, where 128 leave one program only. bench/compile_audit.py says
what each costs. Without tensor cores (fp32) the tiles are those that need few registers.
"""

import torch
import triton
from gptfast.kernels.triton import target

# Longer heads are served by the reference.
MAX_D = 256

Tile = tuple[int, int, int, int, int | None]
# "16-bit", "16-bit dropout" or "fp32" -> padded head dim -> tile.
Tiles = dict[str, dict[int, Tile]]


def _tiles(bits_16: list[tuple], dropout: list[tuple], fp32: list[tuple]) -> Tiles:
    kinds = {"16-bit": bits_16, "16-bit dropout": dropout, "fp32": fp32}
    return {
        kind: {16 << i: (*tile, None)[:5] for i, tile in enumerate(tiles)}
        for kind, tiles in kinds.items()
    }


# With longer heads ptxas stops at 80 registers, and spills, unless told where to.
_FWD_FP32 = [(64, 32, 8, 1)] * 3 + [(32, 16, 8, 1, 128), (16, 16, 8, 1, 128)]
# Of both kernels of the backward: the second relies on the sums of the first to the bit.
_BWD_FP32 = [(64, 32, 8, 1)] * 3 + [(16, 16, 8, 1, 128)] * 2

_FWD_90 = _tiles(
    [(128, 64, 8, 3, 128)] * 3 + [(128, 64, 8, 3), (128, 32, 8, 2)],
    [(128, 64, 8, 3, 128)] * 3 + [(128, 64, 8, 3), (128, 32, 8, 2)],
    _FWD_FP32,
)
_DQ_90 = _tiles(
    [(128, 64, 8, 3, 128)] * 3 + [(64, 64, 4, 2), (64, 32, 4, 2)],
    [(128, 64, 8, 3)] * 3 + [(64, 32, 4, 2), (64, 32, 8, 2)],
    _BWD_FP32,
)
_DK_DV_90 = _tiles(
    [(64, 64, 4, 3)] * 3 + [(32, 64, 4, 2), (16, 64, 8, 2)],
    [(32, 64, 4, 3)] * 3 + [(16, 64, 4, 2), (16, 64, 8, 2)],
    _BWD_FP32,
)
_FWD_100 = _tiles(
    [(128, 64, 4, 3)] * 3 + [(128, 64, 8, 3), (128, 32, 8, 2)],
    [(128, 64, 4, 3)] * 3 + [(128, 64, 8, 3), (128, 32, 8, 2)],
    _FWD_FP32,
)
_DQ_100 = _tiles(
    [(128, 64, 8, 3)] * 3 + [(64, 32, 4, 2), (64, 32, 4, 2)],
    [(128, 64, 8, 3)] * 3 + [(64, 32, 4, 2), (64, 32, 8, 2)],
    _BWD_FP32,
)
_FWD_80 = _tiles(
    [(64, 64, 4, 3)] * 3 + [(64, 64, 4, 2), (64, 32, 8, 2)],
    [(64, 64, 4, 3)] * 3 + [(64, 32, 4, 2), (64, 32, 8, 2)],
    _FWD_FP32,
)
_DQ_80 = _tiles(
    [(64, 32, 4, 2)] * 4 + [(32, 32, 4, 2)],
    [(64, 32, 4, 2)] * 3 + [(64, 32, 8, 2), (32, 32, 8, 2)],
    _BWD_FP32,
)
_DK_DV_80 = _tiles(
    [(32, 64, 4, 2)] * 3 + [(32, 64, 8, 2), (16, 32, 4, 2)],
    [(32, 32, 4, 2)] * 3 + [(32, 64, 8, 2), (16, 32, 8, 2)],
    _BWD_FP32,
)
_FWD_942 = _tiles(
    [(128, 64, 4, 1)] * 3 + [(128, 32, 4, 1), (64, 32, 4, 1)],
    [(128, 64, 4, 1)] * 3 + [(128, 32, 4, 1), (64, 32, 4, 1)],
    [(64, 32, 4, 1)] * 3 + [(32, 32, 4, 1), (16, 16, 4, 1)],
)
_DQ_942 = _tiles(
    [(64, 64, 4, 1)] * 3 + [(64, 32, 4, 1), (32, 32, 4, 1)],
    [(64, 64, 4, 1)] * 3 + [(64, 32, 4, 1), (32, 32, 4, 1)],
    [(32, 32, 4, 1)] * 3 + [(32, 16, 4, 1), (16, 16, 4, 1)],
)
_DK_DV_942 = _tiles(
    [(64, 64, 4, 1)] * 3 + [(32, 64, 4, 1), (16, 32, 4, 1)],
    [(64, 64, 4, 1)] * 3 + [(32, 64, 4, 1), (16, 32, 4, 1)],
    [(32, 32, 4, 1)] * 3 + [(32, 16, 4, 1), (16, 16, 4, 1)],
)

FWD = {"sm_80": _FWD_80, "sm_90": _FWD_90, "sm_100": _FWD_100, "gfx942": _FWD_942}
BWD_DQ = {"sm_80": _DQ_80, "sm_90": _DQ_90, "sm_100": _DQ_100, "gfx942": _DQ_942}
BWD_DK_DV = {"sm_80": _DK_DV_80, "sm_90": _DK_DV_90, "sm_100": _DK_DV_90, "gfx942": _DK_DV_942}


def tile(
    table: dict[str, Tiles], dtype: torch.dtype, D: int, dropout: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """The constexprs that shape a kernel, and the options of its launch."""
    kind = "fp32" if dtype == torch.float32 else "16-bit dropout" if dropout else "16-bit"
    BLOCK_D = max(16, triton.next_power_of_2(D))
    BLOCK_M, BLOCK_N, warps, stages, registers = table[target.arch()][kind][BLOCK_D]
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "EVEN_D": BLOCK_D == D}
    options = {"num_warps": warps, "num_stages": stages}
    return blocks, options if registers is None else {**options, "maxnreg": registers}
