"""A command's flags, derived from the fields of its dataclass, on Python's own argparse.

A field `n_layer: int = 4` is the flag `--n-layer`; a field of type `Positional[str]` has no flag; a
field that is itself a dataclass contributes its own fields. The string under a field is its help.
Parsing returns only what was given, so that files and saved settings can come between the defaults
and the flags. (tyro parses such dataclasses too, but it prints errors as boxes and fills in
defaults at once, so that a second parser was needed to see what had been given.)
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import textwrap
import typing
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar

T = TypeVar("T")
Positional = Annotated[T, "positional"]
"""The type of a field that is given by its place on the command line, without a flag."""


_METAVARS = {"int": "N", "float": "X"}


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ValueErrors of one line that name the remedy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the values of the flags in argv by their fields' names; raise ValueError."""
        # --n_layer is read as --n-layer.
        hyphenated = [_hyphenated(word) if word.startswith("--") else word for word in argv]
        values, unknown = self.parse_known_args(hyphenated)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown argument {unknown[0]!r}{hint}")
        return vars(values)


def _hyphenated(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def command_parser(
    command: type, prog: str, *, no_default_shown: Collection[str] = ()
) -> FlagParser:
    """Return the parser of a command's flags.

    command: a dataclass; its docstring is the description. no_default_shown: fields whose default
    is not a value that a user would give, and is left out of the help.
    """
    parser = FlagParser(prog=prog, description=inspect.getdoc(command))
    _add_fields(parser, parser, command, dataclasses.MISSING, no_default_shown)
    return parser


def _add_fields(
    parser: FlagParser,
    group: Any,
    owner: type,
    instance: Any,
    no_default_shown: Collection[str],
) -> None:
    """Add the fields of the dataclass `owner`; their defaults are those of `instance`, if any."""
    hints = typing.get_type_hints(owner, include_extras=True)
    help_texts = field_help(owner)
    for field in dataclasses.fields(owner):
        hint, text = hints[field.name], help_texts.get(field.name, "")
        default = field.default
        if instance is not dataclasses.MISSING:
            default = getattr(instance, field.name)
        if dataclasses.is_dataclass(hint):
            own_group = parser.add_argument_group(field.name, text or None)
            _add_fields(parser, own_group, hint, default, no_default_shown)
            continue
        if field.name not in no_default_shown:
            text += _default_text(default)
        _add_flag(group, field.name, hint, text, default is dataclasses.MISSING)


def _default_text(default: Any) -> str:
    if default is dataclasses.MISSING or default is None or default is False or default == ():
        return ""
    if default is True:
        return " (default: on)"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f" (default: {shown})"


def _add_flag(group: Any, name: str, hint: Any, text: str, required: bool) -> None:
    positional = typing.get_origin(hint) is Annotated
    if positional:
        hint = typing.get_args(hint)[0]
    options: dict[str, Any] = {
        "help": text.replace("%", "%%"),
        "default": argparse.SUPPRESS,
        **_value_options(hint),
    }
    if positional:
        if options.get("nargs") != "*":
            options.pop("default")
        group.add_argument(name, metavar=name.upper(), **options)
        return
    if "choices" not in options and hint is not bool:
        options["metavar"] = _METAVARS.get(options["type"].__name__) or name.upper()
    flag = f"--{name.replace('_', '-')}"
    group.add_argument(flag, dest=name, required=required, **options)


def _value_options(hint: Any) -> dict[str, Any]:
    """Return argparse's options for the values of a field of this type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        options = _value_options(next(arg for arg in args if arg is not NoneType))
        if "choices" in options:
            # None is a choice too, but the help shows the values only.
            shown = "{" + ",".join(options["choices"]) + "}"
            choices = (*options["choices"], None)
            return {"choices": choices, "type": _or_none(str), "metavar": shown}
        return options | {"type": _or_none(options["type"])}
    if origin is Literal:
        return {"choices": args}
    if origin is tuple:
        n = "*" if args[-1] is Ellipsis else len(args)
        return {"nargs": n, "type": args[0]}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint}


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader of `kind` that takes "none", as in TOML files, for None."""

    def read(text: str) -> Any:
        return None if text in ("none", "None") else kind(text)

    read.__name__ = kind.__name__  # in argparse's message: invalid int value
    return read


def field_help(owner: type) -> dict[str, str]:
    """Return the strings that stand under a dataclass's fields, those of its bases included."""
    texts: dict[str, str] = {}
    for base in reversed(owner.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts
