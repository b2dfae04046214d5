"""Test linear layers with a frozen weight in int8: parity, what a graph holds, autocast, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, cases_of, check
from torch import Tensor

from gptfast import ops
from gptfast.kernels.reference import linear as reference
from gptfast.ops.int8_linear import int8_linear, quantize, widen

EPS = 1e-5
SIZES = [(1, 1, 1), (5, 24, 7), (33, 40, 50), (97, 300, 145)]  # (N, C, outputs)


def inputs(N: int, C: int, n_out: int, dtype: torch.dtype, norm: bool) -> dict[str, Tensor]:
    tensors = {"residual": torch.randn(N, n_out), "x": torch.randn(N, C) + 0.5}
    if norm:
        tensors |= {"norm_weight": 1 + 0.1 * torch.randn(C), "norm_bias": 0.1 * torch.randn(C)}
    return {name: t.to(dtype) for name, t in tensors.items()}


def layers(C: int, n_out: int, dtype: torch.dtype, bias: bool) -> list[Callable[..., Tensor]]:
    """Return a layer as an operator, as it is defined and in plain PyTorch."""
    weight, scale = quantize(torch.randn(n_out, C) / C**0.5)
    b = torch.randn(n_out).to(dtype) if bias else None

    def ours(residual: Tensor, x: Tensor, *norm: Tensor) -> Tensor:
        norms = (*norm, EPS) if norm else None
        return int8_linear(x, weight, scale, b, norm=norms, residual=residual)

    def defined(residual: Tensor, x: Tensor, *norm: Tensor) -> Tensor:
        wide = widen(weight, scale, x.dtype), None if b is None else b.to(x.dtype)
        return reference.linear_fwd(x, *(norm or (None, None)), EPS, *wide, residual)[0]

    def plain(residual: Tensor, x: Tensor, *norm: Tensor) -> Tensor:
        a = F.layer_norm(x, x.shape[-1:], *norm, EPS) if norm else x
        return residual + F.linear(a, widen(weight, scale, x.dtype), b)

    return [ours, defined, plain]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(
    products: str, size: tuple[int, int, int], norm: bool, bias: bool, dtype: torch.dtype
) -> None:
    N, C, n_out = size
    n = cases_of(min(N * C, N * n_out, C))
    cases = [(inputs(*size, dtype, norm), torch.randn(N, n_out)) for _ in range(n)]
    check(*layers(C, n_out, dtype, bias), *cases)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_bits_are_those_of_a_linear_layer(backend: str, dtype: torch.dtype) -> None:
    weight, scale = quantize(torch.randn(60, 48))
    tensors = inputs(70, 48, 60, dtype, norm=True)
    wide, dy = widen(weight, scale, dtype), torch.randn(70, 60).to(dtype)

    def results(layer: Callable[..., Tensor], *weights: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        residual, x, *norm = leaves
        y = layer(x, *weights, norm=(*norm, EPS), residual=residual)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    pairs = zip(results(int8_linear, weight, scale), results(ops.linear, wide), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_weight_is_rounded_to_its_nearest_step() -> None:
    """An int8 number stands for at most half a step more or less; the largest of a row is exact."""
    w = torch.randn(50, 40) * torch.rand(50, 1).exp()
    w[3] = 0
    weight, scale = quantize(w)
    off = (widen(weight, scale, torch.float64) - w.double()).abs()
    assert (off <= 0.5001 * scale[:, None].double()).all() and (off > 0.3 * scale[:, None]).any()
    assert (weight.abs().amax(1) == torch.where(torch.arange(50) == 3, 0, 127)).all()
    torch.testing.assert_close(scale[:3], w[:3].abs().amax(1) / 127)


@pytest.mark.parametrize("wide_residual", [True, False])
def test_autocast(backend: str, wide_residual: bool) -> None:
    """Under autocast the product is in bf16, with the bits of ops.linear."""
    weight, scale = quantize(torch.randn(60, 48))
    wide, bias = widen(weight, scale, torch.float32), torch.randn(60)
    x, residual = torch.randn(2, 35, 48), torch.randn(2, 35, 60)
    residual = residual if wide_residual else residual.bfloat16()
    norm = torch.randn(48), torch.randn(48)

    def results(layer: Callable[..., Tensor], *weights: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (residual, x, *norm)]
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(leaves[1], *weights, norm=(*leaves[2:], EPS), residual=leaves[0])
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    ours = results(int8_linear, weight, scale, bias)
    wanted = results(ops.linear, wide, bias)
    assert [t.dtype for t in ours] == [t.dtype for t in wanted]
    assert ours[0].dtype == (torch.float32 if wide_residual else torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_the_graph_holds_no_wide_weight() -> None:
    weight, scale = quantize(torch.randn(60, 48))
    x = torch.randn(5, 48, requires_grad=True)
    saved: list[Tensor] = []

    def kept(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda t: t):
        int8_linear(x, weight, scale, norm=(torch.ones(48), torch.zeros(48), EPS))
    assert any(t.data_ptr() == weight.data_ptr() for t in saved)
    assert not [t for t in saved if t.is_floating_point() and t.numel() >= weight.numel()]


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_second_derivatives_are_those_of_a_linear_layer(norm: bool) -> None:
    weight, scale = quantize(torch.randn(60, 48))
    tensors = inputs(5, 48, 60, torch.float64, norm)
    dy = torch.randn(5, 60, dtype=torch.float64)

    def results(layer: Callable[..., Tensor], *weights: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (*tensors.values(), dy)]
        residual, x, *norms, dout = leaves
        norm = (*norms, EPS) if norms else None
        y = layer(x, *weights, norm=norm, residual=residual)
        first = torch.autograd.grad(y, leaves[:-1], dout, create_graph=True)
        squares = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(squares, leaves[1:], materialize_grads=True)
        return [t.detach() for t in (*first, *second)]

    wide = widen(weight, scale, torch.float64)
    for a, b in zip(results(int8_linear, weight, scale), results(ops.linear, wide), strict=True):
        torch.testing.assert_close(a, b)


def test_errors() -> None:
    weight, scale = quantize(torch.randn(7, 4))
    x, bias = torch.randn(3, 4), torch.randn(7)

    def refused(match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            int8_linear(*args, **options)

    refused("needs an int8 weight", x, weight.float(), scale)
    refused("scale \\(7,\\) in fp32", x, weight, scale.bfloat16())
    refused("change a model's dtype before", x, weight, scale.bfloat16())
    refused("scale \\(7,\\) in fp32", x, weight, scale[:6])
    refused("needs x \\(..., C\\)", x[:, :3], weight, scale)
    refused("bias must be \\(7,\\)", x, weight, scale, bias[:3])
    refused("need one dtype", x, weight, scale, bias.bfloat16())
    refused("residual must be \\(3, 7\\)", x, weight, scale, residual=x)
    refused("norm must be", x, weight, scale, norm=(x[0, :2], x[0, :2], EPS))
    refused("freeze them", x, weight, scale, bias.requires_grad_())
