"""The engine as compiled for aarch64, on the CPUs of qemu: the same bits as on this machine."""

import pytest
import torch
from arm.program import CPUS, call, emulated
from conftest import at_level
from helpers import random_ids, random_model
from torch import Tensor

from gptfast import GPT
from gptfast.engine.packed import CACHE_DTYPES, Shape, pack_model
from gptfast.ops.backend import EXTENSION

ops = torch.ops.gptfast


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def places_of(shape: Shape) -> list[int]:
    """Return the places of a packed model's parameters, as csrc/engine_layout.cpp lays them out."""
    places, end = [], 0
    C, panel = shape.n_embd, 32

    def add(size: int, *others: int) -> None:
        nonlocal end
        places.extend([end, *others])
        end += round_up(size, 64)

    def panel_bytes(K: int) -> int:
        return [K * 128, round_up(K, 32) * 64, round_up(K, 64) * 32, round_up(K, 64) * 20][
            shape.weight_type
        ]

    def matrix(N: int, K: int) -> None:
        panels, int8 = panel_bytes(K) * (round_up(N, panel) // panel), shape.weight_type == 2
        scales = round_up(N, panel) * 4 if int8 else 0
        add(panels + scales, *([end + panels] if int8 else []))

    def vector(n: int) -> None:
        add(round_up(n, panel) * 4)

    matrix(shape.vocab_size, C)
    add(shape.block_size * C * 4)
    for _ in range(shape.n_layer):
        for layers in ([(3 * C, C), (C, C)], [(4 * C, C), (C, 4 * C)]):
            vector(C), vector(C)
            for N, K in layers:
                matrix(N, K), vector(N)
    vector(C), vector(C)
    assert end == ops.engine_bytes(shape)
    return places


class Steps:
    """Steps of a packed model for one row, here or by the loops of an aarch64 level."""

    def __init__(self, model: GPT, dtype: str) -> None:
        self.packed = pack_model(model, dtype)
        self.shape, config = self.packed.shape, model.config
        self.head_dim = config.n_embd // config.n_head
        n_slots, padded = config.block_size, round_up(self.head_dim, 16)
        self.slots = torch.randperm(n_slots).to(torch.int32)
        size = config.n_layer * 2 * config.n_head * n_slots * padded
        self.cache = torch.zeros(size, dtype=CACHE_DTYPES[dtype])

    def here(self, start: int, ids: list[int], wanted: list[int]) -> tuple[Tensor, Tensor]:
        cache = self.cache.clone()
        inputs = [self.packed.data, self.shape, cache, self.slots[None]]
        return ops.engine_step(*inputs, [0], [start], [len(ids)], ids, wanted, [], [])[0], cache

    def at(
        self, level: str, threads: int, start: int, ids: list[int], wanted: list[int]
    ) -> tuple[Tensor, Tensor]:
        V, N, shape = self.shape.vocab_size, len(ids), self.shape
        numbers = [shape.weight_type, shape.n_layer, shape.n_head, shape.n_embd, self.head_dim, N]
        numbers += [V, threads, start, *places_of(shape), len(wanted), len(self.slots)]
        positions = torch.arange(start, start + N)
        logits = torch.full((len(wanted), round_up(V, 32)), torch.nan)
        arrays = [self.packed.data, self.slots, torch.tensor(ids), positions, torch.tensor(wanted)]
        cache, logits = call(level, "engine", numbers, [*arrays, self.cache, logits])[-2:]
        return logits[:, :V], cache


def fused_levels() -> list[str]:
    """Return this machine's levels that round a product and its sum once."""
    return [level for level in EXTENSION.build_info()["isa_supported"] if level != "default"]


needs_fused = pytest.mark.skipif(
    EXTENSION is None or not fused_levels(), reason="this CPU rounds products and sums apart"
)


@emulated
@needs_fused
@pytest.mark.parametrize("shape", [{"n_embd": 128}, {"n_head": 5, "n_embd": 50}], ids=str)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("level", CPUS)
def test_an_engine_has_the_same_bits(level: str, dtype: str, shape: dict) -> None:
    """A prompt, a token, and several guesses; the cache too."""
    model = random_model(std=0.08, block_size=80, vocab_size=211, **shape).eval()
    steps, ids = Steps(model, dtype), random_ids(47, vocab_size=211).tolist()
    for threads, start, end in ((1, 0, 41), (2, 41, 42), (3, 42, 47)):
        wanted = [*range(end - start)][-5:]
        found, cache = steps.at(level, threads, start, ids[start:end], wanted)
        with at_level(fused_levels()[-1]):
            logits, steps.cache = steps.here(start, ids[start:end], wanted)
        assert logits.isfinite().all() and torch.equal(found, logits)
        assert torch.equal(cache, steps.cache)


@emulated
@needs_fused
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("factor", [1e-37, 1e-30, 1e30])
@pytest.mark.parametrize("level", CPUS)
def test_an_engine_at_the_edges_of_the_range(level: str, factor: float, dtype: str) -> None:
    """The smallest inputs, weights and sums are no normal numbers; the largest sums overflow."""
    model = random_model(std=0.08, block_size=80, vocab_size=211).eval()
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.mul_(factor)
        model.ln_f.weight.mul_(factor)
        model.ln_f.bias.mul_(factor)
        model.h[1].attn.c_proj.bias[3] = 1e-40
    steps, ids = Steps(model, dtype), random_ids(20, vocab_size=211).tolist()
    found, _ = steps.at(level, 1, 0, ids, [0, 19])
    with at_level(fused_levels()[-1]):
        logits, _ = steps.here(0, ids, [0, 19])
    assert torch.equal(found.nan_to_num(), logits.nan_to_num())
