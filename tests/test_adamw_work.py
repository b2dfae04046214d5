"""What a step of AdamW keeps for the next ones: every change between two steps counts.

A twin looks at everything anew in each step and makes each table of Triton's kernels anew. After
the same changes it must have the same bits. Where nothing changed, or only addresses did, the
optimizer must not look again.
"""

import copy
import importlib
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import GPU
from torch import nn

import gptfast
from gptfast.ops import library
from gptfast.ops.backend import IMPLEMENTATIONS

Change = Callable[[nn.Sequential, gptfast.AdamW], None]
HALF = torch.float16


@pytest.fixture(params=["triton", "direct"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run on Triton's kernels, through the dispatcher and called directly."""
    pytest.importorskip("triton")
    with torch.device("cuda" if GPU else "cpu"):
        if request.param == "direct":
            monkeypatch.setitem(library._IN_PYTHON, "cpu", IMPLEMENTATIONS["triton"])
            yield
        else:
            with gptfast.use_backend("triton"):
                yield


def made(dtype: torch.dtype) -> tuple[nn.Sequential, gptfast.AdamW]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False)).to(dtype)
    matrices, vectors = [net[0].weight, net[1].weight], [net[0].bias]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    return net, gptfast.AdamW(groups, lr=1e-2, max_norm=0.5)


def step(net: nn.Module, optimizer: gptfast.AdamW, seed: int) -> None:
    """Take a step with new gradients, for the parameters that are trained."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for p in net.parameters():
        gradient = torch.randn(p.shape, generator=generator, device="cpu").to(p.device, p.dtype)
        p.grad = gradient.as_strided(p.shape, p.stride()) if p.requires_grad else None
    optimizer.step()


def forget(optimizer: gptfast.AdamW) -> None:
    """Let the next step look at everything anew."""
    optimizer._work = None
    tables = importlib.import_module("gptfast.kernels.triton.adamw_tables")
    tables._plans.recent.clear()


def assert_same(pairs: list[tuple[nn.Module, gptfast.AdamW]]) -> None:
    (net, optimizer), (twin, other) = pairs
    assert torch.equal(optimizer.grad_norm, other.grad_norm)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q)
        ours, theirs = optimizer.state.get(p, {}), other.state.get(q, {})
        assert ours.keys() == theirs.keys()
        for name, x in ours.items():
            assert x.dtype == theirs[name].dtype and torch.equal(x, theirs[name])


def other_addresses(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    for p in net.parameters():
        p.data = p.data.clone()
        for name, x in optimizer.state[p].items():
            optimizer.state[p][name] = x.clone()


def data_of_a_state(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    for name in ("exp_avg", "exp_avg_sq", "step"):
        x = optimizer.state[net[1].weight][name]
        x.data = x.data + 2.0


def options(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    optimizer.param_groups[0] |= {"lr": 0.1, "weight_decay": 0.5, "betas": (0.5, 0.7), "eps": 0.1}
    optimizer.max_norm = 0.01


NOTHING_TO_LOOK_AT: list[Change] = [
    lambda net, optimizer: None, other_addresses, data_of_a_state, options,
]  # fmt: skip


def frozen(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    net[0].bias.requires_grad_(False)


def another_dtype(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    net.to(HALF if net[0].weight.dtype == torch.float32 else torch.float32)


def one_dtype(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    p = net[1].weight
    p.data = p.data.to(HALF if p.dtype == torch.float32 else torch.float32)


def transposed(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    """The same address, other strides: what a plan would take for the same tensor."""
    p = net[0].weight
    p.data = p.data.view(-1).as_strided(p.shape, (1, p.shape[0]))


def state_of_another_dtype(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    of_weight = optimizer.state[net[0].weight]
    of_weight["exp_avg"] = of_weight["exp_avg"].double()


def state_gone(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    del optimizer.state[net[0].weight]


def moment_gone(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    optimizer.state[net[0].weight].clear()


def master_too_many_or_gone(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    p = net[0].weight
    if "master" in optimizer.state[p]:
        del optimizer.state[p]["master"]
    else:
        optimizer.state[p]["master"] = torch.zeros_like(p)


def loaded(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    """The state of a run in another dtype, whose masters must come or go."""
    dtype = torch.float32 if net[0].weight.dtype == HALF else HALF
    pair = made(dtype)
    step(*pair, seed=7)
    optimizer.load_state_dict(pair[1].state_dict())


def stochastic(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    net.to(torch.bfloat16)
    optimizer.bf16_update = "stochastic"


def added_group(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    net.append(nn.Linear(3, 2).to(net[0].weight.dtype))
    with torch.no_grad():
        for p in net[2].parameters():
            p.fill_(0.5)
    optimizer.add_param_group({"params": list(net[2].parameters()), "lr": 0.1})


def moved_to_another_group(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    """The list of all parameters is the same; only where a group ends is not."""
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop())


def another_order(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    optimizer.param_groups[0]["params"].reverse()


def replaced_parameter(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
    net[1].weight = nn.Parameter(torch.ones_like(net[1].weight))
    optimizer.param_groups[0]["params"][1] = net[1].weight


LOOK_AGAIN: list[Change] = [
    frozen, another_dtype, one_dtype, transposed, state_of_another_dtype, state_gone, moment_gone,
    master_too_many_or_gone, added_group, moved_to_another_group, another_order, replaced_parameter,
    loaded, stochastic,
]  # fmt: skip


def run(dtype: torch.dtype, change: Change) -> tuple[object, object]:
    """Compare steps before and after a change with the twin's; return the work before and after."""
    pairs = [made(dtype), made(dtype)]
    for seed in range(4):
        if seed == 2:
            before = pairs[0][1]._work
            for pair in pairs:
                torch.manual_seed(5)
                change(*pair)
        for pair in pairs:
            if pair is pairs[1]:
                forget(pair[1])
            step(*pair, seed)
        assert_same(pairs)
    return before, pairs[0][1]._work


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("change", NOTHING_TO_LOOK_AT)
def test_what_needs_no_look(dtype: torch.dtype, change: Change) -> None:
    before, after = run(dtype, change)
    assert after is before is not None


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("change", LOOK_AGAIN)
def test_what_is_looked_at_again(dtype: torch.dtype, change: Change) -> None:
    before, after = run(dtype, change)
    assert after is not before


def test_another_option_is_noticed() -> None:
    """The masters go, though no tensor has changed."""

    def change(net: nn.Sequential, optimizer: gptfast.AdamW) -> None:
        optimizer.bf16_update = "stochastic"

    before, after = run(torch.bfloat16, change)
    assert after is not before


@pytest.mark.parametrize(
    "change", [other_addresses, data_of_a_state, one_dtype, transposed, moved_to_another_group]
)
def test_tables_follow(way: None, change: Change) -> None:
    run(HALF, change)


def test_gradients_that_come_and_go() -> None:
    """A parameter without a gradient stays, and its steps do not count."""
    net, optimizer = made(torch.float32)
    expected = []
    for i, parts in enumerate(("wbv", "wbv", "wv", "w", "wbv", "wbv")):
        step(net, optimizer, i)
        expected.append(parts)
    assert optimizer.state[net[0].bias]["step"] == 6
    params = {"w": net[0].weight, "b": net[0].bias, "v": net[1].weight}
    for parts in ("bv", "bv", "w", "wbv"):
        before = {name: p.detach().clone() for name, p in params.items()}
        for name, p in params.items():
            p.grad = torch.ones_like(p) if name in parts else None
        optimizer.step()
        changed = {name for name, p in params.items() if not torch.equal(p, before[name])}
        assert changed == set(parts)


@pytest.mark.parametrize("wrong", ["sparse", "shape"])
def test_a_wrong_gradient_after_right_ones_is_refused(wrong: str) -> None:
    net, optimizer = made(torch.float32)
    for i in range(2):
        step(net, optimizer, i)
    weight = net[0].weight
    before = weight.detach().clone()
    if wrong == "sparse":
        weight.grad = torch.ones_like(weight).to_sparse()
    else:
        weight.grad.data = torch.ones(4, 6)
    with pytest.raises(
        ValueError, match="got a sparse one" if wrong == "sparse" else "gradient has"
    ):
        optimizer.step()
    assert torch.equal(weight, before)
    step(net, optimizer, 2)
    assert optimizer.state[weight]["step"] == 3


def test_a_gradient_that_two_parameters_share() -> None:
    results = []
    for shared in (False, True):
        params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizer = gptfast.AdamW(params, lr=0.1, max_norm=1.0)
        for i in range(3):
            gradient = torch.full((3,), 1.0 + i)
            params[0].grad = gradient
            params[1].grad = gradient if shared else gradient.clone()
            optimizer.step()
        results.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*results)


def test_a_copy_begins_without_the_work() -> None:
    net, optimizer = made(torch.float32)
    step(net, optimizer, 0)
    twin, other = copy.deepcopy((net, optimizer))
    assert optimizer._work is not None and other._work is None
    for n, o in ((net, optimizer), (twin, other)):
        step(n, o, 1)
    assert_same([(net, optimizer), (twin, other)])


def test_a_step_that_others_must_see_goes_through_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only without a mode do plain tensors go to the launcher directly."""
    called: list[str] = []

    def launcher(op: object) -> Callable:
        return lambda *args: called.append(op.name()) or torch.zeros(())

    launchers = {op: launcher(op) for op in IMPLEMENTATIONS["reference"]}
    monkeypatch.setitem(library._IN_PYTHON, "cpu", launchers)
    net, optimizer = made(torch.float32)
    with gptfast.use_backend("reference"):
        step(net, optimizer, 0)
    assert called == []
    step(net, optimizer, 1)
    assert called == ["gptfast::grad_norm", "gptfast::adamw", "gptfast::adamw"]


def test_no_gradient_is_kept_alive() -> None:
    net, optimizer = made(torch.float32)
    step(net, optimizer, 0)
    gradients = [weakref.ref(p.grad) for p in net.parameters()]
    optimizer.zero_grad()
    assert all(gradient() is None for gradient in gradients)
