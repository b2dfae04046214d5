"""A command's settings as a flat mapping: read from TOML, applied to its nested dataclasses."""

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
    """Return the names of the fields that are dataclasses themselves."""
    return [
        field.name
        for field in dataclasses.fields(command)
        if dataclasses.is_dataclass(getattr(command, field.name))
    ]


def flat(command: Any) -> dict[str, Any]:
    """Return the command's fields by name, those of its nested dataclasses beside its own."""
    nested = {name: getattr(command, name) for name in _nested(command)}
    own = {
        field.name: getattr(command, field.name)
        for field in dataclasses.fields(command)
        if field.name not in nested
    }
    return {**{k: v for config in nested.values() for k, v in flat(config).items()}, **own}


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the keys of a TOML file. Raises ValueError if it cannot be read or is not TOML."""
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    # TOMLDecodeError and UnicodeDecodeError are ValueErrors; tomllib recurses into nested arrays.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def apply(command: T, values: Mapping[str, Any], source: str) -> T:
    """Return the command with these fields changed, wherever they are nested.

    source: named in errors; "" for flags, which name themselves. "none" stands for None, which TOML
    lacks. Raises ValueError for a key that is no field, with the one it resembles, and for a value
    of another type than the field's.
    """
    known, prefix = flat(command), f"{source}: " if source else ""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{prefix}unknown key {key!r}{hint}")
    return _replace(command, values, prefix)


def _replace(command: T, values: Mapping[str, Any], prefix: str) -> T:
    hints = typing.get_type_hints(type(command))
    changes: dict[str, Any] = {}
    for name in _nested(command):
        changes[name] = _replace(getattr(command, name), values, prefix)
    for field in dataclasses.fields(command):
        if field.name in values and field.name not in changes:
            value, hint = values[field.name], hints[field.name]
            if value == "none" and NoneType in typing.get_args(hint):
                value = None
            try:
                changes[field.name] = convert(value, hint)
            except (TypeError, OverflowError):
                raise ValueError(
                    f"{prefix}{field.name} must be {describe(hint)}, got {value!r:.100}"
                ) from None
    try:
        return dataclasses.replace(command, **changes)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None
