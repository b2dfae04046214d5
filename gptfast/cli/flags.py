"""A command's flags, made from the fields of its dataclass with Python's argparse.

A field `n_layer: int = 4` becomes the flag `--n-layer`. A field of type `Positional[str]` becomes a
positional argument. A field that is a dataclass contributes its own fields. The string under a
field is its help. Parsing returns only the flags that were given, because files and saved settings
rank between the defaults and the flags. (tyro parses such dataclasses too, but it prints errors as
boxes and fills in the defaults at once. A second parser was needed to see which flags were given.)
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
"""The type of a field that is a positional argument instead of a flag."""

_METAVARS = {"int": "N", "float": "X"}
GROUP_TEXT_COLUMNS = 80
"""Width of the text below a group's title, which argparse does not wrap."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A formatter that keeps the lines of descriptions and never breaks a line within a flag."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that raises a ValueError of one line instead of exiting."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with argparse's message."""
        raise ValueError(f"{message} (see {self.prog} --help)")

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the value of each flag in argv by its field's name. Raises ValueError."""
        values, unknown = self.parse_known_args([self._with_hyphens(word) for word in argv])
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown argument {unknown[0]!r}{hint}")
        return vars(values)

    def _with_hyphens(self, word: str) -> str:
        """Return --n_layer as --n-layer; what is no flag of this parser stays as it is."""
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        return flag + equals + value if flag in self._option_string_actions else word


def command_parser(
    command: type,
    prog: str,
    *,
    no_default_shown: Collection[str] = (),
    not_in_help: Collection[str] = (),
) -> FlagParser:
    """Return the parser of a command's flags.

    command: a dataclass whose docstring is the description in the help. no_default_shown: fields
    whose default stands for something else and does not appear in the help. not_in_help: fields
    that the command refuses itself, with an error that names the remedy.
    """
    parser = FlagParser(prog=prog, description=inspect.getdoc(command))
    _add_fields(parser, parser, command, dataclasses.MISSING, no_default_shown, not_in_help)
    parser.usage = _usage(parser)
    return parser


def _usage(parser: FlagParser) -> str:
    """Return the usage line: required flags and positional arguments; the help lists the rest."""
    required, positional = [], []
    for action in parser._actions:
        values = f"{action.metavar} ..." if action.nargs == "*" else str(action.metavar)
        if not action.option_strings:
            positional.append(values)
        elif action.required:
            required.append(f"{action.option_strings[0]} {values}")
    return " ".join([parser.prog, "[FLAGS]", *required, *positional])


def _add_fields(
    parser: FlagParser,
    group: Any,
    owner: type,
    instance: Any,
    no_default_shown: Collection[str],
    not_in_help: Collection[str],
) -> None:
    """Add a flag for each field of the dataclass `owner`.

    instance: has the defaults, or is MISSING if the fields' own defaults apply.
    """
    hints = typing.get_type_hints(owner, include_extras=True)
    help_texts = field_help(owner)
    for field in dataclasses.fields(owner):
        hint, text = hints[field.name], help_texts.get(field.name, "")
        default = field.default
        if instance is not dataclasses.MISSING:
            default = getattr(instance, field.name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            wrapped = textwrap.fill(text, GROUP_TEXT_COLUMNS, break_on_hyphens=False)
            own_group = parser.add_argument_group(field.name, wrapped or None)
            _add_fields(parser, own_group, hint, default, no_default_shown, not_in_help)
            continue
        if field.name in not_in_help:
            text = argparse.SUPPRESS
        elif field.name not in no_default_shown:
            text += _default_text(default)
        _add_flag(group, field.name, hint, text, default is dataclasses.MISSING)


def _default_text(default: Any) -> str:
    """Return the end of a help text that shows the default; "" for an empty default."""
    if default is dataclasses.MISSING or default is None or default is False or default == ():
        return ""
    if default is True:
        return " (default: on)"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if "\n" in shown:
        shown = repr(shown)
    return f" (default: {shown})"


def _add_flag(group: Any, name: str, hint: Any, text: str, required: bool) -> None:
    """Add the flag or positional argument of one field of type `hint`."""
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
    """Return the options of argparse's add_argument for a field of this type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        options = _value_options(next(arg for arg in args if arg is not NoneType))
        if "choices" in options:
            # "none" is a choice too, but the help lists the values only.
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
    """Return a function that converts text to `kind`, and "none" to None as in TOML files."""

    def read(text: str) -> Any:
        return None if text in ("none", "None") else kind(text)

    read.__name__ = kind.__name__  # argparse puts it in its message: invalid int value
    return read


def field_help(owner: type) -> dict[str, str]:
    """Return the string below each field of a dataclass and of its bases, by the field's name."""
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
