"""Ctrl-C and SIGTERM as a request to stop at the next good moment."""

import os
import signal
import threading
from types import FrameType
from typing import Self


class Interrupt:
    """While entered, SIGINT and SIGTERM set `requested` to their name and end nothing.

    A SIGINT that follows another signal raises KeyboardInterrupt at once. Handlers belong to the
    main thread; entered in another one, this does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, object] = {}

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
            # Not print: the signal may have come in the middle of one.
            line = f"\n{self.requested}: finishing the step and saving; Ctrl-C stops at once\n"
            os.write(2, line.encode())
