"""What a training run leaves on disk besides its checkpoints: metrics, samples, a profile."""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# The workers of a run that was killed hold its lock until they notice, which takes them seconds.
PATIENCE = 10.0


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
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.metrics.open("a").close()
            descriptor = os.open(self.out, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"cannot write to {self.out}: {error.strerror}") from None
        try:
            self._acquire(descriptor)
            yield
        finally:
            os.close(descriptor)
            if self._writer is not None:
                self._writer.close()

    def _acquire(self, descriptor: int) -> None:
        try:
            import fcntl
        except ImportError:  # Windows has no such lock
            return
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(
                        f"{self.out} is in use by another process; wait or choose another out"
                    ) from None
                time.sleep(0.1)

    def rewind(self, step: int, *, ended: bool) -> list[dict[str, Any]]:
        """Drop what was written after `step`, which happens again; the rows of metrics up to it.

        ended: whether the run is over; if not, no row is its "final" one any more.
        """
        rows = [row for row in self._rows() if row["step"] <= step]
        if not ended:
            rows = [{k: v for k, v in row.items() if k != "final"} for row in rows]
        _replace(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        lines = self.samples.read_text("utf-8").splitlines() if self.samples.exists() else []
        steps = [re.match(r"step (\d+): ", line) for line in lines]
        kept = [m.string for m in steps if m and int(m[1]) <= step]
        _replace(self.samples, "".join(line + "\n" for line in kept))
        if self.tensorboard:
            self._writer = _summary_writer()(str(self.out / "tensorboard"), purge_step=step + 1)
        return rows

    def _rows(self) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self.metrics.read_text("utf-8").splitlines(), 1):
            if not line.endswith("}"):  # cut off in the middle
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{self.metrics}:{number} is damaged ({error}); remove that line to resume"
                ) from None

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
            with path.open("a") as file:
                os.fsync(file.fileno())

    def _append(self, path: Path, line: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}") from error


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tensorboard was asked for, but is not installed ({error}): "
            "pip install 'gptfast[tensorboard]'"
        ) from None
    return SummaryWriter
