"""Test PyTorch's own tools on gptfast: FlopCounterMode and torch.jit.trace."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from helpers import random_ids, random_model
from plain_gpt import PlainGPT
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptfast import ops


def counted(f: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen-blocks"])
def test_flops_are_those_of_plain_pytorch(frozen: bool) -> None:
    model = random_model()
    plain = PlainGPT(model.config)
    model.h.requires_grad_(not frozen)
    plain.h.requires_grad_(not frozen)
    idx = random_ids(2, 9)
    with sdpa_kernel(SDPBackend.MATH):
        expected = counted(lambda: plain(idx, idx).backward())
    # As PyTorch's formula for its fused attention has it, the backward computes the scores again.
    scores = 2 * (2 * 9 * 9 * 24) * model.config.n_layer
    assert counted(lambda: model(idx, idx).backward()) == expected + scores


def test_flops_of_attention_and_decoding() -> None:
    q, k = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 7, 5)
    assert counted(lambda: ops.attention(q, k, k)) == 2 * (2 * 2 * 3 * 4 * 7 * 5)
    x, weight = torch.randn(6, 5), torch.randn(8, 5)
    assert counted(lambda: ops.decode_linear(x, weight)) == 2 * 6 * 5 * 8


@pytest.mark.parametrize("first", ["gptfast", "torch.utils.flop_counter"])
def test_flops_in_either_order_of_import(first: str) -> None:
    code = f"""
import {first}, gptfast, torch
from torch.utils.flop_counter import FlopCounterMode
x = torch.ones(2, 3)
with FlopCounterMode(display=False) as counter:
    gptfast.ops.linear(x, x)
print(counter.get_total_flops())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "24", result.stderr


def test_counter_is_not_imported_at_start() -> None:
    # It imports Triton, which takes longer than all of gptfast.
    code = "import gptfast, sys; print('torch.utils.flop_counter' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


class Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, target: Tensor) -> Tensor:
        return self.model(idx, target)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trace_of_logits(tied: bool) -> None:
    model = random_model(tie_weights=tied).eval()
    traced = torch.jit.trace(model, (random_ids(2, 9),))
    idx = random_ids(3, 5, seed=2)  # of another shape
    torch.testing.assert_close(traced(idx), model(idx), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trace_of_the_loss_and_its_gradients(tied: bool) -> None:
    model = random_model(tie_weights=tied)
    traced = torch.jit.trace(Loss(model), (random_ids(2, 9), random_ids(2, 9)))
    idx, target = random_ids(3, 5, seed=2), random_ids(3, 5, seed=3)
    results = []
    for f in (traced, model):
        model.zero_grad()
        loss = f(idx, target)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for ours, expected in zip(*results, strict=True):
        # Two forms of the same gradient: the head's is computed in the forward or after it.
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
