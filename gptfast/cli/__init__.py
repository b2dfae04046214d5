"""The `gptfast` command, one file per group of subcommands. Flags come from dataclasses' fields."""

import contextlib
import gc
import importlib
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union

from gptfast.cli.terminal import ERRORS, one_line
from gptfast.ops.backend import check_isa


class _Commands(Mapping[str, type]):
    """Commands by name. Each is imported when it is asked for: one takes nothing of another."""

    def __init__(self, **places: str) -> None:
        self._places = places

    def __getitem__(self, name: str) -> type:
        return self.find(self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @staticmethod
    def find(place: str) -> Any:
        module, _, name = place.partition(".")
        return getattr(importlib.import_module(f"gptfast.cli.{module}"), name)


COMMANDS = _Commands(
    train="train.Train",
    generate="generate.Generate",
    chat="chat.Chat",
    eval="evaluate.Eval",
    prepare="data.Prepare",
    tokenizer="data.TrainTokenizer",
    search="search.Search",
    plot="search.Plot",
    convert="weights.Convert",
    download="weights.Download",
    info="info.Info",
)
# What a command's defaults are where files that argv names have a say in them.
_DEFAULTS = {"train": "train.train_defaults", "search": "search.search_defaults"}


def _tyro(argv: Sequence[str]) -> Any:
    """The command argv asks for, or SystemExit with what is wrong in a box on stderr."""
    import tyro

    if argv and argv[0] in COMMANDS:
        name, *rest = argv
        options: dict[str, Any] = {"args": rest, "prog": f"gptfast {name}"}
        if name in _DEFAULTS:
            options["default"] = _Commands.find(_DEFAULTS[name])(rest)
        return tyro.cli(COMMANDS[name], **options)
    kinds = []
    for name, command in COMMANDS.items():  # a line each
        line = (command.__doc__ or "").partition("\n")[0]
        kinds.append(Annotated[command, tyro.conf.subcommand(name, description=line)])
    return tyro.cli(Union[tuple(kinds)], args=argv, prog="gptfast")  # noqa: UP007


def _parse(argv: Sequence[str]) -> Any:
    """The command argv asks for; what tyro reports in a box becomes a one-line ValueError."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return _tyro(argv)
    except SystemExit as error:
        if not error.code:  # --help
            raise
    plain = re.sub(r"\x1b\[[\d;]*m", "", box.getvalue())  # without colours
    # A title, the message, a rule, help texts.
    body = re.split(r"^[ │]*[─-]+[ │]*$", plain.partition("\n")[2].lstrip(" -\n"), flags=re.M)[0]
    message = " ".join(line.strip("│ ") for line in body.splitlines()).split()
    if message[:2] == ["Error", "parsing"] and message[2].startswith("__tyro"):
        message = message[3:]
    prog = " ".join(["gptfast", *(name for name in argv[:1] if name in COMMANDS)])
    raise ValueError(f"{' '.join(message)} (see {prog} --help)")


def _check_arguments(argv: Sequence[str]) -> None:
    for argument in argv:
        # What is not UTF-8 reaches Python as lone surrogates; no file of a run could hold it.
        if re.search("[\ud800-\udfff]", argument):
            raise ValueError(f"an argument is not UTF-8 text: {argument!r:.100}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; an error the user can act on is one line on stderr and exit code 1."""
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
        _parse(argv).run()
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
