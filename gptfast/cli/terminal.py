"""What a terminal is shown."""

import re
import sys
from typing import TYPE_CHECKING, TextIO

from gptfast.generation.stop import REPLACEMENT

if TYPE_CHECKING:
    from gptfast.engine import Engine

ERRORS = (ValueError, LookupError, OSError, RuntimeError, ArithmeticError, MemoryError)
"""What the user may act on: one line, no traceback."""


def one_line(error: BaseException) -> str:
    """What is wrong, in the first line of its message."""
    message = str(error).strip() or type(error).__name__
    return re.sub(r"^\[enforce fail.*DefaultCPUAllocator: ", "", message.splitlines()[0])


# What a terminal may obey rather than show: C0 but for \n and \t, DEL, C1.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {*b"\n\t"}, REPLACEMENT)


def is_terminal(stream: TextIO | None) -> bool:
    """Of a standard stream, which is None where it was closed before Python began."""
    return stream is not None and stream.isatty()


def printable(text: str) -> str:
    """What stdout gets of a model's text: all of it, but in a terminal no control character."""
    return text.translate(_CONTROLS) if is_terminal(sys.stdout) else text


def speed(model: "Engine") -> str:
    """One line of what the engine has done since this was last asked, and what it read for it."""
    from gptfast.engine import Stats

    stats, model.stats = model.stats, Stats()
    first = bool(stats.prompt_tokens)  # a prompt's pass gives a token too
    n = stats.new_tokens + first
    parts = [f"{n} token{'s' * (n != 1)}"]
    if stats.steps:
        rate = stats.steps * model.weight_bytes / stats.seconds
        parts.append(f"{stats.new_tokens / stats.seconds:.1f} tokens/s")
        parts.append(f"{rate / 1e9:.3g} GB/s of weights")
    if stats.guessed:
        parts.append(f"{stats.accepted} of {stats.guessed} guesses right")
    text = ", ".join(parts)
    if first:
        text += f"; prompt {stats.prompt_tokens} tokens in {stats.prompt_seconds:.2f} s"
    return f"[{text}]"
