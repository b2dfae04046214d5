"""Checkpoints that are written beside the steps are those that are written between them."""

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import differing, make_trainer, without_speed
from safetensors.torch import load_file

from gptfast.training import progress
from gptfast.training.background import Background
from gptfast.training.metrics import read_metrics
from gptfast.weights.checkpoint import checkpoints, read_state

RUN: dict[str, Any] = {"max_steps": 7, "checkpoint_interval": 2, "keep": 9}


def assert_same_checkpoints(out: Path, other: Path) -> None:
    names = [path.name for path in checkpoints(out)]
    assert names == [path.name for path in checkpoints(other)] and len(names) >= 4
    for name in names:
        ours, theirs = (folder / "checkpoints" / name for folder in (out, other))
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert differing(load_file(ours / file), load_file(theirs / file)) == []
        a, b = read_state(ours), read_state(theirs)
        for key in ("rng", "guard", "step", "tokens", "best", "pending"):
            assert a[key] == b[key], key


def slowed(monkeypatch: pytest.MonkeyPatch, before: Any) -> None:
    """Call `before` with the values of a checkpoint before it is written."""
    real = progress.write_checkpoint

    def write(out: Path, snapshot: Any, values: Any, *args: Any, **options: Any) -> Path:
        before(values)
        return real(out, snapshot, values, *args, **options)

    monkeypatch.setattr(progress, "write_checkpoint", write)


def test_they_hold_the_step_they_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path / "sync", **RUN).fit()
    trainer = make_trainer(tmp_path / "async", async_save=True, **RUN)
    late: list[int] = []

    def wait_for_the_next_step(values: dict[str, Any]) -> None:
        end = time.monotonic() + 20
        while trainer.progress.step == values["step"] < 7 and time.monotonic() < end:
            time.sleep(0.001)
        late.append(trainer.progress.step - values["step"])

    slowed(monkeypatch, wait_for_the_next_step)
    trainer.fit()
    assert late[-1] == 0 and min(late[:-1]) >= 1  # the run ends when the last is written
    assert_same_checkpoints(tmp_path / "async", tmp_path / "sync")
    runs = [without_speed(read_metrics(tmp_path / name)) for name in ("async", "sync")]
    assert runs[0] == runs[1]


def test_it_ends_with_the_last_one_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, lambda values: time.sleep(0.2))
    trainer = make_trainer(tmp_path, async_save=True, max_steps=9, checkpoint_interval=9)
    take_step = trainer.train_step

    def train_step(batches: Any) -> Any:
        if trainer.progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(batches)

    monkeypatch.setattr(trainer, "train_step", train_step)
    trainer.fit()
    assert trainer.interrupt.requested == "SIGTERM"
    assert read_state(checkpoints(tmp_path)[-1])["step"] == 5
    monkeypatch.setattr(trainer, "train_step", take_step)
    make_trainer(tmp_path, async_save=True, max_steps=9).fit(resume=True)
    assert read_state(checkpoints(tmp_path)[-1])["step"] == 9


def test_an_error_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def full(values: dict[str, Any]) -> None:
        if values["step"] == 4:
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    slowed(monkeypatch, full)
    trainer = make_trainer(tmp_path, async_save=True, **RUN)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert failed.is_set() and 4 <= trainer.progress.step <= 6
    assert read_state(checkpoints(tmp_path)[-1])["step"] == 3  # the best so far


def test_work_is_waited_for_and_its_error_is_raised_once() -> None:
    ended: list[int] = []

    def work() -> None:
        time.sleep(0.05)
        ended.append(1)

    def fail() -> None:
        raise OSError("full")

    with Background(waits=True) as background:
        background.start(work)
        background.start(work)
        assert len(ended) >= 1
    assert len(ended) == 2
    background.start(fail)
    with pytest.raises(OSError, match="full"):
        background.finish()
    background.finish()
    with pytest.raises(ValueError, match="of the block"), background:
        background.start(work)
        raise ValueError("of the block")
    assert len(ended) == 3
