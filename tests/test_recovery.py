"""Killed and interrupted runs, damaged checkpoints, full disks: nothing is lost by a resumed run.

Runs are real processes, forked from one that has imported everything and has no threads.
"""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    differing,
    disk_of,
    make_trainer,
    parameters,
    without_speed,
)
from safetensors.torch import load_file
from seeds import python_generator

import gptfast.training.trainer
from gptfast import GPT, Trainer
from gptfast.training.metrics import read_metrics
from gptfast.weights.checkpoint import _read_state, checkpoints, read_state

STEPS = 16
# An epoch has 7 batches; every 3 steps comes an evaluation, every 2 a checkpoint.
OPTIONS = {"max_steps": STEPS, "checkpoint_interval": 2, "dropout": 0.2, "skip_zscore": 50.0}
FILES = [
    "config.json",
    "merges.txt",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "tokenizer_config.json",
    "train.toml",
    "vocab.json",
]


def trainer_at(out: Path, **changes: Any) -> Trainer:
    # With a checkpoint, the new process's own initial weights must not matter.
    return make_trainer(out, init_seed=99 if checkpoints(out) else 0, **{**OPTIONS, **changes})


def train(out: Path, shim: Callable[..., None] | None = None, *args: Any) -> None:
    """Run or resume one run in a child process, after `shim` has patched its operations."""
    assert multiprocessing.parent_process(), "what is replaced below would stay replaced"
    torch.set_num_threads(1)
    # Measuring the peak and plotting are slow, and no test here needs them.
    gptfast.training.trainer.peak_flops = lambda device, dtype: 1e12
    gptfast.training.trainer.plot_losses = lambda history, out: None
    if shim:
        shim(*args)
    trainer_at(out).fit(resume=True)


def before_each_operation(before: Callable[[str], None]) -> None:
    """Call `before` with the name of each disk operation of a save, just before it."""
    import gptfast.files as files

    def wrapped(name: str, real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            before(name)
            return real(*args, **kwargs)

        return call

    files.save_file = wrapped("save_file", files.save_file)
    for owner, name in (
        (os, "fsync"),
        (shutil, "rmtree"),
        (Path, "write_text"),
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "symlink_to"),
        (Path, "unlink"),
    ):
        setattr(owner, name, wrapped(name, getattr(owner, name)))


def kill_at_operation(n: int) -> None:
    """Kill this process before the n-th operation."""
    count = 0

    def die(name: str) -> None:
        nonlocal count
        count += 1
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)

    before_each_operation(die)


def kill_in_write(n: int) -> None:
    """Kill this process when the n-th file is half written."""
    import gptfast.files as files

    real, count = files.save_file, 0

    def save_file(tensors: dict, path: Path, **options: Any) -> None:
        nonlocal count
        count += 1
        real(tensors, path, **options)
        if count == n:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    files.save_file = save_file


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gptfast.training.trainer", "pytest", "torch._dynamo"])
    yield context


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread like the forked processes: the order of layer norm's sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """Run once without interruption."""
    out = tmp_path_factory.mktemp("whole")
    trainer_at(out).fit()
    return out


def duration_of_a_run(processes: Any, tmp_path: Path) -> float:
    for out in (tmp_path / "first", tmp_path / "timed"):  # the first run waits for the fork server
        start = time.perf_counter()
        timed = processes.Process(target=train, args=(out,))
        timed.start()
        timed.join()
        assert timed.exitcode == 0
    return time.perf_counter() - start


def assert_same_end(out: Path, whole: Path) -> None:
    assert without_speed(read_metrics(out)) == without_speed(read_metrics(whole))
    assert (out / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    for run_out in (out, whole):
        last = checkpoints(run_out)[-1]
        assert last.name == f"step-{STEPS:08d}"
        assert sorted(path.name for path in last.iterdir()) == FILES
        # No half-written files are left.
        hidden = [p for p in (run_out / "checkpoints").iterdir() if p.name.startswith(".")]
        assert hidden == []
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(checkpoints(o)[-1] / file) for o in (out, whole))
        assert differing(ours, theirs) == []
    ours, theirs = (read_state(checkpoints(o)[-1]) for o in (out, whole))
    for name in ("step", "tokens", "best", "bad_evaluations", "guard", "rng", "pending"):
        assert ours[name] == theirs[name], name


def assert_whole(out: Path) -> None:
    """Check that every directory with a checkpoint's name is a whole checkpoint."""
    for path in checkpoints(out):
        read_state(path)


def test_killed_at_twenty_random_moments(processes: Any, whole: Path, tmp_path: Path) -> None:
    """After SIGKILL at any time, the last complete checkpoint works and the end is the same."""
    rng = python_generator(0)
    duration = duration_of_a_run(processes, tmp_path)
    kills, out, runs = 0, tmp_path / "run-0", 0
    while kills < 20:
        process = processes.Process(target=train, args=(out,))
        process.start()
        process.join(rng.uniform(0.1, 1.0) * duration)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            assert_whole(out)
            continue
        assert process.exitcode == 0
        assert_same_end(out, whole)
        runs += 1
        out = tmp_path / f"run-{runs}"
    process = processes.Process(target=train, args=(out,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same_end(out, whole)


def operations_of_a_run(out: Path, processes: Any) -> int:
    queue = processes.SimpleQueue()
    process = processes.Process(target=train, args=(out, count_operations, queue))
    process.start()
    process.join()
    assert process.exitcode == 0
    return queue.get()


def count_operations(queue: Any) -> None:
    """Put the run's number of operations into the queue when it ends."""
    import multiprocessing.util as util

    names: list[str] = []
    before_each_operation(names.append)
    util.Finalize(None, lambda: queue.put(len(names)), exitpriority=1)


def test_killed_at_the_operations_of_a_save(processes: Any, whole: Path, tmp_path: Path) -> None:
    """Kill at every write, fsync, rename and deletion of two saves in the middle of the run."""
    total = operations_of_a_run(tmp_path / "counted", processes)
    first = total // 3
    for n in range(first, min(total, first + 45)):
        out = tmp_path / f"at-{n}"
        killed = processes.Process(target=train, args=(out, kill_at_operation, n))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL, n
        assert_whole(out)
        assert checkpoints(out), n
        resumed = processes.Process(target=train, args=(out,))
        resumed.start()
        resumed.join()
        assert resumed.exitcode == 0
        assert_same_end(out, whole)
        shutil.rmtree(out)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_killed_with_a_file_half_written(
    processes: Any, whole: Path, tmp_path: Path, n: int
) -> None:
    killed = processes.Process(target=train, args=(tmp_path, kill_in_write, n))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert_whole(tmp_path)
    assert len(checkpoints(tmp_path)) == (n - 1) // 2
    trainer_at(tmp_path).fit(resume=True)
    assert_same_end(tmp_path, whole)


def test_terminated_at_random_moments(processes: Any, whole: Path, tmp_path: Path) -> None:
    """After SIGTERM the step is finished and saved, the exit is clean, and the end is the same."""
    rng = python_generator(1)
    duration = duration_of_a_run(processes, tmp_path)
    out, stops = tmp_path / "run", 0
    for _ in range(60):
        after = rng.uniform(0.0, duration)
        process = processes.Process(target=train, args=(out, signal_soon, after))
        process.start()
        process.join()
        assert process.exitcode == 0
        if checkpoints(out)[-1].name == f"step-{STEPS:08d}":
            state = read_state(checkpoints(out)[-1])
            if state["pending"] is None:
                assert_same_end(out, whole)
                shutil.rmtree(out)
                if stops >= 10:
                    return
                continue
        assert_whole(out)
        stops += 1
    pytest.fail("the run never came to its end")


def signal_soon(seconds: float) -> None:
    """Send this process SIGTERM once training has gone on for a while."""
    real = Trainer._loop

    def loop(self: Trainer) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds + 1e-6)
        real(self)
        signal.setitimer(signal.ITIMER_REAL, 0)

    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    Trainer._loop = loop


def send(trainer: Trainer, where: str, at_step: int, *signals: int) -> None:
    """Send this process the signals when the trainer reaches that place at that step."""

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if trainer.progress.step == at_step:
                for number in signals:
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)  # let the handler run
            return real(*args, **kwargs)

        setattr(owner, name, call)

    owner = {"train_step": trainer, "_loss_over": trainer, "_sample": trainer, "sync": trainer.run}
    wrap(owner[where], where)


# During a step, an evaluation (steps 3 and 6 have one), the sample of an epoch, and a save.
PLACES = [
    ("train_step", 4, 5),
    ("_loss_over", 0, 0),
    ("_loss_over", 3, 3),
    ("_loss_over", 6, 6),
    ("_loss_over", STEPS, STEPS),
    ("_sample", 7, 7),
    ("sync", 8, 8),
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("where", "step", "saved"), PLACES, ids=lambda value: str(value))
def test_a_signal_saves_and_ends_the_run(
    where: str,
    step: int,
    saved: int,
    number: int,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = trainer_at(tmp_path)
    send(trainer, where, step, number)
    before = signal.getsignal(signal.SIGINT)  # ignored in a background job
    trainer.fit()
    assert trainer.progress.step == saved
    assert checkpoints(tmp_path)[-1].name == f"step-{saved:08d}"
    assert f"stopped at step {saved}, all is saved; --resume continues" in capsys.readouterr().out
    # The old handlers are back.
    assert signal.getsignal(signal.SIGINT) is before
    trainer_at(tmp_path).fit(resume=True)
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize(("where", "step"), [("train_step", 5), ("_loss_over", 6), ("sync", 6)])
def test_a_second_interrupt_stops_at_once(
    where: str, step: int, whole: Path, tmp_path: Path
) -> None:
    trainer = trainer_at(tmp_path)
    send(trainer, where, step, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert checkpoints(tmp_path)[-1].name == "step-00000004"
    assert_whole(tmp_path)
    trainer_at(tmp_path).fit(resume=True)
    assert_same_end(tmp_path, whole)


def test_a_signal_after_the_last_check_is_saved_too(whole: Path, tmp_path: Path) -> None:
    trainer = trainer_at(tmp_path, checkpoint_interval=100)
    real = trainer._after_step

    def after_step(row: dict[str, Any]) -> bool:
        written = real(row)
        if trainer.progress.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return written

    trainer._after_step = after_step
    trainer.fit()
    assert checkpoints(tmp_path)[-1].name == "step-00000008"
    trainer_at(tmp_path).fit(resume=True)
    assert_same_end(tmp_path, whole)


def test_an_interrupted_replacement_leaves_the_old_one(tmp_path: Path) -> None:
    """Between the two renames, the old checkpoint is still found, loaded and not overwritten."""
    options = {"keep": 1, "keep_best": False, "checkpoint_interval": 100}
    trainer = trainer_at(tmp_path, **options)
    send(trainer, "_loss_over", 6, signal.SIGTERM)
    trainer.fit()
    (path,) = checkpoints(tmp_path)
    # SIGKILL between the renames leaves this.
    path.rename(path.with_name(f".{path.name}.old"))
    (hidden,) = checkpoints(tmp_path)
    assert read_state(hidden)["step"] == 6 and GPT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        trainer_at(tmp_path, **options).fit()
    assert checkpoints(tmp_path) == [path]


def test_a_second_sigterm_changes_nothing(whole: Path, tmp_path: Path) -> None:
    trainer = trainer_at(tmp_path)
    send(trainer, "train_step", 5, signal.SIGTERM, signal.SIGTERM)
    trainer.fit()
    assert checkpoints(tmp_path)[-1].name == "step-00000006"


def test_a_thousand_bit_flips_are_found(whole: Path, tmp_path: Path) -> None:
    """A flipped bit in any file of a checkpoint is found, and the file is named."""
    saved = checkpoints(whole)[-1]
    shutil.copytree(saved, tmp_path / saved.name)
    rng = python_generator(2)
    contents = {name: (saved / name).read_bytes() for name in FILES}
    for i in range(1000):
        name = FILES[i % len(FILES)]
        damaged = bytearray(contents[name])
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (tmp_path / saved.name / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name} (is damaged|has checkpoint format)"):
            read_state(tmp_path / saved.name)
        (tmp_path / saved.name / name).write_bytes(contents[name])
    assert read_state(tmp_path / saved.name)["step"] == STEPS


@pytest.mark.parametrize("file", FILES)
def test_resume_falls_back_to_the_checkpoint_before(
    file: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    before, last = checkpoints(out)[-2:]
    content = bytearray((last / file).read_bytes())
    content[len(content) // 2] ^= 4
    (last / file).write_bytes(content)
    capsys.readouterr()
    trainer_at(out).fit(resume=True)
    printed = capsys.readouterr().out
    assert f"{last / file} is damaged" in printed
    assert "falling back to the checkpoint before it" in printed
    assert f"resumed from {before}" in printed
    assert_same_end(out, whole)


def test_damaged_checkpoints_do_not_crowd_out_new_ones(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    for path in checkpoints(out)[1:]:
        (path / "optimizer.safetensors").write_bytes(b"")
    first = read_state(checkpoints(out)[0])["step"]
    trainer = trainer_at(out, keep=1, keep_best=False)
    send(trainer, "train_step", first, signal.SIGTERM)
    trainer.fit(resume=True)
    assert [read_state(path)["step"] for path in checkpoints(out)] == [first + 1]
    assert sorted(p.name for p in (out / "checkpoints").glob("damaged-*")) == [
        f"damaged-{path.name}" for path in checkpoints(whole)[1:]
    ]


def test_a_copied_run_goes_on(whole: Path, tmp_path: Path) -> None:
    """The copy has a directory for the link, and foreign files beside the checkpoints."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(checkpoints(out)[-1])
    folder = out / "checkpoints"
    assert (folder / "best").is_dir() and not (folder / "best").is_symlink()
    (folder / ".DS_Store").write_text("")
    (folder / ".git.d").mkdir()
    (folder / "notes.txt").write_text("mine")
    trainer_at(out).fit(resume=True)
    assert os.readlink(folder / "best") == checkpoints(out)[-1].name
    for name in (".DS_Store", ".git.d", "notes.txt"):
        assert (folder / name).exists()


def test_every_bit_of_the_state_counts(whole: Path, tmp_path: Path) -> None:
    """Even a bit that only changes the spelling of a number, as in 3E-05, is found."""
    saved = checkpoints(whole)[-1]
    content = (saved / "state.json").read_bytes()
    start = content.index(b'"tokens"')
    (tmp_path / "state.json").write_bytes(content)
    for at in [*range(0, start, 3), *range(content.index(b'"config"'), len(content), 3)]:
        for bit in range(8):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            (tmp_path / "state.json").write_bytes(damaged)
            with pytest.raises(ValueError, match="state.json"):
                _read_state(tmp_path)


def test_when_every_checkpoint_is_damaged(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    for path in checkpoints(out):
        (path / "model.safetensors").write_bytes(b"")
    metrics = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged: .*model.safetensors"):
        trainer_at(out).fit(resume=True)
    assert (out / "metrics.jsonl").read_bytes() == metrics


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system with room for little more than two checkpoints."""
    yield from disk_of("800k", tmp_path / "disk")


def test_no_space_left(small_disk: Path, whole: Path, tmp_path: Path) -> None:
    """The error names the save that does not fit; older checkpoints are whole and resumable."""
    out = small_disk / "run"
    with pytest.raises(OSError, match="cannot save .*step-00000004.*No space left on device"):
        trainer_at(out, keep=9).fit()
    # The temporary checkpoint is gone, and the older ones are whole.
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["best", "step-00000002", "step-00000003"]
    assert_whole(out)
    shutil.copytree(out, tmp_path / "moved", symlinks=True)
    trainer_at(tmp_path / "moved").fit(resume=True)
    assert_same_end(tmp_path / "moved", whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_a_log_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    # No save may come before the first sample, because it would write to /dev/full first.
    trainer = trainer_at(tmp_path, checkpoint_interval=100, eval_interval=100)
    real = trainer._loop

    def full() -> None:
        path = tmp_path / name
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/full")
        real()

    trainer._loop = full
    with pytest.raises(OSError, match=rf"cannot write .*{name}: No space left on device"):
        trainer.fit()


def test_the_model_of_a_whole_run_loads(whole: Path) -> None:
    model = GPT.from_pretrained(whole)
    assert model.config.n_embd == 24 and len(parameters(model)) == 28
