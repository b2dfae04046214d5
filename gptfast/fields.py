"""What a field's type admits, and how to say so: for configurations and the files they are in."""

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
