"""Test sampling by several programs a row, and which memory sampling reads.

Rows of a vocabulary that is short enough for Triton's interpreter get several programs here by
small blocks, few bins and short lists; tests/test_sampling.py has rows that really get them.
"""

import importlib
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import GPU
from parity import DTYPES
from torch import Tensor

from gptfast import ops
from gptfast.ops.backend import use_backend

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# (bins, tokens in the list): most cuts are found in the list; most are not.
SIZES = [(256, 64), (16, 16)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "bins{}-list{}".format(*size))


def in_slices(n_bins: int, list_size: int) -> Any:
    """Return a context in which each row has several programs, for blocks of 64 tokens."""
    sampling = importlib.import_module("gptfast.kernels.triton.sampling")
    return mock.patch.multiple(
        sampling,
        MAX_SPLIT_B=10**6,
        MIN_SPLIT_V=0,
        N_PROGRAMS=24,
        N_BINS=n_bins,
        LIST_SIZE=list_size,
        split_tile=lambda: (64, 1, 1),
        tile=lambda V: (256, 1, 1),
    )


def assert_same(logits: Tensor, size: tuple[int, int], **parameters: Any) -> None:
    """Compare the tokens with the reference's."""
    with use_backend("reference"):
        expected = ops.sample(logits, **parameters)
    with in_slices(*size):
        assert ops.sample(logits, **parameters).tolist() == expected.tolist()


@dtypes
@pytest.mark.parametrize("V", [1, 257], ids=lambda V: f"V{V}")
def test_same_tokens(triton: str, V: int, dtype: torch.dtype) -> None:
    # Row by row: greedy, no filter, each filter alone, and all together.
    logits = torch.randn(8, V).mul(2).to(dtype)
    logits[1, 1::3] = -torch.inf
    assert_same(
        logits,
        (256, 64),
        temperature=torch.tensor([0.0, 1.0, 0.7, 1.0, 2.0, 1.0, 0.8, 1.5]),
        top_k=torch.tensor([V, V, 5, V // 2 + 1, 10**12, V, V // 3 + 1, 40]),
        top_p=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.9, 0.3, 0.95, 0.6]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.01, 0.0]),
        seed=torch.arange(8) * 7 - 20,
        position=torch.arange(8),
    )


@sizes
def test_cuts_are_exact(triton: str, size: tuple[int, int]) -> None:
    # With nearly equal weights, one token more or less would move the draws. V is odd, so each row
    # has another misalignment.
    B, V = 5, 333
    assert_same(
        torch.randn(B, V).mul(0.01),
        size,
        top_k=torch.tensor([300, 200, V, 250, 332]),
        top_p=torch.tensor([1.0, 0.5, 0.9, 0.999, 0.01]),
        position=torch.arange(B),
    )


def test_equal_logits_are_kept_in_the_order_of_ids(triton: str) -> None:
    # In 16-bit logits, one bin has hundreds of equal ones: the list is too short for row 0.
    logits = torch.randint(4, (2, 200)).half()
    options = {"top_k": torch.tensor([77, 20]), "top_p": torch.tensor([0.9, 0.7])}
    assert_same(logits, (64, 32), temperature=1e3, **options, position=torch.arange(2))


def test_extreme_temperatures_and_logits(triton: str) -> None:
    temperature = torch.tensor([1e-30, 1e-6, 1e6, 3e38, 1.0])
    logits = torch.randn(5, 150)
    logits[1::2, ::7] = -3e38
    logits[4] *= 1e-41
    options = {"top_k": 120, "top_p": 0.8, "position": torch.arange(5)}
    assert_same(logits, (64, 64), temperature=temperature, **options)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_gpu_reports_rows_by_minus_one(triton: str, temperature: float) -> None:
    sampling = importlib.import_module("gptfast.kernels.triton.sampling")
    V = 130
    logits = torch.randn(9, V)
    for row, column in enumerate((0, V // 2, V - 1)):
        logits[row, column], logits[3 + row, column] = torch.nan, torch.inf
    logits[6], logits[7] = -torch.inf, -torch.nan
    numbers = {"temperature": temperature, "top_k": 40, "top_p": 0.8, "min_p": 0.01}
    options = ops.sampling.per_row(9, logits.device, **numbers, seed=3, position=0)
    with in_slices(64, 32):
        ids = sampling.sample_fwd(logits, *options.values()).tolist()
    with use_backend("reference"):
        good = ops.sample(logits[8:], **{name: value[8:] for name, value in options.items()})
    assert ids == [-1] * 8 + good.tolist()


def test_parameters_a_gpu_does_not_check(triton: str) -> None:
    # With any values, the kernels end with an id of the row or -1.
    sampling = importlib.import_module("gptfast.kernels.triton.sampling")
    nan, inf, V = torch.nan, torch.inf, 70
    nonsense = {
        "temperature": [nan, -1.0, inf, -inf],
        "top_k": [0, -5, -(2**63), 2**63 - 1],
        "top_p": [nan, -1.0, 2.0],
        "min_p": [nan, -1.0, 2.0],
    }
    rows = [(name, value) for name, values in nonsense.items() for value in values]
    logits = torch.randn(len(rows), V)
    usual = {"temperature": 1.0, "top_k": 30, "top_p": 0.8, "min_p": 0.01, "seed": 0}
    options = ops.sampling.per_row(len(rows), logits.device, **usual, position=0)
    for row, (name, value) in enumerate(rows):
        options[name][row] = value
    with in_slices(64, 32):
        ids = sampling.sample_fwd(logits, *options.values())
    assert ((ids >= -1) & (ids < V)).all()


def exact(kind: str, B: int, V: int, dtype: torch.dtype) -> Tensor:
    """Return B rows of V logits that end where their memory ends."""
    match kind:
        case "whole":
            return torch.randn(B, V).to(dtype)
        case "odd start":
            return torch.randn(B * V + 1).to(dtype)[1:].view(B, V)
        case "last columns":
            return torch.randn(B, V + 2).to(dtype)[:, 2:]
        case _:
            # This memory's start is not aligned to 16 bytes.
            memory = bytearray(B * V * dtype.itemsize + 16)
            rows = torch.frombuffer(memory, dtype=dtype, offset=4, count=B * V).view(B, V)
            return rows.copy_(torch.randn(B, V))


@pytest.mark.skipif(GPU, reason="compute-sanitizer checks it there")
@pytest.mark.parametrize("plan", ["one program", "slices"])
@pytest.mark.parametrize("kind", ["whole", "odd start", "last columns", "any start"])
def test_nothing_outside_the_memory_is_read(triton: str, kind: str, plan: str) -> None:
    from loads import recorded_loads

    # The last row, at the end of the memory, is read in every way there is.
    B, V, dtype = 6, 69, torch.float16
    logits = exact(kind, 2, V, dtype)[-1:].expand(B, -1)
    options = {
        "temperature": torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]),
        "top_k": torch.tensor([10, 20, V, V, 50, 60]),
        "top_p": torch.tensor([1.0, 1.0, 1.0, 0.9, 1.0, 0.9]),
        "position": torch.arange(B),
    }
    sampling = importlib.import_module("gptfast.kernels.triton.sampling")
    short = mock.patch.multiple(sampling, LIST_SIZE=16, tile=lambda V: (64, 2, 1))
    with short if plan == "one program" else in_slices(64, 16), recorded_loads(logits) as loads:
        drawn = ops.sample(logits, **options)
    memory = logits.untyped_storage().nbytes()
    assert sum(map(len, loads)) >= B * V
    for at in loads:
        assert ((at >= 0) & (at + dtype.itemsize <= memory)).all()
    with use_backend("reference"):
        assert torch.equal(drawn, ops.sample(logits.clone(), **options))
