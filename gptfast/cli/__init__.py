"""The `gptfast` command. Each subcommand has a file, and a dataclass whose fields are its flags."""

import errno
import gc
import importlib
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gptfast
from gptfast.checks import one_line
from gptfast.cli.terminal import ERRORS, is_terminal
from gptfast.ops.backend import check_isa
from gptfast.startup import ENDING, INTERRUPTED, release_ctrl_c, short_answer
from gptfast.training.interrupt import exit_code
from gptfast.training.log import discard

if TYPE_CHECKING:
    from gptfast.cli.flags import Flag

USAGE_ERROR = 2
BROKEN_PIPE = 141
"""128 and the number of SIGPIPE."""


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
    serve="serve.Serve",
    eval="evaluate.Eval",
    prepare="prepare.Prepare",
    tokenizer="tokenizer.TrainTokenizer",
    search="search.Search",
    plot="plot.Plot",
    convert="convert.Convert",
    download="download.Download",
    info="info.Info",
)


def command_flags(name: str) -> "list[Flag]":
    """Return the flags of a command."""
    from gptfast.cli.flags import flags_of

    command = COMMANDS[name]
    hidden = {
        option: getattr(command, option, ()) for option in ("no_default_shown", "not_in_help")
    }
    return flags_of(command, **hidden)


def parse(argv: Sequence[str]) -> Any:
    """Return the command that argv names, ready to `run`. Raises UsageError for a wrong argv.

    Prints help and raises SystemExit if that is asked for.
    """
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] not in COMMANDS:
        return _no_command(argv)
    from gptfast.cli.command_line import CommandLine
    from gptfast.cli.settings import with_tuples

    name, flags = argv[0], command_flags(argv[0])
    command = COMMANDS[name]
    before_rest = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    if {"-h", "--help", "--help-all"} & set(before_rest):
        from gptfast.cli.help import full_help, help_text

        text = full_help if "--help-all" in before_rest else help_text
        print(text(name, command, flags), end="")
        raise SystemExit(0)
    given = CommandLine(name, flags, _commands_with).read(argv[1:])
    if hasattr(command, "from_given"):  # it reads files and saved settings, then the flags
        return command.from_given(given)
    return command(**with_tuples(given))


def _commands_with(flag: str) -> list[str]:
    """Return the commands that have a flag and show it in their help."""
    return [
        name
        for name in COMMANDS
        if any(flag == other.long and not other.hidden for other in command_flags(name))
    ]


def _no_command(argv: Sequence[str]) -> None:
    """Print help, version or completions, or raise a UsageError that lists the commands."""
    if text := short_answer(argv, gptfast.__version__):
        print(text)
        raise SystemExit(0)
    if argv[:1] == ["--completion"]:
        from gptfast.cli.completion import completion_script

        shell = "".join(argv[1:2])
        print(completion_script(shell, {name: command_flags(name) for name in COMMANDS}), end="")
        raise SystemExit(0)
    from gptfast.cli.flags import UsageError
    from gptfast.cli.hints import similar_command

    names = ", ".join(COMMANDS)
    got = f"there is no command {argv[0]!r}" if argv else "no command given"
    hint = similar_command(argv[0], COMMANDS) if argv else ""
    if argv and argv[0].startswith("-"):
        got, hint = f"{argv[0]} stands before the command", "; write gptfast COMMAND [FLAGS]"
    raise UsageError(f"{got}{hint}; choose one of {{{names}}} (see gptfast --help)")


def _argument(given: str) -> str:
    """Return an argument as text. Raises ValueError for one that is not UTF-8."""
    # Python turns bytes that it cannot decode into lone surrogates, which no file can hold. Under
    # a locale of ASCII alone these are all but ASCII.
    if not re.search("[\ud800-\udfff]", given):
        return given
    try:
        return os.fsencode(given).decode("utf-8")
    except UnicodeError:
        raise ValueError(f"an argument is not UTF-8 text: {given!r:.100}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    An error that the user can act on prints one line on stderr and returns 1, or 2 if the command
    line is wrong. argv: of a process that does more than this command, else sys.argv's.
    """
    if argv is not None:
        return _main(argv)
    # This process runs one command. The many objects that importing PyTorch made live until
    # it ends, so the garbage collector need not scan them.
    gc.freeze()
    try:
        ENDING.code = _main(sys.argv[1:])
    except SystemExit as error:
        ENDING.code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    return ENDING.code


def _main(argv: Sequence[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A sample with characters that the terminal cannot encode must not end a training run.
        sys.stdout.reconfigure(errors="replace")
    argv = list(argv)
    try:
        release_ctrl_c()
        argv = [_argument(given) for given in argv]
        check_isa()
        code = parse(argv).run() or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where an error is caught
        return code
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        discard(sys.stdout)
        return BROKEN_PIPE
    except KeyboardInterrupt as error:
        _end_line()
        print("gptfast: interrupted", file=sys.stderr)
        # A search names the signal that ended it.
        return exit_code(error.args[0]) if error.args else INTERRUPTED
    except ERRORS as error:
        return _failed(error, argv)


def _failed(error: BaseException, argv: Sequence[str]) -> int:
    """Print an error on one line and return the exit code."""
    from gptfast.cli.flags import UsageError
    from gptfast.cli.hints import with_flags
    from gptfast.cli.settings import SettingsError

    message = one_line(error)
    if argv and argv[0] in COMMANDS and not isinstance(error, SettingsError):
        message = with_flags(message, command_flags(argv[0]))
    if isinstance(error, OSError) and not _can_write():
        discard(sys.stdout)  # else Python would complain once more when it ends
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        message = f"cannot write what is printed: {error.strerror}"
    if "No working C++ compiler" in message:  # in the words of torch.compile
        message = "--compile needs a C++ compiler; install g++, or leave out --compile"
    print(f"gptfast: {message}", file=sys.stderr)
    return USAGE_ERROR if isinstance(error, UsageError) else 1


def _can_write() -> bool:
    """Return whether stdout takes what was printed."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        return False
    return True


def _end_line() -> None:
    """End the line on which a terminal shows ^C."""
    for stream in (sys.stdout, sys.stderr):
        if is_terminal(stream):
            print(file=stream, flush=True)
            return
