"""Take Ctrl-C, SIGTERM and a closed terminal as a request to stop after the current step."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""The signals that ask a run to stop. SIGHUP comes when a terminal or a connection closes."""


def exit_code(name: str) -> int:
    """Return the exit code of a command that a signal ended, by the signal's name."""
    return 128 + signal.Signals[name].value


EXIT_CODES = tuple(exit_code(number.name) for number in SIGNALS)


class Interrupt:
    """A context in which these signals only set `requested` to the signal's name.

    A SIGINT after another signal raises KeyboardInterrupt at once. A SIGHUP or SIGTERM that is
    ignored stays so: `nohup` asks for that. Outside the main thread, which alone may set signal
    handlers, the context does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                under_nohup = signal.getsignal(number) is signal.SIG_IGN
                if number == signal.SIGINT or not under_nohup:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._before.clear()

    def agree(self) -> bool:
        """Return whether the run was asked to stop."""
        return bool(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = signal.Signals(number).name
            self._announce(self.requested)

    def _announce(self, name: str) -> None:
        # print is not safe here, because the signal may have interrupted another print.
        line = f"\n{name}: finishing the step and saving; Ctrl-C stops at once\n"
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, line.encode())
