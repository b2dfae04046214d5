"""AdamW with fp32 masters: what others write to a 16-bit parameter is followed, not undone."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gptfast
from gptfast.kernels.reference import adamw as reference
from gptfast.ops.adamw import adamw

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(3,), (5, 7), (0,), (2100,), (), (40_003,)]
# No finite value, signed zeros, subnormals, and values that overflow fp16 but not its fp32 master.
SPECIAL = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-40, 3e-7, 7e4, 1e38]


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest, backend: str) -> torch.dtype:
    """Return a 16-bit dtype; the string as its parameter lets Triton's interpreter try bf16."""
    return HALVES[request.param]


def bits(x: Tensor) -> Tensor:
    return x.detach().view(torch.int16 if x.itemsize == 2 else torch.int32)


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether all bits are equal; any NaN equals any other."""
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def step(
    params: list[Tensor], grads: list[Tensor], state: list[list[Tensor]], norm: float | None = None
) -> None:
    """Take one step with masters in place; state: exp_avgs, exp_avg_sqs, masters, steps."""
    total = None if norm is None else torch.tensor(norm)
    lr, ids = torch.tensor(3e-3, dtype=torch.float64), list(range(len(params)))
    adamw(params, grads, *state, lr, total, 1.0, 0.9, 0.95, 1e-8, 0.1, ids, False, 0)


def new_state(masters: list[Tensor]) -> list[list[Tensor]]:
    m, v = ([torch.randn(x.shape).abs() for x in masters] for _ in range(2))
    return [m, v, [x.clone() for x in masters], [torch.full((), 2.0) for _ in masters]]


def test_written_elements_count_and_the_others_keep_their_precision(half: torch.dtype) -> None:
    masters = [torch.randn(shape) for shape in SHAPES]
    own = [x.to(half) for x in masters]
    written = [torch.rand(x.shape) < 0.3 for x in masters]
    params, mended = [], []
    for master, x, w in zip(masters, own, written, strict=True):
        params.append(torch.where(w, torch.randn(x.shape).to(half), x))
        # What the master should be, for a step that no element contradicts.
        mended.append(torch.where(bits(params[-1]) == bits(x), master, params[-1].float()))
    grads = [torch.randn(x.shape).to(half) for x in masters]
    state = new_state(masters)
    twin = copy.deepcopy(state)
    twin[2] = [x.clone() for x in mended]
    twin_params = [x.to(half) for x in mended]
    step(params, grads, state)
    step(twin_params, grads, twin)
    for a, b in zip([*params, *sum(state, [])], [*twin_params, *sum(twin, [])], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(p, x.to(half)) for p, x in zip(params, state[2], strict=True))


def test_special_values(half: torch.dtype) -> None:
    """Each of these as a master meets each as a parameter; a step of lr 0 shows which is taken."""
    values = torch.tensor(SPECIAL)
    master = values.repeat_interleave(len(SPECIAL))
    param = values.repeat(len(SPECIAL)).to(half)
    rounded = master.to(half)
    equal = (bits(rounded) == bits(param)) | (rounded.isnan() & param.isnan())
    expected = torch.where(equal, master, param.float())
    assert equal.any() and not equal.all()
    m, v, s = torch.zeros_like(master), torch.zeros_like(master), torch.zeros(())
    lr = torch.tensor(0.0)
    adamw(
        [param], [torch.ones_like(param)], [m], [v], [master], [s], lr, None, 1.0, 0.9, 0.95, 1e-8,
        0.0, [0], False, 0,
    )  # fmt: skip
    assert same(master, expected) and same(param, expected.to(half))


def test_every_bit_pattern_is_its_own_rounded_master(half: torch.dtype) -> None:
    """Whatever 16 bits a parameter holds, a master next to it keeps its precision."""
    param = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)
    # An ulp of fp32 away, toward zero: it rounds to the parameter.
    inward = (bits(param.float()) - 1).view(torch.float32)
    master = torch.where(param.isfinite() & (param != 0), inward, param.float())
    before, kept = master.clone(), param.clone()
    zeros = [torch.zeros(param.shape) for _ in range(2)]
    lr, grad = torch.tensor(0.0), torch.zeros(param.shape, dtype=half)
    adamw(
        [param], [grad], [zeros[0]], [zeros[1]], [master], [torch.zeros(())], lr, None, 1.0, 0.9,
        0.95, 1e-8, 0.0, [0], False, 0,
    )  # fmt: skip
    assert same(master, before) and same(param, kept)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_skipped_step_changes_nothing(half: torch.dtype, bad: float) -> None:
    masters = [torch.randn(100)]
    params, grads = [torch.randn(100).to(half)], [torch.randn(100).to(half)]
    state = new_state(masters)
    before = copy.deepcopy([params, *state])
    step(params, grads, state, norm=bad)
    for a, b in zip(before, [params, *state], strict=True):
        assert torch.equal(a[0], b[0])
    # What was written is still followed by the first step that is taken.
    twin = copy.deepcopy(state)
    twin[2], twin_params = [params[0].float()], [params[0].clone()]
    step(params, grads, state, norm=0.1)
    step(twin_params, grads, twin, norm=0.1)
    assert torch.equal(state[2][0], twin[2][0]) and torch.equal(*params, *twin_params)


@pytest.mark.parametrize("dtype", HALVES)
def test_layouts_and_the_reference_agree(backend: str, dtype: str) -> None:
    half = HALVES[dtype]
    masters = [torch.randn(13, 37).T, torch.randn(20, 6)[:, ::2]]
    grads = [torch.randn(x.shape).to(half) for x in masters]
    written = [torch.rand(x.shape) < 0.5 for x in masters]
    results = []
    for take in (adamw, reference.adamw):
        state = new_state([x.clone(memory_format=torch.preserve_format) for x in masters])
        for kind in state[:2]:
            for x in kind:
                x.zero_()
        params = [x.to(half) for x in masters]
        for p, w in zip(params, written, strict=True):
            p[w] = 2.5
        lr, norm = torch.tensor(1e-2), torch.tensor(4.0)
        numbers = (1.0, 0.0, 0.95, 1e-8, 0.1, [0, 1], False, 0)
        take(params, grads, *state, lr, norm, *numbers)
        results.append([*params, *state[2]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=1e-6)
        assert (a - b).float().abs().mean() <= 2**-16


def trained(half: torch.dtype, **options: object) -> tuple[nn.Linear, gptfast.AdamW]:
    net = nn.Linear(37, 41).to(half)
    optimizer = gptfast.AdamW(net.parameters(), lr=1e-3, **options)
    for _ in range(3):
        train_step(net, optimizer)
    return net, optimizer


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in net.parameters():
        p.grad = torch.randn(p.shape).to(p.dtype)
    optimizer.step()


def load(net: nn.Linear) -> None:
    net.load_state_dict(nn.Linear(37, 41).state_dict())


def surgery(net: nn.Linear) -> None:
    with torch.no_grad():
        net.weight[:, 3] = 1.0
        net.bias.zero_()


def silent(net: nn.Linear) -> None:
    # `.data` does not count as a new version.
    net.weight.data.copy_(torch.randn(41, 37))
    net.weight.data[0, 0] = -0.0


def replaced(net: nn.Linear) -> None:
    net.weight.data = torch.randn(37, 41).T.to(net.weight.dtype)


def averaged(net: nn.Linear) -> None:
    average = torch.optim.swa_utils.AveragedModel(net)
    load(net)
    average.update_parameters(net)
    for p, q in zip(net.parameters(), average.module.parameters(), strict=True):
        p.detach().copy_(q)


WRITES = [load, surgery, silent, replaced, averaged]


@pytest.mark.parametrize("write", WRITES)
def test_what_others_write_is_kept(half: torch.dtype, write: Callable[[nn.Linear], None]) -> None:
    net, optimizer = trained(half)
    write(net)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.param_groups[0]["lr"] = 0.0
    train_step(net, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    optimizer.param_groups[0]["lr"] = 1e-3
    train_step(net, optimizer)
    for p, b in zip(net.parameters(), before, strict=True):
        assert not torch.equal(p, b) and (p - b).float().abs().max() < 0.05
        assert torch.equal(p, optimizer.state[p]["master"].to(half))


@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_a_run_resumes_to_the_bit_in_either_order(half: torch.dtype, first: str) -> None:
    net, optimizer = trained(half)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    # The other run has its own state by now, which must leave no trace.
    other, resumed = trained(half)
    parts = [(other, "model"), (resumed, "optimizer")]
    for part, name in parts if first == "model" else parts[::-1]:
        part.load_state_dict(saved[name])
    for seed in range(3):
        for n, o in ((net, optimizer), (other, resumed)):
            torch.manual_seed(seed)
            train_step(n, o)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for name, x in optimizer.state[p].items():
            assert torch.equal(x, resumed.state[q][name])


def test_small_steps_add_up_until_somebody_writes(half: torch.dtype) -> None:
    # Each step is 1/40 of bf16's spacing below 1: only the master sees it.
    w = nn.Parameter(torch.ones(5, dtype=half))
    optimizer = gptfast.AdamW([w], lr=1e-4, weight_decay=0.0)
    for _ in range(10):
        w.grad = torch.ones_like(w)
        optimizer.step()
    master = optimizer.state[w]["master"]
    torch.testing.assert_close(master, torch.full((5,), 1 - 1e-3), rtol=0, atol=1e-6)
    w.data[2] = 2.0
    optimizer.step()
    expected = torch.full((5,), 1 - 1.1e-3)
    expected[2] = 2 - 1e-4
    torch.testing.assert_close(master, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("update", ["master", "stochastic"])
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_another_dtype_after_the_first_step(
    before: torch.dtype, after: torch.dtype, update: str
) -> None:
    net, optimizer = trained(before, bf16_update=update)
    moments = [optimizer.state[p]["exp_avg"].clone() for p in net.parameters()]
    net.to(after)
    # Without a change, the master is more exact than the parameter.
    kept = before == after == torch.bfloat16 and update == "master"
    starts = [optimizer.state[p]["master"] if kept else p.detach() for p in net.parameters()]
    exact = [x.double().requires_grad_() for x in starts]
    twin = torch.optim.AdamW(exact, lr=1e-3)
    for p, q, m in zip(net.parameters(), exact, moments, strict=True):
        state = {name: x.double() for name, x in optimizer.state[p].items() if name != "master"}
        twin.state[q] = state | {"exp_avg": m.double(), "step": optimizer.state[p]["step"].clone()}
    train_step(net, optimizer)
    for p, q in zip(net.parameters(), exact, strict=True):
        q.grad = p.grad.double()
    twin.step()
    for p, q in zip(net.parameters(), exact, strict=True):
        state = optimizer.state[p]
        assert ("master" in state) == (after == torch.bfloat16 and update == "master")
        widest = torch.float64 if after == torch.float64 else torch.float32
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == widest
        # One rounding of the parameter; a stochastic one may go the far way.
        tolerance = 2**-7 if after == torch.bfloat16 else 1e-6
        torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=1e-8)


def test_a_dtype_that_the_options_do_not_allow_is_refused() -> None:
    net, optimizer = trained(torch.bfloat16, moment_dtype=torch.bfloat16)
    net.to(torch.float32)
    with pytest.raises(ValueError, match="needs bfloat16 parameters, got torch.float32"):
        train_step(net, optimizer)
    net, optimizer = trained(torch.bfloat16, bf16_update="stochastic")
    net.to(torch.float16)
    with pytest.raises(ValueError, match="use 'master' for float16"):
        train_step(net, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_shape_after_the_first_step_is_refused(backend: str, dtype: torch.dtype) -> None:
    net, optimizer = trained(dtype)
    first = net.weight.detach().clone()
    # These shapes would broadcast against the state's.
    net.bias.data = torch.ones(1, dtype=dtype)
    with pytest.raises(ValueError, match=r"shape \(1,\), but its gradient has \(41,\)"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"shape \(1,\), but its exp_avg has \(41,\)"):
        train_step(net, optimizer)
    assert torch.equal(net.weight, first)
    # The state of the parameter can be dropped, too.
    del optimizer.state[net.bias]
    optimizer.param_groups[0]["lr"] = 0.1
    train_step(net, optimizer)
    assert optimizer.state[net.bias]["step"] == 1 and (net.bias != 1).all()


def test_masters_that_the_options_no_longer_want_are_dropped(backend: str) -> None:
    net, optimizer = trained(torch.bfloat16)
    state = copy.deepcopy(optimizer.state_dict())
    results = []
    for drop in (False, True):
        twin = copy.deepcopy(net)
        other = gptfast.AdamW(twin.parameters(), bf16_update="stochastic")
        if drop:
            for saved in state["state"].values():
                del saved["master"]
        other.load_state_dict(state)
        torch.manual_seed(5)
        train_step(twin, other)
        assert all("master" not in other.state[p] for p in twin.parameters())
        results.append([p.detach() for p in twin.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_follows_the_parameter(triton: str) -> None:
    w = nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    w.grad = torch.ones_like(w)
    optimizer = gptfast.AdamW([w], lr=torch.tensor(1e-3), weight_decay=0.0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    w.data[7] = 3.0
    graph.replay()
    torch.testing.assert_close(optimizer.state[w]["master"][7].item(), 3 - 1e-3, rtol=0, atol=1e-4)


def test_state_that_went_through_torchs_adamw() -> None:
    # torch rounds every tensor of a state to the parameter's dtype, the master too.
    p = torch.nn.Parameter(torch.randn(37).bfloat16())
    first, second = gptfast.AdamW([p]), gptfast.AdamW([p])
    theirs = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    first.step()
    theirs.load_state_dict(first.state_dict())
    second.load_state_dict(theirs.state_dict())
    before = p.detach().clone()
    second.step()
    assert second.state[p]["master"].dtype == torch.float32
    assert second.state[p]["step"] == 2 and not torch.equal(p, before)
