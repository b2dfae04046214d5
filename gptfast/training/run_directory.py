"""The files of a training run besides its checkpoints: metrics, text samples and a profile."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gptfast.files import LOCK_TIMEOUT_S, lock, replacing, write_json
from gptfast.training.metrics import MetricsRow, metrics_of
from gptfast.weights.card import ENVIRONMENT


class RunDirectory:
    """Writes metrics.jsonl, samples.txt and, on request, tensorboard/ and trace.json in `out`.

    on_row: called with a copy of each row of metrics.jsonl once it is written.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        tensorboard: bool = False,
        on_row: Callable[[MetricsRow], Any] | None = None,
    ) -> None:
        self.out, self.tensorboard, self._on_row = Path(out), tensorboard, on_row
        self.metrics, self.samples = self.out / "metrics.jsonl", self.out / "samples.txt"
        self._writer: Any = None
        if tensorboard:
            _summary_writer()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Create the directory and lock it. Raises ValueError if it cannot be used."""
        with lock(self.out, LOCK_TIMEOUT_S):
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
        """Remove the rows and samples after `step`, because a resumed run writes them again.

        ended: whether the run is over. If not, the mark "final" is removed from its last row.
        """
        with replacing(self.metrics) as file:
            for row in metrics_of(self.metrics):
                if row["step"] <= step:
                    if not ended:
                        row.pop("final", None)
                    file.write(json.dumps(row) + "\n")
        with replacing(self.samples) as file:
            text = self.samples.read_text("utf-8") if self.samples.exists() else ""
            for line in text.splitlines(keepends=True):
                at = re.match(r"step (\d+): ", line)
                if at and int(at[1]) <= step and line.endswith("\n"):
                    file.write(line)
        if self.tensorboard:
            self._writer = _summary_writer()(str(self.out / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and to the files of TensorBoard, then call on_row."""
        self._append(self.metrics, json.dumps(row))
        if self._writer is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, float | int):
                    self._writer.add_scalar(name, value, row["step"])
            self._writer.flush()
        if self._on_row is not None:
            self._on_row(dict(row))

    def describe(self, environment: Mapping[str, str]) -> None:
        """Write environment.json, which says where the run computes."""
        write_json(self.out / ENVIRONMENT, environment)

    def write_sample(self, step: int, line: str) -> None:
        """Append a line of generated text to samples.txt."""
        self._append(self.samples, f"step {step}: {line}")

    @contextlib.contextmanager
    def profiler(self, steps: int) -> Iterator[Callable[[], None]]:
        """Yield a function to call after each of `steps` steps; write a profile to trace.json.

        The profile covers the third to fifth step, or starts earlier if there are fewer steps. It
        has Chrome's trace format, which ui.perfetto.dev opens.
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
        """Wait until metrics and samples are on disk: no checkpoint may be newer than they are."""
        for path in (self.metrics, self.samples):
            try:
                with path.open("a") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(f"cannot write {path}: {error.strerror}") from error

    def _append(self, path: Path, line: str) -> None:
        """Append a line to a file. Raises OSError that names the file."""
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}") from error


def _summary_writer() -> Any:
    """Return TensorBoard's SummaryWriter class. Raises ValueError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"--tensorboard needs tensorboard, which is not installed ({error}): "
            "pip install tensorboard"
        ) from None
    return SummaryWriter
