"""Test the linear layer of generation: parity with float and int8 weights, single rows, errors."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU
from parity import DTYPES, assert_parity, poisoned
from torch import Tensor

from gptfast import ops
from gptfast.kernels.reference import decode_linear as reference
from gptfast.kernels.reference.decode_linear import quantize

EPS = 1e-5
# (N, C, outputs): few rows, and from 9 rows on tiles; the sizes are at the borders of both.
SIZES = [
    (1, 1, 1),
    (1, 24, 7),
    (2, 63, 129),
    (8, 100, 65),
    (9, 100, 33),
    (16, 257, 50),
    (17, 80, 131),
    (70, 130, 40),
]
if GPU:
    SIZES += [(1, 768, 50257), (8, 3072, 768), (16, 768, 3072), (200, 1600, 4801), (1, 6400, 1600)]

both = pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
weights = pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])


def inputs(N: int, C: int, n_out: int, dtype: torch.dtype, int8: bool) -> dict[str, Tensor]:
    """Return arguments with every optional part."""
    weight, scale = torch.randn(n_out, C) / C**0.5, None
    if int8:
        weight, scale = quantize(weight)
    tensors = {"x": torch.randn(N, C) + 0.5, "norm_weight": 1 + 0.1 * torch.randn(C)}
    tensors |= {"norm_bias": 0.1 * torch.randn(C), "bias": torch.randn(n_out)}
    tensors |= {"residual": torch.randn(N, n_out)}
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    return tensors | {"weight": weight if int8 else weight.to(dtype), "scale": scale}


def ours(case: dict[str, Tensor], *, gelu: bool = False, fp32_out: bool = False) -> Tensor:
    norm = None
    if case["norm_weight"] is not None:
        norm = case["norm_weight"], case["norm_bias"], EPS
    rest = {name: case[name] for name in ("scale", "residual")}
    return ops.decode_linear(
        case["x"], case["weight"], case["bias"], norm=norm, gelu=gelu, fp32_out=fp32_out, **rest
    )


def defined(case: dict[str, Tensor], gelu: bool) -> Tensor:
    """Compute the reference in float64."""
    double = {name: None if t is None else t.double() for name, t in case.items()}
    norm = double["norm_weight"], double["norm_bias"], EPS
    layer = (double[name] for name in ("weight", "scale", "bias", "residual"))
    return reference.decode_linear(double["x"], *norm, *layer, gelu, False)


def plain(case: dict[str, Tensor], gelu: bool) -> Tensor:
    """Compute the layer in plain PyTorch, in the dtype of x."""
    x, weight = case["x"], case["weight"].to(case["x"].dtype)
    if case["scale"] is not None:
        weight = weight * case["scale"].to(x.dtype)[:, None]
    if case["norm_weight"] is not None:
        x = F.layer_norm(x, x.shape[-1:], case["norm_weight"], case["norm_bias"], EPS)
    y = F.linear(x, weight, case["bias"])
    y = F.gelu(y, approximate="tanh") if gelu else y
    return y if case["residual"] is None else case["residual"] + y


def check(make: Callable[[], dict[str, Tensor]], gelu: bool, fp32_out: bool = False) -> None:
    """Check parity over four cases at once: one case of few numbers compares lucky roundings."""
    results = []
    for _ in range(4):
        case = make()
        with poisoned():
            out = ours(case, gelu=gelu, fp32_out=fp32_out)
        assert not fp32_out or out.dtype == torch.float32
        pt = plain(case, gelu)
        results.append((out.to(pt.dtype), defined(case, gelu), pt))
    assert_parity("y", *(torch.stack(kind) for kind in zip(*results, strict=True)))


@both
@dtypes
@weights
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(backend: str, size: tuple[int, int, int], int8: bool, dtype: torch.dtype) -> None:
    check(partial(inputs, *size, dtype, int8), gelu=False)


@both
@weights
@pytest.mark.parametrize("N", [3, 20], ids=["few", "more"])
@pytest.mark.parametrize("parts", ["no norm", "no bias", "no residual", "gelu", "fp32", "bare"])
def test_parts(backend: str, parts: str, N: int, int8: bool) -> None:
    left_out = {
        "no norm": ["norm_weight", "norm_bias"],
        "no bias": ["bias"],
        "no residual": ["residual"],
        "gelu": ["residual"],
        "bare": ["norm_weight", "norm_bias", "bias", "residual"],
    }.get(parts, [])

    def make() -> dict[str, Tensor]:
        case = inputs(N, 70, 50, torch.float16, int8)
        return case | dict.fromkeys(left_out)

    check(make, gelu=parts == "gelu", fp32_out=parts == "fp32")


@both
@weights
@pytest.mark.parametrize("N", [8, 9, 17], ids="N-{}".format)
def test_an_fp32_result_is_not_rounded(backend: str, N: int, int8: bool) -> None:
    y = ours(inputs(N, 70, 50, torch.float16, int8), fp32_out=True)
    assert y.dtype == torch.float32
    # By chance, one number in 2**13 is representable.
    assert (y != y.half()).float().mean(1).min() > 0.9


@pytest.mark.parametrize("N", [9, 33, 64, 70], ids="N-{}".format)
def test_a_row_of_the_wide_head_depends_on_no_other(triton: str, N: int) -> None:
    case = inputs(70, 100, 150, torch.float16, False)
    y = ours(case, fp32_out=True)
    i = torch.randperm(70)[:N]
    few = ours({**case, "x": case["x"][i], "residual": case["residual"][i]}, fp32_out=True)
    assert torch.equal(few, y[i])


@pytest.mark.skipif(GPU, reason="counts the interpreter's loads")
@pytest.mark.parametrize("N", [9, 64], ids="N-{}".format)
def test_the_wide_head_is_read_once(triton: str, N: int) -> None:
    from loads import recorded_loads

    case = inputs(N, 100, 150, torch.float16, False)
    with recorded_loads(case["weight"]) as loads:
        ours(case, fp32_out=True)
    assert sum(map(len, loads)) == case["weight"].numel()


@both
@weights
@pytest.mark.parametrize("value", [-1e30, -60.0, 0.0, 60.0, 1e30], ids=str)
def test_gelu_far_out(backend: str, value: float, int8: bool) -> None:
    """Far from 0, GELU returns zero or its input, without NaN or overflow."""
    weight, scale = torch.ones(3, 1), None
    if int8:
        weight, scale = quantize(weight)
    x = torch.full((9, 1), value)
    for rows in (x[:2], x):
        y = ops.decode_linear(rows, weight, scale=scale, gelu=True)
        torch.testing.assert_close(y, rows.clamp(min=0).expand(-1, 3), rtol=1e-6, atol=0)


@both
@weights
def test_a_row_depends_on_no_other(backend: str, int8: bool) -> None:
    """A row gets the same bits in any batch of 2 to MAX_ROWS rows on the Triton kernels.

    PyTorch's products guarantee equality only up to rounding.
    """
    case = inputs(8, 100, 70, torch.float32, int8)
    y = ours(case, gelu=True)
    for i in ([0, 5], [7, 3], [3, 6, 1, 2]):
        few = ours({**case, "x": case["x"][i], "residual": case["residual"][i]}, gelu=True)
        if backend == "triton":
            assert torch.equal(few, y[i])
        else:
            torch.testing.assert_close(few, y[i])


@both
@weights
def test_layouts_and_dimensions(backend: str, int8: bool) -> None:
    case = inputs(12, 40, 30, torch.float32, int8)
    expected = ours(case)
    strided = {
        name: None if t is None else torch.stack((t, t), -1)[..., 0] for name, t in case.items()
    }
    torch.testing.assert_close(ours(strided), expected, rtol=0, atol=0)
    cube = {**case, "x": case["x"].view(3, 4, 40), "residual": case["residual"].view(3, 4, 30)}
    torch.testing.assert_close(ours(cube), expected.view(3, 4, 30), rtol=0, atol=0)
    none = {**case, "x": case["x"][:0], "residual": case["residual"][:0]}
    assert ours(none).shape == (0, 30)


def test_quantize() -> None:
    weight = torch.randn(50, 33)
    weight[7] = 0
    weight[9] *= 1e-30
    rounded, scale = quantize(weight)
    assert rounded.dtype == torch.int8 and scale.dtype == torch.float32
    assert scale[7] == 1 and not rounded[7].any()
    assert rounded.abs().amax(1)[torch.arange(50) != 7].eq(127).all()
    error = (rounded * scale[:, None] - weight).abs()
    # The error is at most half a step and a rounding of the product.
    assert (error <= scale[:, None] * (0.5 + 127 * 2**-23)).all()


def test_errors() -> None:
    x, weight, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    rounded, scale = quantize(weight)
    with pytest.raises(ValueError, match=r"x \(\.\.\., C\) and weight \(O, C\), got \(4, 6\)"):
        ops.decode_linear(x, weight.T)
    with pytest.raises(ValueError, match="its dtype or int8, got torch.float32 and torch.float64"):
        ops.decode_linear(x, weight.double())
    with pytest.raises(ValueError, match="a scale for an int8 weight only"):
        ops.decode_linear(x, rounded)
    with pytest.raises(ValueError, match="a scale for an int8 weight only"):
        ops.decode_linear(x, weight, scale=scale)
    with pytest.raises(ValueError, match=r"scale must be \(5,\) torch.float32"):
        ops.decode_linear(x, rounded, scale=scale.half())
    with pytest.raises(ValueError, match=r"bias must be \(5,\) torch.float32 .* got \(6,\)"):
        ops.decode_linear(x, weight, torch.randn(6))
    with pytest.raises(ValueError, match=r"residual must be \(4, 5\) .* got \(5,\)"):
        ops.decode_linear(x, weight, residual=bias)
    with pytest.raises(ValueError, match=r"norm must be weight and bias of shape \(6,\)"):
        ops.decode_linear(x, weight, norm=(torch.ones(5), torch.zeros(5), EPS))
