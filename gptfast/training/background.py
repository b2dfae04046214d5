"""Work beside the steps: the writing of a checkpoint from a copy in memory."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Background:
    """One piece of work at a time, in a thread of its own.

    A context: it ends when the work has ended, and raises the work's error if the block raises
    none. waits: whether to wait for the work after an error of the block too.
    """

    def __init__(self, *, waits: bool) -> None:
        self._waits = waits
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Start work, when the work before has ended. Raises the error of that work."""
        self.finish()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # A daemon: an error of the run, or a second Ctrl-C, does not wait for a slow disk.
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of work that has ended."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait for the work, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None and self._waits and issubclass(kind, Exception):
            self._thread.join()
