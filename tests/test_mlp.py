"""Test the block's MLP: parity, both providers of products, saved tensors, autocast, errors."""

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, assert_parity, cases_of, check
from seeds import shifted
from torch import Tensor

from gptfast import ops
from gptfast.kernels.reference import mlp as reference

EPS = 1e-5


def defined(x: Tensor, *rest: Tensor) -> Tensor:
    layers, norm = rest[:4], rest[4:] or (None, None)
    return reference.mlp_fwd(x, *norm, EPS, *layers, False)[0]


def plain(x: Tensor, *rest: Tensor) -> Tensor:
    fc_weight, fc_bias, proj_weight, proj_bias, *norm = rest
    a = F.layer_norm(x, x.shape[-1:], *norm, EPS) if norm else x
    h = F.gelu(F.linear(a, fc_weight, fc_bias), approximate="tanh")
    return F.linear(h, proj_weight, proj_bias)


def ours(x: Tensor, *rest: Tensor) -> Tensor:
    return ops.mlp(x, *rest[:4], norm=(*rest[4:], EPS) if rest[4:] else None)


def inputs(
    N: int, C: int, n_hidden: int, n_out: int, dtype: torch.dtype, norm: bool = True
) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(N, C) - 0.5,
        # The inputs are wide enough to reach both tails of the GELU.
        "fc_weight": 3 * torch.randn(n_hidden, C) / C**0.5,
        "fc_bias": torch.randn(n_hidden),
        "proj_weight": torch.randn(n_out, n_hidden) / n_hidden**0.5,
        "proj_bias": torch.randn(n_out),
    }
    if norm:
        tensors |= {"norm_weight": 1 + 0.1 * torch.randn(C), "norm_bias": 0.1 * torch.randn(C)}
    return {name: t.to(dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (5, 24, 96, 24), (37, 48, 192, 50), (130, 100, 257, 33)], ids=str
)
def test_parity(products: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    N, C, n_hidden, n_out = size
    n = cases_of(min(N * C, N * n_out, C, n_hidden, n_out))
    cases = [(inputs(*size, dtype), torch.randn(N, n_out)) for _ in range(n)]
    check(ours, defined, plain, *cases)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_residual(products: str, norm: bool, dtype: torch.dtype) -> None:
    check_residual(norm, dtype, 4)


def check_residual(norm: bool, dtype: torch.dtype, cases: int) -> None:
    def fused(x: Tensor, *rest: Tensor) -> Tensor:
        return ops.mlp(x, *rest[:4], norm=(*rest[4:], EPS) if rest[4:] else None, residual=True)

    check(
        fused,
        lambda x, *rest: x + defined(x, *rest),
        lambda x, *rest: x + plain(x, *rest),
        *((inputs(50, 40, 70, 40, dtype, norm), torch.randn(50, 40)) for _ in range(cases)),
    )


def test_parity_without_norm(products: str) -> None:
    cases = [(inputs(40, 36, 80, 36, torch.float32, norm=False), None) for _ in range(4)]
    check(ours, defined, plain, *cases)


FAR_OUT = [-1e30, -60.0, -12.0, 0.0, 12.0, 60.0, 1e30]


@pytest.mark.parametrize("value", FAR_OUT, ids=str)
def test_gelu_far_out(products: str, value: float) -> None:
    check_gelu_far_out(value)


def check_gelu_far_out(value: float) -> None:
    """Weights of 1 pass GELU and its slope through: neither gives NaN or overflows."""
    one, zero = torch.ones(1, 1), torch.zeros(1)
    x = torch.full((40, 1), value, requires_grad=True)
    y = ops.mlp(x, one, zero, one, zero)
    y.sum().backward()
    expected = torch.full((40, 1), max(value, 0.0))
    if abs(value) >= 12:
        assert torch.equal(y, expected)
        assert torch.equal(x.grad, torch.full((40, 1), float(value > 0)))
    else:
        assert torch.equal(y, expected) and torch.equal(x.grad, torch.full((40, 1), 0.5))


@pytest.mark.parametrize("wanted", range(7), ids=str)
def test_one_gradient_is_as_with_all(products: str, wanted: int) -> None:
    check_one_gradient(wanted)


def check_one_gradient(wanted: int) -> None:
    case, dy = list(inputs(40, 48, 96, 48, torch.float32).values()), torch.randn(40, 48)
    every = [t.clone().requires_grad_() for t in case]
    ours(*every).backward(dy)
    case[wanted].requires_grad_()
    ours(*case).backward(dy)
    assert [t.grad is not None for t in case] == [i == wanted for i in range(7)]
    assert torch.equal(case[wanted].grad, every[wanted].grad)


def test_second_backward_gives_the_same(products: str) -> None:
    check_second_backward()


def check_second_backward() -> None:
    """The backward does not write to saved tensors."""
    case = [t.requires_grad_() for t in inputs(40, 48, 96, 48, torch.float32).values()]
    y = ours(*case)
    first = torch.autograd.grad(y.square().sum(), case, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_torchs(products: str, dtype: torch.dtype) -> None:
    check_autocast(dtype)


def check_autocast(dtype: torch.dtype) -> None:
    results = []
    for f in (ours, plain):
        torch.manual_seed(shifted(1))
        case = [t.requires_grad_() for t in inputs(64, 48, 96, 48, torch.float32).values()]
        with torch.autocast(case[0].device.type, dtype):
            y = f(*case)
        y.float().square().sum().backward()
        results.append([y, *(t.grad for t in case)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        # The two differ by a few roundings to 16 bits, at most one per layer and direction.
        assert (a - b).abs().max() <= 8 * torch.finfo(dtype).eps * b.abs().max()


def test_errors() -> None:
    case = list(inputs(4, 6, 8, 6, torch.float32).values())
    with pytest.raises(
        ValueError, match=r"fc_weight \(F, C\) and proj_weight \(O, F\), got \(8, 6\)"
    ):
        ops.mlp(*case[:3], torch.randn(6, 7), case[4])
    with pytest.raises(ValueError, match=r"weights \(O, C\), got \(4, 5\)"):
        ops.mlp(torch.randn(4, 5), *case[1:5])
    with pytest.raises(ValueError, match=r"bias must be \(8,\)"):
        ops.mlp(case[0], case[1], torch.randn(6), *case[3:5])
    with pytest.raises(ValueError, match=r"residual needs proj_weight \(6, F\), got \(5, 8\)"):
        ops.mlp(*case[:3], torch.randn(5, 8), torch.randn(5), residual=True)
    with pytest.raises(ValueError, match="one dtype and one device"):
        ops.mlp(*case[:3], case[3].double(), case[4].double())


# The tests below are of the Triton kernels.


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [(129, 48, 257, 33), (3, 129, 24, 7)], ids=str)
def test_triton_parity(triton: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    N, C, n_hidden, n_out = size
    check(ours, defined, plain, *((inputs(*size, dtype), torch.randn(N, n_out)) for _ in range(3)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_triton_residual(triton: str, dtype: torch.dtype) -> None:
    for norm in (True, False):
        check_residual(norm, dtype, 2)


def test_triton_layouts(triton: str) -> None:
    case = inputs(70, 40, 50, 36, torch.float32)
    strided = {name: torch.stack((t, t), -1)[..., 0] for name, t in case.items()}
    # The gradient of a sum has strides of 0.
    for dout in (None, torch.randn(36, 70).T):
        check(ours, defined, plain, (strided, dout))
    empty = [t.requires_grad_() for t in (case | {"x": torch.randn(0, 40)}).values()]
    ours(*empty).sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in empty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_triton_autocast_is_torchs(triton: str, dtype: torch.dtype) -> None:
    check_autocast(dtype)


def test_triton_gradients(triton: str) -> None:
    for wanted in range(7):
        check_one_gradient(wanted)
    check_second_backward()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_triton_gelu(triton: str, dtype: torch.dtype) -> None:
    """GELU and its slope for numbers of every size; weights of 1 pass them through."""
    from gptfast.kernels.triton.gelu import gelu_bwd_, gelu_fwd

    powers = torch.logspace(-24, 4, 2048, 2, dtype=torch.float64)
    x = torch.cat((-powers, powers, torch.linspace(-6, 6, 4096, dtype=torch.float64)))
    x = x.view(-1, 128).to(dtype)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        dh, g, _ = gelu_bwd_(torch.ones_like(x), x, with_g=True, with_sums=False)
        assert torch.equal(g, gelu_fwd(x))
        return g, dh

    def pytorch(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = F.gelu(x, approximate="tanh")
        y.sum().backward()
        return y.detach(), x.grad

    for name, *results in zip(("g", "dh"), ours(x), pytorch(x.double()), pytorch(x), strict=True):
        assert_parity(name, *results)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # the interpreter's
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_triton_gelu_far_out(triton: str, dtype: torch.dtype) -> None:
    from gptfast.kernels.triton.gelu import gelu_bwd_, gelu_fwd

    most = torch.finfo(dtype).max
    x = torch.tensor([[-most, -60.0, -12.0, -0.0, 0.0, 12.0, 60.0, most]], dtype=dtype)
    slope = torch.tensor([[0, 0, 0, 0.5, 0.5, 1, 1, 1]], dtype=dtype)
    assert torch.equal(gelu_fwd(x), x.clamp(min=0))
    dh, g, sums = gelu_bwd_(torch.ones_like(x), x, with_g=True, with_sums=True)
    assert torch.equal(dh, slope) and torch.equal(g, x.clamp(min=0)) and torch.equal(sums, slope[0])
    x = torch.tensor([[-torch.inf, torch.inf, torch.nan]], dtype=dtype)
    g, expected = gelu_fwd(x), F.gelu(x, approximate="tanh")
    assert torch.equal(g.isnan(), expected.isnan()) and g[0, 1] == torch.inf
    assert gelu_bwd_(torch.ones_like(x), x, with_g=False, with_sums=False)[0].isnan().all()
    # The operator itself, with weights of 1.
    check_gelu_far_out(-1e30)


def test_triton_sums_are_those_of_what_was_stored(triton: str) -> None:
    from gptfast.kernels.triton.column_sums import column_sums
    from gptfast.kernels.triton.gelu import gelu_bwd_

    for shape in ((1, 1), (300, 131)):
        dg, h = torch.randn(*shape).half(), torch.randn(*shape).half()
        dh, _, sums = gelu_bwd_(dg, h, with_g=False, with_sums=True)
        assert dh is dg and torch.equal(sums, column_sums(dh))
