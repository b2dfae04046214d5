"""A command's flags, made from the fields of its dataclass.

A field `n_layer: int = 4` becomes the flag `--n-layer`. A field of type `Positional[str]` becomes a
positional argument. A field that is a dataclass contributes its own fields. The string under a
field is its help. `gptfast.cli.command_line` reads the flags that were given, and
`gptfast.cli.help` writes the help. (Python's argparse parses neither a list flag before a
positional argument nor a value that begins with a dash, and would read -prompt as -p rompt.)
"""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")
Positional = Annotated[T, "positional"]
"""The type of a field that is a positional argument instead of a flag."""

SHORT = {"data": "-d", "out": "-o", "prompt": "-p", "max_new_tokens": "-n", "seed": "-s"}
"""The short flags, which mean the same in every command. There is no -t: it is the number of
threads in one program and the temperature in the next."""
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
# What stands for the value in the help, by the field's name or else by its type.
_METAVARS = {
    **dict.fromkeys(("data", "config", "hellaswag"), "FILE"),
    **dict.fromkeys(("init", "draft", "base"), "MODEL"),
    **dict.fromkeys(("prompt", "sample_prompt", "stop", "template"), "TEXT"),
    **dict.fromkeys(
        ("tokenizer", "tasks", "allow_special", "freeze", "lora_targets", "device"), "NAME"
    ),
    **dict.fromkeys(("text_field", "prompt_field", "completion_field"), "NAME"),
    **{"grid": "NAME=VALUE,VALUE", "random": "NAME=LOW:HIGH", "lr_range": "LOW HIGH"},
}


class UsageError(ValueError):
    """The command line is wrong: the command ends with exit code 2, as Unix commands do."""


@dataclass(frozen=True)
class Flag:
    """A flag or a positional argument of a command."""

    name: str
    """The name of its field."""
    kind: type
    """int, float, str or bool."""
    count: int | None
    """The number of values; 0 for a switch, None for one or more."""
    choices: tuple[str, ...]
    """The possible values; () if any is."""
    optional: bool
    """Whether "none" stands for None."""
    positional: bool
    required: bool
    help: str
    hidden: bool = False
    """Whether the help leaves it out and no hint suggests it."""
    group: str = ""
    """The field of the dataclass that it comes from, "" for the command itself."""

    @property
    def long(self) -> str:
        """The flag as it is typed, such as --n-layer; the name in capitals for a positional."""
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def short(self) -> str | None:
        """The short form, such as -p."""
        return None if self.positional else SHORT.get(self.name)

    @property
    def metavar(self) -> str:
        """What stands for the value in the help; "" for a switch."""
        if self.count == 0:
            return ""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        by_kind = {int: "N", float: "X"}.get(self.kind, self.name.upper())
        return _METAVARS.get(self.name, by_kind) + (" ..." if self.count is None else "")

    def value(self, text: str) -> Any:
        """Return the value that a text stands for. Raises UsageError for a wrong one."""
        if self.optional and text in ("none", "None"):
            return None
        if self.choices:
            if text in self.choices:
                return text
            raise UsageError(f"{self.long} takes one of {', '.join(self.choices)}, got {text!r}")
        try:
            return self.kind(text)
        except ValueError:
            raise UsageError(f"{self.long} takes {_KINDS[self.kind]}, got {text!r}") from None


def flags_of(
    command: type, *, no_default_shown: Collection[str] = (), not_in_help: Collection[str] = ()
) -> list[Flag]:
    """Return the flags of a command in the order of its fields.

    command: a dataclass. no_default_shown: fields whose default stands for something else and does
    not appear in the help. not_in_help: fields that the command refuses itself, with an error that
    names the remedy.
    """
    found = _flags_of(command, dataclasses.MISSING, "", no_default_shown)
    return [dataclasses.replace(flag, hidden=flag.name in not_in_help) for flag in found]


def _flags_of(
    owner: type, instance: Any, group: str, no_default_shown: Collection[str]
) -> Iterator[Flag]:
    """Yield the flags of the dataclass `owner`.

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
            yield from _flags_of(hint, default, field.name, no_default_shown)
            continue
        if field.name not in no_default_shown:
            text += _default_text(default)
        positional = typing.get_origin(hint) is Annotated
        if positional:
            hint = typing.get_args(hint)[0]
        required = default is dataclasses.MISSING
        yield Flag(field.name, *_value_of(hint), positional, required, text, group=group)


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


def _value_of(hint: Any) -> tuple[type, int | None, tuple[str, ...], bool]:
    """Return kind, count, choices and optional of a flag for a field of this type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        kind, count, choices, _ = _value_of(next(arg for arg in args if arg is not NoneType))
        return kind, count, choices, True
    if origin is Literal:
        return str, 1, args, False
    if origin is tuple:
        return args[0], None if args[-1] is Ellipsis else len(args), (), False
    return hint, 0 if hint is bool else 1, (), False


def field_help(owner: type) -> dict[str, str]:
    """Return the string below each field of a dataclass and of its bases, by the field's name."""
    texts: dict[str, str] = {}
    for base in reversed(owner.__mro__[:-1]):
        texts |= _own_help(base)
    return texts


@cache
def _own_help(owner: type) -> dict[str, str]:
    """Return the strings below the fields that a class itself defines: reading them is slow."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(str(below.value.value).split())
        for field, below in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def group_help(owner: type) -> dict[str, str]:
    """Return the string below each field that is a dataclass itself, by the field's name."""
    texts = field_help(owner)
    found: dict[str, str] = {}
    for name, hint in typing.get_type_hints(owner).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= {name: texts.get(name, ""), **group_help(hint)}
    return found
