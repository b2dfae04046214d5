"""Sampling without a sort; kernels/reference/sampling.py is the definition.

One program a row (sampling_draw.py), or, for a few long rows, several programs a row in four
launches (sampling_split.py). A token's code orders all tokens by rank and is unique, so ties need
no rules of their own (sampling_codes.py). Weights are whole numbers up to 2^40; their int64 sums
are exact, whatever the blocks are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.reference import sampling as reference
from gptfast.kernels.triton.launch import launch
from gptfast.kernels.triton.launch_series import repeat, scratch
from gptfast.kernels.triton.sampling_codes import row_at
from gptfast.kernels.triton.sampling_draw import draw_row
from gptfast.kernels.triton.sampling_split import (
    MAX_SLICES,
    sample_collect_kernel,
    sample_draw_kernel,
    sample_extremes_kernel,
    sample_histogram_kernel,
    words_per_row,
)
from gptfast.kernels.triton.target import arch

# Tokens that fit the list, in which each is compared to each.
LIST_SIZE = 256
# arch: (BLOCK, UNROLL, num_warps) for a vocabulary of up to MAX_SHORT_V, and for a longer one.
MAX_SHORT_V = 2048
TILES = {
    "sm_80": ((2048, 1, 8), (4096, 4, 16)),
    "sm_90": ((2048, 1, 8), (4096, 4, 16)),
    "sm_100": ((2048, 1, 8), (4096, 4, 16)),
    "gfx942": ((2048, 1, 4), (4096, 4, 8)),
}
# Several programs a row: for at most MAX_SPLIT_B rows of at least MIN_SPLIT_V logits. All rows
# together have about N_PROGRAMS programs.
MAX_SPLIT_B = 64
MIN_SPLIT_V = 8192
N_PROGRAMS = 264
# arch: (BLOCK, num_warps) of these programs, and the warps of the one that draws.
SPLIT_TILES = {
    "sm_80": (1024, 4, 8),
    "sm_90": (1024, 4, 8),
    "sm_100": (1024, 4, 8),
    "gfx942": (1024, 4, 4),
}
# Bins of their histogram.
N_BINS = 1024


@triton.jit
def sample_fwd_kernel(
    logits_ptr, first, limit, stride, V,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    ids_ptr, list_ptr, mass_ptr, mass_stride,
    GRANULE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, LIST_SIZE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = row_at(logits_ptr, first, limit, stride, V, b, GRANULE)
    parameters = (
        temperature_ptr + b,
        top_k_ptr + b,
        top_p_ptr + b,
        min_p_ptr + b,
        seed_ptr + b,
        position_ptr + b,
    )
    id = draw_row(
        row, parameters, list_ptr + b * (2 * LIST_SIZE), mass_ptr + b * mass_stride,
        GRANULE, BLOCK, UNROLL, LIST_SIZE,
    )  # fmt: skip
    tl.store(ids_ptr + b, id)


def tile(V: int) -> tuple[int, int, int]:
    """Return (BLOCK, UNROLL, num_warps) for rows of V logits."""
    short, long = TILES[arch()]
    return short if V <= MAX_SHORT_V else long


def split_tile() -> tuple[int, int, int]:
    """Return (BLOCK, num_warps) of a program that has a slice, and the warps of one that draws."""
    return SPLIT_TILES[arch()]


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """Draw a token from each row of logits (B, V); all else is (B,).

    Return ids (B,) int64; -1 for a row that cannot be sampled.
    """
    parameters = [x.contiguous() for x in (temperature, top_k, top_p, min_p, seed, position)]
    if not triton.knobs.runtime.interpret:
        return sample_fwd(logits, *parameters)
    # On a CPU the parameters are checked, here by the reference on a vocabulary of one.
    reference.sample(logits.new_zeros(logits.shape[0], 1), *parameters)
    ids = sample_fwd(logits, *parameters)
    reference.check_rows(ids < 0)
    return ids


def sample_fwd(logits: Tensor, *parameters: Tensor) -> Tensor:
    """Return what `sample` returns, without the checks that a CPU can afford."""
    B, V = logits.shape
    ids = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B == 0:
        return ids
    if logits.stride(1) != 1 and V > 1:
        logits = logits.contiguous()
    size = logits.element_size()
    first = 0
    limit = int(logits.untyped_storage().nbytes() // size - logits.storage_offset())
    if logits.data_ptr() % 16:
        # Pass the start of the memory, which is aligned, so that the kernel can align its loads.
        first = int(logits.storage_offset())
        limit += first
        logits = logits.as_strided((B, V), logits.stride(), 0)
    by_slices = B <= MAX_SPLIT_B and V >= MIN_SPLIT_V
    fill = _sample_by_slices if by_slices else _sample_by_rows
    repeat(fill, (ids, logits, *parameters), first, limit, tile(V))
    return ids


def _sample_by_rows(ids: Tensor, logits: Tensor, *rest: Any) -> None:
    """Fill ids by one program a row; the rest is as for `_sample_by_slices`."""
    *parameters, first, limit, (BLOCK, unroll, num_warps) = rest
    B, V = logits.shape
    granule = 16 // logits.element_size()
    blocks = triton.cdiv(V + granule - 1, BLOCK)
    # Per row: the codes in the list, then their weights.
    lists = scratch(logits, (B, 2, LIST_SIZE), torch.int64)
    masses = scratch(logits, (B, blocks), torch.int64)
    launch(
        sample_fwd_kernel, (B,),
        logits, first, limit, logits.stride(0), V, *parameters, ids, lists, masses, blocks,
        GRANULE=granule, BLOCK=BLOCK, UNROLL=unroll, LIST_SIZE=LIST_SIZE, num_warps=num_warps,
    )  # fmt: skip


def slices(B: int, V: int, granule: int, BLOCK: int) -> tuple[int, int]:
    """Return how many slices each of B rows has, and their length, a multiple of BLOCK."""
    # A row may start up to granule - 1 positions after its first granule.
    blocks = triton.cdiv(V + granule - 1, BLOCK)
    blocks_per_slice = triton.cdiv(blocks, max(1, min(MAX_SLICES.value, N_PROGRAMS // B)))
    return triton.cdiv(blocks, blocks_per_slice), blocks_per_slice * BLOCK


def _sample_by_slices(
    ids: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    first: int,
    limit: int,
    row_tile: tuple[int, int, int],
) -> None:
    """Fill ids by several programs a row."""
    B, V = logits.shape
    granule = 16 // logits.element_size()
    BLOCK, num_warps, draw_warps = split_tile()
    row_block, unroll, _ = row_tile
    n_slices, length = slices(B, V, granule, BLOCK)
    words = words_per_row(N_BINS, LIST_SIZE)
    blocks = triton.cdiv(V + granule - 1, row_block)
    extremes = scratch(ids, (B, 2, MAX_SLICES.value), torch.float32)
    memory = scratch(ids, (B, words), torch.int64)
    masses = scratch(ids, (B, blocks), torch.int64)
    rows = (logits, first, limit, logits.stride(0), V, length)
    between = (extremes, memory, words)
    cuts = (temperature, top_k, top_p)
    bins = {"GRANULE": granule, "N_BINS": N_BINS}
    slicing = {**bins, "BLOCK": BLOCK, "num_warps": num_warps}
    listing = {"LIST_SIZE": LIST_SIZE, **slicing}
    grid = (n_slices, B)
    launch(sample_extremes_kernel, grid, *rows, *between, **slicing)
    launch(sample_histogram_kernel, grid, *rows, *between, *cuts, **listing)
    launch(sample_collect_kernel, grid, *rows, *between, *cuts, min_p, **listing)
    launch(
        sample_draw_kernel, (B,),
        *rows, n_slices, *between, *cuts, min_p, seed, position,
        ids, masses, blocks, **bins, BLOCK=min(row_block, triton.next_power_of_2(length)),
        LIST_SIZE=LIST_SIZE, ROW_BLOCK=row_block, UNROLL=unroll, num_warps=draw_warps,
    )  # fmt: skip
