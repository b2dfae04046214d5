"""The fundamental types of PTX as numpy's, and access to an instruction's operands.

A register holds the value of every thread of a CTA: an array of unsigned integers of its width, or
of booleans. No array in a register is ever changed in place, so registers may share one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptx.faults import Fault, UnknownInstruction
from ptx.parse import Immediate, Instruction, Not, Nowhere, Operand, Register, Symbol, Vector

if TYPE_CHECKING:
    from ptx.machine import CTA

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None
"""The threads that execute an instruction; None is all of them."""
Step = Callable[["CTA", Mask], None]
"""One decoded instruction."""
Read = Callable[["CTA"], Array]
Write = Callable[["CTA", Array, Mask], None]

WARP = 32
U8, U16, U32, U64 = (np.dtype(f"u{n}") for n in (1, 2, 4, 8))
BOOL, F16, F32, F64 = np.dtype(bool), np.dtype("f2"), np.dtype("f4"), np.dtype("f8")
RAW = {1: BOOL, 8: U8, 16: U16, 32: U32, 64: U64}
TYPES = {"pred": BOOL, "f16": F16, "f32": F32, "f64": F64, "bf16": U16, "f16x2": U32}
TYPES |= {f"{kind}{bits}": RAW[bits] for kind in "bu" for bits in (8, 16, 32, 64)}
TYPES |= {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
TYPES |= {name: U32 for name in ("bf16x2", "s16x2", "u16x2")} | {"f32x2": U64}


def type_of(name: str) -> np.dtype[Any]:
    """Return numpy's type of a PTX type, such as u4 for "b32"."""
    if name not in TYPES:
        raise UnknownInstruction(f"the type .{name}")
    return TYPES[name]


def from_bf16(bits: Array) -> Array:
    """Return bf16 numbers, given by their bits, as float32."""
    return (bits.astype(U32) << 16).view(F32)


def to_bf16(x: Array) -> Array:
    """Return the bits of float32 numbers rounded to bf16, ties to even; NaN is 0x7FFF.

    The manual's "cvt": a NaN becomes the canonical one of the format.
    """
    bits = x.astype(F32, copy=False).view(U32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(x), U16.type(0x7FFF), rounded.astype(U16))


def halves(bits: Array, dtype: str) -> tuple[Array, Array]:
    """Return the lower and upper 16-bit floats of 32 bits as float32; dtype is bf16 or f16."""
    lower, upper = bits.astype(U16), (bits >> 16).astype(U16)
    if dtype == "bf16":
        return from_bf16(lower), from_bf16(upper)
    return lower.view(F16).astype(F32), upper.view(F16).astype(F32)


def joined(lower: Array, upper: Array) -> Array:
    """Return 32 bits of two 16-bit values, given by their bits."""
    return lower.astype(U32) | (upper.astype(U32) << 16)


SHARED_BASE = 1024
"""The address of the symbol global_smem, not 0 so that a null pointer is a fault."""
_DIMENSIONS = {"x": 0, "y": 1, "z": 2}


def special(name: str) -> Read:
    """Return the reader of a special register or variable ("Special Registers" in the manual)."""
    if name == "global_smem":
        address = np.array([SHARED_BASE], U32)
        return lambda cta: address
    register, _, dimension = name.removeprefix("%").partition(".")
    axis = _DIMENSIONS.get(dimension, 0)
    if name == "%tid.x":
        return lambda cta: cta.tid
    if register == "tid":
        return lambda cta: np.zeros(1, U32)
    if register == "laneid":
        return lambda cta: cta.tid % WARP
    if register in ("ctaid", "nctaid", "ntid"):
        return lambda cta: np.array([cta.sizes[register][axis]], U32)
    raise UnknownInstruction(f"the operand {name}")


def read(operand: Operand, dtype: np.dtype[Any]) -> Read:
    """Return a function of a CTA that gives an operand's values: an array of all threads, or of 1.

    A register that is wider than the type gives its lower bits ("Operand Size Exceeding
    Instruction-Type Size").
    """
    if isinstance(operand, Register):
        return _read_register(operand, dtype)
    if isinstance(operand, Not):
        inner = _read_register(operand.register, BOOL)
        return lambda cta: ~inner(cta)
    if isinstance(operand, Immediate):
        constant = constant_of(operand, dtype)
        return lambda cta: constant
    if isinstance(operand, Symbol):
        inner = special(operand.name)
        return lambda cta: inner(cta).astype(dtype, copy=False)
    raise UnknownInstruction(f"the operand {operand}")


def constant_of(operand: Immediate, dtype: np.dtype[Any]) -> Array:
    if dtype == BOOL:
        return np.array([operand.bits != 0])
    unsigned = RAW[8 * dtype.itemsize]
    return np.array([operand.bits & ((1 << 8 * dtype.itemsize) - 1)], unsigned).view(dtype)


def _read_register(register: Register, dtype: np.dtype[Any]) -> Read:
    index, raw = register.index, RAW[register.bits]
    if dtype == raw:

        def plain(cta: "CTA") -> Array:
            value = cta.registers[index]
            if value is None:
                raise Fault(f"{register.name} is read before it is written")
            return value

        return plain
    inner = _read_register(register, raw)
    if dtype.itemsize == raw.itemsize and BOOL not in (dtype, raw):
        return lambda cta: inner(cta).view(dtype)
    if dtype.itemsize > raw.itemsize or BOOL in (dtype, raw):
        raise UnknownInstruction(f"{register.name} as an operand of type {dtype}")
    unsigned = RAW[8 * dtype.itemsize]
    return lambda cta: inner(cta).astype(unsigned).view(dtype)


def write(operand: Operand) -> Write:
    """Return the function that writes a result (an array of all threads or of 1) to a register.

    A register that is wider than the result takes it sign-extended if its type is signed, else
    zero-extended.
    """
    if isinstance(operand, Nowhere):
        return lambda cta, value, mask: None
    if not isinstance(operand, Register):
        raise UnknownInstruction(f"the destination {operand}")
    index, raw = operand.index, RAW[operand.bits]

    def store(cta: "CTA", value: Array, mask: Mask) -> None:
        if value.dtype != raw:
            value = as_raw(value, raw)
        if mask is not None:
            old = cta.registers[index]
            value = np.where(mask, value, poison(raw) if old is None else old)
        elif len(value) == 1 != cta.n_threads:
            value = np.repeat(value, cta.n_threads)
        cta.registers[index] = value

    return store


def as_raw(value: Array, raw: np.dtype[Any]) -> Array:
    """Return values as bits of a register's width."""
    if value.dtype.itemsize == raw.itemsize:
        return value.view(raw)
    if value.dtype.kind == "f":
        value = value.view(RAW[8 * value.dtype.itemsize])
    if value.dtype.kind == "i" and value.dtype.itemsize < raw.itemsize:
        return value.astype(f"i{raw.itemsize}").view(raw)
    return value.astype(raw)


def poison(raw: np.dtype[Any]) -> Array:
    """Return what a thread has in a register that it never wrote: all ones, a NaN as a float."""
    return np.array([raw.type(0) if raw == BOOL else np.iinfo(raw).max], raw)


def items(operand: Operand) -> tuple[Operand, ...]:
    """Return the operands in a vector, or the operand alone."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def guarded(instruction: Instruction, step: Step) -> Step:
    """Return the step of an instruction under its predicate ("Predicated Execution")."""
    if instruction.guard is None:
        return step
    condition = read(instruction.guard, BOOL)

    def conditional(cta: "CTA", mask: Mask) -> None:
        chosen = condition(cta) if mask is None else condition(cta) & mask
        step(cta, None if chosen.all() else chosen)

    return conditional


def pure(
    instruction: Instruction,
    f: Callable[..., Array],
    sources: list[np.dtype[Any]],
) -> Step:
    """Return the step of an instruction that writes f(its sources) to its first operand.

    sources: the types of the operands after it.
    """
    given = instruction.operands[1:]
    if len(given) != len(sources):
        raise UnknownInstruction(instruction.text)
    reads = [read(operand, dtype) for operand, dtype in zip(given, sources, strict=True)]
    put = write(instruction.operands[0])
    if len(reads) == 1:
        (a,) = reads
        return lambda cta, mask: put(cta, f(a(cta)), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda cta, mask: put(cta, f(a(cta), b(cta)), mask)
    return lambda cta, mask: put(cta, f(*[source(cta) for source in reads]), mask)
