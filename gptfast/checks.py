"""What a field's type admits, and how to say so: for configurations and the files they are in."""

import operator
import typing
from types import NoneType, UnionType
from typing import Any, Literal


def convert(value: Any, hint: Any) -> Any:
    """The value as the type says; TypeError if it is of another, OverflowError if out of range.

    A float may be written as an integer, a tuple as a list.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        if NoneType in args and value is None:
            return None
        return convert(value, next(arg for arg in args if arg is not NoneType))
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise TypeError
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(convert(item, args[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError
    if hint is int and not -(2**63) <= value < 2**63:
        raise OverflowError
    return value


def describe(hint: Any) -> str:
    """What a field of this type must be, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        return " or ".join("none" if arg is NoneType else describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        return "a list of strings" if args[0] is str else "a list of numbers"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names[hint]


def _at_least(least: int, name: str, value: Any) -> int:
    try:
        n = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if n < least:
        raise ValueError(f"{name} must be >= {least}, got {n}")
    return n


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def _token_id(i: Any, name: str) -> int:
    try:
        return operator.index(i)
    except TypeError:
        raise ValueError(f"{name} must be a token id (an integer), got {i!r}") from None


def check_text(text: str, what: str) -> None:
    """ValueError unless `text`, which the message calls `what`, is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} has the lone surrogate {text[error.start]!r} at character {error.start}, "
            "which UTF-8 cannot hold; decode its source with errors='replace'"
        ) from None


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
