"""What the command does before PyTorch is imported, which takes seconds: Ctrl-C, help, refusals.

How the process ends is here too, because Python calls the function last that atexit learns first.

Imports little but Python's own modules, because it runs before anything else of the package.
"""

import atexit
import contextlib
import os
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from gptfast.installed import refusal

INTERRUPTED = 128 + signal.SIGINT
"""As a shell says it of a command that Ctrl-C ended."""
_NAMES = ("gptfast", "-mgptfast")
SUMMARIES = {
    "train": "Train a GPT on text; print its losses and text samples, and save checkpoints.",
    "generate": "Continue a prompt with a trained model. The text appears while it is generated.",
    "chat": "Talk with a model: type a message, read the reply. Inside, /help lists the commands.",
    "serve": "Serve a model over HTTP to clients of OpenAI's protocol, with a page to try it on.",
    "eval": "Measure a model's loss, perplexity and bits per byte on text, or its accuracy on "
    "tasks.",
    "prepare": "Turn text into token files, which training reads without loading them into memory.",
    "tokenizer": "Learn a byte-pair encoding from text (needs pip install tokenizers).",
    "search": "Train with several settings, each in a process of its own, and compare the results.",
    "plot": "Draw the losses of several runs in one picture, or write a page about one run.",
    "convert": "Write a model in another format. The format of SRC is recognised from its content.",
    "download": "Download GPT-2's weights. Every command then takes the name, such as gpt2, as a "
    "model.",
    "info": "Show version, CPU level, matrix engine, threads, GPU, and the backend of each "
    "operation.",
}
"""The first line of each command's help."""


def is_command(words: Sequence[str], argv: Sequence[str]) -> bool:
    """Return whether a process is the `gptfast` command, or `python -m gptfast`.

    words: all of the process's words, as in sys.orig_argv; argv: those of its program, as in
    sys.argv.
    """
    program = words[-len(argv) :][:1]
    return bool(argv) and os.path.basename(program[0] if program else "") in _NAMES


def answer(argv: Sequence[str], version: str) -> None:
    """End this process where that needs no PyTorch: the help, the version, a namesake installed.

    argv: the words after `gptfast`.
    """
    if text := short_answer(argv, version):
        # What cannot be printed is left to the command, which says so as it does everywhere.
        with contextlib.suppress(OSError):
            print(f"{text}\n", end="", flush=True)  # in one piece, which head reads
            sys.exit(0)
    if line := refusal():
        sys.exit(f"gptfast: {line}")


@contextlib.contextmanager
def told_on_one_line(is_command: bool) -> Iterator[None]:
    """In the command's process, end with one line where an import of the block fails."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:  # the last two: torch's own libraries
        if not is_command:
            raise
        remedy = "; run pip install torch" if getattr(error, "name", "") == "torch" else ""
        sys.exit(f"gptfast: {' '.join(str(error).split())}{remedy}")


def short_answer(argv: Sequence[str], version: str) -> str:
    """Return the help or the version if the first word asks for one, else ""."""
    if argv[:1] in (["--version"], ["-V"]):
        return f"gptfast {version}"
    if argv[:1] not in (["--help"], ["-h"]) and list(argv) != ["help"]:
        return ""
    width = min(100, shutil.get_terminal_size().columns)
    lines = [
        textwrap.fill(line, width, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13)
        for name, line in SUMMARIES.items()
    ]
    return "\n".join(
        [
            "usage: gptfast COMMAND [FLAGS]\n",
            "commands (gptfast COMMAND --help shows the flags that people set first):",
            *lines,
            "\ngptfast --version prints the version, gptfast --completion bash what completes "
            "these\nwords in a shell; docs/command.md explains the rest.",
        ]
    )


class Ending:
    """How the command's process ends: at once where Python's own end could abort it.

    A thread that comes back to Python from C++ after Python has begun to end is stopped inside a
    destructor of C++, which aborts the whole process: SIGABRT instead of the exit code. Such a
    thread may read a model, write a checkpoint, or wait for a process that is cut off.
    """

    def __init__(self) -> None:
        self.code = 1
        """The exit code: 1 for an error that nobody expects, else what `main` sets."""
        self.at_once = False
        """Whether to end at once even if no thread is left."""

    def register(self) -> None:
        """Let this process end so. Functions that atexit learns of later are called before."""
        atexit.register(self._end)

    def _end(self) -> None:
        if not self.at_once and threading.active_count() == 1:
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.flush()
        os._exit(self.code)


ENDING = Ending()


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
