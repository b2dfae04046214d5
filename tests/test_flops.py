"""Compare FLOPs with torch's counter, and measurements with numbers they must exceed."""

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gptfast import GPTConfig
from gptfast.device import measured_peak, peak_memory
from gptfast.training.flops import flops_per_token, mfu


class PlainGPT(nn.Module):
    """The matrix products of a GPT-2 in plain PyTorch; attention is computed whole, then masked."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, C = config, config.n_embd
        self.wte = nn.Embedding(config.vocab_size, C)
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(*s) for s in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)))
            for _ in range(config.n_layer)
        )
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.wte.weight

    def forward(self, idx: Tensor, target: Tensor) -> Tensor:
        B, T = idx.shape
        H, D = self.config.n_head, self.config.n_embd // self.config.n_head
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        x = self.wte(idx)  # (B, T, C)
        for c_attn, c_proj, c_fc, mlp_proj in self.layers:
            q, k, v = c_attn(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
            p = (q @ k.transpose(-1, -2)).masked_fill(mask, float("-inf")).softmax(-1)
            x = x + c_proj((p @ v).transpose(1, 2).reshape(B, T, -1))
            x = x + mlp_proj(F.gelu(c_fc(x)))
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


@pytest.mark.parametrize("T", [1, 7, 16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_counts_what_a_plain_model_multiplies(tied: bool, T: int) -> None:
    config = tiny_config(n_layer=3, tie_weights=tied)
    model, idx = PlainGPT(config), torch.zeros(2, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    # The plain model computes the masked half of attention too.
    masked = 6 * config.n_layer * config.n_embd * T
    assert counter.get_total_flops() == 2 * T * (flops_per_token(config, T) + masked)


def test_gpt2_is_about_six_times_its_parameters() -> None:
    """The count leaves out position embedding and biases; attention adds 57 MFLOPs."""
    per_token = flops_per_token(GPTConfig.preset("gpt2"), 1024)
    assert per_token == 6 * (85_054_464 - 119_808 + 38_597_376) + 6 * 12 * 768 * 1024


@pytest.mark.parametrize("T", [0, -1, 17])
def test_length_out_of_range(T: int) -> None:
    with pytest.raises(ValueError, match=rf"T must be in \[1, block_size=16\], got {T}"):
        flops_per_token(tiny_config(), T)


def test_mfu_is_the_share_of_the_peak() -> None:
    config = tiny_config()
    per_token = flops_per_token(config, 16)
    assert mfu(1000, config, 16, per_token * 4000) == 0.25
    with pytest.raises(ValueError, match="peak must be .* > 0, got 0"):
        mfu(1000, config, 16, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_measured_peak_leaves_the_generator_alone(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    assert 0 < measured_peak("cpu", dtype) < math.inf
    assert torch.equal(torch.get_rng_state(), before)


def test_measured_peak_is_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are invented, because the machine may be busy with other work."""
    sides = []

    def seconds(n: int, *_: object) -> Iterator[float]:
        sides.append(n)
        yield from [9.0, 0.3, 0.2, 0.4, *[0.5] * 99]

    monkeypatch.setattr("gptfast.device._product_seconds", seconds)
    peak = measured_peak("cpu")
    assert len(set(sides)) == 1
    assert peak == pytest.approx(2 * sides[0] ** 3 / 0.2)


def test_peak_is_of_the_precision_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU multiplies fp32 matrices faster where TF32 is allowed: each setting has its peak."""
    from gptfast.training import flops

    measured = []

    def peak(device: torch.device, dtype: torch.dtype, **_: object) -> float:
        measured.append((dtype, torch.get_float32_matmul_precision()))
        return float(len(measured))

    monkeypatch.setattr(flops, "measured_peak", peak)
    flops._peak_of.cache_clear()
    before, device = torch.get_float32_matmul_precision(), torch.device("cpu")
    uses = [(torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "high")]
    try:
        for _ in range(2):
            for number, (dtype, fp32_products) in enumerate(uses, 1):
                torch.set_float32_matmul_precision(fp32_products)
                assert flops.peak_flops(device, dtype) == number
    finally:
        torch.set_float32_matmul_precision(before)
        flops._peak_of.cache_clear()
    assert measured == uses


def test_peak_memory_is_not_the_parents() -> None:
    block = torch.ones(2**28)  # 1 GB
    code = "from gptfast.device import peak_memory; print(peak_memory('cpu'))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_memory("cpu") >= 4 * block.numel() > int(child.stdout)


def test_peak_memory_grows_by_the_touched_bytes() -> None:
    before = peak_memory("cpu")
    # This is more than everything so far could have freed, so the maximum must rise.
    block = torch.ones(before // 8 + 2**24)
    after = peak_memory("cpu")
    assert after >= block.numel() * 4
    assert after - before <= 2 * block.numel() * 4
    assert before > 50 * 2**20
