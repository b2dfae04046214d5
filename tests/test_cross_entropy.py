"""Test cross entropy and linear cross entropy: parity, PyTorch's semantics, chunks, errors."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU
from parity import DTYPES, assert_parity, cases_of, check, forward_backward, poisoned
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptfast import ops
from gptfast.kernels.reference import cross_entropy as reference

REDUCTIONS = ["mean", "sum", "none"]
# The reductions cover the two operators behind linear_cross_entropy: "mean" computes the gradient
# with the loss, "none" does not. "sum" differs from "mean" in Python only.
FUSED_AND_PLAIN = ["mean", "none"]
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "smoothing and z_loss": {"label_smoothing": 0.3, "z_loss": 1e-3},
    "ignore_index": {"ignore_index": 2},
}


def fewer(backend: str, N: int, cases: int) -> tuple[int, int]:
    """Return the numbers of rows and cases; Triton's interpreter gets fewer: a row takes 20 ms."""
    return (max(4, N // 10), max(2, cases // 4)) if interpreted(backend) else (N, cases)


def interpreted(backend: str) -> bool:
    return backend == "triton" and not GPU


def skip_if_slow(backend: str, reduction: str, special: bool) -> None:
    if interpreted(backend) and reduction != "none" and special:
        pytest.skip("to the kernels a reduction is a dloss, and this takes a second")


def targets(N: int, V: int, ignore_index: int = -100) -> Tensor:
    target = torch.randint(V, (N,))
    target[N // 3 :: 5] = ignore_index
    return target


def reduce(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "mean":
        return loss.sum() / (target != ignore_index).sum()
    return loss.sum() if reduction == "sum" else loss


def defined(logits: Tensor, target: Tensor, reduction: str, options: dict) -> Tensor:
    every = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, **options}
    loss = reference.cross_entropy_fwd(logits, target, *every.values())[0]
    return reduce(loss, target, every["ignore_index"], reduction)


def plain(logits: Tensor, target: Tensor, reduction: str, options: dict) -> Tensor:
    options = dict(options)
    z_loss, ignore_index = options.pop("z_loss", 0.0), options.get("ignore_index", -100)
    loss = F.cross_entropy(logits, target, reduction=reduction, **options)
    if z_loss:
        z = z_loss * logits.logsumexp(-1).square() * (target != ignore_index)
        loss = loss + reduce(z, target, ignore_index, reduction)
    return loss


def check_cross_entropy(
    logits: list[Tensor], target: Tensor, reduction: str = "none", options: dict | None = None
) -> None:
    options = options or {}
    N = len(target)
    # Use gradients of order one, where the parity rule says most.
    douts = {"mean": lambda: torch.randn(()) * N, "sum": lambda: torch.randn(())}
    dout = douts.get(reduction, lambda: torch.randn(N))
    check(
        lambda x: ops.cross_entropy(x, target, reduction=reduction, **options),
        lambda x: defined(x, target, reduction, options),
        lambda x: plain(x, target, reduction, options),
        *(({"logits": x}, dout()) for x in logits),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_parity(backend: str, dtype: torch.dtype, options: dict) -> None:
    (N, cases), V = fewer(backend, 40, 32), 1009
    logits = [torch.randn(N, V).mul(4).to(dtype) for _ in range(cases)]
    target = targets(N, V, options.get("ignore_index", -100))
    check_cross_entropy(logits, target, "none", options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reductions(dtype: torch.dtype, reduction: str, options: dict) -> None:
    """Reductions are Python code after the operator, so testing one backend is enough."""
    logits = [torch.randn(40, 1009).mul(4).to(dtype) for _ in range(32)]
    target = targets(40, 1009, options.get("ignore_index", -100))
    check_cross_entropy(logits, target, reduction, options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("N", "V"), [(1, 1), (1, 2), (1, 15), (3, 16), (2, 17), (5, 63), (1, 257), (2, 50257)]
)
def test_parity_odd_sizes(backend: str, N: int, V: int, dtype: torch.dtype) -> None:
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    target = torch.randint(V, (N,))
    target[-1] = V - 1
    cases = max(2, 16 // N) if interpreted(backend) else 16
    if interpreted(backend) and V > 10_000:
        cases = 1
    logits = [torch.randn(N, V).mul(3).to(dtype) for _ in range(cases)]
    check_cross_entropy(logits, target, "none", options)
    if not interpreted(backend):
        check_cross_entropy(logits, target, "mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_parity_gpt2_vocabulary(dtype: torch.dtype) -> None:
    N, V = 200, 50257
    logits = [torch.randn(N, V).to(dtype) for _ in range(2)]
    check_cross_entropy(logits, targets(N, V), "none")


def strided(kind: str, N: int) -> Tensor:
    V = 331
    padding = torch.full((N, 53), torch.nan)
    padding[::2] = torch.inf
    return {
        "transposed": torch.randn(V, N).T,
        "every other column": torch.randn(N, 2 * V)[:, ::2],
        "rows of a wider matrix": torch.randn(N, V + 9)[:, 3 : V + 3],
        "expanded": torch.randn(1, V).expand(N, V),
        "padded vocabulary": torch.cat([torch.randn(N, V), padding], 1)[:, :V],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "transposed",
        "every other column",
        "rows of a wider matrix",
        "expanded",
        "padded vocabulary",
    ],
)
def test_layouts(backend: str, kind: str) -> None:
    N, cases = fewer(backend, 12, 8)
    logits = [strided(kind, N) for _ in range(cases)]
    check_cross_entropy(logits, targets(*logits[0].shape), "none")


def test_expanded_gradient(backend: str) -> None:
    target = targets(12, 331)
    check(
        lambda x: ops.cross_entropy(x, target, reduction="none"),
        lambda x: defined(x, target, "none", {}),
        lambda x: plain(x, target, "none", {}),
        *(({"logits": torch.randn(12, 331)}, None) for _ in range(cases_of(12))),
    )


def offsets_of(dtype: torch.dtype, backend: str = "") -> list[float]:
    """Return offsets of a row's logits up to the largest numbers of the dtype."""
    limits = torch.finfo(dtype)
    offsets = [0.0, 1e3, 1e6, -1e6, 1e15, -1e15, 1e30, limits.min, limits.max / 2, limits.max]
    if interpreted(backend):
        offsets = [1e3, -1e6, 1e15, limits.min]
    return [offset for offset in offsets if abs(offset) <= limits.max]


def far_logits(N: int, V: int, offset: float, dtype: torch.dtype) -> Tensor:
    """Return (N, V) around the offset; from some offset on, all are equal."""
    limits = torch.finfo(dtype)
    return (torch.randn(N, V).double() * 3 + offset).clamp(limits.min, limits.max).to(dtype)


def options_at(offset: float, dtype: torch.dtype) -> dict[str, dict]:
    """Return OPTIONS without those whose loss overflows the dtype, by z_loss * offset^2."""
    most = torch.finfo(dtype).max
    return {k: v for k, v in OPTIONS.items() if 2 * v.get("z_loss", 0) * offset**2 < most}


@pytest.mark.parametrize("V", [1, 2, 1009, 50257])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_parity_at_offsets(backend: str, dtype: torch.dtype, V: int) -> None:
    N, cases = fewer(backend, 64, 4)
    if V > 10_000 and interpreted(backend):
        N, cases = 1, 1
    target = torch.randint(V, (N,))
    for offset in offsets_of(dtype, backend):
        # The equal rows of the larger offsets differ in V only by their sums, which 1009 has too.
        if V > 10_000 and abs(offset) not in (1e3, torch.finfo(dtype).max):
            continue
        logits = [far_logits(N, V, offset, dtype) for _ in range(1 if V > 10_000 else cases)]
        every = options_at(offset, dtype)
        for name in ["smoothing"] if interpreted(backend) or V > 10_000 else every:
            check_cross_entropy(logits, target, "none", every[name])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_at_offsets(reduction: str) -> None:
    for offset in offsets_of(torch.float32):
        for options in options_at(offset, torch.float32).values():
            logits = [far_logits(40, 331, offset, torch.float32) for _ in range(8)]
            target = targets(40, 331, options.get("ignore_index", -100))
            check_cross_entropy(logits, target, reduction, options)


@pytest.mark.parametrize("V", [1, 2, 7, 1009, 50257])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equal_logits(backend: str, dtype: torch.dtype, V: int) -> None:
    target = torch.tensor([0, V - 1])
    onehot = torch.nn.functional.one_hot(target, V).double()
    smoothing = 0.0 if V < 10_000 else 0.1
    log_V = torch.tensor(V, dtype=torch.float64).log()
    wanted = 1 / V - (1 - smoothing) * onehot - smoothing / V
    for value in offsets_of(dtype, backend):
        loss, (dlogits,) = forward_backward(
            lambda x: ops.cross_entropy(x, target, reduction="none", label_smoothing=smoothing),
            [torch.full((2, V), value, dtype=dtype)],
            torch.ones(2),
        )
        # One rounding of the result, and those of its terms in fp32.
        eps = torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps
        assert ((loss.double() - log_V).abs() <= eps * log_V).all()
        tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # the smallest number
        assert ((dlogits.double() - wanted).abs() <= eps * (1 / V + onehot) + tiny).all()


@pytest.mark.parametrize("V", [1, 2, 331, 50257])
def test_the_reference_is_as_exact_as_pytorch(V: int) -> None:
    target = torch.randint(V, (8,))
    for offset in offsets_of(torch.float32):
        logits = [far_logits(8, V, offset, torch.float32) for _ in range(32 if V < 1000 else 4)]
        for options in options_at(offset, torch.float32).values():

            def run(f: Callable, x: Tensor, options: dict = options) -> list[Tensor]:
                dloss = torch.ones(len(target), dtype=x.dtype)
                loss, (dx,) = forward_backward(lambda x: f(x, target, "none", options), [x], dloss)
                return [loss, dx]

            ours, exact, pytorch = (
                [torch.stack(kind) for kind in zip(*results, strict=True)]
                for results in (
                    [run(defined, x) for x in logits],
                    [run(plain, x.double()) for x in logits],
                    [run(plain, x) for x in logits],
                )
            )
            for name, out, ref, pt in zip(["loss", "dlogits"], ours, exact, pytorch, strict=True):
                rounded = ref.float()
                atol = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max()
                # Single roundings decide whose largest error is larger, so compare the means: their
                # difference is at most 4 standard errors above 0.
                excess = (out.double() - ref).abs() - (pt.double() - ref).abs()
                limit = atol + 4 * excess.std() / math.sqrt(excess.numel())
                assert excess.mean() <= limit, (name, offset, options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_reference_can_be_differentiated_again(options: dict) -> None:
    target = targets(4, 7, options.get("ignore_index", -100))
    for offset in (0.0, -1e6):
        x = torch.randn(4, 7, dtype=torch.float64) + offset
        tangent = torch.randn(4, 7, dtype=torch.float64)

        def ours(x: Tensor) -> Tensor:
            return defined(x, target, "sum", options)

        def pytorch(x: Tensor) -> Tensor:
            return plain(x, target, "sum", options)

        # At an offset, only what does not have lse^2 is of order one.
        size = max(1.0, abs(offset)) ** 2 if "z_loss" in options else 1.0
        for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
            out, expected = transform(ours)(x), transform(pytorch)(x)
            torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12 * size)
        out, expected = (torch.func.jvp(f, (x,), (tangent,)) for f in (ours, pytorch))
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9 * size)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ours, (x,))


def special_rows() -> Tensor:
    """Return rows with infinities, NaN and the ends of fp32's range."""
    inf, most = torch.inf, torch.finfo(torch.float32).max
    x = torch.randn(10, 37)
    x[0] = -inf
    x[1, 30] = torch.nan
    x[2, 30] = inf
    x[3, ::2] = -inf  # at the target
    x[4, 1::2] = -inf
    x[5] = torch.nan
    x[6] = inf
    x[7, :30], x[7, 30:] = -most, most
    x[8], x[8, 0] = -inf, 5.0  # nothing but the target is possible
    x[9, 1:] = -most / 64
    return x


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_special_values_are_pytorchs(backend: str, dtype: torch.dtype, smoothing: float) -> None:
    target, logits = torch.zeros(10, dtype=torch.int64), special_rows().to(dtype)
    (loss, (dlogits,)), (expected, (dexpected,)) = (
        forward_backward(
            lambda x, f=f: f(x, target, reduction="none", label_smoothing=smoothing),
            [x],
            torch.ones(10),
        )
        for f, x in ((ops.cross_entropy, logits), (F.cross_entropy, logits.double()))
    )
    close = {"rtol": max(1e-6, torch.finfo(dtype).eps), "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(loss, expected.to(dtype), **close)
    torch.testing.assert_close(dlogits, dexpected.to(dtype), **close)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ignored_rows_may_hold_anything(backend: str, options: dict) -> None:
    logits = torch.cat([special_rows(), torch.randn(2, 37)])
    target = torch.full((12,), options.get("ignore_index", -100))
    target[-1] = 1
    functions = {
        "operator": lambda x: ops.cross_entropy(x, target, reduction="none", **options),
        "definition": lambda x: defined(x, target, "none", options),
    }
    for f in functions.values():
        loss, (dlogits,) = forward_backward(f, [logits], torch.ones(12))
        assert not loss[:-1].any() and not dlogits[:-1].any()
        assert loss[-1].isfinite() and dlogits[-1].isfinite().all()


def test_masked_and_huge_logits(backend: str) -> None:
    # -inf masks a vocabulary; 1e4 overflows a softmax that does not subtract its maximum.
    logits = torch.randn(6, 100)
    logits[:, ::3] = -torch.inf
    logits[0, 1], logits[1, 50] = 1e4, -1e4
    target = torch.tensor([1, 50, 1, 2, 4, 5])
    check_cross_entropy([logits.masked_fill(logits == -torch.inf, -1e30)], target)
    out, (dlogits,) = forward_backward(
        lambda x: ops.cross_entropy(x, target, reduction="none"), [logits], torch.ones(6)
    )
    expected, (dexpected,) = forward_backward(
        lambda x: F.cross_entropy(x, target, reduction="none"), [logits], torch.ones(6)
    )
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dlogits, dexpected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_bad_logits_spoil_their_row_only(backend: str, poison: float) -> None:
    logits = torch.randn(3, 200)
    logits[1, 190] = poison
    loss = ops.cross_entropy(logits, torch.tensor([1, 2, 3]), reduction="none")
    assert loss.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=["", "all"])
@pytest.mark.parametrize("N", [0, 1, 3])
def test_all_targets_ignored(backend: str, N: int, options: dict) -> None:
    target = torch.full((N,), -100)
    weight = torch.randn(11, 4)
    functions = {
        "cross_entropy": lambda x, **o: ops.cross_entropy(x @ weight.T, target, **o),
        "linear": lambda x, **o: ops.linear_cross_entropy(x, weight, target, **o),
    }
    for f in functions.values():
        for reduction in REDUCTIONS:
            x = torch.randn(N, 4, requires_grad=True)
            loss = f(x, reduction=reduction, **options)
            loss.sum().backward()
            assert loss.isnan().all() if reduction == "mean" else not loss.any()
            assert x.grad.shape == x.shape and not x.grad.any()


def test_ignored_rows_are_zero_whatever_their_gradient(backend: str) -> None:
    logits, target = torch.randn(4, 9), torch.tensor([1, -100, 2, -100])
    dloss = torch.tensor([1.0, torch.inf, 1.0, torch.nan])
    loss, (dlogits,) = forward_backward(
        lambda x: ops.cross_entropy(x, target, reduction="none"), [logits], dloss
    )
    assert not loss[1::2].any() and not dlogits[1::2].any()
    assert dlogits[::2].isfinite().all()


def with_incoming(
    f: Callable, inputs: Sequence[Tensor], dout: float, retain_graph: bool
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = f(*leaves)
    out.backward(torch.full_like(out, dout), retain_graph=retain_graph)
    return [x.grad for x in leaves]


def spoiled_cases() -> dict[str, tuple[Tensor, Tensor, Tensor, dict]]:
    """Return input (N, C), linear_weight (V, C), target and options by name."""
    N, C, V = 6, 4, 9
    x, w, some = torch.randn(N, C), torch.randn(V, C), targets(N, V)
    certain, zero = w * 200, w.clone()
    zero[:, 1] = 0  # a column of dinput is 0
    some_zero = x.clone()
    some_zero[:, 2] = 0  # a column of dlinear_weight is 0
    every = torch.randint(V, (N,))
    return {
        "ignored rows": (x, w, some, {}),
        "none ignored": (x, w, every, {}),
        "all ignored": (x, w, torch.full((N,), -100), {}),
        "another ignore_index": (x, w, some.where(some >= 0, 3), {"ignore_index": 3}),
        "p = 0": (x, certain, some, {}),
        "zeros": (some_zero, zero, some, {}),
        "V = 1": (x, w[:1], some.clamp(max=0), {}),
        "smoothing": (x, w, some, {"label_smoothing": 0.1}),
        "one row": (x[:1], w, every[:1], {}),
    }


@pytest.mark.parametrize("dout", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", spoiled_cases())
def test_spoiled_gradients_spoil_what_they_do_in_pytorch(
    backend: str, case: str, reduction: str, dout: float
) -> None:
    if interpreted(backend) and (dout != torch.inf or reduction == "sum"):
        pytest.skip("the other numbers take the same way, and this takes seconds")
    x, w, target, options = spoiled_cases()[case]
    options = {**options, "reduction": reduction}
    expected = with_incoming(
        lambda x, w: F.cross_entropy(x @ w.T, target, **options), [x, w], dout, False
    )
    functions = {
        "alone": lambda x, w: ops.cross_entropy(x @ w.T, target, **options),
        "linear": lambda x, w: ops.linear_cross_entropy(x, w, target, **options),
        "skip": lambda x, w: ops.linear_cross_entropy(x, w, target, skip_below=1e-3, **options),
    }
    ignored = target == options.get("ignore_index", -100)
    for f in functions.values():
        for retain_graph in (False,) if interpreted(backend) else (False, True):
            grads = with_incoming(f, [x, w], dout, retain_graph)
            assert not grads[0][ignored].any()
            for grad, other in zip(grads, expected, strict=True):
                assert torch.equal(grad.isfinite(), other.isfinite())


@pytest.mark.parametrize("reduction", FUSED_AND_PLAIN)
@pytest.mark.parametrize("options", ["plain", "smoothing"])
def test_linear_equal_logits(backend: str, options: str, reduction: str) -> None:
    N, C, V = 12, 8, 37
    target, x, w = targets(N, V), torch.randn(N, C), torch.randn(V, C)
    counts, w[:, 0] = target != -100, 1.0
    smoothing = OPTIONS[options].get("label_smoothing", 0.0)
    dlogits = torch.full((N, V), (1 - smoothing) / V, dtype=torch.float64)
    dlogits[counts, target[counts]] -= 1 - smoothing
    dlogits = dlogits * counts[:, None] / counts.sum()
    for value in (2.0**50, -(2.0**100), 2.0**126):
        x[:, 0] = value  # a sum with the other products rounds to it
        loss, grads = forward_backward(
            lambda x, w: ops.linear_cross_entropy(
                x, w, target, reduction=reduction, **OPTIONS[options]
            ),
            [x, w],
            torch.ones(N) / counts.sum() if reduction == "none" else None,
        )
        expected = torch.tensor(float(V)).log()
        expected = expected * counts if reduction == "none" else expected
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for grad, a, b in zip(grads, (dlogits, dlogits.T), (w.double(), x.double()), strict=True):
            # The bound of a sum in any order, with some roundings more in its terms.
            bound = (len(b) + 8) * 2.0**-24 * (a.abs() + (a != 0) / N) @ b.abs()
            assert ((grad.double() - a @ b).abs() <= bound).all()


def test_same_bits_twice_and_with_any_threads(isa: str) -> None:
    N, V, C = 30, 5003, 16
    logits, target, weight = torch.randn(N, V), targets(N, V), torch.randn(V, C)
    runs = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        loss, grads = forward_backward(lambda x: ops.cross_entropy(x, target), [logits], None)
        runs.append([loss, *grads])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    # The BLAS library computes the linear one's products and may split them by threads.
    twice = [
        forward_backward(
            lambda x, w: ops.linear_cross_entropy(x, w, target),
            [logits[:, :C], weight],
            None,
        )
        for _ in range(2)
    ]
    assert torch.equal(twice[0][0], twice[1][0])
    assert all(torch.equal(a, b) for a, b in zip(twice[0][1], twice[1][1], strict=True))


def check_linear(
    make: Callable[[], tuple[Tensor, Tensor]],
    target: Tensor,
    reduction: str,
    options: dict,
    cases: int = 8,
) -> None:
    flat = target.reshape(-1)
    dout = {"mean": torch.tensor(-1.7 * len(flat)), "sum": torch.tensor(0.7)}.get(reduction)
    dout = torch.randn(target.shape) if dout is None else dout

    def head(f):  # type: ignore[no-untyped-def]
        def run(x: Tensor, w: Tensor) -> Tensor:
            loss = f(x.reshape(-1, x.shape[-1]) @ w.T, flat, reduction, options)
            return loss.view(target.shape) if reduction == "none" else loss

        return run

    check(
        lambda x, w: ops.linear_cross_entropy(x, w, target, reduction=reduction, **options),
        head(defined),
        head(plain),
        *((dict(zip(("input", "linear_weight"), make(), strict=True)), dout) for _ in range(cases)),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", FUSED_AND_PLAIN)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_linear_parity(backend: str, dtype: torch.dtype, reduction: str, options: dict) -> None:
    skip_if_slow(backend, reduction, bool(options))
    (N, cases), C, V = fewer(backend, 50, 8), 24, 211
    target = targets(N, V, options.get("ignore_index", -100)).view(1, N)

    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(1, N, C).to(dtype), torch.randn(V, C).mul(0.3).to(dtype)

    check_linear(make, target, reduction, options, cases)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_linear_sum(dtype: torch.dtype, options: dict) -> None:
    target = targets(50, 211, options.get("ignore_index", -100))

    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(50, 24).to(dtype), torch.randn(211, 24).mul(0.3).to(dtype)

    check_linear(make, target, "sum", options)


@pytest.mark.parametrize("reduction", FUSED_AND_PLAIN)
@pytest.mark.parametrize(("N", "C", "V"), [(1, 1, 1), (1, 16, 17), (2, 5, 63), (3, 8, 50257)])
def test_linear_parity_odd_sizes(backend: str, N: int, C: int, V: int, reduction: str) -> None:
    target = torch.randint(V, (N,))
    skip_if_slow(backend, reduction, V > 10_000)
    cases = 4 if V < 10_000 else 1
    if not interpreted(backend):
        cases = cases_of(1 if reduction == "mean" else N) if V < 10_000 else 8
    check_linear(lambda: (torch.randn(N, C), torch.randn(V, C)), target, reduction, {}, cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_parity_in_chunks(reduction: str, dtype: torch.dtype) -> None:
    # The logits take more than the 104 MiB of a chunk, in fp32 and in bf16.
    V, C = 50257, 16
    N = 1200 if dtype == torch.float32 else 2300
    assert N * V * dtype.itemsize > 2 * 104 << 20
    input, weight, target = torch.randn(N, C).to(dtype), torch.randn(V, C).to(dtype), targets(N, V)
    rows = slice(N - 20, N)  # the float64 reference of all rows would be 1 GB a tensor
    dout = torch.zeros(N)
    dout[rows] = torch.randn(20)
    dout[5] = 1.0
    some = torch.cat([torch.tensor([5]), torch.arange(N)[rows]])

    def ours(x: Tensor, w: Tensor) -> Tensor:
        if reduction == "none":
            return (ops.linear_cross_entropy(x, w, target, reduction="none") * dout)[some]
        # "sum" and "mean" give every row the same weight: keep these rows by ignoring the others.
        kept = torch.full_like(target, -100)
        kept[some] = target[some]
        return ops.linear_cross_entropy(x, w, kept, reduction=reduction)

    def other(f):  # type: ignore[no-untyped-def]
        def run(x: Tensor, w: Tensor) -> Tensor:
            loss = f(x[some] @ w.T, target[some], "none" if reduction == "none" else reduction, {})
            return loss * dout[some] if reduction == "none" else loss

        return run

    inputs = {"input": input, "linear_weight": weight}
    check(ours, other(defined), other(plain), (inputs, None))


@pytest.mark.parametrize("kind", ["transposed", "every other", "expanded"])
def test_linear_layouts(backend: str, kind: str) -> None:
    N, C, V = 12, 10, 33
    cases = 8 if interpreted(backend) else 32
    make = {
        "transposed": lambda: (torch.randn(C, N).T, torch.randn(C, V).T),
        "every other": lambda: (torch.randn(N, 2 * C)[:, ::2], torch.randn(V, 2 * C)[:, ::2]),
        "expanded": lambda: (torch.randn(N, 1).expand(N, C), torch.randn(V, C)),
    }[kind]
    for reduction in ["none"] if interpreted(backend) else FUSED_AND_PLAIN:
        check_linear(make, targets(N, V), reduction, {}, cases)


@pytest.mark.parametrize("reduction", FUSED_AND_PLAIN)
def test_linear_without_gradient_is_the_same_loss(backend: str, reduction: str) -> None:
    x, w, target = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8), targets(6, 50)
    with_gradient = ops.linear_cross_entropy(x, w, target, reduction=reduction)
    with torch.no_grad():
        without = ops.linear_cross_entropy(x, w, target, reduction=reduction)
    assert with_gradient.requires_grad and not without.requires_grad
    torch.testing.assert_close(without, with_gradient.detach(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("reduction", FUSED_AND_PLAIN)
@pytest.mark.parametrize("which", ["input", "linear_weight"])
def test_linear_with_one_gradient(backend: str, which: str, reduction: str) -> None:
    x, w, target = torch.randn(5, 8), torch.randn(50, 8), targets(5, 50)
    wanted = {"input": x, "linear_weight": w}[which].requires_grad_()
    ops.linear_cross_entropy(x, w, target, reduction=reduction).sum().backward()
    alone, wanted.grad = wanted.grad, None
    ops.linear_cross_entropy(
        x.requires_grad_(), w.requires_grad_(), target, reduction=reduction
    ).sum().backward()
    assert torch.equal(alone, wanted.grad)


@pytest.mark.parametrize("reduction", FUSED_AND_PLAIN)
def test_linear_backward_twice(backend: str, reduction: str) -> None:
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss = ops.linear_cross_entropy(x, w, targets(6, 50), reduction=reduction).sum()
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    twice = torch.autograd.grad(loss * -3.0, (x, w))
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(b, a * -3.0, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_linear_gradient_times_a_factor(backend: str, factor: float) -> None:
    # The gradients from the forward are scaled in place where nobody else can see them.
    x, w, target = torch.randn(6, 8), torch.randn(50, 8), targets(6, 50)
    with poisoned():
        _, grads = forward_backward(
            lambda x, w: ops.linear_cross_entropy(x, w, target) * factor, [x, w], None
        )
    _, once = forward_backward(lambda x, w: ops.linear_cross_entropy(x, w, target), [x, w], None)
    for grad, one in zip(grads, once, strict=True):
        torch.testing.assert_close(grad, one * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("N", "C", "V"), [(3, 2500, 4), (9, 7, 3), (2, 1, 1), (0, 5, 6)])
def test_scale(backend: str, N: int, C: int, V: int, dtype: torch.dtype) -> None:
    x, w, target = torch.randn(N, C).to(dtype), torch.randn(V, C).to(dtype), torch.arange(N) % V
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0, "equal_nan": True}
    for factor in (1.0, 0.3, torch.nan, -torch.inf):
        for ignored in (slice(0, None, 2), slice(0, 0), slice(0, None)):
            some, dinput, dweight = target.clone(), x.clone(), w.clone()
            some[ignored], dinput[ignored] = -100, 0
            dweight *= bool((some >= 0).any())
            before = dinput.clone(), dweight.clone()
            torch.ops.gptfast.scale_(dinput, dweight, some, torch.tensor(factor), -100)
            assert not dinput[ignored].any()
            counts = some >= 0
            torch.testing.assert_close(dinput[counts], before[0][counts] * factor, **close)
            wanted = before[1] * factor if counts.any() else torch.zeros(V, C, dtype=dtype)
            torch.testing.assert_close(dweight, wanted, **close)


@pytest.mark.parametrize("reduction", FUSED_AND_PLAIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_linear_parity_under_autocast(backend: str, dtype: torch.dtype, reduction: str) -> None:
    (N, cases), C, V = fewer(backend, 48, 8), 24, 211
    target = targets(N, V)

    def cast(f: Callable) -> Callable:
        def run(x: Tensor, w: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype):
                return f(x, w)

        return run

    dout = None if reduction == "none" else torch.tensor(float(N))
    inputs = [
        {"input": torch.randn(N, C), "linear_weight": torch.randn(V, C).mul(0.3)}
        for _ in range(cases)
    ]
    check(
        cast(lambda x, w: ops.linear_cross_entropy(x, w, target, reduction=reduction)),
        lambda x, w: defined(x @ w.T, target, reduction, {}),
        cast(lambda x, w: plain(F.linear(x, w), target, reduction, {})),
        *((case, dout) for case in inputs),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_linear_gradient_has_the_weight_s_dtype(backend: str, dtype: torch.dtype) -> None:
    x, w, target = torch.randn(6, 24).to(dtype), torch.randn(211, 24), targets(6, 211)
    dloss = torch.rand(6)
    op = torch.ops.gptfast.linear_cross_entropy_fwd_bwd
    total, dx, dw = op(x, w, target, dloss, -100, 0.0, 0.0)
    low_total, low_dx, low_dw = op(x, w.to(dtype), target, dloss, -100, 0.0, 0.0)
    assert dw.dtype == torch.float32 and low_dw.dtype == dtype
    assert torch.equal(total, low_total) and torch.equal(dx, low_dx)
    torch.testing.assert_close(dw, low_dw.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("skip_below", [0.0, 2.0**-24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_linear_without_the_weight_s_gradient(
    backend: str, dtype: torch.dtype, skip_below: float
) -> None:
    """need_dweight=False leaves the other results as they are and computes nothing else."""
    x, w, target = torch.randn(6, 24).to(dtype), torch.randn(211, 24).to(dtype), targets(6, 211)
    op, options = torch.ops.gptfast.linear_cross_entropy_fwd_bwd, (-100, 0.1, 0.01, skip_below)
    dloss = torch.rand(6)
    total, dx, _ = op(x, w, target, dloss, *options)
    again, same_dx, none = op(x, w, target, dloss, *options, False)
    assert torch.equal(total, again) and torch.equal(dx, same_dx)
    assert none.shape == (0,) and none.dtype == dtype
    x.requires_grad_()
    ops.linear_cross_entropy(x, w, target).mul(3).backward()
    frozen, x.grad = x.grad, None
    ops.linear_cross_entropy(x, w.requires_grad_(), target).mul(3).backward()
    assert torch.equal(frozen, x.grad)
    with pytest.raises(RuntimeError, match="left out the gradient of linear_weight"):
        op(x, w, target, dloss, *options, False)[0].backward()


def test_linear_fp16_gradient_survives_a_loss_scale(backend: str) -> None:
    # Like a GradScaler, scale up gradients below fp16's 6e-8 before they are rounded.
    (N, _), C, V = fewer(backend, 64, 1), 16, 5003
    x, w = torch.randn(N, C).half(), torch.randn(V, C).mul(0.01).half()
    target = torch.randint(V, (N,))
    scale = torch.tensor(2.0**14)
    functions = [
        lambda x, w: ops.linear_cross_entropy(x, w, target).float(),
        lambda x, w: defined(x @ w.T, target, "mean", {}),
        lambda x, w: F.cross_entropy(F.linear(x, w), target).float(),
    ]
    check(*functions, ({"input": x, "linear_weight": w}, scale))


def test_linear_equals_the_two_steps(backend: str) -> None:
    x, w, target = torch.randn(7, 16), torch.randn(77, 16), targets(7, 77)
    loss, (dx, dw) = forward_backward(
        lambda x, w: ops.linear_cross_entropy(x, w, target), [x, w], None
    )
    two, (dx2, dw2) = forward_backward(
        lambda x, w: ops.cross_entropy(x @ w.T, target), [x, w], None
    )
    torch.testing.assert_close(loss, two, rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, dx2, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dw, dw2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("target", [[0, 5, 1], [0, -1, 1], [0, -100, 1], [2**40, 0, 0]], ids=str)
def test_target_out_of_range(backend: str, target: list[int]) -> None:
    # -100 is out of range too if ignore_index is another number.
    target, x, w = torch.tensor(target), torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    for reduction in REDUCTIONS:
        options = {"ignore_index": -7, "reduction": reduction}
        if x.is_cuda:  # a check would synchronise
            assert ops.cross_entropy(x @ w.T, target, **options).isnan().any()
            assert ops.linear_cross_entropy(x, w, target, **options).isnan().any()
            continue
        with pytest.raises(IndexError, match="out of range for a vocabulary of 5"):
            ops.cross_entropy(x @ w.T, target, **options)
        with pytest.raises(IndexError, match="out of range for a vocabulary of 5"):
            ops.linear_cross_entropy(x, w, target, **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, "logits must be"),
        ({"logits": torch.zeros(4)}, "logits must be"),
        ({"logits": torch.zeros(3, 4).long()}, "floating-point"),
        ({"target": torch.zeros(2).long()}, "target must be int64"),
        ({"target": torch.zeros(3)}, "target must be int64"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, "target must be int64"),
        ({"target": torch.zeros(3, dtype=torch.int64, device="meta")}, "target is on meta"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": 1.1}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"z_loss": float("nan")}, "z_loss"),
        ({"reduction": "average"}, "reduction"),
    ],
)
def test_bad_input(changed: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(3, 4), "target": torch.zeros(3).long(), **changed}
    with pytest.raises(ValueError, match=message):
        ops.cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(5, 6), "needs input"),
        (torch.zeros(3, 4), torch.zeros(4), "needs input"),
        (torch.zeros(3, 4), torch.zeros(5, 4).bfloat16(), "one dtype"),
        (torch.zeros(3, 4), torch.zeros(5, 4, device="meta"), "one device"),
        (torch.zeros(2, 4), torch.zeros(5, 4), "target must be"),
    ],
)
def test_bad_linear_input(x: Tensor, w: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(x, w, torch.zeros(3).long())


def test_inputs_unchanged(backend: str) -> None:
    x, w, target = torch.randn(9, 8), torch.randn(50, 8), targets(9, 50)
    before = [t.clone() for t in (x, w, target)]
    forward_backward(lambda x, w: ops.linear_cross_entropy(x, w, target), [x, w], None)
    forward_backward(lambda x: ops.cross_entropy(x, target % 8), [x], None)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, w, target), strict=True))


def check_stats_of_a_long_row() -> None:
    # One fp32 sum over 50,257 terms would cost 4e-6.
    logits = torch.randn(4, 50257)
    with poisoned():
        loss, stats = torch.ops.gptfast.cross_entropy_fwd(logits, torch.arange(4), -100, 0.0, 0.0)
    ref = logits.double().logsumexp(-1)
    top, exp_sum = stats.unbind(-1)
    assert stats.dtype == torch.float64 and torch.equal(top, logits.double().amax(-1))
    assert (top + exp_sum.log() - ref).abs().max() < 5e-7
    assert_parity(
        "loss",
        loss,
        ref - logits.diagonal().double(),
        F.cross_entropy(logits, torch.arange(4), reduction="none"),
    )


def test_stats_of_a_long_row(isa: str) -> None:
    check_stats_of_a_long_row()


def test_triton_stats_of_a_long_row(triton: str) -> None:
    check_stats_of_a_long_row()


def test_an_empty_vocabulary_is_refused() -> None:
    target = torch.full((2,), -100)
    with pytest.raises(ValueError, match="V >= 1"):
        ops.linear_cross_entropy(torch.randn(2, 4), torch.randn(0, 4), target)
    with pytest.raises(ValueError, match="V >= 1"):
        ops.cross_entropy(torch.randn(2, 0), target)


# The tests below are of what only the Triton kernels have: tiles, their own chunks, int64 offsets,
# and the semantics of a GPU.


def on_arch(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    """Use the tiles of that architecture."""
    from gptfast.kernels.triton import target

    monkeypatch.setattr(target, "arch", lambda: arch)


def in_chunks(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    from gptfast.kernels.triton import cross_entropy

    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", n_bytes)


def each_tile(table: dict, sizes: int) -> list[str]:
    """Return architectures that together have all tiles.

    In the interpreter only the sizes (the first numbers) matter: it has no warps and stages.
    """
    found: dict[str, str] = {}
    for arch, tiles in table.items():
        found.setdefault(str([tile if GPU else tile[:sizes] for tile in tiles.values()]), arch)
    return list(found.values())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_triton_row_tiles(triton: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    from gptfast.kernels.triton import cross_entropy_rows

    # The rows take more than one step of the longest tile, with and without a remainder.
    N, V = 2, 9001
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    target = torch.randint(V, (N,))
    for arch in each_tile(cross_entropy_rows.ROW_TILES, 1):
        on_arch(monkeypatch, arch)
        check_cross_entropy([torch.randn(N, V).to(dtype)], target, "none", options)
        check_linear(
            lambda: (torch.randn(N, 7).to(dtype), torch.randn(V, 7).to(dtype)),
            target,
            "sum",
            options,
            4,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_triton_weight_tiles(
    triton: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    from gptfast.kernels.triton import cross_entropy

    # There are three chunks of two steps of rows; tiles fill both dimensions or do not.
    N, V, C = 200, 140, 260
    x = torch.randn(N, C).to(dtype)
    dlogits = torch.randn(N, 256).to(dtype)
    dlogits[:, V:] = torch.nan  # the padding
    expected = dlogits[:, :V].double().T @ x.double()
    plain = dlogits[:, :V].T @ x
    for arch in each_tile(cross_entropy.WEIGHT_TILES, 3):
        on_arch(monkeypatch, arch)
        for kind in (dtype, torch.float32):
            with poisoned():
                dweight = torch.empty(V, C, dtype=kind)
                low = torch.empty(V, C, dtype=torch.int16) if kind == dtype else None
            for rows in (slice(0, 80), slice(80, 160), slice(160, N)):
                cross_entropy._add_dweight(
                    dweight, low, dlogits[rows, :V], x[rows], rows.start == 0, rows.stop == N
                )
            assert_parity("dweight", dweight, expected, plain.to(kind))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_triton_rows_off_16_bytes(triton: str, dtype: torch.dtype) -> None:
    """Rows begin anywhere within 16 bytes. All layouts share one maximum: of two losses alone,
    PyTorch's error may be below half a unit in the last place, which nobody could keep to."""
    A = 16 // dtype.itemsize
    for V in (1, 5, A, 2 * A + 3):
        layouts = []
        for shift in (0, 1, A - 1):
            # One row stride keeps the rows' alignment, the other does not.
            for stride in (V + 2 * A, V + A + 1):
                memory = torch.full((3 * stride + A,), torch.nan, dtype=dtype)
                logits = memory.as_strided((2, V), (stride, 1), shift)
                layouts.append(logits.copy_(torch.randn(2, V)))
        check_cross_entropy(layouts, torch.randint(V, (2,)), "none", {"label_smoothing": 0.1})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("N", "C", "chunk"), [(7, 24, 3), (5, 7, 1), (4, 130, 4)], ids=["3,3,1", "1 each", "one"]
)
def test_triton_chunks(
    triton: str, monkeypatch: pytest.MonkeyPatch, N: int, C: int, chunk: int, dtype: torch.dtype
) -> None:
    V = 211
    in_chunks(monkeypatch, chunk * 256 * dtype.itemsize)
    target = targets(N, V)

    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(N, C).to(dtype), torch.randn(V, C).mul(0.3).to(dtype)

    check_linear(make, target, "none", {}, 8)


@pytest.mark.parametrize("n_bytes", [400 << 20, 64 << 20], ids=["default", "small"])
def test_triton_chunk_rows(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    pytest.importorskip("triton")
    from gptfast.kernels.triton.cross_entropy import CHUNK_BYTES, chunk_rows

    assert CHUNK_BYTES == 400 << 20
    in_chunks(monkeypatch, n_bytes)
    for V, itemsize in ((50257, 2), (50257, 4), (65, 2), (128_256, 2), (2**30, 2)):
        row = (V + 127) // 128 * 128 * itemsize
        for N in (1, 63, 1000, 16384, 10**6):
            rows = chunk_rows(N, V, itemsize)
            assert rows == 1 or rows * row <= n_bytes
            # Whole tiles and few chunks make the matrix products fast.
            assert rows % 64 == 0 or 64 * row > n_bytes
            unit = 64 if rows % 64 == 0 else 1
            assert -(-N // rows) <= -(-N // max(1, n_bytes // row // unit * unit))
    assert chunk_rows(0, 50257, 2) > 0
    # By default dweight's sums are moved four times; the small size is under 5% of the logits.
    assert chunk_rows(16384, 50257, 2) == (4096 if n_bytes == CHUNK_BYTES else 640)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_triton_sums_in_halves_are_fp32_sums(
    triton: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    # An fp32 weight gets the sums unrounded; here the tiles are the same for both dtypes.
    on_arch(monkeypatch, "sm_100")
    N, V, C = 8, 211, 24
    in_chunks(monkeypatch, 3 * 256 * dtype.itemsize)
    x, w, target = torch.randn(N, C).to(dtype), torch.randn(V, C).to(dtype), targets(N, V)
    op, dloss = torch.ops.gptfast.linear_cross_entropy_fwd_bwd, torch.rand(N)
    low = op(x, w, target, dloss, -100, 0.0, 0.0)
    high = op(x, w.float(), target, dloss, -100, 0.0, 0.0)
    assert low[2].dtype == dtype and high[2].dtype == torch.float32
    for a, b in zip(low, high, strict=True):
        assert torch.equal(a, b.to(a.dtype))


def far_rows(N: int, width: int) -> Tensor:
    """Return (N, width) fp16 with its last rows past 2^31 elements; few pages are touched."""
    stride = 2**30 + 5
    memory = torch.empty((N - 1) * stride + width, dtype=torch.float16)
    return memory.as_strided((N, width), (stride, 1)).copy_(torch.randn(N, width))


def test_triton_offsets_are_int64(triton: str, monkeypatch: pytest.MonkeyPatch) -> None:
    N, V, C = 4, 37, 16
    logits, target = far_rows(N, V), torch.randint(V, (N,))
    near = logits.clone(memory_format=torch.contiguous_format)
    op = torch.ops.gptfast
    loss, stats = op.cross_entropy_fwd(logits, target, -100, 0.0, 0.0)
    expected = op.cross_entropy_fwd(near, target, -100, 0.0, 0.0)
    torch.testing.assert_close((loss, stats), expected, rtol=1e-6, atol=0)
    dlogits = op.cross_entropy_bwd(torch.ones(N), logits, target, stats, -100, 0.0, 0.0)
    expected = op.cross_entropy_bwd(torch.ones(N), near, target, stats, -100, 0.0, 0.0)
    assert torch.equal(dlogits, expected)
    in_chunks(monkeypatch, 2 * 128 * 2)
    x, w, dloss = far_rows(N, C), torch.randn(V, C).half(), torch.rand(N)
    near = x.clone(memory_format=torch.contiguous_format)
    options = (target, dloss, -100, 0.0, 0.0)
    for a, b in zip(
        op.linear_cross_entropy_fwd_bwd(x, w, *options),
        op.linear_cross_entropy_fwd_bwd(near, w, *options),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)


def test_triton_same_bits_twice(triton: str) -> None:
    logits, target, weight = torch.randn(5, 5003), targets(5, 5003), torch.randn(5003, 16)
    functions: list[tuple[Callable, Sequence[Tensor]]] = [
        (lambda x: ops.cross_entropy(x, target), [logits]),
        (lambda x, w: ops.linear_cross_entropy(x, w, target), [logits[:, :16], weight]),
    ]
    for f, inputs in functions:
        first, second = (forward_backward(f, inputs, None) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_triton_target_out_of_range_is_nan_on_a_gpu(
    triton: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A check on a GPU would synchronise; the interpreter runs on the CPU, so switch the check off.
    from gptfast.kernels.triton import cross_entropy

    monkeypatch.setattr(cross_entropy, "check_targets", lambda *args: None)
    logits, target = torch.randn(6, 9), torch.tensor([0, -1, 9, 2**40, -7, 8])
    loss, stats = cross_entropy.cross_entropy_fwd(logits, target, -7, 0.1, 0.1)
    spoiled = [False, True, True, True, False, False]
    assert loss.isnan().tolist() == spoiled and loss[4] == 0
    assert stats.isfinite().all()
    dlogits = cross_entropy.cross_entropy_bwd(torch.ones(6), logits, target, stats, -7, 0.1, 0.1)
    # As in the reference, the other rows' gradients are right and no other memory is touched.
    expected = reference.cross_entropy_bwd(torch.ones(6), logits, target, stats, -7, 0.1, 0.1)
    torch.testing.assert_close(dlogits, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(9, 9)
    linear = cross_entropy.linear_cross_entropy_fwd(logits, weight, target, -7, 0.0, 0.0)
    assert linear.isnan().tolist() == spoiled


class Largest(TorchDispatchMode):
    """Record the bytes of the largest memory that any operation returned."""

    n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, Tensor):
                self.n_bytes = max(self.n_bytes, t.untyped_storage().nbytes())
        return out


def test_triton_logits_never_exist_at_once(triton: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptfast.kernels.triton import cross_entropy

    N, V, C = 12, 1009, 2
    chunk = 4 * 1024 * 2
    in_chunks(monkeypatch, chunk)
    x, w, target = torch.randn(N, C).half(), torch.randn(V, C).half(), targets(N, V)
    with Largest() as largest:
        cross_entropy.linear_cross_entropy_fwd(x, w, target, -100, 0.0, 0.0)
        cross_entropy.linear_cross_entropy_fwd_bwd(x, w, target, torch.ones(N), -100, 0.0, 0.0)
    assert largest.n_bytes == chunk > V * C * 2


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("skip_below", [1e-12, 2.0**-24, 1e-3])
def test_linear_skip_below_keeps_its_bound(
    backend: str, skip_below: float, dtype: torch.dtype
) -> None:
    """Late in training, every row is nearly certain and most tokens are improbable everywhere."""
    N, C, V = 40, 32, 500
    w = torch.randn(V, C)
    target = torch.randint(0, 60, (N,))
    target[3] = -100
    x = (w[target.clamp(min=0)] * 0.7 + 0.1 * torch.randn(N, C)).to(dtype)
    w = w.to(dtype)

    def run(x: Tensor, w: Tensor, skip: float) -> tuple[Tensor, Tensor]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        ops.linear_cross_entropy(x, w, target, skip_below=skip, reduction="sum").backward()
        return x.grad.double(), w.grad.double()

    dx, dw = run(x, w, skip_below)
    exact_dx, exact_dw = run(x.double(), w.double(), 0.0)
    near_dx, near_dw = run(x, w, 0.0)
    x_sum = x.double()[target != -100].abs().sum(0)
    for error, plain, bound in (
        (dx - exact_dx, near_dx - exact_dx, skip_below * w.double().abs().sum(0)),
        (dw - exact_dw, near_dw - exact_dw, skip_below * x_sum),
    ):
        # The rounding without skipping is added to the bound.
        assert (error.abs() <= bound + 2 * plain.abs().max() + 1e-12).all()


@pytest.mark.usefixtures("cpp")
def test_linear_skip_below_leaves_out_tokens_improbable_everywhere(isa: str) -> None:
    N, C, V = 64, 16, 300
    w = torch.randn(V, C)
    target = torch.arange(N) % 7
    x = w[target] * 3
    grads = []
    for skip in (0.0, 1e-4):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        ops.linear_cross_entropy(*leaves, target, skip_below=skip).backward()
        grads.append([leaf.grad for leaf in leaves])
    p = (x @ w.T).softmax(-1)
    p[torch.arange(N), target] -= 1
    left_out = (p.abs() <= 0.9e-4).all(0)
    kept = (p.abs() > 1.1e-4).any(0)
    assert left_out.sum() > V / 2 and kept.any()
    (_, plain), (_, skipped) = grads
    assert not skipped[left_out].any() and plain[left_out].any()
    torch.testing.assert_close(skipped[kept], plain[kept], rtol=1e-4, atol=1e-6)


def test_linear_skip_below_all(backend: str) -> None:
    """Without an entry above the bound, both gradients are zero or equal those without skipping."""
    x, w = torch.randn(5, 4, requires_grad=True), torch.zeros(900, 4, requires_grad=True)
    target = torch.full((5,), -100)
    ops.linear_cross_entropy(x, w, target, skip_below=0.5, reduction="sum").backward()
    assert not x.grad.any() and not w.grad.any()


@pytest.mark.parametrize("value", [-1e-3, 1.0, math.nan])
def test_linear_skip_below_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"skip_below must be in \[0, 1\), got"):
        ops.linear_cross_entropy(
            torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), skip_below=value
        )
