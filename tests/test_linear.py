"""Test linear layers after a norm: parity with both providers of products, autocast, errors."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU
from parity import DTYPES, cases_of, check, forward_backward
from seeds import shifted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptfast import ops, use_backend
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
    check_residual(bias, dtype)


def check_residual(bias: bool, dtype: torch.dtype) -> None:
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


LAYOUTS = ["transposed", "every other", "expanded"]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(products: str, kind: str) -> None:
    check_layout(kind)


def check_layout(kind: str) -> None:
    def strided(rows: int, columns: int) -> Tensor:
        return {
            "transposed": lambda: torch.randn(columns, rows).T,
            "every other": lambda: torch.randn(rows, 2 * columns)[:, ::2],
            "expanded": lambda: torch.randn(rows, 1).expand(rows, columns),
        }[kind]()

    cases = [({"x": strided(70, 48), "weight": strided(60, 48)}, None) for _ in range(4)]
    check(ours, defined, plain, *cases)


def test_more_dimensions_and_no_rows(products: str) -> None:
    check_no_rows()


def check_no_rows() -> None:
    case = inputs(6, 8, 5, torch.float32)
    y = ours(case["x"].view(2, 3, 8), *list(case.values())[1:])
    assert torch.equal(y.view(6, 5), ours(*case.values()))
    empty = {name: t.requires_grad_() for name, t in (case | {"x": torch.randn(0, 8)}).items()}
    ours(*empty.values()).sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in empty.values())


WANTED = ["x", "weight", "bias", "norm_weight", "norm_bias"]


@pytest.mark.parametrize("wanted", WANTED, ids=lambda name: f"only-{name}")
def test_one_gradient_is_as_with_all(products: str, wanted: str) -> None:
    check_one_gradient(wanted)


def check_one_gradient(wanted: str) -> None:
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
    check_autocast(dtype)


def check_autocast(dtype: torch.dtype) -> None:
    results = []
    for f in (ours, plain):
        torch.manual_seed(shifted(1))
        case = {k: t.requires_grad_() for k, t in inputs(64, 48, 40, torch.float32).items()}
        with torch.autocast(case["x"].device.type, dtype):
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


# The tests below are of the Triton kernels.


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [(1, 768, 9), (129, 48, 33), (40, 257, 5)], ids=str)
def test_triton_parity(triton: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(
        ours, defined, plain, *((inputs(*size, dtype), torch.randn(*size[::2])) for _ in range(4))
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_triton_without_parts(triton: str, dtype: torch.dtype) -> None:
    check_residual(False, dtype)
    case = inputs(70, 48, 60, dtype, norm=False)
    check(ours, defined, plain, (case, torch.randn(70, 60)))


def test_triton_layouts(triton: str) -> None:
    for kind in LAYOUTS:
        check_layout(kind)
    case = inputs(70, 48, 60, torch.float32)
    strided = {name: torch.stack((t, t), -1)[..., 0] for name, t in case.items()}
    # The gradient of a sum has strides of 0.
    for dout in (None, torch.randn(60, 70).T):
        check(ours, defined, plain, (strided, dout))
    check_no_rows()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_triton_autocast_is_torchs(triton: str, dtype: torch.dtype) -> None:
    check_autocast(dtype)


def test_triton_one_gradient_is_as_with_all(triton: str) -> None:
    for wanted in WANTED:
        check_one_gradient(wanted)


def check_norm(x: list[Tensor]) -> None:
    """Check a norm alone: a product with the unit matrix changes nothing, and has no rounding."""
    (N, C), dtype = x[0].shape, x[0].dtype

    def case(x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        norm_weight, norm_bias = 1 + 0.1 * torch.randn(C), 0.1 * torch.randn(C)
        named = {"x": x, "norm_weight": norm_weight.to(dtype), "norm_bias": norm_bias.to(dtype)}
        return named, torch.randn(N, C)

    def after(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *norm: f(x, torch.eye(C, dtype=x.dtype), *norm)

    check(
        after(ours),
        after(defined),
        lambda x, *norm: F.layer_norm(x, (C,), *norm, EPS),
        *map(case, x),
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [(1, 48), (129, 3), (129, 48), (33, 768), (2, 1600)], ids=str)
def test_triton_norm(triton: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    check_norm([(3 * torch.randn(*size) + 0.5).to(dtype) for _ in range(3)])


@pytest.mark.parametrize("offset", [1e4, -1e6], ids=str)
def test_triton_norm_far_from_0(triton: str, offset: float) -> None:
    """E[x^2] - E[x]^2 would be noise here."""
    check_norm([torch.randn(33, 48) + offset for _ in range(3)])
    # A channel that outweighs all others, as GPT-2's residual stream has.
    spikes = [torch.randn(33, 48) for _ in range(3)]
    for x in spikes:
        # Of another height in each row: else all rows would have the same rounding.
        x[:, 5] = offset * (0.5 + torch.rand(33))
    check_norm(spikes)


@pytest.mark.filterwarnings("ignore:overflow")  # in the interpreter, beside the row
def test_triton_norm_of_equal_numbers_is_its_bias(triton: str) -> None:
    # Most of these sums round, so the mean is only right after its correction.
    for size in (1.0, 1e4, 3e36):
        x, norm = (size * torch.randn(64, 1)).expand(64, 37), (torch.randn(37), torch.randn(37))
        y, (dx, *_) = forward_backward(
            lambda x, *norm: ours(x, torch.eye(37), *norm), [x, *norm], torch.randn(64, 37)
        )
        assert torch.equal(y, norm[1].expand(64, 37)) and dx.isfinite().all()


def test_triton_norm_of_one_channel(triton: str) -> None:
    case = [torch.randn(40, 1), torch.ones(1, 1), torch.randn(1), torch.randn(1)]
    y, (dx, _, dnorm_weight, dnorm_bias) = forward_backward(ours, case, torch.ones(40, 1))
    assert torch.equal(y, case[3].expand(40, 1))
    assert not dx.any() and not dnorm_weight.any() and dnorm_bias == 40


def test_triton_long_rows_are_the_references(triton: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptfast.kernels.triton import norm

    monkeypatch.setattr(norm, "MAX_C", 47)
    check(ours, defined, plain, (inputs(9, 48, 7, torch.float32), torch.randn(9, 7)))


def test_triton_sums_of_many_programs(triton: str) -> None:
    """16,384 tokens make 512 partial sums, more than one step of the second launch takes."""
    from gptfast.kernels.triton.column_sums import column_totals

    partial = torch.randn(600, 2, 33)
    first, second = torch.empty(33), torch.empty(33, dtype=torch.float16)
    column_totals(partial, first, second)
    expected = partial.double().sum(0)
    # In any order, a sum has at most 600 roundings, each relative to a sum of some of the terms.
    bound = 600 * 2.0**-24 * partial.double().abs().sum(0)
    assert ((first - expected[0]).abs() <= bound[0]).all()
    assert ((second - expected[1]).abs() <= bound[1] + 2.0**-11 * expected[1].abs()).all()


def test_triton_same_bits_twice(triton: str) -> None:
    case, dy = inputs(200, 48, 24, torch.float32), torch.randn(200, 24)
    first, second = (forward_backward(ours, list(case.values()), dy) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


class Calls(TorchDispatchMode):
    """Count what runs on the device: PyTorch's own operations that are no view and no empty memory.

    A cast is a copy to another dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.casts = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        tensors = [t for t in (*args[:2], out) if isinstance(t, Tensor)]
        memory = {t.untyped_storage().data_ptr() for t in tensors[:-1]}
        if name in ("_to_copy", "copy_"):
            self.casts += len({t.dtype for t in tensors}) > 1
        elif isinstance(out, Tensor) and "empty" not in name:
            if name.endswith("_") or out.untyped_storage().data_ptr() not in memory:
                self.names[name] += 1
        return out


@pytest.mark.parametrize("autocast", [False, True], ids=["fp16", "autocast"])
def test_triton_casts_nothing_that_pytorch_does_not(autocast: bool) -> None:
    pytest.importorskip("triton")
    C, device = 16, "cuda" if GPU else "cpu"
    dtype = torch.float32 if autocast else torch.float16
    shapes = [(C,), (C,), (C, C), (C,), (C, C), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]

    def block(x: Tensor, *layers: Tensor) -> Tensor:
        norm, (qkv, qkv_bias, proj, proj_bias), rest = layers[:2], layers[2:6], layers[6:]
        x = ops.linear(ops.linear(x, qkv, qkv_bias, norm=(*norm, EPS)), proj, proj_bias, residual=x)
        return ops.mlp(x, *rest, norm=(*norm, EPS), residual=True)

    def plain_block(x: Tensor, *layers: Tensor) -> Tensor:
        norm, (qkv, qkv_bias, proj, proj_bias), rest = layers[:2], layers[2:6], layers[6:]
        x = x + F.linear(plain(x, qkv, qkv_bias, *norm), proj, proj_bias)
        h = F.gelu(plain(x, *rest[:2], *norm), approximate="tanh")
        return x + F.linear(h, *rest[2:])

    counts = []
    for f, backend in ((block, "triton"), (plain_block, "auto")):
        leaves = [torch.randn(s, device=device).to(dtype) for s in ((8, C), *shapes)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        # The counter is outside: it sees what the launchers call, not the operators.
        with Calls() as calls, use_backend(backend):
            with torch.autocast(device, torch.float16, enabled=autocast):
                y = f(*leaves)
            y.backward(torch.ones_like(y))
        counts.append(calls)
    ours, pytorch = counts
    assert ours.casts <= pytorch.casts
    # The products, the residuals, autograd's sums of two gradients, and the casts counted above;
    # Triton's interpreter sets the memory of its tensors.
    assert ours.names["linear"] + ours.names["addmm"] == 4 and ours.names["mm"] == 8, ours.names
    assert set(ours.names) <= {"linear", "addmm", "mm", "add", "add_", "to", "ones_like", "set_"}
    assert ours.names["add_"] == (0 if autocast else 2), ours.names
