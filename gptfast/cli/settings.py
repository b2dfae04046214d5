"""The settings of a command, which is a nested dataclass, as one flat mapping as in TOML files."""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

from gptfast import checks
from gptfast.cli.flags import UsageError
from gptfast.cli.hints import similar_key

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


class SettingsError(ValueError):
    """A setting of a file is wrong. Its message has the names that stand in the file."""


def _nested(command: Any) -> list[str]:
    """Return the names of the fields that are dataclasses themselves."""
    return [
        field.name
        for field in dataclasses.fields(command)
        if dataclasses.is_dataclass(getattr(command, field.name))
    ]


def flat(command: Any) -> dict[str, Any]:
    """Return the values of the command's fields and of its nested dataclasses' fields by name."""
    nested = {name: getattr(command, name) for name in _nested(command)}
    own = {
        field.name: getattr(command, field.name)
        for field in dataclasses.fields(command)
        if field.name not in nested
    }
    return {**{k: v for config in nested.values() for k, v in flat(config).items()}, **own}


def with_tuples(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of flags with tuples in place of lists, for a frozen dataclass."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the keys of a TOML file. Raises ValueError if it cannot be read or is not TOML."""
    try:
        # Some editors put a byte-order mark in front.
        return tomllib.loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    # Bad TOML raises a ValueError; deeply nested arrays raise a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def apply(command: T, values: Mapping[str, Any], source: str) -> T:
    """Return a copy of the command with these values in its fields or its nested fields.

    "none" stands for None, which TOML does not have. source: where the values come from, for error
    messages; "" for flags. Raises SettingsError for an unknown key and for a value of a wrong type;
    of flags, UsageError.
    """
    known, prefix = flat(command), f"{source}: " if source else ""
    for key in values:
        if key not in known:
            near = similar_key(key, known)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise SettingsError(f"{prefix}unknown key {key!r}{hint}")
    try:
        return _replace(command, values, prefix)
    except ValueError as error:
        kind = SettingsError if source else UsageError
        raise kind(str(error)) from None


def _replace(command: T, values: Mapping[str, Any], prefix: str) -> T:
    """Return a copy of the command with these values. prefix: the start of error messages."""
    hints = typing.get_type_hints(type(command))
    changes: dict[str, Any] = {}
    for name in _nested(command):
        changes[name] = _replace(getattr(command, name), values, prefix)
    for field in dataclasses.fields(command):
        if field.name in values and field.name not in changes:
            value, hint = values[field.name], hints[field.name]
            if value == "none" and NoneType in typing.get_args(hint):
                value = None
            changes[field.name] = checks.field(f"{prefix}{field.name}", value, hint)
    try:
        return dataclasses.replace(command, **changes)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None
