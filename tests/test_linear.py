"""Test linear layers after a norm: parity with both providers of products, autocast, errors."""

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, cases_of, check
from seeds import shifted
from torch import Tensor

from gptfast import ops
from gptfast.kernels.reference import linear as reference

EPS = 1e-5

# (N, C, outputs): too small for our own products, and at the borders of their tiles.
SIZES = [
    (1, 1, 1),
    (5, 24, 7),
    (33, 40, 50),
    (100, 257, 49),
    (97, 300, 145),
    (129, 64, 193),
    (40, 1100, 96),
]


def defined(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    bias, *norm = rest if len(rest) % 2 else (None, *rest)
    norm_weight, norm_bias = norm or (None, None)
    return reference.linear_fwd(x, norm_weight, norm_bias, EPS, weight, bias, None)[0]


def plain(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    bias, *norm = rest if len(rest) % 2 else (None, *rest)
    return F.linear(F.layer_norm(x, x.shape[-1:], *norm, EPS) if norm else x, weight, bias)


def ours(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    bias, *norm = rest if len(rest) % 2 else (None, *rest)
    return ops.linear(x, weight, bias, norm=(*norm, EPS) if norm else None)


def inputs(
    N: int, C: int, n_out: int, dtype: torch.dtype, *, bias: bool = True, norm: bool = True
) -> dict[str, Tensor]:
    tensors = {"x": torch.randn(N, C) + 0.5, "weight": torch.randn(n_out, C) / C**0.5}
    if bias:
        tensors["bias"] = torch.randn(n_out)
    if norm:
        tensors |= {"norm_weight": 1 + 0.1 * torch.randn(C), "norm_bias": 0.1 * torch.randn(C)}
    return {name: t.to(dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(products: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    N, C, n_out = size
    n = cases_of(min(N * C, N * n_out, C, n_out))
    cases = [(inputs(*size, dtype), torch.randn(N, n_out)) for _ in range(n)]
    check(ours, defined, plain, *cases)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_parity_without_parts(products: str, bias: bool, norm: bool) -> None:
    cases = [
        (inputs(70, 48, 60, torch.float32, bias=bias, norm=norm), torch.randn(70, 60))
        for _ in range(4)
    ]
    check(ours, defined, plain, *cases)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_residual(products: str, bias: bool, dtype: torch.dtype) -> None:
    def case() -> dict[str, Tensor]:
        return {"residual": torch.randn(70, 60).to(dtype), **inputs(70, 48, 60, dtype, bias=bias)}

    def fused(residual: Tensor, x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        bias, *norm = rest if len(rest) % 2 else (None, *rest)
        return ops.linear(x, weight, bias, norm=(*norm, EPS), residual=residual)

    check(
        fused,
        lambda residual, *rest: residual + defined(*rest),
        lambda residual, *rest: residual + plain(*rest),
        *((case(), torch.randn(70, 60)) for _ in range(4)),
    )


@pytest.mark.parametrize("kind", ["transposed", "every other", "expanded"])
def test_layouts(products: str, kind: str) -> None:
    def strided(rows: int, columns: int) -> Tensor:
        return {
            "transposed": lambda: torch.randn(columns, rows).T,
            "every other": lambda: torch.randn(rows, 2 * columns)[:, ::2],
            "expanded": lambda: torch.randn(rows, 1).expand(rows, columns),
        }[kind]()

    cases = [({"x": strided(70, 48), "weight": strided(60, 48)}, None) for _ in range(4)]
    check(ours, defined, plain, *cases)


def test_more_dimensions_and_no_rows(products: str) -> None:
    case = inputs(6, 8, 5, torch.float32)
    y = ours(case["x"].view(2, 3, 8), *list(case.values())[1:])
    assert torch.equal(y.view(6, 5), ours(*case.values()))
    empty = {name: t.requires_grad_() for name, t in (case | {"x": torch.randn(0, 8)}).items()}
    ours(*empty.values()).sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in empty.values())


@pytest.mark.parametrize(
    "wanted", ["x", "weight", "bias", "norm_weight", "norm_bias"], ids=lambda name: f"only-{name}"
)
def test_one_gradient_is_as_with_all(products: str, wanted: str) -> None:
    case, dy = inputs(40, 48, 64, torch.float32), torch.randn(40, 64)
    every = {name: t.clone().requires_grad_() for name, t in case.items()}
    ours(*every.values()).backward(dy)
    case[wanted].requires_grad_()
    ours(*case.values()).backward(dy)
    for name, t in case.items():
        assert (t.grad is not None) == (name == wanted)
    assert torch.equal(case[wanted].grad, every[wanted].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_torchs(products: str, dtype: torch.dtype) -> None:
    results = []
    for f in (ours, plain):
        torch.manual_seed(shifted(1))
        case = {k: t.requires_grad_() for k, t in inputs(64, 48, 40, torch.float32).items()}
        with torch.autocast("cpu", dtype):
            y = f(*case.values())
        y.float().square().sum().backward()
        results.append([y, *(t.grad for t in case.values())])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        # Each side rounds each sum once to 16 bits.
        unit = torch.finfo(dtype).eps
        assert (a - b).abs().max() <= 4 * unit * b.abs().max()


def test_errors() -> None:
    x, weight, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    with pytest.raises(ValueError, match=r"x \(\.\.\., C\) and weights \(O, C\), got \(4, 6\)"):
        ops.linear(x, weight.T)
    with pytest.raises(ValueError, match=r"bias must be \(5,\), got \(6,\)"):
        ops.linear(x, weight, torch.randn(6))
    with pytest.raises(ValueError, match="one dtype and one device"):
        ops.linear(x, weight.double(), bias.double())
    with pytest.raises(ValueError, match=r"norm must be weight and bias of shape \(6,\)"):
        ops.linear(x, weight, norm=(torch.ones(5), torch.zeros(5), EPS))
    with pytest.raises(ValueError, match=r"residual must be \(4, 5\), got \(5,\)"):
        ops.linear(x, weight, residual=bias)
    with pytest.raises(ValueError, match="floating-point"):
        ops.linear(torch.ones(4, 6, dtype=torch.int64), torch.ones(5, 6, dtype=torch.int64))
