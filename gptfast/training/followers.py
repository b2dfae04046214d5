"""What the processes other than the first have in place of a log and a run directory."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gptfast.training.log import RunLog
from gptfast.training.run_directory import RunDirectory


class QuietLog(RunLog):
    """Prints nothing."""

    @contextlib.contextmanager
    def progress_bar(self, total: int, initial: int) -> Iterator[None]:
        yield

    def line(self, text: str) -> None:
        """Print nothing."""


class FollowedDirectory(RunDirectory):
    """A run directory to which the first process writes."""

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        yield

    def rewind(self, step: int, *, ended: bool) -> None:
        """Change nothing."""

    def describe(self, environment: Mapping[str, str]) -> None:
        """Write nothing."""

    def write(self, row: dict[str, Any]) -> None:
        """Write nothing."""

    def write_sample(self, step: int, line: str) -> None:
        """Write nothing."""

    @contextlib.contextmanager
    def profiler(self, steps: int) -> Iterator[Callable[[], None]]:
        yield lambda: None

    def sync(self) -> None:
        """Return at once: nothing was written."""
