"""AdamW: the operators against the reference, the optimizer against torch.optim.AdamW."""

import copy
import importlib
import math
import pickle
import threading
from types import ModuleType

import pytest
import torch
from parity import DTYPES, assert_parity
from seeds import shifted
from torch import Tensor

import gptfast
from gptfast.kernels.reference import adamw as reference
from gptfast.kernels.reference.philox import philox
from gptfast.ops.adamw import adamw, grad_norm

SHAPES = [(1,), (2, 3), (17,), (63, 5), (129,), (0,), (), (40_000,)]


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_grad_norm(backend: str, dtype: torch.dtype) -> None:
    grads = [*tensors(dtype), torch.randn(50, 30).to(dtype).T, torch.randn(90).to(dtype)[::2]]
    exact = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    norm = grad_norm(grads)
    assert norm.shape == () and norm.dtype == torch.float32
    # Summed in double over blocks of fp32: within two units in the last place.
    assert abs(norm.item() - exact) <= exact * 2**-22


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_grad_norm_not_finite(backend: str, bad: float) -> None:
    grads = tensors()
    grads[-1][39_999] = bad
    assert not grad_norm(grads).isfinite()


def test_grad_norm_same_bits_with_any_threads(isa: str) -> None:
    grads = [torch.randn(300_001), torch.randn(7)]
    norms = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        norms.append(grad_norm(grads))
    assert torch.equal(norms[0], norms[1]) and torch.equal(norms[1], norms[2])


def run_operator(
    params: list[Tensor], steps: list[list[Tensor]], norm: float | None, step=None
) -> list[list[Tensor]]:  # type: ignore[no-untyped-def]
    """Step copies of params, one list of gradients a step; return params, exp_avgs, exp_avg_sqs."""
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    params = [p.clone() for p in params]
    m, v = ([torch.zeros_like(p, dtype=dtype) for p in params] for _ in range(2))
    counts = [torch.zeros(()) for _ in params]
    lr = torch.tensor(3e-3, dtype=torch.float64)
    ids = list(range(len(params)))
    for grads in steps:
        total = None if norm is None else torch.tensor(norm, dtype=dtype)
        (step or adamw)(
            params, grads, m, v, [], counts, lr, total, 1.0, 0.9, 0.95, 1e-8, 0.1, ids, False, 0
        )
    assert all(c == len(steps) for c in counts)
    return [params, m, v]


@pytest.mark.parametrize("norm", [None, 0.3, 7.0], ids=["unclipped", "norm below", "norm above"])
def test_operator_parity(backend: str, norm: float | None) -> None:
    params, steps = tensors(), [tensors() for _ in range(3)]
    out = run_operator(params, steps, norm)
    double = [[g.double() for g in grads] for grads in steps]
    ref = run_operator([p.double() for p in params], double, norm, reference.adamw)

    plain = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(plain, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for grads in steps:
        for p, g in zip(plain, grads, strict=True):
            p.grad = g * (1.0 if norm is None else min(1.0, 1.0 / (norm + 1e-6)))
        optimizer.step()
    states = [optimizer.state[p] for p in plain]
    pt = [plain, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]]
    for name, *kinds in zip(("param", "exp_avg", "exp_avg_sq"), out, ref, pt, strict=True):
        assert_parity(name, *(torch.cat([x.detach().flatten() for x in kind]) for kind in kinds))


@pytest.mark.parametrize("norm", [torch.nan, torch.inf])
def test_operator_changes_nothing_if_the_norm_is_not_finite(backend: str, norm: float) -> None:
    p, m, v, step = torch.randn(20), torch.randn(20), torch.rand(20), torch.tensor(3.0)
    before = [x.clone() for x in (p, m, v, step)]
    lr, grads = torch.tensor(1.0), [torch.full((20,), torch.nan)]
    total = torch.tensor(norm)
    adamw([p], grads, [m], [v], [], [step], lr, total, 1.0, 0.9, 0.9, 1e-8, 0.1, [0], False, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, (p, m, v, step), strict=True))


def test_operator_same_bits_with_any_threads(isa: str) -> None:
    params, steps, runs = tensors(), [tensors() for _ in range(2)], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(run_operator(params, steps, 2.0))
    for a, b in zip(*runs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_operator_layouts(backend: str) -> None:
    # A transposed parameter keeps its strides; its gradient may have others.
    values, grads = torch.randn(12, 7), [torch.randn(12, 7) for _ in range(3)]
    expected = run_operator([values], [[g] for g in grads], None)
    turned = values.T.contiguous().T
    gap = torch.zeros(12, 14)[:, ::2].copy_(values)
    for start in (turned, gap):
        for grad in (lambda g: g, lambda g: g.T.contiguous().T, lambda g: g.repeat(1, 2)[:, :7]):
            clone = start.clone(memory_format=torch.preserve_format)
            result = run_operator([clone], [[grad(g)] for g in grads], None)
            for a, b in zip(result, expected, strict=True):
                torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=1e-7)
    expanded = [[torch.randn(()).expand(12, 7)]]
    dense = [[expanded[0][0].contiguous()]]
    assert torch.equal(
        run_operator([values], expanded, None)[0][0], run_operator([values], dense, None)[0][0]
    )


def test_step_is_seen_by_autograd(backend: str) -> None:
    # Backward through a parameter that a step has changed must raise, not give a wrong gradient.
    w = torch.randn(5, requires_grad=True)
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    gptfast.AdamW([w]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def model_and_data(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(shifted(1))
    net = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.GELU(), torch.nn.Linear(33, 5))
    return net.to(dtype), torch.randn(16, 9).to(dtype)


def train(net: torch.nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        (net(x + step).square().mean() * 30).backward()
        optimizer.step()


def values(net: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def groups(net: torch.nn.Module) -> list[dict]:
    matrices = [p for p in net.parameters() if p.dim() > 1]
    return [
        {"params": matrices, "weight_decay": 0.2, "lr": 2e-3},
        {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("options", [{}, {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6}], ids=str)
def test_equals_torch(backend: str, options: dict) -> None:
    results = []
    for cls in (gptfast.AdamW, torch.optim.AdamW):
        net, x = model_and_data()
        optimizer = cls(groups(net), **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for _ in range(4):
            train(net, x, optimizer, 3)
            scheduler.step()
        results.append(values(net))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [gptfast.AdamW, torch.optim.AdamW], ids=["ours", "torch"])
@pytest.mark.parametrize("second", [gptfast.AdamW, torch.optim.AdamW], ids=["ours", "torch"])
def test_state_dict_in_both_directions(first: type, second: type) -> None:
    net, x = model_and_data()
    optimizer = first(groups(net), lr=5e-3)
    train(net, x, optimizer, 5)
    other = copy.deepcopy(net)
    resumed = second(groups(other), lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [g["lr"] for g in resumed.param_groups] == [2e-3, 5e-3]
    train(net, x, optimizer, 5)
    train(other, x, resumed, 5)
    if first is second:
        assert torch.equal(values(net), values(other))
    torch.testing.assert_close(values(other), values(net), rtol=1e-5, atol=1e-6)
    states = [list(o.state_dict()["state"].values()) for o in (optimizer, resumed)]
    for a, b in zip(*states, strict=True):
        assert a["step"] == b["step"] == 10
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-4, atol=1e-6)


def test_loading_does_not_share_memory() -> None:
    net, x = model_and_data()
    optimizer = gptfast.AdamW(net.parameters())
    train(net, x, optimizer, 2)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    other = copy.deepcopy(net)
    resumed = gptfast.AdamW(other.parameters())
    resumed.load_state_dict(state)
    train(other, x, resumed, 2)
    for key, saved in before["state"].items():
        assert torch.equal(saved["exp_avg"], state["state"][key]["exp_avg"])
        assert saved["step"] == state["state"][key]["step"]


@pytest.mark.parametrize("max_norm", [0.05, 1.0, 1e6])
def test_max_norm_equals_clip_grad_norm(backend: str, max_norm: float) -> None:
    net, x = model_and_data()
    exact, _ = model_and_data(torch.float64)
    exact.load_state_dict(net.state_dict())
    optimizer = gptfast.AdamW(groups(net), lr=5e-3, max_norm=max_norm)
    clipped = torch.optim.AdamW(groups(exact), lr=5e-3)
    for step in range(6):
        for n in (net, exact):
            n.zero_grad()
            (n(x.to(n[0].weight.dtype) + step).square().mean() * 30).backward()
        before = [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(exact.parameters(), max_norm)
        clipped.step()
        torch.testing.assert_close(optimizer.grad_norm.double(), norm, rtol=1e-5, atol=0)
        after = [p.grad for p in net.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    torch.testing.assert_close(values(net).double(), values(exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_norm_skips_the_step(backend: str, bad: float) -> None:
    net, x = model_and_data()
    optimizer = gptfast.AdamW(groups(net), max_norm=1.0)
    train(net, x, optimizer, 2)
    before, state = values(net).clone(), copy.deepcopy(optimizer.state_dict()["state"])
    net[0].bias.grad[3] = bad
    optimizer.step()
    assert not optimizer.grad_norm.isfinite()
    assert torch.equal(values(net), before)
    for key, saved in optimizer.state_dict()["state"].items():
        assert all(torch.equal(saved[name], state[key][name]) for name in saved)
    train(net, x, optimizer, 1)
    assert values(net).isfinite().all() and not torch.equal(values(net), before)


def test_norm_limit_refuses_larger_norms(backend: str) -> None:
    """A norm above the limit changes nothing, one at the limit does; NaN refuses every norm."""
    net, x = model_and_data()
    optimizer = gptfast.AdamW(groups(net), max_norm=1.0)
    train(net, x, optimizer, 2)
    norm = optimizer.grad_norm.double()
    below = norm.nextafter(torch.zeros_like(norm))
    before, state = values(net).clone(), copy.deepcopy(optimizer.state_dict()["state"])
    for limit in (below, torch.full_like(norm, torch.nan)):
        optimizer.step(norm_limit=limit)
        assert optimizer.grad_norm.double() == norm
        assert torch.equal(values(net), before)
        for key, saved in optimizer.state_dict()["state"].items():
            assert all(torch.equal(saved[name], state[key][name]) for name in saved)
    other, _ = model_and_data()
    free = gptfast.AdamW(groups(other), max_norm=1.0)
    train(other, x, free, 2)
    free.step()
    optimizer.step(norm_limit=norm)
    assert torch.equal(values(net), values(other)) and not torch.equal(values(net), before)


def test_norm_limit_needs_max_norm() -> None:
    net, x = model_and_data()
    optimizer = gptfast.AdamW(net.parameters())
    with pytest.raises(ValueError, match="norm_limit limits the norm that max_norm measures"):
        optimizer.step(norm_limit=torch.ones(()))
    optimizer = gptfast.AdamW([torch.nn.Parameter(torch.ones(3))], max_norm=1.0)
    for wrong in (2.0, torch.ones(1)):
        with pytest.raises(ValueError, match="norm_limit must be a 0-d tensor, such as"):
            optimizer.step(norm_limit=wrong)


def test_infinite_max_norm_measures_only(backend: str) -> None:
    results = []
    for max_norm in (None, float("inf")):
        net, x = model_and_data()
        optimizer = gptfast.AdamW(net.parameters(), max_norm=max_norm)
        train(net, x, optimizer, 3)
        results.append(values(net))
    assert torch.equal(*results)
    grads = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(optimizer.grad_norm, grads.norm(), rtol=1e-6, atol=0)


def test_parameters_without_gradient_stay(backend: str) -> None:
    used, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = gptfast.AdamW([unused, used], max_norm=1.0)
    used.sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(3)) and not torch.equal(used, torch.ones(3))
    assert not optimizer.state[unused]
    gptfast.AdamW([unused], max_norm=1.0).step()


def test_closure_tensor_lr_and_added_group() -> None:
    net, x = model_and_data()
    plain, _ = model_and_data()
    results = []
    for n, cls in ((net, gptfast.AdamW), (plain, torch.optim.AdamW)):
        optimizer = cls(n[0].parameters(), lr=torch.tensor(2e-3))
        optimizer.add_param_group({"params": n[2].parameters(), "lr": 1e-2})

        def closure(n=n, optimizer=optimizer) -> Tensor:  # type: ignore[no-untyped-def]
            optimizer.zero_grad()
            loss = n(x).square().sum()
            loss.backward()
            return loss

        results.append((optimizer.step(closure).detach(), values(n)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def bf16_run(
    **options: object,
) -> tuple[torch.nn.Module, torch.optim.Optimizer, list[list[Tensor]]]:
    net, _ = model_and_data(torch.bfloat16)
    optimizer = gptfast.AdamW(net.parameters(), lr=1e-3, **options)
    torch.manual_seed(shifted(2))
    history = []
    for _ in range(5):
        for p in net.parameters():
            p.grad = torch.randn(p.shape).bfloat16()
        history.append([p.grad for p in net.parameters()])
        optimizer.step()
    return net, optimizer, history


def test_bf16_master_is_an_fp32_run_rounded(backend: str) -> None:
    net, optimizer, history = bf16_run()
    start, _ = model_and_data(torch.bfloat16)
    exact = [p.detach().float().requires_grad_() for p in start.parameters()]
    twin = gptfast.AdamW(exact, lr=1e-3)
    for grads in history:
        for p, g in zip(exact, grads, strict=True):
            p.grad = g.float()
        twin.step()
    for p, q in zip(net.parameters(), exact, strict=True):
        assert torch.equal(optimizer.state[p]["master"], q)
        assert torch.equal(p, q.bfloat16())
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(optimizer.state[p]["exp_avg"], twin.state[q]["exp_avg"])


def test_bf16_stochastic_rounding_is_unbiased_and_seeded(backend: str) -> None:
    # 10 steps of 1e-4 from 1.0, each 1/40 of bf16's spacing below 1: with rounding to nearest, the
    # parameter would never move.
    results = []
    for seed in (0, 0, 1):
        w = torch.ones(4096, dtype=torch.bfloat16, requires_grad=True)
        optimizer = gptfast.AdamW(
            [w], lr=1e-4, weight_decay=0.0, bf16_update="stochastic", seed=seed
        )
        for _ in range(10):
            w.grad = torch.ones_like(w)
            optimizer.step()
        results.append(w.detach())
        # The mean should be 1 - 1e-3. Its spread: 4096 weights with 10 rare steps of 2^-8 each.
        deviation = (10 * 1e-4 * 2**-8 / 4096) ** 0.5
        assert abs(w.double().mean().item() - (1 - 1e-3)) < 4 * deviation
        assert "master" not in optimizer.state[w]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_fp16_master() -> None:
    w = torch.ones(5, dtype=torch.float16, requires_grad=True)
    optimizer = gptfast.AdamW([w], lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        w.grad = torch.ones_like(w)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[w]["master"], torch.full((5,), 1 - 1e-3))
    assert torch.equal(w, optimizer.state[w]["master"].half())


@pytest.mark.parametrize("update", ["master", "stochastic"])
def test_loading_keeps_fp32_state_of_bf16_parameters(update: str) -> None:
    net, optimizer, history = bf16_run(bf16_update=update)
    other = copy.deepcopy(net)
    resumed = gptfast.AdamW(other.parameters(), lr=1e-3, bf16_update=update)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, n in ((optimizer, net), (resumed, other)):
        for p, g in zip(n.parameters(), history[0], strict=True):
            p.grad = g
        o.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        a, b = optimizer.state[p], resumed.state[q]
        assert a.keys() == b.keys()
        assert all(a[name].dtype == torch.float32 and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("update", ["master", "stochastic"])
def test_bf16_moments(update: str, backend: str) -> None:
    """Moments are rounded to bf16 at each step; copies and state dicts keep them in bf16."""
    options = {"bf16_update": update, "moment_dtype": torch.bfloat16}
    net, optimizer, history = bf16_run(**options)
    other = copy.deepcopy(net)
    resumed = gptfast.AdamW(other.parameters(), lr=1e-3, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, n in ((optimizer, net), (resumed, other)):
        for p, g in zip(n.parameters(), history[0], strict=True):
            p.grad = g
        o.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][name].dtype == torch.bfloat16
            assert torch.equal(optimizer.state[p][name], resumed.state[q][name])
    assert pickle.loads(pickle.dumps(optimizer)).moment_dtype == torch.bfloat16

    # The result differs from that of fp32 moments by two bf16 roundings per step.
    plain, wide, _ = bf16_run(bf16_update=update)
    start, _ = model_and_data(torch.bfloat16)
    net, narrow, _ = bf16_run(**options)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        a, b = narrow.state[p]["exp_avg"].float(), wide.state[q]["exp_avg"]
        assert (a - b).abs().max() <= 2 * 2**-8 * b.abs().max()
    moved = (values(plain) - values(start)).abs().max()
    assert (values(net) - values(plain)).abs().max() <= 0.1 * moved + 2**-7


def test_bf16_moments_need_bf16_parameters() -> None:
    with pytest.raises(ValueError, match="needs bfloat16 parameters, got torch.float32"):
        gptfast.AdamW([torch.zeros(3, requires_grad=True)], moment_dtype=torch.bfloat16)


def test_bf16_moments_of_torch_are_taken(backend: str) -> None:
    net, _ = model_and_data(torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters())
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    resumed = gptfast.AdamW(net.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    before = values(net).clone()
    resumed.step()
    assert values(net).isfinite().all() and not torch.equal(values(net), before)


def test_float64_parameters_use_the_reference() -> None:
    results = []
    for cls in (gptfast.AdamW, torch.optim.AdamW):
        net, x = model_and_data(torch.float64)
        train(net, x, cls(net.parameters()), 5)
        results.append(values(net))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"max_norm": 0.0},
        {"max_norm": -1.0},
        {"max_norm": float("nan")},
        {"bf16_update": "nearest"},
        {"moment_dtype": torch.float16},
        {"amsgrad": True},
        {"maximize": True},
        {"differentiable": True},
    ],
    ids=str,
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        gptfast.AdamW([torch.zeros(3, requires_grad=True)], **options)


def test_torch_keywords() -> None:
    w = torch.zeros(3, requires_grad=True)
    gptfast.AdamW([w], foreach=True, fused=True, capturable=True, amsgrad=False)
    with pytest.raises(TypeError, match="nesterov"):
        gptfast.AdamW([w], nesterov=True)
    with pytest.raises(ValueError, match="empty parameter list"):
        gptfast.AdamW([])


def test_a_copy_steps_as_the_original() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = gptfast.AdamW([param], lr=0.1, max_norm=0.5)
    twin = pickle.loads(pickle.dumps(optimizer))
    copied = twin.param_groups[0]["params"][0]
    for one, tensor in ((optimizer, param), (twin, copied)):
        tensor.grad = torch.full((3,), 2.0)
        one.step()
    assert torch.equal(param, copied) and (param != 1).all()


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_a_group_or_a_state_cannot_bring_what_the_constructor_refuses(option: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=option):
        gptfast.AdamW([{"params": [param], option: True}])
    state = torch.optim.AdamW([param], **{option: True}).state_dict()
    with pytest.raises(ValueError, match=option):
        gptfast.AdamW([param]).load_state_dict(state)


def test_stochastic_rounding_of_a_transposed_parameter(cpp: None) -> None:
    start, stepped = torch.randn(64, 48).bfloat16(), []
    for backend in ("cpp", "reference"):
        param = torch.nn.Parameter(start.clone().t())
        param.grad = torch.ones_like(param)
        with gptfast.use_backend(backend):
            gptfast.AdamW([param], lr=1e-2, bf16_update="stochastic", seed=3).step()
        stepped.append(param.detach())
    assert torch.equal(*stepped)


@pytest.fixture
def kernel(triton: str) -> ModuleType:
    return importlib.import_module("gptfast.kernels.triton.adamw")


@pytest.fixture
def tables(triton: str) -> ModuleType:
    return importlib.import_module("gptfast.kernels.triton.adamw_tables")


SMALL = [(3,), (5, 7), (0,), (2100,), (), (0,)]


def small(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in SMALL]


def askew(x: Tensor) -> Tensor:
    """Return x shifted by one element in memory, so that no wide load can begin there."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def assert_same(a: list[list[Tensor]], b: list[list[Tensor]]) -> None:
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(t, u) for t, u in zip(x, y, strict=True))


def test_configurations_agree(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    params, steps = small(), [small()]
    exact = math.sqrt(sum(g.double().square().sum().item() for g in steps[0]))
    expected = run_operator(params, steps, 2.0)
    assert kernel.STEP_CONFIGS.keys() == kernel.NORM_CONFIGS.keys()
    for arch in kernel.STEP_CONFIGS:
        monkeypatch.setattr(kernel.target, "arch", lambda arch=arch: arch)
        assert_same(run_operator(params, steps, 2.0), expected)
        assert abs(grad_norm(steps[0]).item() - exact) <= exact * 2**-22
    # There are more tensors than one search looks at, and than one program takes steps.
    monkeypatch.setattr(kernel, "SEARCH", 4)
    assert_same(run_operator(params, steps, 2.0), expected)
    assert abs(grad_norm(steps[0]).item() - exact) <= exact * 2**-22


def test_grad_norm_depends_on_shapes_alone(triton: str) -> None:
    grads = [torch.randn(33_000), torch.randn(7).half(), torch.randn(50), torch.randn(9).bfloat16()]
    exact = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    norm = grad_norm(grads)
    assert abs(norm.item() - exact) <= exact * 2**-22
    for again in (grads, [g.clone() for g in grads], [askew(g) for g in grads]):
        assert torch.equal(grad_norm(again), norm)


def test_grad_norm_follows_the_shape(triton: str) -> None:
    """Of equal strides and as many elements, only the first of these fills its memory."""
    part = torch.full((3, 3), 2.0)[:, :2].fill_(1.0)
    for grad in (torch.ones(2, 3), part):
        assert grad_norm([grad]).item() == pytest.approx(6**0.5, rel=1e-6)


@pytest.fixture
def uploads(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Start without plans, and collect the table of each copy to the device."""
    copied: list[Tensor] = []
    real = tables.upload

    def upload(words: Tensor, table: Tensor) -> None:
        copied.append(words.clone())
        real(words, table)

    monkeypatch.setattr(tables, "upload", upload)
    monkeypatch.setattr(tables, "_plans", tables._Plans())
    return copied


def test_addresses_do_not_matter(tables: ModuleType, uploads: list[Tensor]) -> None:
    # Each tensor of one parameter is misaligned in turn; every step's gradients have new addresses.
    values = [[torch.randn(37) for _ in range(2)] for _ in range(3)] + [
        [torch.rand(37) for _ in range(2)]
    ]
    results, kept = [], []
    for at in (None, 0, 1, 2, 3):
        lists = [[x.clone() for x in column] for column in values]
        if at is not None:
            lists[at][1] = askew(lists[at][1])
        steps, lr = [torch.tensor(4.0), torch.tensor(9.0)], torch.tensor(1e-3)
        for _ in range(2):
            adamw(*lists, [], steps, lr, None, 1.0, 0.9, 0.95, 1e-8, 0.1, [0, 1], False, 0)
            kept.append(lists[1])
            lists[1] = [g if at == 1 else g.clone() for g in lists[1]]
        assert [step.item() for step in steps] == [6, 11]
        results.append(lists)
    for other in results[1:]:
        assert_same(other, results[0])
    # With the same addresses, the table of the previous step is used again.
    before = len(uploads)
    for _ in range(2):
        adamw(*lists, [], steps, lr, None, 1.0, 0.9, 0.95, 1e-8, 0.1, [0, 1], False, 0)
    assert len(uploads) == before + 1


def test_only_addresses_that_moved_are_rewritten(
    tables: ModuleType, uploads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    real = tables.Plan.__init__
    monkeypatch.setattr(
        tables.Plan, "__init__", lambda self, *args: built.append(self) or real(self, *args)
    )
    # Two kinds of rows, so that the table has another order than the lists.
    p = [torch.randn(37), torch.randn(9).half(), torch.randn(5, 7)]
    g, m, v = ([torch.randn(x.shape) for x in p] for _ in range(3))
    v = [x.abs() for x in v]
    steps, lr = [torch.tensor(1.0) for _ in p], torch.tensor(1e-3)
    column, kept = tables.StepRow._fields.index("grad"), [g]
    for i in range(4):
        adamw(p, g, m, v, [], steps, lr, None, 1.0, 0.9, 0.95, 1e-8, 0.1, [0, 1, 2], False, 0)
        assert uploads[-1][column].tolist() == [g[j].data_ptr() for j in (0, 2, 1)]
        assert len(uploads) == i + 1
        g = [x.clone() for x in g]
        kept.append(g)
        if i == 1:
            # A state that moves is followed as well.
            m[1] = m[1].clone()
    assert len(built) == 1
    same = [row for row in range(9) if row not in (column, 4)]
    assert all(torch.equal(words[same], uploads[0][same]) for words in uploads)
    # What a launch is compiled for, or the shape, may not change behind a plan.
    turned = [*g[:2], g[2].t().contiguous().t()]
    for grads in (turned, [*g[:2], askew(g[2])], [g[0].half(), *g[1:]]):
        adamw(p, grads, m, v, [], steps, lr, None, 1.0, 0.9, 0.95, 1e-8, 0.1, [0, 1, 2], False, 0)
    assert len(built) == 4
    with pytest.raises(ValueError, match="shape"):
        wrong = [*g[:2], g[2].reshape(7, 5)]
        adamw(p, wrong, m, v, [], steps, lr, None, 1.0, 0.9, 0.95, 1e-8, 0.1, [0, 1, 2], False, 0)


def test_plans_are_few_and_of_one_thread(tables: ModuleType, uploads: list[Tensor]) -> None:
    for n in range(1, 2 * tables._Plans.SIZE):
        grads = [torch.randn(n)]
        grad_norm(grads)
        assert len(tables._plans.recent) == min(n, tables._Plans.SIZE)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(len(tables._plans.recent)))
    thread.start()
    thread.join()
    assert seen == [0]


def test_lr_from_host_or_device(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    params, steps = small(), [small() for _ in range(2)]
    expected = run_operator(params, steps, None)
    monkeypatch.setattr(kernel, "_read_on_device", lambda lr, device: False)
    assert_same(run_operator(params, steps, None), expected)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_stochastic_rounding_equals_the_reference(triton: str, layout: str) -> None:
    # beta1 = 0: torch's lerp is fused, the interpreter's is not.
    params = [torch.randn(61, 35).bfloat16(), torch.randn(5).bfloat16()]
    if layout == "transposed":
        params[0] = params[0].t()
    params[1][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    grads = [torch.randn(p.shape).bfloat16() for p in params]
    norm, lr = torch.tensor(3.0), torch.tensor(1e-2, dtype=torch.float64)
    results = []
    for step in (adamw, reference.adamw):
        p = [x.clone() for x in params]
        m, v = ([torch.zeros_like(x, dtype=torch.float32) for x in params] for _ in range(2))
        steps = [torch.tensor(2.0), torch.tensor(70_000.0)]
        numbers = (1.0, 0.0, 0.95, 1e-8, 0.1, [3, 8], True, -(2**40) + 5)
        step(p, grads, m, v, [], steps, lr, norm, *numbers)
        results.append([[x.nan_to_num(77.0) for x in kind] for kind in (p, m, v, steps)])
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float16, "bf16"], ids=["fp16", "bf16"])
def test_masters_equal_fp32_parameters(triton: str, dtype: torch.dtype | str) -> None:
    dtype = torch.bfloat16 if dtype == "bf16" else dtype
    grads = small(dtype)
    masters = small()
    p = [x.to(dtype) for x in masters]
    m, v = ([torch.zeros_like(x) for x in masters] for _ in range(2))
    steps, ids = [torch.zeros(()) for _ in p], list(range(len(p)))
    expected = run_operator(masters, [[g.float() for g in grads]], 0.3)
    norm, lr = torch.tensor(0.3), torch.tensor(3e-3, dtype=torch.float64)
    adamw(p, grads, m, v, masters, steps, lr, norm, 1.0, 0.9, 0.95, 1e-8, 0.1, ids, False, 0)
    assert_same([masters, m, v], expected)
    assert_same([p], [[x.to(dtype) for x in masters]])


def test_far_elements(kernel: ModuleType) -> None:
    # The tables place 100 elements at 2^33 + 2^31 of a tensor; nothing else of it exists.
    tl, far, n = kernel.tl, 2**33 + 2**31, 100
    block, warps = kernel.STEP_CONFIGS["sm_90"]
    g, m, v = torch.randn(n), torch.randn(n), torch.rand(n)
    twin = [torch.randn(n).bfloat16().float(), g.clone(), m.clone(), v.clone()]
    p, lr = twin[0].bfloat16(), torch.tensor(1e-2)
    adamw(
        *([x] for x in twin),
        [],
        [torch.tensor(4.0)],
        lr,
        None,
        1.0,
        0.9,
        0.95,
        1e-8,
        0.0,
        [0],
        False,
        0,
    )
    bias = [1 - beta**5 for beta in (0.9, 0.95)]
    scalars = torch.tensor([[1.0], [1.0], [1e-2 / bias[0]], [math.sqrt(bias[1])], [5.0]])
    addresses = [x.data_ptr() - far * x.itemsize for x in (p, g, m, v)]
    row = [-(far // block), far + n, *addresses, 0, 0, 9]
    table = torch.tensor(row)[:, None]
    numbers = [kernel._two_floats(x)[0] for x in (1 - 0.9, 0.95, 1 - 0.95, 1e-8)]
    dtypes = [tl.bfloat16, tl.float32, tl.float32, tl.float32]
    kernel.adamw_kernel[(1,)](
        table,
        scalars,
        1,
        0,
        1,
        *numbers,
        11,
        *dtypes,
        MASTER=False,
        STOCHASTIC=True,
        FROM_GRAD=False,
        ALIGNED=0,
        BLOCK=block,
        SEARCH=kernel.SEARCH,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    assert torch.equal(m, twin[2]) and torch.equal(v, twin[3])
    index = far + torch.arange(n)
    counter = [(index >> 3) & 0xFFFFFFFF, *(torch.full_like(index, i) for i in (9, 5, 2))]
    words = torch.stack(philox(*counter, torch.tensor(11)), -1)
    word = words.gather(-1, ((index & 7) >> 1)[:, None])[:, 0]
    half = (word >> 16 * (index & 1)) & 0xFFFF
    bits = twin[0].view(torch.int32) + half.to(torch.int32)
    assert torch.equal(p, (bits & -0x10000).view(torch.float32).bfloat16())

    partials = torch.zeros(3, dtype=torch.float64)
    first = -(far // kernel.CHUNK)
    table = torch.tensor([[first], [far + n], [g.data_ptr() - far * 4], [2 + first]])
    kernel.grad_norm_kernel[(1,)](
        table,
        partials,
        1,
        0,
        1,
        DTYPE=tl.float32,
        CHUNK=kernel.CHUNK,
        LANES=kernel.LANES,
        SEARCH=kernel.SEARCH,
    )
    torch.testing.assert_close(partials[2], g.double().square().sum(), rtol=1e-6, atol=0)


def test_a_capture_keeps_its_tables(
    tables: ModuleType, uploads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, steps = small(), [small()]
    monkeypatch.setattr(tables, "_staging", tables._Staging())
    expected = run_operator(params, steps, 2.0)
    before = len(uploads)
    monkeypatch.setattr(tables, "_capturing", lambda device: True)
    for _ in range(2):
        assert_same(run_operator(params, steps, 2.0), expected)
    # A capture's table is in memory that nobody writes again.
    assert len(uploads) == before
    assert len({source.data_ptr() for source in tables._staging.taken}) == 2
    monkeypatch.setattr(tables, "_staging", tables._Staging())
    with pytest.raises(RuntimeError, match="once before capturing"):
        run_operator(params, steps, 2.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_holds_a_step(triton: str) -> None:
    results = []
    for captured in (False, True):
        net, _ = model_and_data()
        lr = torch.tensor(1e-2)
        optimizer = gptfast.AdamW(groups(net), lr=lr, max_norm=0.5)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(4):
            lr.fill_(1e-2 / (1 + step))
            for p in net.parameters():
                p.grad.normal_()
            if step == 2:
                net[0].bias.grad[0] = torch.nan
            graph.replay() if captured else optimizer.step()
        results.append([values(net), *(optimizer.state[p]["step"] for p in net.parameters())])
    assert_same([results[0]], [results[1]])
