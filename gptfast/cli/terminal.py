"""What the commands print on a terminal: errors, text that a model wrote, and speed."""

import os
import sys
from typing import TYPE_CHECKING, TextIO

from gptfast.generation.stop import REPLACEMENT

if TYPE_CHECKING:
    from gptfast.generation.decoder import Stats

ERRORS = (
    *(ValueError, LookupError, OSError, RuntimeError, ArithmeticError, MemoryError),
    ImportError,  # of a package that is an extra, and names itself
)
"""The errors that a user can act on. They are printed as one line, without a traceback."""


# The characters that a terminal may obey instead of showing: C0 except \n and \t, DEL, and C1.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {*b"\n\t"}, REPLACEMENT)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream is a terminal.

    The stream is None if it was closed before Python started.
    """
    return stream is not None and stream.isatty()


def print_note(line: str) -> None:
    """Print a line that is not the result: on stderr, dim if it is a terminal with colours."""
    # https://no-color.org: NO_COLOR counts unless it is empty.
    no_colour = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    plain = no_colour or not is_terminal(sys.stderr)
    print(line if plain else f"\x1b[2m{line}\x1b[0m", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Return a model's text for stdout, without control characters if stdout is a terminal."""
    return text.translate(_CONTROLS) if is_terminal(sys.stdout) else text


def speed(stats: "Stats") -> str:
    """Return one line: the number of tokens, tokens per second and the rate of reading weights."""
    first = bool(stats.prompt_tokens)  # prefill gives the first token
    n = stats.new_tokens + first
    parts = [f"{n} token{'s' * (n != 1)}"]
    if stats.steps:
        parts.append(f"{stats.new_tokens / stats.seconds:.1f} tokens/s")
        parts.append(f"{stats.bytes_read / stats.seconds / 1e9:.3g} GB/s of weights")
    if stats.guessed:
        parts.append(f"{stats.accepted} of {stats.guessed} guesses right")
    text = ", ".join(parts)
    if first:
        text += f"; prompt {stats.prompt_tokens} tokens in {stats.prompt_seconds:.2f} s"
    return f"[{text}]"
