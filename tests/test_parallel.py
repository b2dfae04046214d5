"""Several processes train the model that one trains, and end together whatever happens to one.

Those that take long run with `make test-distributed` only, as test_distributed.py does.
"""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from commands import refused, run
from helpers import differing, random_ids, random_model
from ranks import RUN, Ended, apart, losses, train, write_data
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gptfast.files
from gptfast import GPT, AdamW, GPTConfig, ops
from gptfast.cli.train import Train
from gptfast.device import peak_memory
from gptfast.dropout import Rows, draw_seed
from gptfast.model import empty_model
from gptfast.ops.attention_rows import attention_qkv_rows
from gptfast.torch_private import is_compiling
from gptfast.training import processes, shards
from gptfast.training.checkpoint import load_checkpoint
from gptfast.training.drawn import draw_parts
from gptfast.training.failures import Failures
from gptfast.training.parallel_step import ParallelStep
from gptfast.training.progress import RunCheckpoints
from gptfast.training.shared_memory import ALIGNMENT, Allotment, padded, share_memory
from gptfast.training.shared_state import SharedState, own_slice
from gptfast.training.shares import Split
from gptfast.training.trainer import Trainer
from gptfast.training.world import World
from gptfast.weights.checkpoint import checkpoints, read_state

STEPS = 30
KILLS = int(os.environ.get("GPTFAST_TEST_DISTRIBUTED", "0"))


def long(*values: Any) -> Any:
    """Return parameters of a test for `make test-distributed`."""
    return pytest.param(*values, marks=pytest.mark.skipif(not KILLS, reason="takes long"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert train(1, out, data, "--max-steps", str(STEPS)).codes == [0]
    return out


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of three processes."""
    out = tmp_path_factory.mktemp("three") / "run"
    assert train(3, out, data, "--max-steps", str(STEPS)).codes == [0, 0, 0]
    return out


def tensors(out: Path, file: str = "model") -> dict[str, Tensor]:
    """Return the tensors of a kind in the last checkpoint, which may be in several files."""
    paths = sorted(checkpoints(out)[-1].glob(f"{file}*.safetensors"))
    return {f"{path.stem}/{name}": x for path in paths for name, x in load_file(path).items()}


def assert_same_to_rounding(out: Path, other: Path) -> None:
    """Losses, norms and weights agree to 1e-6 of their size, and the random state to the bit."""
    for ours, theirs in zip(losses(out), losses(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    ours, theirs = (torch.cat([x.flatten() for x in tensors(o).values()]) for o in (out, other))
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    ours, theirs = (read_state(checkpoints(o)[-1]) for o in (out, other))
    assert ours["rng"] == theirs["rng"]
    for state in (ours, theirs):
        del state["config"]["train"]["compile"]
    assert ours["config"] == theirs["config"]


def assert_same_bits(out: Path, other: Path) -> None:
    assert losses(out) == losses(other)
    for file in ("model", "optimizer"):
        assert differing(tensors(out, file), tensors(other, file)) == []


def assert_one_line(ended: Ended, *words: str) -> None:
    """All ended with an error, of which one line tells."""
    assert all(ended.codes), ended
    assert len(ended.told) == 1, ended.told
    assert "Traceback" not in "".join(ended.errors)
    for word in words:
        assert word in ended.told[0]


# Rows of a batch


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(24, 1), (6, 4), (4, 6), (1, 24), (3, 8)])
def test_every_row_is_taken_once(size: int, batch_size: int, accumulation: int) -> None:
    rows = torch.arange(batch_size * accumulation).view(accumulation, batch_size, 1)
    taken, shapes = [], set()
    for rank in range(size):
        pieces = Split(rank, size, batch_size, accumulation).pieces([(x, x) for x in rows])
        mine = [piece for piece in pieces if piece.mine]
        shapes.add(tuple(len(piece.x) for piece in mine))
        for i, piece in enumerate(pieces):
            if piece.mine:
                first = piece.rows.first if piece.rows else 0
                assert piece.x[0, 0] == i * batch_size + first
                taken += piece.x.flatten().tolist()
            else:
                assert torch.equal(piece.x, rows[i])  # for the masks that it draws
    assert sorted(taken) == list(range(batch_size * accumulation))
    assert len(shapes) == 1


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_a_short_batch_is_shared_too(n: int) -> None:
    """The last batch of an epoch may have fewer rows than there are processes."""
    x = torch.arange(n)[:, None]
    pieces = [Split(rank, 4, 8, 1).pieces([(x, x)])[0] for rank in range(4)]
    assert sum(piece.count for piece in pieces) == n
    assert sorted(torch.cat([p.x[p.y != -100] for p in pieces]).tolist()) == list(range(n))


@pytest.mark.parametrize("size", [5, 7, 8, 24])
def test_a_size_that_does_not_divide_the_rows(size: int) -> None:
    with pytest.raises(ValueError, match=r"share the 12 rows.*\(1, 2, 3, 4, 6, 12\)"):
        Split(0, size, 6, 2)


@pytest.mark.parametrize(("first", "end"), [(0, 2), (2, 4), (1, 3), (3, 5), (2, 5), (4, 5)])
@pytest.mark.parametrize(("T", "H", "D"), [(1, 1, 16), (33, 3, 16), (64, 2, 64)])
def test_attention_of_rows_has_their_dropout(first: int, end: int, T: int, H: int, D: int) -> None:
    whole, dout = torch.randn(5, T, 3 * H * D, requires_grad=True), torch.randn(5, T, H * D)
    expected = ops.attention_qkv(whole, H, dropout_p=0.3, seed=7)
    expected.backward(dout)
    part = whole.detach()[first:end].clone().requires_grad_()
    out = attention_qkv_rows(part, H, first, dropout_p=0.3, seed=7)
    out.backward(dout[first:end])
    assert torch.equal(out, expected[first:end])
    assert whole.grad is not None and torch.equal(part.grad, whole.grad[first:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("first", "end"), [(0, 2), (2, 4), (1, 4)])
def test_a_model_of_rows_has_their_dropout(
    first: int, end: int, recomputed: bool, dtype: torch.dtype
) -> None:
    model, idx = random_model(dropout=0.3).train(), random_ids(4, 16)
    model.activation_checkpointing = recomputed
    results = []
    for rows in (None, Rows(first, 4)):
        torch.manual_seed(3)
        model.rows = rows
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            logits = model(idx if rows is None else idx[first:end])
        results.append(logits if rows is not None else logits[first:end])
        results[-1].float().square().sum().backward()
        results += [torch.get_rng_state()]
    # A product of fewer rows may be summed in another order.
    rounding = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(results[2], results[0], rtol=rounding, atol=rounding)
    assert torch.equal(results[1], results[3])
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        model.draw_only(4, 16)
    assert torch.equal(torch.get_rng_state(), results[1])


@pytest.mark.parametrize("more", [{}, {"tie_weights": False, "qkv_bias": False}])
def test_a_model_without_values_gets_those_of_gpt(more: dict[str, Any]) -> None:
    config = GPTConfig(vocab_size=67, block_size=9, n_layer=3, n_head=2, n_embd=16, **more)
    torch.manual_seed(5)
    whole, state = GPT(config), torch.get_rng_state()
    model = empty_model(config)
    model.to_empty(device="cpu")
    draw_parts(model, 5)
    assert differing(dict(model.state_dict()), dict(whole.state_dict())) == []
    assert torch.equal(torch.get_rng_state(), state)


# Memory that processes share


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 16, 17, 768, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_has_an_owner(n: int, size: int, dtype: torch.dtype) -> None:
    t = torch.zeros(n, dtype=dtype)
    for rank in range(size):
        own = own_slice(t, rank, size)
        t[own] += 1
        assert own.start * t.element_size() % ALIGNMENT == 0 or own.start == n
    assert t.eq(1).all()


class Meeting:
    """What two processes exchange, here two threads; `offer` changes what the first one offers."""

    def __init__(self, offer: Callable[[str], str] = str) -> None:
        self._offer, self._barrier = offer, threading.Barrier(2)
        self._texts: dict[str, list[str]] = {}

    def exchange(self, rank: int, what: str, text: str) -> list[str]:
        texts = self._texts.setdefault(what, ["", ""])
        texts[rank] = self._offer(text) if what == "is offered" and rank == 0 else text
        self._barrier.wait(timeout=20)
        return texts

    def memories(self, n_bytes: int) -> list[Tensor | None]:
        """Return what each gets."""
        with ThreadPoolExecutor(2) as threads:
            return list(
                threads.map(
                    lambda rank: share_memory(n_bytes, not rank, partial(self.exchange, rank)),
                    range(2),
                )
            )


needs_files_without_a_name = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="needs files without a name"
)


@needs_files_without_a_name
def test_memory_is_shared() -> None:
    files = len(os.listdir("/proc/self/fd"))
    ours, theirs = Meeting().memories(1000)
    assert ours is not None and theirs is not None and ours.data_ptr() != theirs.data_ptr()
    assert ours.shape == theirs.shape == (1000,) and not ours.any()
    ours[7], theirs[999] = 1, 2
    assert theirs[7] == 1 and ours[999] == 2
    del ours, theirs
    assert len(os.listdir("/proc/self/fd")) == files


@needs_files_without_a_name
@pytest.mark.parametrize(
    "offer",
    [
        lambda text: "",
        lambda text: text[:-1] + ("0" if text[-1] != "0" else "1"),
        lambda text: text.replace("/fd/", "/fd/99"),
        lambda text: f"{os.getpid()}/fd/0 {text.split()[1]}",
    ],
    ids=["none", "of another run", "no such file", "another file"],
)
def test_memory_that_is_not_to_be_had(offer: Callable[[str], str]) -> None:
    assert Meeting(offer).memories(1000) == [None, None]


def test_a_python_without_such_files_shares_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert Meeting().memories(1000) == [None, None]


def test_parts_of_a_memory() -> None:
    like = [torch.zeros(3, 5), torch.zeros((), dtype=torch.float64), torch.zeros(2, 0, 4)]
    like.append(torch.zeros(33, dtype=torch.bfloat16))
    memory = torch.zeros(sum(padded(t.nbytes) for t in like), dtype=torch.uint8)
    allotment = Allotment(memory)
    parts = [allotment.like(t) for t in like]
    for i, (part, t) in enumerate(zip(parts, like, strict=True)):
        assert part.shape == t.shape and part.dtype == t.dtype and part.is_contiguous()
        assert part.untyped_storage().nbytes() == t.nbytes  # what torch.save writes
        part.fill_(i + 1)
    assert all(part.eq(i + 1).all() for i, part in enumerate(parts))


class OfOne(World):
    """A process that shares memory with itself alone."""

    def shared_memory(self, n_bytes: int) -> Tensor:
        return torch.zeros(n_bytes, dtype=torch.uint8)


def test_the_optimizer_of_slices_follows_the_whole_and_holds_no_gradients() -> None:
    model = torch.nn.Linear(3, 4)
    whole = AdamW(model.parameters(), max_norm=1.0)
    state = SharedState(model, whole, OfOne())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    whole.max_norm = 0.5
    whole.param_groups[0]["lr"] = 0.25
    own = state.own_optimizer()
    assert own.max_norm == 0.5 and own.param_groups[0]["lr"] == 0.25
    assert model.weight.grad is not None
    gradient = StorageWeakRef(model.weight.grad.untyped_storage())
    own.step()
    state.forget_gradients()
    whole.zero_grad(set_to_none=True)
    assert gradient.expired()


# The same run


@pytest.mark.parametrize(
    ("n", "before"), [(2, None), (4, None), (2, apart), long(4, apart), long(6, None)]
)
def test_any_number_of_processes_makes_the_same_run(
    n: int, before: Any, tmp_path: Path, data: Path, alone: Path
) -> None:
    more = "--max-steps", str(STEPS), "--parallel", "ddp"
    ended = train(n, tmp_path / "run", data, *more, before=before)
    assert ended.codes == [0] * n
    assert not any(ended.out[1:]) and not any(ended.errors)
    assert_same_to_rounding(tmp_path / "run", alone)
    # The weights are still the same at step 0, and so are the losses, to the bit.
    assert losses(tmp_path / "run")[0] == losses(alone)[0]


@pytest.mark.parametrize(
    ("n", "how"),
    [
        (2, "fsdp"),
        (4, "hsdp"),
        long(3, "fsdp"),
        long(6, "hsdp --replicas 3"),
        long(3, "hsdp --replicas 3"),
    ],
)
def test_weights_in_parts_make_the_same_run(
    n: int, how: str, tmp_path: Path, data: Path, alone: Path
) -> None:
    for out in (tmp_path / "run", tmp_path / "again")[: 2 if n < 4 or KILLS else 1]:
        more = "--max-steps", str(STEPS), "--parallel", *how.split()
        # The second run saves beside its steps, which changes no bit.
        beside = ["--async-save"] if out.name == "again" else []
        ended = train(n, out, data, *more, *beside)
        assert ended.codes == [0] * n, ended
        assert not any(ended.out[1:]) and not any(ended.errors)
    assert_same_to_rounding(tmp_path / "run", alone)
    assert losses(tmp_path / "run")[0] == losses(alone)[0]
    if (tmp_path / "again").exists():
        assert_same_bits(tmp_path / "again", tmp_path / "run")


def test_three_processes_make_the_same_run(alone: Path, three: Path) -> None:
    assert_same_to_rounding(three, alone)


def test_two_runs_of_as_many_processes_are_the_same(
    tmp_path: Path, data: Path, three: Path
) -> None:
    assert train(3, tmp_path / "run", data, "--max-steps", str(STEPS)).codes == [0, 0, 0]
    assert_same_bits(tmp_path / "run", three)


def double_weights_after_the_run(rank: int) -> None:
    """Change weights and moments in each process, as a script may; write whether that was once."""
    real = Trainer.fit

    def fit(self: Trainer, **options: Any) -> Any:
        real(self, **options)
        states = self.step.optimizer.state.values()
        tensors = [p.detach() for p in self.model.parameters()]
        tensors += [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        before = [t.clone() for t in tensors]
        self.world.wait_for_first("all have a copy")
        for t in tensors:
            t.mul_(2)
        self.world.compare({"all": "have doubled"})
        once = all(map(torch.equal, tensors, [2 * x for x in before]))
        Path(os.environ["DOUBLED"], str(rank)).write_text(str(once))

    Trainer.fit = fit  # type: ignore[method-assign]


def test_weights_are_shared_until_the_end_of_a_run_only(tmp_path: Path, data: Path) -> None:
    doubling: dict[str, Any] = {"before": double_weights_after_the_run, "DOUBLED": str(tmp_path)}
    ended = train(2, tmp_path / "run", data, "--max-steps", "2", **doubling)
    assert ended.codes == [0, 0], ended
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["True", "True"]


def differ(rank: int) -> None:
    """Give each process a model of its own, as a script does whose seed depends on the rank."""
    real = Trainer.__init__

    def init(self: Trainer, model: GPT, *args: Any, **options: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * rank)
        real(self, model, *args, **options)

    Trainer.__init__ = init  # type: ignore[method-assign]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_all_begin_with_the_weights_of_the_first(how: str, tmp_path: Path, data: Path) -> None:
    more = "--max-steps", "2", "--freeze", "wpe.weight", "--parallel", how
    for name, before in (("other", differ), ("same", None)):
        assert train(2, tmp_path / name, data, *more, before=before).codes == [0, 0]
    assert losses(tmp_path / "other") == losses(tmp_path / "same")


def hook_a_step(rank: int) -> None:
    """Add a hook to the optimizer of a run."""
    real = Trainer.fit

    def fit(self: Trainer, **options: Any) -> Any:
        self.step.optimizer.register_step_post_hook(lambda *args: None)
        return real(self, **options)

    Trainer.fit = fit  # type: ignore[method-assign]


def test_hooks_of_the_optimizer_are_refused(tmp_path: Path, data: Path) -> None:
    ended = train(2, tmp_path / "run", data, "--max-steps", "2", before=hook_a_step)
    assert_one_line(ended, "the optimizer has a hook")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("4", "2"),
        ("1", "2 --parallel fsdp"),
        ("2 --parallel fsdp", "1"),
        long("2", "1"),
        long("1", "3"),
        long("2", "4 --parallel hsdp"),
        long("3 --parallel fsdp", "2 --parallel ddp"),
    ],
)
def test_resume_with_another_number(
    first: str, then: str, tmp_path: Path, data: Path, alone: Path
) -> None:
    steps = ["--max-steps", str(STEPS)]
    n, *how = first.split()
    ended = train(int(n), tmp_path / "run", data, *steps, *how, before=stop_at_step_12)
    assert ended.codes == ([0] * int(n) if n != "1" else [128 + signal.SIGTERM])
    assert read_state(checkpoints(tmp_path / "run")[-1])["step"] == 12
    n, *how = then.split()
    assert train(int(n), tmp_path / "run", data, *steps, *how, "--resume").codes == [0] * int(n)
    assert_same_to_rounding(tmp_path / "run", alone)


def test_prompts_and_short_batches(tmp_path: Path) -> None:
    """Masked prompts weigh right, and rows of another length have their masks."""
    lines = [
        f'{{"prompt": "{"a" * (i % 7 + 1)}", "completion": "{"b" * (i % 5)}c"}}' for i in range(60)
    ]
    data = tmp_path / "examples.jsonl"
    data.write_text("\n".join(lines))
    runs = [(1, []), (4, []), (2, ["--parallel", "fsdp"]), (6, [])]
    for n, how in runs if KILLS else runs[:3]:
        ended = train(n, tmp_path / str(n), data, "--max-steps", "12", *how)
        assert ended.codes == [0] * n, ended
    for n, _ in runs[1:] if KILLS else runs[1:3]:
        assert_same_to_rounding(tmp_path / str(n), tmp_path / "1")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "option",
    [
        "--precision bf16",
        "--activation-checkpointing",
        "--freeze wpe.* h.0.*",
        "--eval-batches 1",
        "--dropout 0",
        "--vocab-size 259 --freeze wte.* ln_f.*",
        "--vocab-size 259 --no-tie-weights",
    ],
)
def test_options(option: str, how: str, tmp_path: Path, data: Path) -> None:
    for n, more in ((1, []), (2, ["--parallel", how])):
        argv = "--max-steps", "6", *option.split(), *more
        ended = train(n, tmp_path / str(n), data, *argv)
        assert ended.codes == [0] * n and not any(ended.errors), ended
    rel = 2e-3 if "bf16" in option else 1e-6
    for ours, theirs in zip(losses(tmp_path / "2"), losses(tmp_path / "1"), strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


def write_peak(rank: int) -> None:
    """Make a run write its peak memory in MB beside its output, before its model and at the end.

    Under ddp, each process has a model of its own, as on machines of their own.
    """
    apart(rank)
    real = Trainer.fit

    def peak() -> int:
        return peak_memory("cpu") // 2**20

    def fit(self: Trainer, **options: Any) -> Any:
        real(self, **options)
        Path(os.environ["PEAKS"], str(rank)).write_text(f"{before} {peak()}")

    before = peak()
    Trainer.fit = fit  # type: ignore[method-assign]


@pytest.mark.parametrize("how", ["fsdp", long("hsdp --replicas 2"), long("ddp")])
def test_weights_to_start_from(how: str, tmp_path: Path, data: Path, alone: Path) -> None:
    """Each process takes its rows of --init; the rows of new tokens are those of one process."""
    init = "--max-steps", "3", "--init", str(alone), "--vocab-size", "261", "--resize-vocab"
    for n, more in ((1, []), (2, ["--parallel", *how.split()])):
        ended = train(n, tmp_path / str(n), data, *init, *more)
        assert ended.codes == [0] * n, ended
    assert_same_to_rounding(tmp_path / "2", tmp_path / "1")
    assert losses(tmp_path / "2")[0] == losses(tmp_path / "1")[0]


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that were made in the block and are held: `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._storages = 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if all(returned.alias_info is None for returned in func._schema.returns):
            for x in tree_leaves(out):
                x = x.to_local() if isinstance(x, DTensor) else x
                if isinstance(x, Tensor) and x.device.type == "cpu":
                    storage = x.untyped_storage()
                    self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            kept = {key: it for key, it in self._storages.items() if not it[0].expired()}
            self._storages = kept
            self.peak = max(self.peak, sum(size for _, size in kept.values()))
        return out


def write_held(rank: int) -> None:
    """Make a run write how much it holds at most of what it makes when it builds, loads, saves."""
    for name, kind in (("trainer", Train), ("restore", RunCheckpoints), ("save", RunCheckpoints)):

        def counted(self: Any, *args: Any, name: str, real: Any) -> Any:
            with Held() as held:
                result = real(self, *args)
            Path(os.environ["HELD"], f"{name}-{rank}").write_text(str(held.peak))
            return result

        setattr(kind, name, partialmethod(counted, name=name, real=getattr(kind, name)))


def test_no_process_holds_the_whole_model(tmp_path: Path, data: Path) -> None:
    """Peak memory of construction, a save and a load, in bytes of whole models."""
    shape = "--n-layer 8 --n-embd 64 --accumulation-steps 1 --sample-tokens 0 --parallel fsdp"
    more = *shape.split(), "--checkpoint-interval", "1", "--eval-batches", "1"
    counting: dict[str, Any] = {"before": write_held, "HELD": str(tmp_path)}
    out = tmp_path / "run"
    assert train(2, out, data, *more, "--max-steps", "1", **counting).codes == [0, 0]
    whole = sum(x.nbytes for x in load_file(checkpoints(out)[-1] / "model.safetensors").values())
    started = {path.name: int(path.read_text()) / whole for path in tmp_path.glob("*-[01]")}
    assert train(2, out, data, *more, "--max-steps", "2", "--resume", **counting).codes == [0, 0]
    resumed = {path.name: int(path.read_text()) / whole for path in tmp_path.glob("*-[01]")}
    # One module at a time beside the half that stays; when loading, two moments of that half too.
    for rank in "01":
        assert 0.5 <= started[f"trainer-{rank}"] < 0.7, started
        assert started[f"save-{rank}"] < 0.2, started
        assert 1.0 <= resumed[f"restore-{rank}"] < 1.2, resumed


@pytest.mark.skipif(not KILLS, reason="takes long")
def test_memory_of_weights_in_parts(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the framework, two processes of fsdp take at most 0.6 of ddp's memory each."""
    monkeypatch.setattr("ranks.DEADLINE_S", 300.0)
    run = "--n-layer 12 --n-head 8 --n-embd 512 --vocab-size 25000 --max-length 16 --batch-size 2"
    run += " --accumulation-steps 1 --dropout 0 --max-steps 2 --eval-batches 1 --sample-tokens 0"
    taken = {}
    for how in ("ddp", "fsdp"):
        (tmp_path / how).mkdir()
        more = *run.split(), "--parallel", how
        peaks = {"before": write_peak, "PEAKS": str(tmp_path / how)}
        assert train(2, tmp_path / f"run-{how}", data, *more, **peaks).codes == [0, 0]
        files = [(tmp_path / how / str(rank)).read_text().split() for rank in range(2)]
        taken[how] = [int(end) - int(before) for before, end in files]
    assert max(taken["fsdp"]) <= 0.6 * min(taken["ddp"]), taken


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_code_has_the_masks_of_the_rows(recomputed: bool) -> None:
    model, idx = random_model(dropout=0.3).train(), random_ids(4, 16)
    model.activation_checkpointing, model.rows = recomputed, Rows(1, 4)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        seed = draw_seed(idx.device)  # compiled, it would be another
        loss = forward(idx[1:3], idx[1:3], seed=seed)
        model.zero_grad()
        loss.backward()
        gradients = [param.grad.clone() for param in model.parameters() if param.grad is not None]
        results.append((loss.detach(), *gradients, torch.get_rng_state()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert torch.equal(results[0][-1], results[1][-1])


@pytest.mark.parametrize(
    ("n", "how"),
    [(1, ""), (2, "--parallel ddp"), (2, "--parallel fsdp"), (2, "--parallel fsdp recomputed")],
)
@pytest.mark.parametrize("batches", ["12 --accumulation-steps 1", "3 --accumulation-steps 4"])
@pytest.mark.skipif(not KILLS, reason="takes long")
def test_compiled(
    batches: str, n: int, how: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that share the rows of each batch, or have some batches each, against eager."""
    monkeypatch.setattr(ranks, "DEADLINE_S", 300.0)
    shared = f"--max-steps 6 --batch-size {batches}".split()
    if "recomputed" in how:
        shared.append("--activation-checkpointing")
    assert train(1, tmp_path / "eager", data, *shared).codes == [0]
    compiled = f"--compile {how.removesuffix('recomputed')}".split()
    ended = train(n, tmp_path / "run", data, *shared, *compiled)
    assert ended.codes == [0] * n, ended
    assert_same_to_rounding(tmp_path / "run", tmp_path / "eager")


def hang_in_a_compiler() -> None:
    """Hang in code of a file of PyTorch's compiler, as a trace of the stack tells it."""
    file = Path(torch.__file__).parent / "_inductor" / "compile_fx.py"
    exec(compile("pause()", str(file), "exec"), {"pause": signal.pause})


def slow_compiler(rank: int) -> None:
    """Let rank 1 do something in its first step, in place of a compiler."""
    torch.compile = lambda compiled, **_: compiled  # type: ignore[assignment]
    processes.COMPILE_TIMEOUTS = int(os.environ["COMPILE_TIMEOUTS"])
    real, doing = GPT.forward, {"sleep": lambda: time.sleep(3), "hang": hang_in_a_compiler}
    doing["stop"] = lambda: os.kill(os.getpid(), signal.SIGSTOP)
    todo = [doing[os.environ["COMPILER"]]] if rank == 1 else []

    def forward(self: GPT, *args: Any, **options: Any) -> Any:
        while todo and self.training:
            todo.pop()()
        return real(self, *args, **options)

    GPT.forward = forward  # type: ignore[method-assign]


COMPILED = "--max-steps", str(STEPS), "--compile", "--dist-timeout", "2", "--parallel"


@pytest.mark.parametrize("how", ["ddp", long("fsdp")])
def test_a_process_that_compiles_for_longer_than_it_may_be_silent(
    how: str, tmp_path: Path, data: Path, alone: Path
) -> None:
    slow = {"before": slow_compiler, "COMPILER": "sleep", "COMPILE_TIMEOUTS": "9"}
    ended = train(2, tmp_path / "run", data, *COMPILED, how, **slow)
    assert ended.codes == [0, 0], ended
    assert_same_to_rounding(tmp_path / "run", alone)


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("hang", ["taken 4 s (2 x --dist-timeout): the compiler of rank 1 (process", "hangs"]),
        long("stop", ["rank 1"]),
    ],
)
def test_a_compiler_that_hangs(compiler: str, words: list[str], tmp_path: Path, data: Path) -> None:
    hanging = {"before": slow_compiler, "COMPILER": compiler, "COMPILE_TIMEOUTS": "2"}
    if compiler == "stop":
        hanging["COMPILE_TIMEOUTS"] = "99"
    ended = train(2, tmp_path / "run", data, *COMPILED, "ddp", **hanging)
    assert_one_line(ended, *words)


def test_a_thread_that_compiles() -> None:
    """It is told from one that runs what was compiled."""
    told: dict[str, bool] = {}

    def backend(graph: Any, inputs: Any) -> Any:
        told["compiles"] = is_compiling(threading.get_ident())

        def compiled(*args: Any) -> Any:
            told["computes"] = is_compiling(threading.get_ident())
            return graph(*args)

        return compiled

    torch.compile(torch.relu, backend=backend)(torch.ones(3))
    assert told == {"compiles": True, "computes": False}


# What one process meets, all answer


def at_step(step: int, rank: int, action: Any) -> None:
    """Make `action` happen in this process, if it has that rank, before that step."""
    real = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> Any:
        if self.progress.step == step and self.world.rank == rank:
            action()
        return real(self, batches)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def stop_at_step_12(rank: int) -> None:
    world = int(os.environ["WORLD_SIZE"])
    at_step(11, world - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))


def interrupt_all(rank: int) -> None:
    at_step(11, rank, lambda: os.kill(os.getpid(), signal.SIGINT))


def die_at_step_12(rank: int) -> None:
    victim = int(os.environ["VICTIM"])
    at_step(12, victim, lambda: os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"])))


def nan_at_step_12(rank: int) -> None:
    real, steps = ParallelStep._backward, iter(range(1000))

    def backward(self: ParallelStep, count: Tensor) -> Tensor:
        loss = real(self, count)
        return loss * torch.nan if next(steps) == 12 and rank == 1 else loss

    ParallelStep._backward = backward  # type: ignore[method-assign]


def full_disk_at_step_15(rank: int) -> None:
    real, saves = gptfast.files.save_file, iter(range(1000))

    def save_file(*args: Any, **options: Any) -> None:
        if next(saves) >= 4:  # two files a save, every five steps
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args, **options)

    gptfast.files.save_file = save_file


def hanging_disk_at_step_15(rank: int) -> None:
    processes.WRITE_TIMEOUTS = 2
    real, saves = gptfast.files.save_file, iter(range(1000))

    def save_file(*args: Any, **options: Any) -> None:
        if next(saves) >= 4:
            signal.pause()
        real(*args, **options)

    gptfast.files.save_file = save_file


def hanging_disk_of_rank_1_at_step_15(rank: int) -> None:
    processes.WRITE_TIMEOUTS = 2
    real, saves = shards.write_safetensors, iter(range(1000))

    def write(*args: Any) -> None:
        if rank == 1 and next(saves) == 2:  # one file a save
            signal.pause()
        real(*args)

    shards.write_safetensors = write


def full_disk_of_rank_1_at_step_15(rank: int) -> None:
    real, saves = shards.write_safetensors, iter(range(1000))

    def write(*args: Any) -> None:
        if rank == 1 and next(saves) == 2:  # one file a save
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    shards.write_safetensors = write


def die_in_the_save_of_step_15(rank: int) -> None:
    real, saves = shards.write_safetensors, iter(range(1000))

    def write(*args: Any) -> None:
        real(*args)
        if rank == 1 and next(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    shards.write_safetensors = write


def other_version(rank: int) -> None:
    if rank == 1:
        torch.__version__ = "2.0.0"


@pytest.mark.parametrize("stop", [stop_at_step_12, long(interrupt_all)])
def test_a_signal_ends_all_at_the_same_step(
    stop: Any, tmp_path: Path, data: Path, three: Path
) -> None:
    steps = ["--max-steps", str(STEPS)]
    ended = train(3, tmp_path / "run", data, *steps, before=stop)
    assert ended.codes == [0, 0, 0] and ended.told == []
    assert "stopped at step 12, all is saved" in ended.out[0]
    assert read_state(checkpoints(tmp_path / "run")[-1])["step"] == 12
    assert train(3, tmp_path / "run", data, *steps, "--resume").codes == [0, 0, 0]
    assert_same_bits(tmp_path / "run", three)


@pytest.mark.parametrize("how", ["ddp", long("fsdp")])
def test_a_loss_that_is_not_finite_on_one_is_refused_by_all(
    how: str, tmp_path: Path, data: Path
) -> None:
    steps = ["--max-steps", str(STEPS), "--parallel", how]
    ended = train(2, tmp_path / "run", data, *steps, before=nan_at_step_12)
    assert_one_line(ended, "loss is nan at step 13", "No weight was changed")
    assert read_state(checkpoints(tmp_path / "run")[-1])["step"] == 12
    skipping = train(
        2, tmp_path / "run", data, *steps, "--resume", "--nonfinite", "skip", before=nan_at_step_12
    )
    assert skipping.codes == [0, 0]
    assert "step 25 skipped: loss is nan" in skipping.out[0]


@pytest.mark.parametrize("victim", [1, long(0), long(2)])
def test_a_process_that_dies(victim: int, tmp_path: Path, data: Path, three: Path) -> None:
    steps = ["--max-steps", str(STEPS)]
    killed = {"VICTIM": str(victim), "SIGNAL": "SIGKILL"}
    # Without torchrun, the first process has the store: with it, the others cannot agree on who
    # prints the line.
    ended = train(3, tmp_path / "run", data, *steps, before=die_at_step_12, **killed)
    assert ended.codes == [-9 if rank == victim else 1 for rank in range(3)]
    assert all(f"rank {victim}" in line for line in ended.told), ended
    assert len(ended.told) == (1 if victim else 2)
    assert read_state(checkpoints(tmp_path / "run")[-1])["step"] == 10
    # torchrun --max-restarts starts the same command again.
    again = train(3, tmp_path / "run", data, *steps, TORCHELASTIC_RESTART_COUNT="1")
    assert again.codes == [0, 0, 0]
    assert "resumed from" in again.out[0]
    assert_same_bits(tmp_path / "run", three)


@pytest.mark.parametrize(("victim", "how"), [(1, "ddp"), long(0, "ddp"), long(1, "fsdp")])
def test_a_process_that_hangs(victim: int, how: str, tmp_path: Path, data: Path) -> None:
    hanging = {"VICTIM": str(victim), "SIGNAL": "SIGSTOP"}
    more = "--max-steps", str(STEPS), "--dist-timeout", "5", "--parallel", how
    ended = train(2, tmp_path / "run", data, *more, before=die_at_step_12, **hanging)
    assert_one_line(ended, f"rank {victim}", "dead, hanging or cut off")
    assert read_state(checkpoints(tmp_path / "run")[-1])["step"] == 10


def test_a_disk_that_is_full(tmp_path: Path, data: Path) -> None:
    more = "--max-steps", str(STEPS)
    ended = train(2, tmp_path / "run", data, *more, before=full_disk_at_step_15)
    assert_one_line(ended, "cannot save", "No space left on device")
    assert all(
        path.name.startswith("step-") or path.name == "best"
        for path in (tmp_path / "run/checkpoints").iterdir()
    )
    assert read_state(checkpoints(tmp_path / "run")[-1])["step"] == 10
    assert train(1, tmp_path / "run", data, *more, "--resume").codes == [0]


@pytest.mark.parametrize("n", [2, long(3)])
def test_a_disk_that_hangs(n: int, tmp_path: Path, data: Path) -> None:
    more = "--max-steps", str(STEPS), "--dist-timeout", "2"
    ended = train(n, tmp_path / "run", data, *more, before=hanging_disk_at_step_15)
    assert_one_line(ended, "rank 0 has been writing to", "for 4 s", "--resume continues")
    assert read_state(checkpoints(tmp_path / "run")[-1])["step"] == 10
    assert train(1, tmp_path / "run", data, *more[:2], "--resume").codes == [0]


def test_a_disk_of_one_part_that_hangs(tmp_path: Path, data: Path) -> None:
    """The first process, which waits for the other inside its own save, is not to blame."""
    more = "--max-steps", str(STEPS), "--dist-timeout", "2", "--parallel", "fsdp"
    ended = train(2, tmp_path / "run", data, *more, before=hanging_disk_of_rank_1_at_step_15)
    assert_one_line(ended, "rank 1 has been writing to", "for 4 s", "--resume continues")
    assert read_state(checkpoints(tmp_path / "run")[-1])["step"] == 10


@pytest.mark.parametrize("how", [["--async-save"], long([])])
def test_a_disk_of_one_part_that_is_full(how: list[str], tmp_path: Path, data: Path) -> None:
    more = "--max-steps", str(STEPS), "--parallel", "fsdp", *how
    ended = train(2, tmp_path / "run", data, *more, before=full_disk_of_rank_1_at_step_15)
    assert_one_line(ended, "cannot save", "step-00000015", "No space left on device")
    found = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert found == ["best", "step-00000005", "step-00000010"]
    assert read_state(checkpoints(tmp_path / "run")[-1])["step"] == 10


@pytest.mark.skipif(not KILLS, reason="takes long")
def test_a_process_that_dies_in_a_save(tmp_path: Path, data: Path) -> None:
    more = "--max-steps", str(STEPS), "--parallel", "fsdp", "--dist-timeout", "5"
    ended = train(2, tmp_path / "run", data, *more, before=die_in_the_save_of_step_15)
    assert ended.codes[1] == -9 and ended.codes[0] == 1, ended
    assert read_state(checkpoints(tmp_path / "run")[-1])["step"] == 10
    assert train(1, tmp_path / "run", data, *more[:2], "--resume").codes == [0]


def test_the_parts_of_a_checkpoint(tmp_path: Path, data: Path) -> None:
    """PyTorch's reader, and one process, find in them what each process wrote."""
    out = tmp_path / "run"
    more = "--max-steps", "2", "--vocab-size", "259", "--parallel", "fsdp"
    assert train(3, out, data, *more).codes == [0, 0, 0]
    (path,) = checkpoints(out)
    names = {file.name for file in path.glob("*.safetensors")}
    parts = {f"optimizer-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names == parts | {"model.safetensors"} and read_state(path)["step"] == 2
    model = GPT.from_pretrained(path)
    optimizer = AdamW(model.parameters())
    load_checkpoint(path, model, optimizer)
    ours = {
        f"{name}.{key}": x
        for name, param in model.named_parameters()
        for key, x in optimizer.state[param].items()
    }
    assert all(x.isfinite().all() for x in ours.values())
    assert ours["wte.weight.exp_avg"].shape == (259, 16) and ours["wte.weight.exp_avg"].any()
    theirs = {name: torch.full_like(x, torch.nan) for name, x in ours.items()}
    (path / "model.safetensors").unlink()  # their reader takes every file
    reader = HuggingFaceStorageReader(str(path))
    torch.distributed.checkpoint.load(theirs, storage_reader=reader, no_dist=True)
    assert differing(ours, theirs) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--lr", "0.5"], ["rank 1", "--lr 0.5"]),
        (["--n-layer", "3"], ["rank 1", "--n-layer 3"]),
        long(["--seed", "4"], ["rank 1", "seed 4", "rank 0 has 0"]),
        long(["--batch-size", "12"], ["rank 1", "--batch-size 12"]),
        long(["--max-steps", "7"], ["rank 1", "7", str(STEPS)]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_other_settings(more: list[str], words: list[str], tmp_path: Path, data: Path) -> None:
    options = {"of_rank": {1: more}}
    ended = train(3, tmp_path / "run", data, "--max-steps", str(STEPS), **options)
    assert_one_line(ended, *words)
    assert checkpoints(tmp_path / "run") == []


def test_other_data_or_versions(tmp_path: Path, data: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(data.read_text().replace("e", "a"))
    argv = tmp_path / "run", data, "--max-steps", str(STEPS)
    ended = train(2, *argv, of_rank={1: ["--data", str(other)]})
    assert_one_line(ended, "rank 1", "data")
    ended = train(2, *argv, of_rank={1: ["--data", str(tmp_path / "gone.txt")]})
    assert_one_line(ended, "gone.txt")
    ended = train(2, *argv, before=other_version)
    assert_one_line(ended, "rank 1 has torch 2.0.0")


def test_sizes_that_cannot_share(tmp_path: Path, data: Path) -> None:
    ended = train(5, tmp_path / "run", data, "--max-steps", "5")
    assert_one_line(ended, "5 processes cannot share the 12 rows", "1, 2, 3, 4, 6, 12")
    ended = train(3, tmp_path / "run", data, "--max-steps", "5", "--parallel", "hsdp")
    assert_one_line(ended, "3 processes cannot form 2 groups")


# Around it


def test_no_beat_is_under_way_when_the_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of one's own ends as Python does, which a thread that is in C++ then would abort."""
    begun, at_exit = threading.Event(), []

    class Slow:
        def set(self, key: str, value: str) -> None:
            if key.startswith("beat"):
                begun.set()
                time.sleep(0.1)

    monkeypatch.setattr("atexit.register", at_exit.append)
    Failures(0, 1, Slow, 5.0)  # type: ignore[arg-type]
    assert begun.wait(60)
    for function in at_exit:
        function()
    assert "gptfast-beats" not in [thread.name for thread in threading.enumerate()]


def test_flags_of_several_processes_need_them(capsys: Any, tmp_path: Path) -> None:
    refused(run(capsys, "train", "--parallel", "ddp", "--out", tmp_path / "run"), "torchrun")
    refused(run(capsys, "train", "--dist-timeout", "5", "--out", tmp_path / "run"), "torchrun")
    refused(run(capsys, "train", "--replicas", "2", "--out", tmp_path / "run"), "replicas", "hsdp")


def test_one_process_connects_nothing(alone: Path) -> None:
    code = "import sys, gptfast.training.trainer; print([m for m in sys.modules if m.endswith(\
('training.processes', 'training.failures', 'training.parallel_step', 'distributed.fsdp'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def torchrun() -> Iterator[list[str]]:
    yield [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_under_torchrun(torchrun: list[str], tmp_path: Path, data: Path) -> None:
    """The real thing: torchrun has the store, and its restart goes on from the checkpoint."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from gptfast.training.trainer import Trainer\n"
        "from gptfast.cli import main\n"
        "real = Trainer.train_step\n"
        "def train_step(self, batches):\n"
        "    first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "    if first and self.progress.step == 12 and self.world.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, batches)\n"
        "Trainer.train_step = train_step\n"
        "sys.exit(main())\n"
    )
    argv = [*RUN, "--data", str(data), "--max-steps", "15", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*torchrun, "--max-restarts", "1", str(script), *argv],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("gptfast: ")]
    assert len(told) == 1 and re.search(r"rank 1 \(process \d+ on .*\) does not answer", told[0])
    assert "resumed from" in done.stdout and losses(tmp_path / "run")[-1]["step"] == 15


@pytest.mark.skipif(not KILLS, reason="takes long")
def test_a_signal_to_torchrun(torchrun: list[str], tmp_path: Path, data: Path) -> None:
    """It hands the signal on, and waits until all is saved."""
    out = tmp_path / "run"
    argv = [*RUN, "--data", str(data), "--max-steps", "100000", "--out", str(out)]
    started = subprocess.Popen(
        [*torchrun, "-m", "gptfast", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    end = time.monotonic() + 60
    while time.monotonic() < end and not checkpoints(out):
        time.sleep(0.1)
    started.terminate()
    told, errors = started.communicate(timeout=60)
    found = re.search(r"SIGTERM: stopped at step (\d+), all is saved", told)
    assert found, (told, errors)
    assert read_state(checkpoints(out)[-1])["step"] == int(found[1])
