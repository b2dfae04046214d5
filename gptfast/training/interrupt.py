"""Take Ctrl-C and SIGTERM as a request to stop after the current step."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self


class Interrupt:
    """A context in which SIGINT and SIGTERM only set `requested` to the signal's name.

    A SIGINT after another signal raises KeyboardInterrupt at once. Outside the main thread, which
    alone may set signal handlers, the context does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = signal.Signals(number).name
            # print is not safe here, because the signal may have interrupted another print.
            line = f"\n{self.requested}: finishing the step and saving; Ctrl-C stops at once\n"
            os.write(2, line.encode())
