"""Flat settings and nested dataclasses: what a TOML file says, applied to a command's fields."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from gptfast.checks import convert, describe

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
    # Of the first, TOMLDecodeError and UnicodeDecodeError; tomllib recurses into nested arrays.
    except (ValueError, RecursionError) as error:
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
            value, hint = values[field.name], hints[field.name]
            if value == "none" and NoneType in typing.get_args(hint):
                value = None
            try:
                changes[field.name] = convert(value, hint)
            except (TypeError, OverflowError):
                raise ValueError(
                    f"{source}: {field.name} must be {describe(hint)}, got {value!r:.100}"
                ) from None
    try:
        return dataclasses.replace(command, **changes)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
