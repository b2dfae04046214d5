"""Choices that only a GPU can confirm, each as a case of `make gpu-train`: sizes and tiles."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_cases import Built, GpuCase, close, dtype_of, linear_cross_entropy
from torch import Tensor

from gptfast.kernels.triton import attention, cross_entropy, launch_series, target
from gptfast.kernels.triton.attention_tiles import BWD_DK_DV, Tile

# For dK and dV of 16 bits with a head dim of 64, beside the tile in the table: BLOCK_M queries,
# BLOCK_N keys, num_warps, num_stages, registers.
DK_DV_TILES: tuple[Tile, ...] = (
    (64, 128, 8, 3, None),
    (128, 64, 4, 2, None),
    (64, 64, 4, 3, None),
    (64, 64, 4, 2, 128),
)
D = 64


def _in_chunks(n_bytes: int, smoke: bool) -> Built:
    """Return the head with the loss; n_bytes: the size of a chunk of logits."""
    assert isinstance(cross_entropy.CHUNK_BYTES, int)
    cross_entropy.CHUNK_BYTES = n_bytes
    return linear_cross_entropy(smoke)


def chunk_cases() -> Iterator[GpuCase]:
    """Yield the head with the loss in small and in large chunks of logits."""
    N, V, C = 16384, 50257, 768
    for mb in (64, 400):
        yield GpuCase(
            f"linear_cross_entropy with chunks of {mb} MB",
            partial(_in_chunks, mb << 20),
            flops=3 * 2.0 * N * V * C,
            rounds=15,
            seconds=60,
            smoke=mb == 64,
        )


def _backward_by_tiles(shape: tuple[int, int, int, int], smoke: bool) -> Built:
    """Return attention's backward, a side for each tile of dK and dV."""
    B, H, T, _ = (1, 2, 33, D) if smoke else shape
    q, k, v, dout = (torch.randn(B, H, T, D).to(dtype_of(smoke)) for _ in range(4))
    options = (D**-0.5, 0.0, None, None)
    out, lse = attention.attention_fwd(q, k, v, *options)
    table = BWD_DK_DV[target.arch()]["16-bit"]
    usual = table[D]

    def by(tile: Tile) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            table[D] = tile
            launch_series.forget()
            return attention.attention_bwd(dout, q, k, v, out, lse, *options)

        return run

    sides = {"gptfast": by(usual)}
    for tile in DK_DV_TILES:
        if tile != usual:
            sides[f"tile {' '.join(map(str, tile))}"] = by(tile)

    def check() -> None:
        for side in sides.values():
            for mine, theirs in zip(side(), sides["gptfast"](), strict=True):
                close(mine, theirs)

    return Built(sides, check)


def tile_cases() -> Iterator[GpuCase]:
    """Yield attention's backward with several tiles, each captured in a graph of its own."""
    shape = B, H, T, _ = 16, 12, 1024, D
    yield GpuCase(
        f"attention bwd bf16 causal {shape}, tiles of dK and dV",
        partial(_backward_by_tiles, shape),
        flops=10 * D * B * H * T * (T + 1) / 2,
        graph=True,
        seconds=90,
    )
