"""Cross entropy and linear cross entropy: parity, PyTorch's semantics, chunks, errors."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gptfast.kernels.reference import cross_entropy as reference
from parity import DTYPES, assert_parity, check, forward_backward, poisoned
from torch import Tensor

from gptfast import ops

REDUCTIONS = ["mean", "sum", "none"]
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "smoothing and z_loss": {"label_smoothing": 0.3, "z_loss": 1e-3},
    "ignore_index": {"ignore_index": 2},
}


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
    # Gradients of order one, where the rule says most.
    douts = {"mean": lambda: torch.randn(()) * N, "sum": lambda: torch.randn(())}
    dout = douts.get(reduction, lambda: torch.randn(N))
    check(
        lambda x: ops.cross_entropy(x, target, reduction=reduction, **options),
        lambda x: defined(x, target, reduction, options),
        lambda x: plain(x, target, reduction, options),
        *(({"logits": x}, dout()) for x in logits),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_parity(backend: str, dtype: torch.dtype, reduction: str, options: dict) -> None:
    N, V = 40, 1009
    logits = [torch.randn(N, V).mul(4).to(dtype) for _ in range(8)]
    target = targets(N, V, options.get("ignore_index", -100))
    check_cross_entropy(logits, target, reduction, options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("N", "V"), [(1, 1), (1, 2), (1, 15), (3, 16), (2, 17), (5, 63), (1, 257), (2, 50257)]
)
def test_parity_odd_sizes(backend: str, N: int, V: int, dtype: torch.dtype) -> None:
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    target = torch.randint(V, (N,))
    target[-1] = V - 1
    logits = [torch.randn(N, V).mul(3).to(dtype) for _ in range(16)]
    check_cross_entropy(logits, target, "none", options)
    check_cross_entropy(logits, target, "mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_parity_gpt2_vocabulary(dtype: torch.dtype) -> None:
    N, V = 200, 50257
    logits = [torch.randn(N, V).to(dtype) for _ in range(2)]
    check_cross_entropy(logits, targets(N, V), "none")


def strided(kind: str) -> Tensor:
    N, V = 12, 331
    return {
        "transposed": torch.randn(V, N).T,
        "every other column": torch.randn(N, 2 * V)[:, ::2],
        "rows of a wider matrix": torch.randn(N, V + 9)[:, 3 : V + 3],
        "expanded": torch.randn(1, V).expand(N, V),
    }[kind]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "kind", ["transposed", "every other column", "rows of a wider matrix", "expanded"]
)
def test_layouts(backend: str, kind: str, reduction: str) -> None:
    logits = [strided(kind) for _ in range(8)]
    check_cross_entropy(logits, targets(*logits[0].shape), reduction)


def test_expanded_gradient(backend: str) -> None:
    target = targets(12, 331)
    check(
        lambda x: ops.cross_entropy(x, target, reduction="none"),
        lambda x: defined(x, target, "none", {}),
        lambda x: plain(x, target, "none", {}),
        ({"logits": torch.randn(12, 331)}, None),
    )


@pytest.mark.parametrize("V", [7, 50257])
@pytest.mark.parametrize("value", [0.0, -1e4, 1e4], ids=lambda x: f"logit {x:g}")
def test_equal_logits(backend: str, V: int, value: float) -> None:
    loss = ops.cross_entropy(torch.full((2, V), value), torch.tensor([0, V - 1]))
    expected = torch.tensor(V, dtype=torch.float64).log()
    # lse is rounded once at the size of the logits.
    assert abs(loss.double() - expected) <= max(expected, abs(value)) * 2**-23


def test_masked_and_huge_logits(backend: str) -> None:
    # -inf is how a vocabulary is masked; 1e4 overflows a softmax without its maximum.
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
@pytest.mark.parametrize("N", [0, 1, 7])
def test_nothing_counts(backend: str, N: int, options: dict) -> None:
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


def test_same_bits_twice_and_with_any_threads(isa: str, restore_threads: None) -> None:
    N, V, C = 30, 5003, 16
    logits, target, weight = torch.randn(N, V), targets(N, V), torch.randn(V, C)
    runs = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        loss, grads = forward_backward(lambda x: ops.cross_entropy(x, target), [logits], None)
        runs.append([loss, *grads])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    # The products of the linear one are the BLAS library's, which may split by threads.
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
    make: Callable[[], tuple[Tensor, Tensor]], target: Tensor, reduction: str, options: dict
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
        *((dict(zip(("input", "linear_weight"), make(), strict=True)), dout) for _ in range(8)),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_linear_parity(backend: str, dtype: torch.dtype, reduction: str, options: dict) -> None:
    N, C, V = 50, 24, 211
    target = targets(N, V, options.get("ignore_index", -100)).view(5, 10)

    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(5, 10, C).to(dtype), torch.randn(V, C).mul(0.3).to(dtype)

    check_linear(make, target, reduction, options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("N", "C", "V"), [(1, 1, 1), (1, 16, 17), (2, 5, 63), (3, 8, 50257)])
def test_linear_parity_odd_sizes(isa: str, N: int, C: int, V: int, reduction: str) -> None:
    target = torch.randint(V, (N,))
    check_linear(lambda: (torch.randn(N, C), torch.randn(V, C)), target, reduction, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_parity_in_chunks(reduction: str, dtype: torch.dtype) -> None:
    # Logits of more than the 104 MiB a chunk may take, in fp32 and in bf16.
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
        # "sum" and "mean" give every row one weight: keep these rows by ignoring the others.
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
def test_linear_layouts(isa: str, kind: str) -> None:
    N, C, V = 12, 10, 33
    make = {
        "transposed": lambda: (torch.randn(C, N).T, torch.randn(C, V).T),
        "every other": lambda: (torch.randn(N, 2 * C)[:, ::2], torch.randn(V, 2 * C)[:, ::2]),
        "expanded": lambda: (torch.randn(1, C).expand(N, C), torch.randn(V, 1).expand(V, C)),
    }[kind]
    for reduction in REDUCTIONS:
        check_linear(make, targets(N, V), reduction, {})


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_without_gradient_is_the_same_loss(backend: str, reduction: str) -> None:
    x, w, target = torch.randn(20, 8, requires_grad=True), torch.randn(50, 8), targets(20, 50)
    with_gradient = ops.linear_cross_entropy(x, w, target, reduction=reduction)
    with torch.no_grad():
        without = ops.linear_cross_entropy(x, w, target, reduction=reduction)
    assert with_gradient.requires_grad and not without.requires_grad
    torch.testing.assert_close(without, with_gradient.detach(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("which", ["input", "linear_weight"])
def test_linear_with_one_gradient(backend: str, which: str, reduction: str) -> None:
    x, w, target = torch.randn(20, 8), torch.randn(50, 8), targets(20, 50)
    wanted = {"input": x, "linear_weight": w}[which].requires_grad_()
    ops.linear_cross_entropy(x, w, target, reduction=reduction).sum().backward()
    alone, wanted.grad = wanted.grad, None
    ops.linear_cross_entropy(
        x.requires_grad_(), w.requires_grad_(), target, reduction=reduction
    ).sum().backward()
    assert torch.equal(alone, wanted.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_backward_twice(backend: str, reduction: str) -> None:
    x, w = torch.randn(20, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss = ops.linear_cross_entropy(x, w, targets(20, 50), reduction=reduction).sum()
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    twice = torch.autograd.grad(loss * -3.0, (x, w))
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(b, a * -3.0, rtol=2e-6, atol=1e-6)


def test_linear_fp16_gradient_survives_a_loss_scale(backend: str) -> None:
    # What a GradScaler does: gradients below fp16's 6e-8 are scaled up before they are rounded.
    N, C, V = 64, 16, 5003
    x, w = torch.randn(N, C).half(), torch.randn(V, C).mul(0.01).half()
    target = torch.randint(V, (N,))
    scale = torch.tensor(2.0**14)
    functions = [
        lambda x, w: ops.linear_cross_entropy(x, w, target).float(),
        lambda x, w: defined(x @ w.T, target, "mean", {}),
        lambda x, w: F.cross_entropy(F.linear(x, w), target).float(),
    ]
    check(*functions, ({"input": x, "linear_weight": w}, scale))


def test_linear_equals_the_two_steps(isa: str) -> None:
    x, w, target = torch.randn(30, 16), torch.randn(77, 16), targets(30, 77)
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
    # -100 is out of range too where ignore_index is another.
    target, x, w = torch.tensor(target), torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    for reduction in REDUCTIONS:
        options = {"ignore_index": -7, "reduction": reduction}
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


def test_lse_of_a_long_row(isa: str) -> None:
    # One fp32 sum over 50,257 terms would cost 4e-6.
    logits = torch.randn(4, 50257)
    with poisoned():
        loss, lse = torch.ops.gptfast.cross_entropy_fwd(logits, torch.arange(4), -100, 0.0, 0.0)
    ref = logits.double().logsumexp(-1)
    assert lse.dtype == torch.float64
    assert (lse - ref).abs().max() < 5e-7
    assert_parity(
        "loss",
        loss,
        ref - logits.diagonal().double(),
        F.cross_entropy(logits, torch.arange(4), reduction="none"),
    )


def test_an_empty_vocabulary_is_refused() -> None:
    target = torch.full((2,), -100)
    with pytest.raises(ValueError, match="V >= 1"):
        ops.linear_cross_entropy(torch.randn(2, 4), torch.randn(0, 4), target)
    with pytest.raises(ValueError, match="V >= 1"):
        ops.cross_entropy(torch.randn(2, 0), target)
