"""The tiles of the attention kernels, by architecture, kind of element and padded head dim.

The choices on sm_90, for 16 bits and a head dim of 64: two programs fit a multiprocessor, so that
one can multiply while the other computes exponentials. The forward and the dQ kernel take 128
queries a program, and the dK and dV kernel 128 keys: with 64, reading the other side from L2 would
take as long as the products. One program of that kernel fits, as its two sums take registers too.
bench/compile_audit.py shows what each tile costs. fp32, without tensor cores, has the tiles that
need few registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.triton import target

# The reference computes attention with larger head dims, and with none.
MAX_D = 256
# fp32 attention computes in fp64 up to this many queries, or below this many products of queries,
# keys and dimensions: of few numbers, single roundings decide the largest error.
FP64_QUERIES = 32
FP64_WORK = 1 << 18

# BLOCK_M queries, BLOCK_N keys, num_warps, num_stages, registers a thread may take.
Tile = tuple[int, int, int, int, int | None]
# "16-bit", "16-bit dropout" or "fp32" -> padded head dim -> tile.
Tiles = dict[str, dict[int, Tile]]


def _tiles(bits_16: list[tuple], dropout: list[tuple], fp32: list[tuple]) -> Tiles:
    """Return tables by head dim from lists of the tiles for the head dims 16, 32, 64, 128, 256."""
    kinds = {"16-bit": bits_16, "16-bit dropout": dropout, "fp32": fp32}
    return {
        kind: {16 << i: (*tile, None)[:5] for i, tile in enumerate(tiles)}
        for kind, tiles in kinds.items()
    }


# For larger head dims ptxas stops at 80 registers and spills, unless it is given a limit.
_FWD_FP32 = [(64, 32, 8, 1, 96)] + [(64, 32, 8, 1)] * 2 + [(32, 16, 8, 1, 128), (16, 16, 8, 1, 128)]
# The same for both kernels of the backward: the second needs the first one's sums bit for bit.
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
    [(64, 128, 8, 2)] * 3 + [(32, 128, 8, 2), (16, 64, 8, 2)],
    [(64, 128, 8, 2)] * 3 + [(32, 128, 8, 2), (16, 64, 8, 2)],
    [(64, 32, 8, 1), (64, 32, 8, 1, 128), *_BWD_FP32[2:]],
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
    """Return the constexprs that shape a kernel, and the options of its launch."""
    kind = "fp32" if dtype == torch.float32 else "16-bit dropout" if dropout else "16-bit"
    BLOCK_D = max(16, triton.next_power_of_2(D))
    BLOCK_M, BLOCK_N, warps, stages, registers = table[target.arch()][kind][BLOCK_D]
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "EVEN_D": BLOCK_D == D}
    options = {"num_warps": warps, "num_stages": stages}
    return blocks, options if registers is None else {**options, "maxnreg": registers}


def number(q: Tensor, Tk: int) -> tl.dtype:
    """Return the type that the kernels compute with."""
    Tq, D = q.shape[2:]
    few = Tq <= FP64_QUERIES or Tq * Tk * D < FP64_WORK
    return tl.float64 if q.dtype == torch.float32 and few else tl.float32
