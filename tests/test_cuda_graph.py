"""Compare steps that are replayed with steps that are run, bit for bit, without a GPU.

`Replays` stands for CUDA graphs on the CPU. It records every operator that a function calls, with
its tensors, and a replay calls the operators again: it writes where they wrote, and knows nothing
of the Python around them. A learning rate, seed or limit that was a Python value would stay what it
was at the capture.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import GPU
from helpers import differing, make_trainer, parameters, random_model, without_speed
from seeds import shifted
from test_train_step import batch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptfast import GPT, TrainConfig
from gptfast.training import cuda_graph
from gptfast.training.cuda_graph import WARM_UP_STEPS, CudaGraphs, StepGraph, recorder_for
from gptfast.training.step import Batch, RefusedStep, TrainStep

CPU = torch.device("cpu")
STEPS = 20
# What reads numbers back, and torch.tensor, which would copy them to a GPU: both wait for it.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.lift_fresh.default,
}


class _Recording(TorchDispatchMode):
    """The operators that were called, and what they overwrote that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self._made: set[int] = set()  # addresses of memory that came into being here
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in WAITING:
            raise RuntimeError(f"{func} waits for the GPU, which a capture forbids")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        out = func(*args, **kwargs)
        given = {_memory(x) for x in _tensors((args, kwargs))}
        self._made |= {_memory(x) for x in _tensors(out)} - given
        self.calls.append((func, args, kwargs, out))
        return out

    def _keep(self, written: Any) -> None:
        for x in _tensors(written):
            if _memory(x) not in self._made:
                self._before.setdefault(x.data_ptr(), (x.detach(), x.detach().clone()))

    @torch.no_grad()
    def undo(self) -> None:
        for now, before in self._before.values():
            now.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Replays:
    """The recorder of the CPU. It counts captures and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recording, rng = _Recording(), torch.get_rng_state()
        try:
            with recording:
                result = function()
        finally:
            recording.undo()
            torch.set_rng_state(rng)
        self.captures += 1

        def replay() -> Tensor:
            self.replays += 1
            recording.replay()
            return result

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Replays:
    """Let every TrainStep made in this test replay its steps."""
    recorder = Replays()
    monkeypatch.setattr("gptfast.training.step.recorder_for", lambda config, device: recorder)
    return recorder


@contextmanager
def eager() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptfast.training.step.recorder_for", lambda config, device: None)
        yield


def made(dropout: float = 0.0, **options: Any) -> TrainStep:
    torch.manual_seed(shifted(1))
    model = random_model(dropout=dropout, std=0.1).train()
    return TrainStep(model, TrainConfig(**options), CPU)


def rates(n: int = STEPS) -> list[float]:
    """Return a warm-up and a decay."""
    return [1e-3 * min(1.0, (i + 1) / 5) * (1 - i / (2 * n)) for i in range(n)]


def batches(step: int, per_step: int = 1, masked: float = 0.0) -> list[Batch]:
    return [batch(2, 9, 10 * step + i, masked) for i in range(per_step)]


def assert_same(ours: TrainStep, wanted: TrainStep) -> None:
    assert differing(parameters(ours.raw_model), parameters(wanted.raw_model)) == []
    pairs = zip(ours.raw_model.parameters(), wanted.raw_model.parameters(), strict=True)
    for p, q in pairs:
        mine, theirs = (s.optimizer.state.get(x, {}) for s, x in ((ours, p), (wanted, q)))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or q.grad is None or torch.equal(p.grad, q.grad)
    assert ours.guard.state_dict() == wanted.guard.state_dict()


Script = Callable[[TrainStep], list[dict[str, Any]]]


def compared(script: Script, **options: Any) -> tuple[TrainStep, list[dict[str, Any]]]:
    """Run a script with replays and without; return the replayed step and its rows."""
    with eager():
        wanted = made(**options)
        rows = script(wanted)
        rng = torch.get_rng_state()
    ours = made(**options)
    assert script(ours) == rows
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(ours, wanted)
    return ours, rows


@pytest.mark.parametrize(
    ("options", "per_step"),
    [
        ({}, 1),
        ({"dropout": 0.2}, 1),
        ({"dropout": 0.2, "precision": "bf16"}, 2),
        ({"activation_checkpointing": True}, 2),
        ({"freeze": ("wte.*", "h.0.*"), "skip_below": 1e-3}, 3),
        ({"lora_rank": 2, "lora_base_dtype": "int8"}, 2),
    ],
    ids=["plain", "dropout", "bf16-accumulated", "recomputed", "frozen", "lora-int8"],
)
def test_replays_are_the_steps(recorder: Replays, options: dict[str, Any], per_step: int) -> None:
    """Losses, weights, moments, gradients and random numbers are those of ordinary steps."""

    def script(step: TrainStep) -> list[dict[str, Any]]:
        # The numbers of targets differ from batch to batch, and so do the shares.
        return [step.run(batches(i, per_step, masked=0.3), rate) for i, rate in enumerate(rates())]

    _, rows = compared(script, **options)
    assert len({row["loss"] for row in rows}) == len({row["lr"] for row in rows}) == STEPS
    assert (recorder.captures, recorder.replays) == (1, STEPS - WARM_UP_STEPS)


def test_the_reference_is_replayed_too(recorder: Replays) -> None:
    """The operators record alike where no C++ kernel hides what they do."""
    from gptfast import use_backend

    def script(step: TrainStep) -> list[dict[str, Any]]:
        with use_backend("reference"):
            return [step.run(batches(i), rate) for i, rate in enumerate(rates(6))]

    compared(script, dropout=0.2)
    assert recorder.replays == 6 - WARM_UP_STEPS


def scaled(step: TrainStep) -> Tensor:
    """Let a number on the device multiply the loss, and return it."""
    scale = torch.ones(())
    model = step.raw_model
    step.model = lambda x, y: model(x, y) * scale
    return scale


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(torch.nan, "loss is nan"), (torch.inf, "loss is inf"), (30.0, "loss .* is an outlier")],
    ids=["nan", "inf", "outlier"],
)
def test_a_replay_refuses_what_the_guard_skips(
    recorder: Replays, factor: float, reason: str
) -> None:
    """The device refuses the update, for a limit that changes with each step."""

    def script(step: TrainStep) -> list[dict[str, Any]]:
        scale, rows = scaled(step), []
        for i, rate in enumerate(rates(24)):
            scale.fill_(factor if i == 20 else 1.0)
            before = parameters(step.raw_model)
            rows.append(step.run(batches(i), rate))
            assert (differing(before, parameters(step.raw_model)) == []) == (i == 20)
        return rows

    ours, rows = compared(script, dropout=0.2, nonfinite="skip", skip_zscore=5.0)
    assert [i for i, row in enumerate(rows) if "skipped" in row] == [20]
    assert ours.guard.skipped == 1 and re.match(reason, rows[20]["skipped"])
    assert recorder.replays == 24 - WARM_UP_STEPS


def test_a_refused_replay_leaves_no_trace(recorder: Replays) -> None:
    step = made(dropout=0.2, skip_zscore=6.0)
    scale = scaled(step)
    for i in range(4):
        step.run(batches(i), 1e-3)
    before, judged, rng = parameters(step.raw_model), step.guard.state_dict(), torch.get_rng_state()
    scale.fill_(torch.nan)
    with pytest.raises(RefusedStep, match="loss is nan"):
        step.run(batches(5), 1e-3)
    assert recorder.replays == 3
    assert differing(before, parameters(step.raw_model)) == []
    assert step.guard.state_dict() == judged and torch.equal(torch.get_rng_state(), rng)


def test_other_batches_run_without_the_graph(recorder: Replays) -> None:
    """A shorter batch, a smaller one, one without targets: the graph serves the steps after it."""
    odd = {5: [batch(2, 7, 1)], 7: [batch(1, 9, 2)], 9: [batch(2, 9, 3), batch(2, 9, 4, 1.1)]}
    odd |= {11: [batch(2, 9, 4, masked=1.1)], 13: [batch(2, 9, 5), batch(2, 9, 6)]}

    def script(step: TrainStep) -> list[dict[str, Any]]:
        rows = []
        for i, rate in enumerate(rates(16)):
            rows.append(step.run(odd.get(i, batches(i)), rate))
            # The optimizer has the norm of the step, whichever way it was taken.
            if "grad_norm" in rows[-1]:
                assert step.optimizer.grad_norm == rows[-1]["grad_norm"]
        return rows

    _, rows = compared(script, dropout=0.2)
    assert [i for i, row in enumerate(rows) if "skipped" in row] == [11]
    # In step 9 the batch without targets counts for nothing, so the other one is as usual.
    assert (recorder.captures, recorder.replays) == (1, 16 - WARM_UP_STEPS - 4)


@pytest.mark.parametrize(
    "what", ["state", "weights", "options", "model", "mode", "frozen", "dropout"]
)
def test_a_change_needs_another_graph(recorder: Replays, what: str) -> None:
    """What was loaded, set or exchanged between two steps counts from the next step on."""

    def change(step: TrainStep) -> None:
        model, optimizer = step.raw_model, step.optimizer
        if what == "state":
            optimizer.load_state_dict(optimizer.state_dict())
        elif what == "weights":
            model.wte.weight.data = model.wte.weight.data * 2
        elif what == "options":
            optimizer.param_groups[0]["weight_decay"] = 0.5
        elif what == "model":
            step.model = lambda x, y: model(x, y) * 3
        elif what == "mode":
            model.eval()
        elif what == "frozen":
            model.wpe.weight.requires_grad_(False)
        else:
            model.h[1].mlp.drop.p = 0.5

    def script(step: TrainStep) -> list[dict[str, Any]]:
        rows = []
        for i, rate in enumerate(rates(10)):
            if i == 5:
                change(step)
            rows.append(step.run(batches(i), rate))
        return rows

    compared(script, dropout=0.2)
    assert (recorder.captures, recorder.replays) == (2, 10 - 2 * WARM_UP_STEPS)


def test_a_capture_that_fails(recorder: Replays, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says why; the step and all after it run as they would have without a graph."""

    def script(step: TrainStep) -> list[dict[str, Any]]:
        model = step.raw_model
        step.model = lambda x, y: model(x, y) * (1.0 + 0.0 * model.ln_f.bias[0].item())
        return [step.run(batches(i), rate) for i, rate in enumerate(rates(6))]

    compared(script, dropout=0.2)
    assert recorder.captures == recorder.replays == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no CUDA graph, its capture failed: ") and "\n" not in line
    assert line.endswith("; steps run without, as with --no-cuda-graph")


HOOKS: dict[str, Callable[[TrainStep], Any]] = {
    "module": lambda step: step.raw_model.h[0].register_forward_hook(lambda *_: None),
    "parameter": lambda step: step.raw_model.wpe.weight.register_hook(lambda gradient: None),
    "optimizer": lambda step: step.optimizer.register_step_post_hook(lambda *_: None),
    "every optimizer": lambda step: register_optimizer_step_post_hook(lambda *_: None),
}


@pytest.mark.parametrize("first", [0, 5], ids=["from-the-start", "later"])
@pytest.mark.parametrize("where", HOOKS)
def test_no_graph_with_hooks(
    recorder: Replays, capsys: pytest.CaptureFixture[str], where: str, first: int
) -> None:
    """A hook is called in every step, also one that comes after the capture."""
    step, hook = made(), None
    try:
        for i in range(first + 5):
            if i == first:
                hook = HOOKS[where](step)
            step.run(batches(i), 1e-3)
    finally:
        if hook is not None:
            hook.remove()
    assert recorder.replays == max(0, first - WARM_UP_STEPS)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{where.removeprefix('every ')} has a hook" in line


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.h[0], "ln_1", torch.nn.RMSNorm(24)), "h.0.ln_1 is a torch"),
        (lambda model: None, "activation checkpointing with dropout repeats random numbers"),
    ],
    ids=["module-of-others", "recomputed-dropout"],
)
def test_what_no_graph_can_hold(
    recorder: Replays,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[GPT], None],
    reason: str,
) -> None:
    step = made(activation_checkpointing=True, dropout=0.1)
    change(step.raw_model)
    for i in range(5):
        step.run(batches(i), 1e-3)
    assert recorder.captures == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert reason in line


def test_the_stand_in_knows_no_python() -> None:
    """A Python value is what it was at the capture; a capture changes nothing by itself."""
    total, step = torch.zeros(2), 0

    def function() -> Tensor:
        total.add_(step + torch.rand(2))
        return total * 2

    torch.manual_seed(shifted(3))
    replay = Replays().capture(function)
    assert torch.equal(total, torch.zeros(2))
    expected = torch.zeros(2)
    for step in (5, 6):
        with torch.random.fork_rng():
            expected += torch.rand(2)
        assert torch.equal(replay(), expected * 2) and step
    with pytest.raises(RuntimeError, match="waits for the GPU"):
        Replays().capture(lambda: total * total.sum().item())


@pytest.mark.parametrize("cut", [None, 7], ids=["whole", "resumed"])
def test_a_run(recorder: Replays, tmp_path: Path, cut: int | None) -> None:
    """A run with evaluations, samples and checkpoints, resumed or not, is that without graphs."""
    options = {"max_steps": 12, "accumulation_steps": 2, "dropout": 0.2, "keep": 9}
    with eager():
        wanted = make_trainer(tmp_path / "eager", **options)
        wanted.fit()
    trainer = make_trainer(tmp_path / "run", **options)
    if cut is not None:
        real = trainer.train_step

        def train_step(step_batches: list[Batch]) -> dict[str, Any]:
            if trainer.progress.step == cut:
                raise InterruptedError
            return real(step_batches)

        trainer.train_step = train_step
        with pytest.raises(InterruptedError):
            trainer.fit()
        trainer = make_trainer(tmp_path / "run", init_seed=5, **options)
    trainer.fit(resume=cut is not None)
    assert without_speed(trainer.history) == without_speed(wanted.history)
    assert_same(trainer.step, wanted.step)
    # Checkpoints are written every third step; the resumed run begins at the sixth.
    expected = (1, 10) if cut is None else (2, (cut - 2) + (12 - 6 - 2))
    assert (recorder.captures, recorder.replays) == expected


def test_a_trainer_that_goes_on_from_a_checkpoint_captures_again(
    recorder: Replays, tmp_path: Path
) -> None:
    """The restored moments are other tensors than those of the graph."""
    trainer = make_trainer(tmp_path, max_steps=6)
    trainer.fit()
    trainer.total_steps = 12
    trainer.fit(resume=True)
    with eager():
        wanted = make_trainer(tmp_path / "eager", max_steps=6)
        wanted.fit()
        wanted.total_steps = 12
        wanted.fit(resume=True)
    assert_same(trainer.step, wanted.step)
    assert recorder.captures == 2


def test_when_there_is_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, made = torch.device("cuda"), object()
    monkeypatch.setattr(cuda_graph, "CudaGraphs", lambda: made)
    assert recorder_for(TrainConfig(), cuda) is made
    assert recorder_for(TrainConfig(), CPU) is None
    assert recorder_for(TrainConfig(cuda_graph=False), cuda) is None
    assert recorder_for(TrainConfig(compile=True), cuda) is None


@pytest.mark.parametrize("fails", [False, True], ids=["captured", "failed"])
def test_what_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Ordinary steps and the capture share a side stream; a failure restores the generator.

    If ending the capture fails too, the first error is the one that counts.
    """
    done: list[Any] = []
    generator = SimpleNamespace(clone_state=lambda: "before", graphsafe_set_state=done.append)

    class Stream:
        def wait_stream(self, other: Any) -> None:
            done.append(("waits", self is not main))

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    @contextmanager
    def ending() -> Iterator[None]:
        try:
            yield
        finally:
            if fails:
                raise RuntimeError("the capture was invalidated")

    main = Stream()
    fake = SimpleNamespace(
        Stream=Stream,
        CUDAGraph=Graph,
        current_stream=lambda: main,
        current_device=lambda: 0,
        default_generators=(generator,),
        stream=lambda stream: nullcontext(),
        graph=lambda graph, *, stream, capture_error_mode: ending(),
    )
    monkeypatch.setattr(cuda_graph.torch, "cuda", fake)
    graphs = CudaGraphs()
    assert graphs.run(lambda: torch.ones(())) == 1
    assert done == [("waits", True), ("waits", False)]
    done.clear()
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            graphs.capture(_out_of_memory)
        assert done == ["before"]
    else:
        assert graphs.capture(lambda: torch.ones(()))() == 1
        assert done == ["replay"]


def _out_of_memory() -> Tensor:
    raise RuntimeError("out of memory")


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_graph_on_a_gpu(triton: str, dropout: float) -> None:
    """Replays are ordinary steps, bit for bit; the loss at the end is that of the same draws."""

    def trained(graph: bool) -> tuple[TrainStep, list[dict[str, Any]]]:
        torch.manual_seed(shifted(1))
        with torch.device("cpu"):
            model = random_model(dropout=dropout, std=0.1).train()
            data = [batches(i, 2, masked=0.3) for i in range(STEPS)]
        device = torch.device("cuda")
        step = TrainStep(model.to(device), TrainConfig(cuda_graph=graph), device)
        return step, [step.run(*pair) for pair in zip(data, rates(), strict=True)]

    (ours, rows), (wanted, expected) = trained(True), trained(False)
    assert isinstance(ours._step, StepGraph) and ours._step.is_captured
    assert rows == expected
    assert_same(ours, wanted)
