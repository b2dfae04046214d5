"""The `gptfast` command. Each subcommand has a file, and a dataclass whose fields are its flags."""

import gc
import importlib
import inspect
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptfast.checks import one_line
from gptfast.cli.terminal import ERRORS
from gptfast.ops.backend import check_isa


class _Commands(Mapping[str, type]):
    """The commands by name. Looking one up imports its module and no other command's."""

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
    """Return the command that argv names, ready to `run`. Raises ValueError for a wrong argv."""
    if not argv or argv[0] not in COMMANDS:
        return _no_command(argv)
    from gptfast.cli.flags import command_parser

    command, prog = COMMANDS[argv[0]], f"gptfast {argv[0]}"
    hidden = {name: getattr(command, name, ()) for name in ("no_default_shown", "not_in_help")}
    given = command_parser(command, prog, **hidden).given(argv[1:])
    if hasattr(command, "from_given"):  # it reads files and saved settings, then the flags
        return command.from_given(given)
    return command(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _no_command(argv: Sequence[str]) -> None:
    """Print the help, or raise a ValueError that lists the commands."""
    if argv and argv[0] in ("-h", "--help"):
        print("usage: gptfast COMMAND [FLAGS]\n")
        print("commands (gptfast COMMAND --help shows the flags of a command):")
        for name, command in COMMANDS.items():
            line = (inspect.getdoc(command) or "").partition("\n")[0]
            print(f"  {name:<11}{line}")
        raise SystemExit(0)
    names = ", ".join(COMMANDS)
    got = f"there is no command {argv[0]!r}" if argv else "no command given"
    raise ValueError(f"{got}; choose one of {{{names}}} (see gptfast --help)")


def _check_arguments(argv: Sequence[str]) -> None:
    """Raise ValueError for an argument that is not UTF-8."""
    for argument in argv:
        # Python turns bytes that are not UTF-8 into lone surrogates, which no file can hold.
        if re.search("[\ud800-\udfff]", argument):
            raise ValueError(f"an argument is not UTF-8 text: {argument!r:.100}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    An error that the user can act on prints one line on stderr and returns 1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A sample with characters that the terminal cannot encode must not end a training run.
        sys.stdout.reconfigure(errors="replace")
    if argv is None:
        # This process runs one command. The many objects that importing PyTorch made live until
        # it ends, so the garbage collector need not scan them.
        gc.freeze()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_arguments(argv)
        check_isa()
        parse(argv).run()
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("gptfast: interrupted", file=sys.stderr)
        return 130
    except ERRORS as error:
        print(f"gptfast: {one_line(error)}", file=sys.stderr)
        return 1
    return 0
