"""Checks of single values: one error, which names the value and what it must be."""

import operator
import re
import typing
from types import NoneType, UnionType
from typing import Any, Literal


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return the value as an int; ValueError, calling it `name`, unless least <= value <= most."""
    try:
        n = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        n = None
    if n is not None and (least is None or n >= least) and (most is None or n <= most):
        return n
    limits = "" if least is None else f" >= {least}"
    if most is not None:
        limits = f" from {least} to {most}" if least is not None else f" <= {most}"
    raise ValueError(f"{name} must be an integer{limits}, got {_quoted(value)}")


def _quoted(value: Any) -> str:
    """Return the beginning of a value's repr, on one line."""
    return " ".join(repr(value).splitlines())[:100]


def text(name: str, value: Any) -> str:
    """Return the value; ValueError, calling it `name`, unless it is a string that UTF-8 holds."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has the lone surrogate {value[error.start]!r} at character {error.start}, "
            "which UTF-8 cannot hold; decode its source with errors='replace'"
        ) from None
    return value


def field(name: str, value: Any, hint: Any) -> Any:
    """Return the value as a field's type; ValueError, calling it `name`, if it is of another type.

    hint: int, float, bool, str, a Literal of strings, a tuple of one of them, or one of these or
    None. An integer is taken for a float, a list for a tuple.
    """
    try:
        return _convert(value, hint)
    except TypeError:
        raise ValueError(f"{name} must be {_describe(hint)}, got {_quoted(value)}") from None
    except OverflowError:
        limit = f"{_describe(hint)} below 2**63 in size"
        raise ValueError(f"{name} must be {limit}, got {_quoted(value)}") from None


def _convert(value: Any, hint: Any) -> Any:
    """Return the value as a type; TypeError if it is of another, OverflowError if too large."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        if NoneType in args and value is None:
            return None
        return _convert(value, next(arg for arg in args if arg is not NoneType))
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise TypeError
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_convert(item, args[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError
    if hint is int and not -(2**63) <= value < 2**63:
        raise OverflowError
    return value


def _describe(hint: Any) -> str:
    """Return what a field of this type must be, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        return " or ".join("none" if arg is NoneType else _describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        return "a list of strings" if args[0] is str else "a list of numbers"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names[hint]


def reason(error: Exception) -> str:
    """Return why a file's values do not fit, without Python's words for one of another form."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return one_line(error) if isinstance(error, ValueError) else "it has another form than usual"


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, without the place in torch's source."""
    message = str(error).strip() or type(error).__name__
    return re.sub(r"^\[enforce fail.*DefaultCPUAllocator: ", "", message.splitlines()[0])
