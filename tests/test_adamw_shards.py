"""AdamW on sharded parameters: FSDP2, HSDP and tensor parallelism equal one process.

One group of four gloo processes runs every function named `case_...` of this file, which is also
their script. Each test looks up what the processes reported about one case.
"""

import copy
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402

import gptfast  # noqa: E402
from gptfast.ops.adamw import adamw  # noqa: E402

WORLD = 4
MAX_SECONDS = 100  # for all cases together, on a busy machine
LR, EPS = 1e-2, 1e-4
# Uneven over two and over four processes: some of them hold no element of some tensors.
SHAPES = [(7, 5), (1,), (3, 2), (8,), (5,)]


class Group:
    """This process among the four, and their meshes."""

    def __init__(self, directory: Path) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.directory = directory
        self.rank = torch.distributed.get_rank()
        self.all = init_device_mesh("cpu", (WORLD,))
        self.grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        self.pair = self.grid["shard"]  # two meshes of two processes, which do the same

    def meshes(self) -> list[Any]:
        return [self.pair, self.all, self.grid]


def full(t: Tensor) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def equal_everywhere(t: Tensor) -> bool:
    """Return whether all processes hold the same bits."""
    every = [torch.empty_like(t) for _ in range(WORLD)]
    torch.distributed.all_gather(every, t.contiguous())
    return all(torch.equal(other, t) for other in every)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 9), nn.GELU(), nn.Linear(9, 1))
    return net.to(dtype)


def gpt() -> nn.Module:
    torch.manual_seed(4)
    sizes = {"vocab_size": 31, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 12}
    return gptfast.GPT(gptfast.GPTConfig(**sizes))


def batch(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    if isinstance(getattr(net, "module", net), gptfast.GPT):  # as DDP wraps it
        return torch.randint(31, (4, 8), generator=generator)
    return torch.randn(4, 5, generator=generator)


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x, x) if x.dtype == torch.int64 else net(x).square().mean() * 30


def trained(
    make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module], parts: int, part: int,
    **options: Any,
) -> tuple[nn.Module, gptfast.AdamW]:  # fmt: skip
    """Return a network after three steps on this part of each batch, and its optimizer."""
    net = wrap(make())
    optimizer = gptfast.AdamW(net.parameters(), lr=LR, eps=EPS, **options)
    for step in range(3):
        optimizer.zero_grad()
        x = batch(net, step)
        rows = x.shape[0] // parts
        loss_of(net, x[part * rows : (part + 1) * rows]).backward()
        optimizer.step()
    return net, optimizer


def sharded(mesh: Any) -> Callable[[nn.Module], nn.Module]:
    from torch.distributed.fsdp import fully_shard

    def wrap(net: nn.Module) -> nn.Module:
        for block in net.h if isinstance(net, gptfast.GPT) else [net[2]]:
            fully_shard(block, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    return wrap


def fsdp2_equals_one_process(group: Group, mesh: Any, make: Callable[[], nn.Module]) -> None:
    parts = mesh.size()
    part = mesh.get_local_rank() if mesh.ndim == 1 else group.rank
    for max_norm in (None, 0.3, float("inf")):
        alone, twin = trained(make, lambda net: net, 1, 0, max_norm=max_norm)
        net, optimizer = trained(make, sharded(mesh), parts, part, max_norm=max_norm)
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(full(p), q.detach(), rtol=0, atol=2e-5)
            assert type(optimizer.state[p]["exp_avg"]) is type(optimizer.state[p]["exp_avg_sq"])
            assert optimizer.state[p]["exp_avg"].placements == p.placements
            assert optimizer.state[p]["step"] == 3
        if max_norm is not None:
            norm = optimizer.grad_norm
            assert type(norm) is Tensor and norm.shape == () and equal_everywhere(norm)
            torch.testing.assert_close(norm, twin.grad_norm, rtol=1e-5, atol=0)


def case_fsdp2_of_two(group: Group) -> None:
    fsdp2_equals_one_process(group, group.pair, network)


def case_fsdp2_of_four(group: Group) -> None:
    fsdp2_equals_one_process(group, group.all, network)


def case_hsdp(group: Group) -> None:
    fsdp2_equals_one_process(group, group.grid, network)


def case_fsdp2_of_gpt(group: Group) -> None:
    fsdp2_equals_one_process(group, group.pair, gpt)


def placements_of(mesh: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]


def distributed(t: Tensor, mesh: Any, placements: list[Any] | None = None) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, mesh, placements or placements_of(mesh))


def drawn(dtype: torch.dtype, seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


def case_the_same_bits_as_one_process(group: Group) -> None:
    """With given gradients, each element takes the step that it takes on one process."""
    for mesh in group.meshes():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            alone = [nn.Parameter(x) for x in drawn(dtype, 0)]
            params = [nn.Parameter(distributed(x, mesh)) for x in drawn(dtype, 0)]
            optimizers = [gptfast.AdamW(p, lr=LR) for p in (alone, params)]
            for step in range(3):
                for p, q, g in zip(alone, params, drawn(dtype, 1 + step), strict=True):
                    p.grad, q.grad = g, distributed(g, mesh)
                for optimizer in optimizers:
                    optimizer.step()
                with torch.no_grad():  # the masters must follow
                    alone[0].mul_(2)
                    params[0].mul_(2)
            for p, q in zip(alone, params, strict=True):
                assert torch.equal(p.detach(), full(q))
                states = [o.state[x] for o, x in zip(optimizers, (p, q), strict=True)]
                assert states[0].keys() == states[1].keys()
                assert ("master" in states[0]) == (dtype != torch.float32)
                assert all(torch.equal(x, full(states[1][name])) for name, x in states[0].items())


def case_stochastic_rounding(group: Group) -> None:
    for mesh in group.meshes():
        w = nn.Parameter(distributed(torch.ones(4096, dtype=torch.bfloat16), mesh))
        options = {"lr": 1e-4, "weight_decay": 0.0, "bf16_update": "stochastic"}
        optimizer = gptfast.AdamW([w], **options)
        for _ in range(10):
            w.grad = distributed(torch.ones(4096, dtype=torch.bfloat16), mesh)
            optimizer.step()
        whole = full(w)
        # As in test_adamw.py, where the parameter is on one process.
        deviation = (10 * 1e-4 * 2**-8 / 4096) ** 0.5
        assert abs(whole.double().mean().item() - (1 - 1e-3)) < 4 * deviation
        # Replicas are equal, and no two parts have the same random numbers.
        assert equal_everywhere(whole.float())
        parts = whole.chunk(mesh.size(mesh.ndim - 1))
        pairs = [(a, b) for i, a in enumerate(parts) for b in parts[:i]]
        assert pairs and not any(torch.equal(a, b) for a, b in pairs)
        assert "master" not in optimizer.state[w]


def case_norm_of_every_placement(group: Group) -> None:
    """Plain, replicated and split parameters of three meshes count once each."""
    from torch.distributed.tensor import Replicate, Shard

    kinds: list[Any] = [
        None,
        (group.all, [Shard(0)]),
        (group.pair, [Shard(0)]),
        (group.grid, [Replicate(), Shard(0)]),
        (group.grid, [Shard(0), Shard(1)]),
        (group.grid, [Shard(1), Replicate()]),
        (group.grid, [Replicate(), Replicate()]),
        (group.all, [Shard(1)]),
    ]
    generator = torch.Generator().manual_seed(8)
    values = [torch.randn(5, 3, generator=generator) for _ in kinds]
    grads = [torch.randn(5, 3, generator=generator) for _ in kinds]
    place = [(lambda t, kind=kind: t if kind is None else distributed(t, *kind)) for kind in kinds]
    params = [nn.Parameter(f(x.clone())) for f, x in zip(place, values, strict=True)]
    alone = [nn.Parameter(x.clone()) for x in values]
    optimizer = gptfast.AdamW(params, lr=LR, eps=EPS, max_norm=0.5)
    twin = gptfast.AdamW(alone, lr=LR, eps=EPS, max_norm=0.5)
    for _ in range(3):
        for p, q, f, g in zip(params, alone, place, grads, strict=True):
            p.grad, q.grad = f(g), g
        optimizer.step()
        twin.step()
    torch.testing.assert_close(optimizer.grad_norm, twin.grad_norm, rtol=2**-22, atol=0)
    assert equal_everywhere(optimizer.grad_norm)
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(full(p), q.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        full(torch.nn.utils.get_total_norm([p.grad for p in params[1:2]])), grads[1].norm()
    )


def case_gradients_with_other_placements(group: Group) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    grad = torch.arange(15.0).view(5, 3)
    share = grad / WORLD  # whose sum over the processes is the gradient
    for placement in (Shard(0), Shard(1), Replicate()):
        for other in (
            DTensor.from_local(share, group.all, [Partial()]),
            distributed(grad, group.all, [Shard(1)]),
            distributed(grad, group.all, [Replicate()]),
        ):
            w = nn.Parameter(distributed(torch.ones(5, 3), group.all, [placement]))
            alone = nn.Parameter(torch.ones(5, 3))
            w.grad, alone.grad = other, grad
            for p in (w, alone):
                optimizer = gptfast.AdamW([p], lr=LR, max_norm=0.5)
                optimizer.step()
                torch.testing.assert_close(optimizer.grad_norm, grad.norm())
            torch.testing.assert_close(full(w), alone.detach())


def case_a_bad_gradient_on_one_process_skips_the_step_on_all(group: Group) -> None:
    for mesh in group.meshes():
        params = [nn.Parameter(distributed(x, mesh)) for x in drawn(torch.bfloat16, 0)]
        params.append(nn.Parameter(torch.ones(2)))
        optimizer = gptfast.AdamW(params, max_norm=1.0)
        for bad in (None, torch.inf, torch.nan):
            before = copy.deepcopy([params, list(optimizer.state.values())])
            for p, g in zip(params, [*drawn(torch.bfloat16, 1), torch.ones(2)], strict=True):
                p.grad = distributed(g, mesh) if p is not params[-1] else g
            local = params[0].grad.to_local()
            if bad is not None and mesh.get_local_rank(mesh.ndim - 1) == 1:
                local[0, 0] = bad
            optimizer.step()
            assert optimizer.grad_norm.isfinite() == (bad is None)
            if bad is not None:
                for p, q in zip(params, before[0], strict=True):
                    assert torch.equal(full(p), full(q))
                for state, old in zip(optimizer.state.values(), before[1], strict=True):
                    assert all(torch.equal(full(state[name]), full(old[name])) for name in old)


def case_a_process_without_gradients_does_not_hold_up_the_others(group: Group) -> None:
    params = [nn.Parameter(distributed(x, group.all)) for x in drawn(torch.float32, 0)]
    optimizer = gptfast.AdamW(params, max_norm=1.0)
    for p, g in zip(params, drawn(torch.float32, 1), strict=True):
        p.grad = distributed(g, group.all)
    if group.rank == 2:
        optimizer.zero_grad()
    optimizer.step()
    assert equal_everywhere(optimizer.grad_norm) and optimizer.grad_norm > 0


def accumulated(net: nn.Module, optimizer: gptfast.AdamW, sync: Callable[[bool], Any],
    group: Group, scaler: Any = None, clip: bool = False) -> None:  # fmt: skip
    """Take three steps, each of two micro-batches of this process's row, as a user's loop does."""
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            x = batch(net, 2 * step + part)
            row = group.rank % 2
            with sync(part == 1):
                loss = loss_of(net, x[2 * row : 2 * row + 2]) / 2
                (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


def wrapped(how: str, group: Group) -> tuple[nn.Module, Callable[[bool], Any]]:
    """Return a GPT for two processes, and what decides whether a backward sums gradients."""
    if how == "ddp":
        mesh = group.pair.get_group()
        ddp: Any = nn.parallel.DistributedDataParallel(gpt(), process_group=mesh)
        return ddp, lambda last: nullcontext() if last else ddp.no_sync()
    net: Any = sharded(group.pair)(gpt())

    def sync(last: bool) -> Any:
        net.set_requires_gradient_sync(last)
        return nullcontext()

    return net, sync


def users_loop_equals_one_process(group: Group, clip: bool, scaled: bool) -> None:
    alone = gpt()
    own = gptfast.AdamW(alone.parameters(), lr=LR, eps=EPS, max_norm=0.3 if clip else None)
    for step in range(3):
        own.zero_grad()
        for part in range(2):
            x = batch(alone, 2 * step + part)
            (loss_of(alone, x) / 2).backward()
        own.step()
    for how in ("ddp", "fsdp"):
        net, sync = wrapped(how, group)
        optimizer = gptfast.AdamW(net.parameters(), lr=LR, eps=EPS)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        accumulated(net, optimizer, sync, group, scaler, clip)
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(full(p), q.detach(), rtol=0, atol=2e-5)


def case_accumulation_without_sums(group: Group) -> None:
    users_loop_equals_one_process(group, clip=False, scaled=False)


def case_clip_grad_norm(group: Group) -> None:
    users_loop_equals_one_process(group, clip=True, scaled=False)


def case_grad_scaler(group: Group) -> None:
    users_loop_equals_one_process(group, clip=False, scaled=True)
    users_loop_equals_one_process(group, clip=True, scaled=True)


def case_grad_scaler_skips_on_all(group: Group) -> None:
    """A gradient that is not finite on one process: none takes the step, and the scale falls."""
    for how in ("ddp", "fsdp"):
        net, sync = wrapped(how, group)
        optimizer = gptfast.AdamW(net.parameters(), lr=LR)
        before = [full(p).clone() for p in net.parameters()]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with sync(True):
            loss = loss_of(net, batch(net, 0)[:2])
            scaler.scale(loss * (torch.inf if group.rank % 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        assert all(torch.equal(full(p), q) for p, q in zip(net.parameters(), before, strict=True))


def case_fsdp1(group: Group) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    alone, _ = trained(network, lambda net: net, 1, 0)
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD):
        for original in (True, False):

            def wrap(net: nn.Module, how: Any = (strategy, original)) -> nn.Module:
                return FullyShardedDataParallel(
                    net,
                    sharding_strategy=how[0],
                    use_orig_params=how[1],
                    device_id=torch.device("cpu"),
                )

            for max_norm in (1.0, float("inf")):
                with pytest.raises(ValueError, match="max_norm would clip .*fully_shard"):
                    trained(network, wrap, WORLD, group.rank, max_norm=max_norm)
            net, _ = trained(network, wrap, WORLD, group.rank)
            with FullyShardedDataParallel.summon_full_params(net):
                for p, q in zip(net.parameters(), alone.parameters(), strict=True):
                    torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=2e-5)


def case_checkpoints(group: Group) -> None:
    """A state goes through torch.distributed.checkpoint to another mesh and steps to the bit."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def network16() -> nn.Module:
        return network(torch.bfloat16)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, mesh: Any) -> None:
        for i, p in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(i)
            p.grad = distributed(torch.randn(p.shape, generator=generator).bfloat16(), mesh)
        optimizer.step()

    net = sharded(group.pair)(network16())
    optimizer = gptfast.AdamW(net.parameters(), lr=LR)
    step(net, optimizer, group.pair)
    parts = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=group.directory / "checkpoint")
    other = sharded(group.all)(network16())
    resumed = gptfast.AdamW(other.parameters(), lr=1.0)
    parts = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
    dcp.load(parts, checkpoint_id=group.directory / "checkpoint")
    set_state_dict(
        other, resumed, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"]
    )
    # And through state_dict, on the same mesh.
    third = sharded(group.all)(network16())
    third.load_state_dict(other.state_dict())
    loaded = gptfast.AdamW(third.parameters())
    loaded.load_state_dict(copy.deepcopy(resumed.state_dict()))
    for n, o, mesh in (
        (net, optimizer, group.pair), (other, resumed, group.all), (third, loaded, group.all)
    ):  # fmt: skip
        step(n, o, mesh)
        assert o.param_groups[0]["lr"] == LR
    for p, *others in zip(*(n.parameters() for n in (net, other, third)), strict=True):
        for q, o in zip(others, (resumed, loaded), strict=True):
            assert torch.equal(full(p), full(q)) and o.state[q]["step"] == 2
            for name, x in optimizer.state[p].items():
                assert torch.equal(full(x), full(o.state[q][name]))


def case_state_of_torch(group: Group) -> None:
    results = []
    for first, second in (
        (gptfast.AdamW, torch.optim.AdamW), (torch.optim.AdamW, gptfast.AdamW)
    ):  # fmt: skip
        params = [nn.Parameter(distributed(x, group.all)) for x in drawn(torch.float32, 0)]
        optimizer = first(params, lr=LR)
        for cls in (first, second):
            if cls is second:
                state = optimizer.state_dict()
                optimizer = cls(params, lr=1.0)
                optimizer.load_state_dict(state)
            for p, g in zip(params, drawn(torch.float32, 1), strict=True):
                p.grad = distributed(g, group.all)
            optimizer.step()
        results.append([full(p) for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def case_refusals(group: Group) -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard

    partial = DTensor.from_local(torch.ones(4, 4), group.all, [Partial()])
    with pytest.raises(ValueError, match="sharded or replicated DTensors.*redistribute"):
        gptfast.AdamW([nn.Parameter(partial)])
    inner = DTensor.from_local(TwoTensor(torch.ones(2), torch.ones(2)), group.all, [Shard(0)])
    with pytest.raises(ValueError, match="plain tensors and DTensors, got TwoTensor"):
        gptfast.AdamW([nn.Parameter(inner)])
    # The state of a plain parameter does not fit a DTensor.
    plain = nn.Parameter(torch.ones(4, 4))
    split = nn.Parameter(distributed(torch.ones(4, 4), group.all))
    plain.grad, split.grad = torch.ones(4, 4), distributed(torch.ones(4, 4), group.all)
    states = []
    for p in (plain, split):
        optimizer = gptfast.AdamW([p])
        optimizer.step()
        states.append(optimizer.state_dict())
    for p, state in ((plain, states[1]), (split, states[0])):
        with pytest.raises(ValueError, match="exp_avg is a .*set_optimizer_state_dict"):
            gptfast.AdamW([p]).load_state_dict(state)
    # A state with other placements is moved.
    again = nn.Parameter(distributed(torch.ones(4, 4), group.all, [Shard(1)]))
    again.grad = distributed(torch.ones(4, 4), group.all, [Shard(1)])
    optimizer = gptfast.AdamW([again])
    optimizer.load_state_dict(states[1])
    optimizer.step()
    assert optimizer.state[again]["exp_avg"].placements == again.placements
    # As for plain tensors: what a graph saved before the step is no longer there.
    loss = (split * split).sum()
    gptfast.AdamW([split]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


CASES = {name: case for name, case in list(globals().items()) if name.startswith("case_")}


@contextmanager
def _process_group(rank: int, directory: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'rendezvous'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=MAX_SECONDS / 2),
    )
    yield
    torch.distributed.destroy_process_group()


def run_cases(rank: int, directory: Path) -> None:
    """Run all cases as one of the four processes, up to the first that fails."""
    reports = {}
    with _process_group(rank, directory):
        group = Group(directory)
        for name, case in CASES.items():
            start = time.monotonic()
            try:
                case(group)
                reports[name] = f"ok, {time.monotonic() - start:.1f} s"
            except BaseException:
                reports[name] = traceback.format_exc()
            torch.save(reports, directory / f"reports-{rank}")
            if not reports[name].startswith("ok"):
                # The others may be inside a collective: they see that this process is gone.
                os._exit(1)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Return what each of the four processes reported, by case."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    directory = tmp_path_factory.mktemp("shards")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(directory)], env=environment)
        for rank in range(WORLD)
    ]
    end = time.monotonic() + MAX_SECONDS
    try:
        for process in processes:
            process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # the cases that are missing in a report fail
    finally:
        for process in processes:
            process.kill()
            process.wait()
    paths = [directory / f"reports-{rank}" for rank in range(WORLD)]
    return [torch.load(path) if path.exists() else {} for path in paths]


@pytest.mark.parametrize("case", CASES)
def test_four_processes(case: str, reports: list[dict[str, str]]) -> None:
    for rank, report in enumerate(reports):
        assert report.get(case, "did not end").startswith("ok"), f"{rank}: {report.get(case)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_do_not_depend_on_an_element_s_place(isa: str, dtype: torch.dtype) -> None:
    """A part of a tensor takes the step that it takes in the whole, wherever its vectors begin."""
    whole = [torch.randn(157).to(dtype), torch.randn(157).to(dtype), torch.randn(157)]
    whole += [torch.rand(157), whole[0].float()]
    lr = torch.tensor(1e-2, dtype=torch.float64)

    def stepped(parts: list[slice]) -> list[Tensor]:
        lists = [[x[part].clone() for part in parts] for x in whole]
        if dtype == torch.float32:
            lists[4] = []
        steps, ids = [torch.tensor(2.0) for _ in parts], list(range(len(parts)))
        adamw(*lists, steps, lr, None, 1.0, 0.9, 0.95, 1e-8, 0.1, ids, False, 0)
        return [torch.cat(x) for x in lists if x]

    expected = stepped([slice(0, 157)])
    for at in (1, 2, 3, 5, 15, 16, 17, 33, 64, 100):
        for a, b in zip(stepped([slice(0, at), slice(at, 157)]), expected, strict=True):
            assert torch.equal(a, b)


def test_other_subclasses_are_refused() -> None:
    pair = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    with pytest.raises(ValueError, match="got TwoTensor; use torch.optim.AdamW"):
        gptfast.AdamW([pair])
    with pytest.raises(ValueError, match="got TwoTensor"):
        gptfast.AdamW([nn.Parameter(torch.ones(2))]).add_param_group({"params": [pair]})
    # A frozen one, as quantised models have, is never stepped.
    gptfast.AdamW([pair.requires_grad_(False), nn.Parameter(torch.ones(2))], max_norm=1.0).step()
    late = gptfast.AdamW([pair])
    pair.requires_grad_().grad = TwoTensor(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="got TwoTensor"):
        late.step()


def test_a_subclass_without_dispatch_is_a_plain_tensor() -> None:
    class Named(torch.Tensor):
        pass

    w = torch.ones(3).as_subclass(Named).requires_grad_()
    w.grad = torch.ones(3).as_subclass(Named)
    optimizer = gptfast.AdamW([w], lr=0.1, weight_decay=0.0, max_norm=10.0)
    optimizer.step()
    torch.testing.assert_close(w.detach().as_subclass(torch.Tensor), torch.full((3,), 0.9))


def test_dtensor_is_not_imported_before_it_is_used() -> None:
    code = "import sys, gptfast; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=MAX_SECONDS).returncode == 0


if __name__ == "__main__":
    run_cases(int(sys.argv[1]), Path(sys.argv[2]))
