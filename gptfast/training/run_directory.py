"""What a training run leaves on disk besides its checkpoints: metrics, samples, a profile."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gptfast.files import PATIENCE, _replacing, lock
from gptfast.training.metrics import metrics_of


class RunDirectory:
    """metrics.jsonl, samples.txt and, if asked for, tensorboard/, trace.json in directory `out`."""

    def __init__(self, out: str | Path, *, tensorboard: bool = False) -> None:
        self.out, self.tensorboard = Path(out), tensorboard
        self.metrics, self.samples = self.out / "metrics.jsonl", self.out / "samples.txt"
        self._writer: Any = None
        if tensorboard:
            _summary_writer()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Make the directory and hold it; ValueError if that cannot be or another run has it."""
        with lock(self.out, PATIENCE):
            try:
                self.metrics.open("a").close()
            except OSError as error:
                raise ValueError(f"cannot write to {self.out}: {error.strerror}") from None
            try:
                yield
            finally:
                if self._writer is not None:
                    self._writer.close()

    def rewind(self, step: int, *, ended: bool) -> None:
        """Drop what was written after `step`, which happens again.

        ended: whether the run is over; if not, no row is its "final" one any more.
        """
        with _replacing(self.metrics) as file:
            for row in metrics_of(self.metrics):
                if row["step"] <= step:
                    if not ended:
                        row.pop("final", None)
                    file.write(json.dumps(row) + "\n")
        with _replacing(self.samples) as file:
            text = self.samples.read_text("utf-8") if self.samples.exists() else ""
            for line in text.splitlines(keepends=True):
                at = re.match(r"step (\d+): ", line)
                if at and int(at[1]) <= step and line.endswith("\n"):
                    file.write(line)
        if self.tensorboard:
            self._writer = _summary_writer()(str(self.out / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl, and to TensorBoard's."""
        self._append(self.metrics, json.dumps(row))
        if self._writer is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, float | int):
                    self._writer.add_scalar(name, value, row["step"])
            self._writer.flush()

    def write_sample(self, step: int, line: str) -> None:
        """Append a line of generated text to samples.txt."""
        self._append(self.samples, f"step {step}: {line}")

    @contextlib.contextmanager
    def profiler(self, steps: int) -> Iterator[Callable[[], None]]:
        """A function to call after each of `steps` steps: the third to fifth go into trace.json.

        The file is Chrome's trace format, which ui.perfetto.dev opens. A run of fewer steps is
        profiled from its first or second one on.
        """
        trace = str(self.out / "trace.json")
        with torch.profiler.profile(
            schedule=torch.profiler.schedule(
                wait=int(steps > 4), warmup=int(steps > 3), active=3, repeat=1
            ),
            on_trace_ready=lambda profile: profile.export_chrome_trace(trace),
        ) as profile:
            yield profile.step

    def sync(self) -> None:
        """Wait until all of it is on the disk, so that no checkpoint is newer than its metrics."""
        for path in (self.metrics, self.samples):
            try:
                with path.open("a") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(f"cannot write {path}: {error.strerror}") from error

    def _append(self, path: Path, line: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}") from error


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tensorboard was asked for, but is not installed ({error}): "
            "pip install 'gptfast[tensorboard]'"
        ) from None
    return SummaryWriter
