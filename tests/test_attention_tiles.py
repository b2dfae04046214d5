"""Attention on the tiles of a CPU's matrix engine, emulated where the CPU has none."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from parity import check, forward_backward
from test_attention import (
    BEYOND_FP32,
    SMALL,
    check_scores_beyond_fp32,
    defined,
    layout,
    make,
    plain,
    shape_id,
    term_by_term,
)
from torch import Tensor

from gptfast import ops
from gptfast.kernels.reference import attention as reference

BF16, FP32 = torch.bfloat16, torch.float32
SMALL_FP32 = [shape for shape in SMALL if shape[2] > 8]  # fewer queries are decoded in fp32


@pytest.fixture(params=["bf16", "high", "medium"])
def numbers(tiles_isa: str, request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Run the test on bf16, and on the bf16 parts of fp32 in each of PyTorch's settings."""
    yield from _dtype_at(request.param)


@pytest.fixture(params=["high", "medium"])
def precision(tiles_isa: str, request: pytest.FixtureRequest) -> Iterator[str]:
    for _ in _dtype_at(request.param):
        yield request.param


def _dtype_at(setting: str) -> Iterator[torch.dtype]:
    torch.set_float32_matmul_precision("highest" if setting == "bf16" else setting)
    yield BF16 if setting == "bf16" else FP32
    torch.set_float32_matmul_precision("highest")


class ByParts(torch.autograd.Function):
    """The reference, whose gradients are products by parts too. Autograd's would not be."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        out, lse = reference.attention_fwd(q, k, v, *options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        return *reference.attention_bwd(grads[0], q, k, v, out, lse, *ctx.options), *[None] * 4


def functions(
    scale: float | None = None, p: float = 0.0, seed: int = 0, kv_len: Tensor | None = None
) -> tuple[Callable[..., Tensor], ...]:
    """Return attention as the kernel, the reference and plain PyTorch compute it."""

    def plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype == BF16:
            keep = reference.dropout_scale(q, k, p, torch.tensor(seed)) if p else None
            return plain(q, k, v, scale, keep, kv_len)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return ByParts.apply(q, k, v, factor, p, torch.tensor(seed), kv_len)

    return (
        lambda q, k, v: ops.attention(q, k, v, scale=scale, dropout_p=p, seed=seed, kv_len=kv_len),
        lambda q, k, v: defined(q, k, v, scale, p, seed, kv_len),
        plainly,
    )


@pytest.mark.parametrize("shape", SMALL, ids=shape_id)
def test_parity(tiles_isa: str, shape: tuple) -> None:
    cases = (make(shape, BF16) for _ in range(8 if shape[2] < 50 else 2))
    check(ops.attention, defined, plain, *cases, reordered=shape[-1])


@pytest.mark.parametrize("shape", SMALL_FP32, ids=shape_id)
def test_parity_by_parts(precision: str, shape: tuple) -> None:
    check(*functions(), *(make(shape, FP32) for _ in range(2)), reordered=shape[-1])


@pytest.mark.parametrize("scale", [0.0, 0.7, -0.3])
def test_scale(numbers: torch.dtype, scale: float) -> None:
    cases = (make((1, 2, 37, 70, 26), numbers) for _ in range(4))
    check(*functions(scale), *cases, reordered=26)


@pytest.mark.parametrize("Tq", [33, 63], ids=lambda Tq: f"Tq{Tq}")
def test_kv_len(numbers: torch.dtype, Tq: int) -> None:
    # The rows have no key, fewer keys than queries, some keys, and all of them.
    kv_len = torch.tensor([0, 3, 77, 130])
    cases = [make((4, 1, Tq, 130, 26), numbers) for _ in range(2)]
    three = functions(kv_len=kv_len)
    check(*three, *cases, reordered=26)
    inputs, dout = cases[0]
    clean, grads = forward_backward(three[0], list(inputs.values()), dout)
    assert not clean[0].any() and not grads[0][0].any()
    for b, length in enumerate(kv_len):
        assert not grads[1][b, :, length:].any() and not grads[2][b, :, length:].any()
        inputs["k"][b, :, length:], inputs["v"][b, :, length:] = 1e30, torch.nan
    unread, unread_grads = forward_backward(three[0], list(inputs.values()), dout)
    assert torch.equal(unread, clean)
    assert all(torch.equal(x, y) for x, y in zip(unread_grads, grads, strict=True))


@pytest.mark.parametrize("T", [5, 129], ids=lambda T: f"T{T}")
def test_dropout(numbers: torch.dtype, T: int) -> None:
    cases = [
        make((6 if T < 100 else 1, 2, T, T + 6, 26), numbers) for _ in range(8 if T < 100 else 2)
    ]
    check(*functions(p=0.25, seed=2**35 + 3), *cases, reordered=26)


@pytest.mark.parametrize("kind", ["packed", "every other"])
def test_layouts(tiles_isa: str, kind: str) -> None:
    check(ops.attention, defined, plain, (layout(kind, BF16), None), reordered=16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_nonfinite_reaches_only_visible_pairs(
    numbers: torch.dtype, name: str, value: float
) -> None:
    """The number is in the second of three blocks of queries, in one of two heads."""
    inputs, dout = make((1, 2, 140, 145, 26), numbers)
    clean, clean_grads = forward_backward(ops.attention, list(inputs.values()), dout)
    {**inputs, "dout": dout}[name][0, 1, 70, 3] = value
    out, grads = forward_backward(ops.attention, list(inputs.values()), dout)
    exact = [x.double() for x in inputs.values()]
    expected, exact_grads = forward_backward(term_by_term, exact, dout)
    for ours, expect in zip([out, *grads], [expected, *exact_grads], strict=True):
        assert torch.equal(ours.isfinite(), expect.isfinite())
        torch.testing.assert_close(
            ours.double().nan_to_num(0, 0, 0), expect.nan_to_num(0, 0, 0), rtol=2e-2, atol=5e-2
        )
    for ours, before in zip([out, *grads], [clean, *clean_grads], strict=True):
        assert torch.equal(ours[0, 0], before[0, 0])


@pytest.mark.parametrize("kind", ["overflow", "minus"])
def test_scores_beyond_fp32(numbers: torch.dtype, kind: str) -> None:
    assert kind in BEYOND_FP32
    check_scores_beyond_fp32(torch.ops.gptfast, (33, 40, 26), numbers, kind)


def test_same_bits_twice_and_with_any_threads(numbers: torch.dtype) -> None:
    inputs, dout = make((2, 3, 70, 70, 64), numbers)
    runs = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        runs.append(results(inputs, dout))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_fp32_runs_beside_tiles(tiles_isa: str) -> None:
    check(ops.attention, defined, plain, make((1, 2, 63, 129, 64), FP32), reordered=64)


def results(inputs: dict[str, Tensor], dout: Tensor, **options: Any) -> list[Tensor]:
    """Return out and the gradients of q, k and v."""
    attention = lambda q, k, v: ops.attention(q, k, v, **options)  # noqa: E731
    out, grads = forward_backward(attention, list(inputs.values()), dout)
    return [out, *grads]


def test_fp32_is_as_exact_as_asked_for(tiles_isa: str) -> None:
    inputs, dout = make((1, 2, 100, 100, 64), FP32)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = results(exact, dout.double())
    errors = {}
    for setting in ("highest", "high", "medium"):
        for _ in _dtype_at(setting):
            found = zip(results(inputs, dout), expected, strict=True)
            errors[setting] = [(x.double() - y).abs().max() for x, y in found]
    # A product leaves out 2^-9 of a number, or 2^-17 of it; fp32 rounds to 2^-24.
    for highest, high, medium in zip(*errors.values(), strict=True):
        assert 2 * highest < high < medium / 2**4


# Powers of two of q, k, v and dout. Without their scaling, small parts would be 0 on tiles.
SIZES = [(-30, 30, 0, 0), (0, 0, -100, 0), (0, 0, 0, -100), (0, 0, -50, -50), (0, 0, 30, 0)]


@pytest.mark.parametrize("exponents", SIZES, ids=str)
def test_powers_of_two_change_no_other_bit(precision: str, exponents: tuple) -> None:
    inputs, dout = make((1, 1, 70, 70, 32), FP32)
    before = results(inputs, dout)
    q, k, v, d = exponents
    sizes = {"q": q, "k": k, "v": v}
    inputs = {name: x * 2.0 ** sizes[name] for name, x in inputs.items()}
    found = results(inputs, dout * 2.0**d)
    for ours, x, exponent in zip(found, before, (v, v + d - q, v + d - k, d), strict=True):
        assert torch.equal(ours, x * 2.0**exponent)


def check_close_to_fp64(inputs: dict[str, Tensor], dout: Tensor, first: int = 0) -> None:
    """Compare the results from the first on."""
    expected = results({name: x.double() for name, x in inputs.items()}, dout.double())
    for ours, exact in list(zip(results(inputs, dout), expected, strict=True))[first:]:
        size = exact.abs().max().item()
        torch.testing.assert_close(ours, exact.float(), rtol=1e-6, atol=1e-6 * size)


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_numbers_too_large_for_parts(precision: str, name: str) -> None:
    inputs, dout = make((1, 1, 70, 70, 32), FP32)
    tensors = {**inputs, "dout": dout}
    tensors[name] *= 1e20
    check_close_to_fp64(inputs, dout, first=1 if name == "dout" else 0)


def test_sums_that_would_overflow_on_the_way_to_a_finite_score(precision: str) -> None:
    inputs, dout = make((1, 1, 70, 70, 32), FP32)
    q, k = torch.zeros_like(inputs["q"]), inputs["k"] * 2.0**-79
    # Terms of even index are added one after the other. Every other score is 0.
    q[..., [0, 2]], q[..., [4, 6]] = -(2.0**79), 2.0**79
    k[..., ::2, :] = 1.0
    check_close_to_fp64({**inputs, "q": q, "k": k}, dout)


def test_a_tiny_scale_stays_in_fp32(precision: str) -> None:
    inputs, dout = make((1, 1, 70, 70, 32), FP32)
    found = results(inputs, dout, scale=1e-20)
    torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, found, results(inputs, dout, scale=1e-20)))
