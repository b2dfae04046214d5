"""The lines that a run prints. A reader who goes away, such as `head`, does not stop the run."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm


def discard(stream: TextIO | None) -> None:
    """Send what is still written to a stream nowhere.

    Without that, Python complains about the stream when it ends.
    """
    # ValueError: a closed file; OSError: a stream that is no file.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # type: ignore[union-attr]
        os.close(null)


def say(line: str) -> None:
    """Print a line. Where that fails, say so on stderr; what is printed later goes nowhere."""
    if why := _print(line):
        warn(f"gptfast: standard output cannot be written ({why}); going on without it")


def _print(line: str) -> str | None:
    """Print a line; return why it could not be written, or None."""
    try:
        print(line, flush=True)
    except (OSError, ValueError) as error:  # ValueError: stdout is closed
        discard(sys.stdout)
        return getattr(error, "strerror", None) or str(error)
    return None


def warn(line: str) -> None:
    """Print a line on stderr if anybody can read it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class RunLog:
    """Prints the lines of a run, above its progress bar if stderr is a terminal.

    lost: why a line could not be written, until the trainer has dealt with it.
    """

    def __init__(self) -> None:
        self.lost: str | None = None
        self._bar: tqdm | None = None

    @contextlib.contextmanager
    def progress_bar(self, total: int, initial: int) -> Iterator[None]:
        """Show a progress bar of steps while the context is open."""
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, initial=initial, unit="step", disable=None, dynamic_ncols=True
        )
        try:
            yield
        finally:
            self._with_bar("close")
            self._bar = None

    def advance(self) -> None:
        """Move the bar on by a step."""
        self._with_bar("update")

    def line(self, text: str) -> None:
        """Print a line. If that fails, `lost` says why; later lines go nowhere."""
        if self._bar is None or self._bar.disable:
            lost = _print(text)
        else:
            self._with_bar("clear")
            lost = _print(text)
            self._with_bar("refresh")
        self.lost = self.lost or lost

    def _with_bar(self, action: str) -> None:
        """Do something with the bar; without its terminal it is switched off."""
        if self._bar is None:
            return
        try:
            getattr(self._bar, action)()
        except (OSError, ValueError):
            self._bar.disable = True
