"""The `gptfast` command, one file per group of subcommands. Flags come from dataclasses' fields."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

from gptfast.cli.data import Prepare, TrainTokenizer
from gptfast.cli.evaluate import Eval
from gptfast.cli.generate import Generate
from gptfast.cli.info import Info
from gptfast.cli.search import Plot, Search, search_defaults
from gptfast.cli.train import Train, train_defaults
from gptfast.cli.weights import Convert, Download
from gptfast.ops.library import check_isa

COMMANDS = {
    "train": Train,
    "generate": Generate,
    "eval": Eval,
    "prepare": Prepare,
    "tokenizer": TrainTokenizer,
    "search": Search,
    "plot": Plot,
    "convert": Convert,
    "download": Download,
    "info": Info,
}
# What a command's defaults are where files that argv names have a say in them.
_DEFAULTS = {"train": train_defaults, "search": search_defaults}


def _parse(argv: Sequence[str]) -> Any:
    """The command argv asks for; what tyro reports in a box becomes a one-line ValueError."""
    kinds = []
    for name, command in COMMANDS.items():
        options: dict[str, Any] = {}
        if argv[:1] != [name]:  # in the list of all commands, a line each
            options["description"] = (command.__doc__ or "").partition("\n")[0]
        elif name in _DEFAULTS:
            options["default"] = _DEFAULTS[name](argv[1:])
        kinds.append(Annotated[command, tyro.conf.subcommand(name, **options)])
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Union[tuple(kinds)], args=argv, prog="gptfast")  # noqa: UP007
    except SystemExit as error:
        if not error.code:  # --help
            raise
    plain = re.sub(r"\x1b\[[\d;]*m", "", box.getvalue())  # without colours
    # A title, the message, a rule, help texts.
    body = re.split(r"^[ │]*[─-]+[ │]*$", plain.partition("\n")[2].lstrip(" -\n"), flags=re.M)[0]
    message = " ".join(line.strip("│ ") for line in body.splitlines()).split()
    if message[:2] == ["Error", "parsing"] and message[2].startswith("__tyro"):
        message = message[3:]
    raise ValueError(f"{' '.join(message)} (see gptfast --help)")


def _check_arguments(argv: Sequence[str]) -> None:
    for argument in argv:
        # What is not UTF-8 reaches Python as lone surrogates; no file of a run could hold it.
        if re.search("[\ud800-\udfff]", argument):
            raise ValueError(f"an argument is not UTF-8 text: {argument!r:.100}")


def _one_line(error: BaseException) -> str:
    message = str(error).strip() or type(error).__name__
    return re.sub(r"^\[enforce fail.*DefaultCPUAllocator: ", "", message.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; an error the user can act on is one line on stderr and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A sample may hold what the terminal cannot show; that must not end a training run.
        sys.stdout.reconfigure(errors="replace")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_arguments(argv)
        check_isa()
        _parse(argv).run()
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("gptfast: interrupted", file=sys.stderr)
        return 130
    except (ValueError, LookupError, OSError, RuntimeError, ArithmeticError, MemoryError) as error:
        print(f"gptfast: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0
