"""Data movement between registers and conversion: the manual's "mov", "cvt"."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.faults import UnknownInstruction
from ptx.floats import flush, to_odd_f32
from ptx.parse import Instruction, Vector
from ptx.values import (
    F16,
    F32,
    F64,
    RAW,
    U16,
    Array,
    Mask,
    Step,
    from_bf16,
    joined,
    pure,
    read,
    to_bf16,
    type_of,
    write,
)


def move(instruction: Instruction) -> Step:
    """mov: a register, a constant, a special register or an address; or pack or unpack a vector."""
    target, source = instruction.operands
    dtype = type_of(instruction.parts[-1])
    if isinstance(target, Vector):
        return _unpack(target, read(source, dtype), dtype)
    if isinstance(source, Vector):
        return _pack(target, source, dtype)
    return pure(instruction, lambda a: a, [dtype])


def _unpack(target: Vector, whole: Callable[[Any], Array], dtype: np.dtype[Any]) -> Step:
    """mov.b32 {a, b}, c: the first item has the lowest bits."""
    bits = 8 * dtype.itemsize // len(target.items)
    puts = [write(item) for item in target.items]

    def step(cta: Any, mask: Mask) -> None:
        value = whole(cta)
        for i, put in enumerate(puts):
            put(cta, (value >> dtype.type(bits * i)).astype(RAW[bits]), mask)

    return step


def _pack(target: Any, source: Vector, dtype: np.dtype[Any]) -> Step:
    """mov.b32 c, {a, b}."""
    bits = 8 * dtype.itemsize // len(source.items)
    reads = [read(item, RAW[bits]) for item in source.items]
    put = write(target)

    def step(cta: Any, mask: Mask) -> None:
        whole = reads[0](cta).astype(dtype)
        for i, part in enumerate(reads[1:], 1):
            whole = whole | (part(cta).astype(dtype) << dtype.type(bits * i))
        put(cta, whole, mask)

    return step


_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "rzi": np.trunc,
    "rni": np.rint,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def to_integer(x: Array, dtype: np.dtype[Any]) -> Array:
    """Return integral floats as integers, clamped to the type's range.

    NaN gives 0 or, where 64 bits are involved on either side, the sign bit alone.
    """
    limits = np.iinfo(dtype)
    size = 2.0 ** (8 * dtype.itemsize - (dtype.kind == "i"))
    high, low = x >= size, x < limits.min
    inside = np.where(high | low | np.isnan(x), 0, x)
    out = np.where(high, dtype.type(limits.max), inside.astype(dtype))
    out = np.where(low, dtype.type(limits.min), out)
    if 8 in (dtype.itemsize, x.dtype.itemsize):
        sign = np.array([1 << (8 * dtype.itemsize - 1)], RAW[8 * dtype.itemsize]).view(dtype)
        out = np.where(np.isnan(x), sign, out)
    return out.astype(dtype)


def convert(instruction: Instruction) -> Step:
    """cvt: between all types that Triton uses; floats are rounded to nearest (.rn)."""
    _, *modifiers, to, of = instruction.parts
    if not {*modifiers} <= {"rn", "ftz", *_ROUNDINGS}:
        raise UnknownInstruction(instruction.text)
    if to in ("bf16x2", "f16x2"):
        # cvt.rn.bf16x2.f32 d, a, b: a becomes the upper half.
        half = to_bits16(to.removesuffix("x2"))
        return pure(instruction, lambda a, b: joined(half(b), half(a)), [F32, F32])
    widen: Callable[[Array], Array] = from_bf16 if of == "bf16" else lambda x: x
    rounded = next((_ROUNDINGS[m] for m in modifiers if m in _ROUNDINGS), None)
    narrow = _narrow(to, "f" in of, "ftz" in modifiers)

    def converted(x: Array) -> Array:
        x = widen(x)
        if "ftz" in modifiers and of == "f32":
            x = flush(x)
        return narrow(x if rounded is None else rounded(x))

    return pure(instruction, converted, [type_of(of)])


def _narrow(to: str, from_float: bool, ftz: bool) -> Callable[[Array], Array]:
    """Return the last step of a conversion to a type."""
    if to in ("bf16", "f16"):
        return to_bits16(to)
    dtype = type_of(to)
    if dtype.kind == "f":
        return (
            (lambda x: flush(x.astype(dtype))) if ftz and to == "f32" else lambda x: x.astype(dtype)
        )
    return (lambda x: to_integer(x, dtype)) if from_float else lambda x: x.astype(dtype)


def to_bits16(name: str) -> Callable[[Array], Array]:
    """Return the rounding of numbers to bf16 or f16, as bits."""
    if name == "bf16":
        return lambda x: to_bf16(x if x.dtype == F32 else _to_f32(x))
    return lambda x: _to_f16(x).view(U16)


def _to_f32(x: Array) -> Array:
    """Return numbers as float32 that rounds to bf16 as they do: float64 is rounded to odd first."""
    if x.dtype != F64 and x.dtype.itemsize > 2:
        raise UnknownInstruction(f"cvt.bf16 of {x.dtype}")
    return to_odd_f32(x) if x.dtype == F64 else x.astype(F32)


def _to_f16(x: Array) -> Array:
    """Round to float16; a NaN becomes 0x7FFF."""
    x = x if x.dtype.kind == "f" else x.astype(F64)
    return np.where(np.isnan(x), U16.type(0x7FFF).view(F16), x.astype(F16))
