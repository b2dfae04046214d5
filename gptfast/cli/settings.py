"""Flat settings and nested dataclasses: what a TOML file says, applied to a command's fields."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def _nested(command: Any) -> list[str]:
    """The fields that are configurations themselves."""
    return [
        field.name
        for field in dataclasses.fields(command)
        if dataclasses.is_dataclass(getattr(command, field.name))
    ]


def flat(command: Any) -> dict[str, Any]:
    """The command's fields by name, those of its configurations beside its own."""
    nested = {name: getattr(command, name) for name in _nested(command)}
    own = {
        field.name: getattr(command, field.name)
        for field in dataclasses.fields(command)
        if field.name not in nested
    }
    return {**{k: v for config in nested.values() for k, v in flat(config).items()}, **own}


def read_toml(path: str | Path) -> dict[str, Any]:
    """The keys of a TOML file. ValueError if it cannot be read or is none."""
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are such
        raise ValueError(f"{path} is not TOML: {error}") from None


def apply(command: T, values: Mapping[str, Any], source: str) -> T:
    """The command with these fields, wherever they are nested. `source` is named in errors.

    "none" stands for None, which TOML lacks. Raises ValueError for a key that is no field, with the
    one it resembles, and for a value of another type than the field's.
    """
    known = flat(command)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{source}: unknown key {key!r}{hint}")
    return _replace(command, values, source)


def _replace(command: T, values: Mapping[str, Any], source: str) -> T:
    hints = typing.get_type_hints(type(command))
    changes: dict[str, Any] = {}
    for name in _nested(command):
        changes[name] = _replace(getattr(command, name), values, source)
    for field in dataclasses.fields(command):
        if field.name in values and field.name not in changes:
            value = values[field.name]
            try:
                changes[field.name] = _convert(value, hints[field.name])
            except TypeError:
                raise ValueError(
                    f"{source}: {field.name} must be {_describe(hints[field.name])}, got {value!r}"
                ) from None
    try:
        return dataclasses.replace(command, **changes)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _convert(value: Any, hint: Any) -> Any:
    """The value as the type says; TypeError if it is of another."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        if NoneType in args and (value is None or value == "none"):
            return None
        return _convert(value, next(arg for arg in args if arg is not NoneType))
    if origin is Literal:
        if value in args:
            return value
        raise TypeError
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_convert(item, args[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        return " or ".join('"none"' if arg is NoneType else _describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names[hint]
