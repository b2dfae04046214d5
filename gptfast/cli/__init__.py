"""The `gptfast` command: one file per subcommand, whose flags are the fields of a dataclass."""

import gc
import importlib
import inspect
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptfast.cli.terminal import ERRORS, one_line
from gptfast.ops.backend import check_isa


class _Commands(Mapping[str, type]):
    """Commands by name. Each is imported when it is asked for, and without any of the others."""

    def __init__(self, **places: str) -> None:
        self._places = places

    def __getitem__(self, name: str) -> type:
        module, _, command = self._places[name].partition(".")
        return getattr(importlib.import_module(f"gptfast.cli.{module}"), command)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


COMMANDS = _Commands(
    train="train.Train",
    generate="generate.Generate",
    chat="chat.Chat",
    eval="evaluate.Eval",
    prepare="prepare.Prepare",
    tokenizer="tokenizer.TrainTokenizer",
    search="search.Search",
    plot="plot.Plot",
    convert="convert.Convert",
    download="download.Download",
    info="info.Info",
)


def parse(argv: Sequence[str]) -> Any:
    """Return the command that argv asks for, ready to `run`. Raises ValueError."""
    if not argv or argv[0] not in COMMANDS:
        return _no_command(argv)
    from gptfast.cli.flags import command_parser

    command, prog = COMMANDS[argv[0]], f"gptfast {argv[0]}"
    hidden = getattr(command, "no_default_shown", ())
    given = command_parser(command, prog, no_default_shown=hidden).given(argv[1:])
    if hasattr(command, "from_given"):  # files and saved settings come before the flags
        return command.from_given(given)
    return command(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _no_command(argv: Sequence[str]) -> None:
    """Print the help, or raise a ValueError that lists the commands."""
    if argv and argv[0] in ("-h", "--help"):
        print("usage: gptfast COMMAND [FLAGS]\n\ncommands (gptfast COMMAND --help says more):")
        for name, command in COMMANDS.items():
            line = (inspect.getdoc(command) or "").partition("\n")[0]
            print(f"  {name:<11}{line}")
        raise SystemExit(0)
    names = ", ".join(COMMANDS)
    got = f"there is no command {argv[0]!r}" if argv else "no command"
    raise ValueError(f"{got}; choose one of {{{names}}} (see gptfast --help)")


def _check_arguments(argv: Sequence[str]) -> None:
    for argument in argv:
        # What is not UTF-8 reaches Python as lone surrogates; no file of a run could hold it.
        if re.search("[\ud800-\udfff]", argument):
            raise ValueError(f"an argument is not UTF-8 text: {argument!r:.100}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    An error that the user can act on is one line on stderr and exit code 1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A sample may hold what the terminal cannot show; that must not end a training run.
        sys.stdout.reconfigure(errors="replace")
    if argv is None:
        # The process is ours. What PyTorch made on import stays: no collection need look at it.
        gc.freeze()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_arguments(argv)
        check_isa()
        parse(argv).run()
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("gptfast: interrupted", file=sys.stderr)
        return 130
    except ERRORS as error:
        print(f"gptfast: {one_line(error)}", file=sys.stderr)
        return 1
    return 0
