"""The tiles of the attention kernels, by architecture, kind of element and padded head dim.

The choices on sm_90, for 16 bits and a head dim of 64: two programs fit a multiprocessor, so that
one can multiply while the other computes exponentials. The forward and the dQ kernel take 128
queries a program, and the dK and dV kernel 128 keys: with 64, reading the other side from L2 would
take as long as the products. One program of that kernel fits, as its two sums take registers too.
bench/compile_audit.py shows what each tile costs. fp32, without tensor cores, has the tiles that
need few registers; so have 16 bits on sm_75, whose tensor cores Triton does not use. The tiles that
compute in fp64 take twice the memory of fp32's, which the smaller GPUs do not have.
"""

import functools
import logging

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
# "16-bit", "16-bit dropout", "fp32" or "fp64" (fp32 computed in fp64) -> padded head dim -> tile.
Tiles = dict[str, dict[int, Tile]]


def _tiles(
    bits_16: list[tuple], dropout: list[tuple], fp32: list[tuple], fp64: list[tuple]
) -> Tiles:
    """Return tables by head dim from lists of the tiles for the head dims 16, 32, 64, 128, 256."""
    kinds = {"16-bit": bits_16, "16-bit dropout": dropout, "fp32": fp32, "fp64": fp64}
    return {
        kind: {16 << i: (*tile, None)[:5] for i, tile in enumerate(tiles)}
        for kind, tiles in kinds.items()
    }


# For larger head dims ptxas stops at 80 registers and spills, unless it is given a limit.
_FWD_FP32 = [(64, 32, 8, 1, 96)] + [(64, 32, 8, 1)] * 2 + [(32, 16, 8, 1, 128), (16, 16, 8, 1, 128)]
# The same for both kernels of the backward: the second needs the first one's sums bit for bit.
_BWD_FP32 = [(64, 32, 8, 1)] * 3 + [(16, 16, 8, 1, 128)] * 2
# For 99 KB, and for 64 KB, where the largest head dim has no room. The kernels of a backward need
# not share these tiles: what they change in fp64 is lost when results become fp32.
_FWD_FP64 = [(16, 16, 4, 1)] * 2 + [(32, 32, 8, 1, 168)] + [(16, 16, 8, 1)] * 2
_DQ_FP64 = [(16, 16, 4, 1)] * 2 + [(16, 32, 8, 1)] + [(16, 16, 8, 1), (8, 16, 8, 1)]
_DK_DV_FP64 = [(16, 16, 4, 1)] * 2 + [(32, 32, 8, 1)] + [(16, 16, 8, 1), (16, 8, 8, 1)]
_FWD_FP64_SMALL = [(32, 32, 4, 1)] * 3 + [(16, 16, 4, 1)]
_DQ_FP64_SMALL = [(16, 16, 4, 1)] * 3 + [(8, 16, 4, 1)]
_DK_DV_FP64_SMALL = [(16, 16, 4, 1)] * 3 + [(16, 8, 4, 1)]
# Smaller ones than AMD's matrix cores take: with these, Triton 3.7 fails to compile fp64.
_FP64_942 = [(8, 8, 4, 1)] * 4 + [(8, 8, 8, 1)]

_FWD_90 = _tiles(
    [(128, 64, 8, 3, 128)] * 3 + [(128, 64, 8, 3), (128, 32, 8, 2)],
    [(128, 64, 8, 3, 128)] * 3 + [(128, 64, 8, 3), (128, 32, 8, 2)],
    _FWD_FP32,
    _FWD_FP64,
)
_DQ_90 = _tiles(
    [(128, 64, 8, 3, 128)] * 3 + [(64, 64, 4, 2), (64, 32, 4, 2)],
    [(128, 64, 8, 3)] * 3 + [(64, 32, 4, 2), (64, 32, 8, 2)],
    _BWD_FP32,
    _DQ_FP64,
)
_DK_DV_90 = _tiles(
    [(64, 128, 8, 2)] * 3 + [(32, 128, 8, 2), (16, 64, 8, 2)],
    [(64, 128, 8, 2)] * 3 + [(32, 128, 8, 2), (16, 64, 8, 2)],
    [(64, 32, 8, 1), (64, 32, 8, 1, 128), *_BWD_FP32[2:]],
    _DK_DV_FP64,
)
_FWD_100 = _tiles(
    [(128, 64, 4, 3)] * 3 + [(128, 64, 8, 3), (128, 32, 8, 2)],
    [(128, 64, 4, 3)] * 3 + [(128, 64, 8, 3), (128, 32, 8, 2)],
    _FWD_FP32,
    _FWD_FP64,
)
_DQ_100 = _tiles(
    [(128, 64, 8, 3)] * 3 + [(64, 32, 4, 2), (64, 32, 4, 2)],
    [(128, 64, 8, 3)] * 3 + [(64, 32, 4, 2), (64, 32, 8, 2)],
    _BWD_FP32,
    _DQ_FP64,
)
_FWD_80 = _tiles(
    [(64, 64, 4, 3)] * 3 + [(64, 64, 4, 2), (64, 32, 8, 2)],
    [(64, 64, 4, 3)] * 3 + [(64, 32, 4, 2), (64, 32, 8, 2)],
    _FWD_FP32,
    _FWD_FP64,
)
_DQ_80 = _tiles(
    [(64, 32, 4, 2)] * 4 + [(32, 32, 4, 2)],
    [(64, 32, 4, 2)] * 3 + [(64, 32, 8, 2), (32, 32, 8, 2)],
    _BWD_FP32,
    _DQ_FP64,
)
_DK_DV_80 = _tiles(
    [(32, 64, 4, 2)] * 3 + [(32, 64, 8, 2), (16, 32, 4, 2)],
    [(32, 32, 4, 2)] * 3 + [(32, 64, 8, 2), (16, 32, 8, 2)],
    _BWD_FP32,
    _DK_DV_FP64,
)
_FWD_75 = _tiles(_FWD_FP32, _FWD_FP32, _FWD_FP32, _FWD_FP64_SMALL)
_DQ_75 = _tiles(_BWD_FP32, _BWD_FP32, _BWD_FP32, _DQ_FP64_SMALL)
# Without a tensor core, each element's sum has one order, whatever the tile.
_DK_DV_FP32_75 = [*_BWD_FP32[:-1], (16, 8, 8, 1, 128)]
_DK_DV_75 = _tiles(_DK_DV_FP32_75, _DK_DV_FP32_75, _DK_DV_FP32_75, _DK_DV_FP64_SMALL)
_FWD_942 = _tiles(
    [(128, 64, 4, 1)] * 3 + [(128, 32, 4, 1), (64, 32, 4, 1)],
    [(128, 64, 4, 1)] * 3 + [(128, 32, 4, 1), (64, 32, 4, 1)],
    [(64, 32, 4, 1)] * 3 + [(32, 32, 4, 1), (16, 16, 4, 1)],
    _FP64_942,
)
_DQ_942 = _tiles(
    [(64, 64, 4, 1)] * 3 + [(64, 32, 4, 1), (32, 32, 4, 1)],
    [(64, 64, 4, 1)] * 3 + [(64, 32, 4, 1), (32, 32, 4, 1)],
    [(32, 32, 4, 1)] * 3 + [(32, 16, 4, 1), (16, 16, 4, 1)],
    _FP64_942,
)
_DK_DV_942 = _tiles(
    [(64, 64, 4, 1)] * 3 + [(32, 64, 4, 1), (16, 32, 4, 1)],
    [(64, 64, 4, 1)] * 3 + [(32, 64, 4, 1), (16, 32, 4, 1)],
    [(32, 32, 4, 1)] * 3 + [(32, 16, 4, 1), (16, 16, 4, 1)],
    _FP64_942,
)


class KernelTiles(dict[str, Tiles]):
    """The tiles of one kernel, by architecture."""

    def __init__(self, kernel: str, **tiles: Tiles) -> None:
        super().__init__(tiles)
        self.kernel = kernel


FWD = KernelTiles(
    "attention_fwd", sm_75=_FWD_75, sm_80=_FWD_80, sm_90=_FWD_90, sm_100=_FWD_100, gfx942=_FWD_942
)
BWD_DQ = KernelTiles(
    "attention_bwd_dq", sm_75=_DQ_75, sm_80=_DQ_80, sm_90=_DQ_90, sm_100=_DQ_100, gfx942=_DQ_942
)
BWD_DK_DV = KernelTiles(
    "attention_bwd_dk_dv",
    sm_75=_DK_DV_75,
    sm_80=_DK_DV_80,
    sm_90=_DK_DV_90,
    sm_100=_DK_DV_90,
    gfx942=_DK_DV_942,
)


def _kind(dtype: torch.dtype, dropout: bool, number: tl.dtype) -> str:
    if dtype == torch.float32:
        return "fp64" if number == tl.float64 else "fp32"
    return "16-bit dropout" if dropout else "16-bit"


def _block_d(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def tile(
    table: KernelTiles, dtype: torch.dtype, D: int, dropout: bool, number: tl.dtype = tl.float32
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the constexprs that shape a kernel, and the options of its launch.

    number: what the kernel computes with.
    """
    kind, BLOCK_D = _kind(dtype, dropout, number), _block_d(D)
    tiles = table[target.fitting((table.kernel, kind, BLOCK_D))]
    BLOCK_M, BLOCK_N, warps, stages, registers = tiles[kind][BLOCK_D]
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "EVEN_D": BLOCK_D == D}
    options = {"num_warps": warps, "num_stages": stages}
    return blocks, options if registers is None else {**options, "maxnreg": registers}


def _number(dtype: torch.dtype, Tq: int, Tk: int, D: int) -> tl.dtype:
    few = Tq <= FP64_QUERIES or Tq * Tk * D < FP64_WORK
    return tl.float64 if dtype == torch.float32 and few else tl.float32


def number(q: Tensor, Tk: int) -> tl.dtype:
    """Return the type that the kernels compute with."""
    return _number(q.dtype, q.shape[2], Tk, q.shape[3])


@functools.cache
def _log_once(line: str) -> None:
    logging.getLogger("gptfast").warning(line)


def has_tile(dtype: torch.dtype, Tq: int, Tk: int, D: int, *, decoding: bool = False) -> bool:
    """Return whether this GPU has tiles for these sizes; the reference computes all others.

    GPUs with 64 KB of shared memory may have none for fp64 and the largest head dims. `decoding`
    needs none.
    """
    if not 0 < D <= MAX_D or decoding:
        return 0 < D <= MAX_D
    kind, BLOCK_D = _kind(dtype, False, _number(dtype, Tq, Tk, D)), _block_d(D)
    if kind != "fp64" or BLOCK_D in FWD[target.fitting((FWD.kernel, kind, BLOCK_D))][kind]:
        return True
    _log_once(
        f"gptfast: attention of up to {FP64_QUERIES} queries in fp32 with head dim {D}: this GPU "
        "has too little shared memory for the kernels; the slower PyTorch reference computes it"
    )
    return False
