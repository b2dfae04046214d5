"""Ctrl-C while the command starts: importing PyTorch takes seconds, and ends without a traceback.

Imports nothing but Python's own modules, because it runs before anything else of the package.
"""

import contextlib
import os
import signal
from collections.abc import Sequence
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
"""As a shell says it of a command that Ctrl-C ended."""
_NAMES = ("gptfast", "-mgptfast")


def is_command(words: Sequence[str], argv: Sequence[str]) -> bool:
    """Return whether a process is the `gptfast` command, or `python -m gptfast`.

    words: all of the process's words, as in sys.orig_argv; argv: those of its program, as in
    sys.argv.
    """
    program = words[-len(argv) :][:1]
    return bool(argv) and os.path.basename(program[0] if program else "") in _NAMES


def catch_ctrl_c() -> None:
    """Let Ctrl-C end this process with one line, until `release_ctrl_c`.

    An exception could not: an import that is interrupted may turn it into another one.
    """
    # A shell without job control ignores Ctrl-C for what runs in the background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def release_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    # A terminal shows ^C, which a line of its own ends.
    with contextlib.suppress(OSError):
        os.write(2, b"\ngptfast: interrupted\n" if os.isatty(2) else b"gptfast: interrupted\n")
    os._exit(INTERRUPTED)
