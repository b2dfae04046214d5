"""Integer instructions, logic, shifts, selection and comparison.

The manual's "Integer Arithmetic Instructions", "Logic and Shift Instructions" and "Comparison and
Selection Instructions". Arithmetic is modulo 2^n.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.faults import UnknownInstruction
from ptx.parse import Instruction, Vector
from ptx.values import (
    BOOL,
    F16,
    RAW,
    U16,
    U32,
    U64,
    Array,
    Mask,
    Step,
    from_bf16,
    halves,
    pure,
    read,
    type_of,
    write,
)


def unsigned(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the unsigned type of the same width: arithmetic modulo 2^n does not need the sign."""
    return RAW[8 * dtype.itemsize]


def wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of twice the width and the same sign."""
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def add_sub(instruction: Instruction) -> Step:
    """add, sub: modulo 2^n; .s16x2 and .u16x2 treat each half alone."""
    name = instruction.parts[-1]
    f: Callable[..., Array] = np.add if instruction.parts[0] == "add" else np.subtract
    if name in ("s16x2", "u16x2"):

        def in_halves(a: Array, b: Array) -> Array:
            upper = f(a >> 16, b >> 16) << 16
            return upper | (f(a, b) & np.uint32(0xFFFF))

        return pure(instruction, in_halves, [U32, U32])
    dtype = unsigned(type_of(name))
    return pure(instruction, f, [dtype, dtype])


def mul(instruction: Instruction) -> Step:
    """mul.lo, .hi, .wide: the lower half, the upper half or all of the product of 2n bits."""
    _, part, name = instruction.parts
    dtype = type_of(name)
    if part == "lo":
        return pure(instruction, np.multiply, [unsigned(dtype)] * 2)
    f = {"hi": upper_product, "wide": wide_product}[part]
    return pure(instruction, f, [dtype] * 2)


def wide_product(a: Array, b: Array) -> Array:
    dtype = wide(a.dtype)
    return a.astype(dtype) * b.astype(dtype)


def upper_product(a: Array, b: Array) -> Array:
    """Return bits n to 2n - 1 of the product of n-bit integers."""
    n = 8 * a.dtype.itemsize
    if n < 64:
        return (wide_product(a, b) >> n).astype(a.dtype)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(U64), b.view(U64)
    lower = (x & low) * (y & low)
    middle = (x >> shift) * (y & low) + (lower >> shift)  # below 2^64: (2^32 - 1)^2 + 2^32 - 1
    crossed = (x & low) * (y >> shift) + (middle & low)
    upper = (x >> shift) * (y >> shift) + (middle >> shift) + (crossed >> shift)
    if a.dtype.kind == "i":
        # A negative number as unsigned is 2^64 too large, which adds the other factor here.
        upper = upper - np.where(a < 0, y, U64.type(0)) - np.where(b < 0, x, U64.type(0))
    return upper.view(a.dtype)


def mad(instruction: Instruction) -> Step:
    """mad.lo, .wide: the part of a * b that mul gives, plus c."""
    _, part, name = instruction.parts
    dtype = type_of(name)
    if part == "lo":
        return pure(instruction, lambda a, b, c: a * b + c, [unsigned(dtype)] * 3)
    if part == "hi":
        return pure(instruction, lambda a, b, c: upper_product(a, b) + c, [dtype] * 3)
    return pure(instruction, lambda a, b, c: wide_product(a, b) + c, [dtype, dtype, wide(dtype)])


def quotient(a: Array, b: Array) -> Array:
    """Return a / b rounded to zero; by 0, what is machine-specific in the manual: all ones."""
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    q = a // divisor
    if a.dtype.kind == "i":
        q = q + ((q < 0) & (q * divisor != a))  # numpy rounds down
    return np.where(zero, a.dtype.type(-1) if a.dtype.kind == "i" else ~a.dtype.type(0), q)


def remainder(a: Array, b: Array) -> Array:
    """Return a - b * (a / b): it has the sign of a; by 0, a."""
    return np.where(b == 0, a, a - b * quotient(a, b))


def div_rem(instruction: Instruction) -> Step:
    """div, rem of integers."""
    dtype = type_of(instruction.parts[-1])
    f = quotient if instruction.parts[0] == "div" else remainder
    return pure(instruction, f, [dtype, dtype])


def min_max(instruction: Instruction) -> Step:
    """min, max of integers."""
    dtype = type_of(instruction.parts[-1])
    f = np.minimum if instruction.parts[0] == "min" else np.maximum
    return pure(instruction, f, [dtype, dtype])


def negate(instruction: Instruction) -> Step:
    """neg of integers: the most negative number stays."""
    return pure(instruction, np.negative, [unsigned(type_of(instruction.parts[-1]))])


def absolute(instruction: Instruction) -> Step:
    """abs of integers: the most negative number stays."""
    return pure(instruction, np.abs, [type_of(instruction.parts[-1])])


def logic(instruction: Instruction) -> Step:
    """and, or, xor, not: bit by bit, also of predicates."""
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    f = functions.get(instruction.parts[0], np.invert)
    dtype = type_of(instruction.parts[-1])
    return pure(instruction, f, [dtype] * (len(instruction.operands) - 1))


def shift(instruction: Instruction) -> Step:
    """shl, shr: a shift by n bits or more clears, or for a signed shr fills with the sign."""
    dtype = type_of(instruction.parts[-1])
    bits = 8 * dtype.itemsize
    if instruction.parts[0] == "shl":
        dtype = unsigned(dtype)
    f = np.left_shift if instruction.parts[0] == "shl" else np.right_shift

    def shifted(a: Array, n: Array) -> Array:
        if (n < bits).all():
            return f(a, n.astype(dtype))
        if dtype.kind == "i":
            return f(a, np.minimum(n, bits - 1).astype(dtype))
        return np.where(n < bits, f(a, (n % bits).astype(dtype)), dtype.type(0))

    return pure(instruction, shifted, [dtype, U32])


def extract_bits(instruction: Instruction) -> Step:
    """bfe: n bits from a place, both modulo 256; beyond the width, .s repeats the sign bit."""
    dtype = type_of(instruction.parts[-1])
    width = 8 * dtype.itemsize

    def field(a: Array, place: Array, n: Array) -> Array:
        a, place, n = np.broadcast_arrays(a, place & 255, n & 255)
        bits = a.view(unsigned(dtype)).astype(U64)
        sign_at = np.minimum(place.astype(np.int64) + n - 1, width - 1)
        sign = (bits >> np.maximum(sign_at, 0).astype(U64)) & U64.type(1)
        sign = np.where((dtype.kind == "i") & (n > 0), sign, U64.type(0))
        # The bits above the value are copies of the sign, as if the register were infinitely wide.
        kept = np.where(
            place < width, bits >> np.minimum(place, width - 1).astype(U64), U64.type(0)
        )
        have = np.maximum(np.minimum(n.astype(np.int64), width - place.astype(np.int64)), 0)
        mask = _ones(have)
        return ((kept & mask) | np.where(sign > 0, ~mask, U64.type(0))).astype(unsigned(dtype))

    return pure(instruction, field, [dtype, U32, U32])


def _ones(n: Array) -> Array:
    """Return numbers whose lowest n bits are set, n up to 64."""
    top = U64.type(0xFFFFFFFFFFFFFFFF)
    return np.where(n > 0, top >> (64 - np.maximum(n, 1)).astype(U64), U64.type(0))


def permute_bytes(instruction: Instruction) -> Step:
    """prmt.b32: each nibble of c chooses one of the 8 bytes of {b, a}; its top bit, its sign."""
    if instruction.opcode != "prmt.b32":
        raise UnknownInstruction(instruction.text)

    def permuted(a: Array, b: Array, selector: Array) -> Array:
        both = (b.astype(U64) << U64.type(32)) | a
        out = np.zeros(1, U32)
        for i in range(4):
            nibble = (selector >> (4 * i)) & np.uint32(15)
            byte = (both >> ((nibble & np.uint32(7)).astype(U64) * U64.type(8))).astype(np.uint8)
            sign = (byte.view(np.int8) >> 7).view(np.uint8)
            out = out | (np.where(nibble & 8, sign, byte).astype(U32) << (8 * i))
        return out

    return pure(instruction, permuted, [U32, U32, U32])


def count_bits(instruction: Instruction) -> Step:
    """popc: the number of ones."""
    dtype = type_of(instruction.parts[-1])

    def ones(a: Array) -> Array:
        bytes_ = np.ascontiguousarray(a).view(np.uint8).reshape(len(a), -1)
        return np.unpackbits(bytes_, axis=1).sum(1, dtype=U32)

    return pure(instruction, ones, [dtype])


def select(instruction: Instruction) -> Step:
    """selp: a where the predicate holds, else b."""
    dtype = unsigned(type_of(instruction.parts[-1]))
    return pure(instruction, lambda a, b, p: np.where(p, a, b), [dtype, dtype, BOOL])


_ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_ORDERED |= {"ge": np.greater_equal}
_UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def comparison(name: str, floating: bool) -> Callable[[Array, Array], Array]:
    """Return a comparison operator of setp by its name.

    eq to ge are false where an operand is NaN, and so is ne; equ to geu and neu are true there; num
    is true where neither is NaN, nan where one is.
    """
    if name in _ORDERED:
        return _ORDERED[name]
    if not floating:
        return {**_UNSIGNED, "ne": np.not_equal}[name]
    if name == "neu":
        return np.not_equal
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name == "num":
        return lambda a, b: (a == a) & (b == b)
    if name == "nan":
        return lambda a, b: (a != a) | (b != b)
    ordered = _ORDERED[name.removesuffix("u")]
    return lambda a, b: ordered(a, b) | (a != a) | (b != b)


def set_predicate(instruction: Instruction) -> Step:
    """setp: compare, then combine with a predicate (.and, .or, .xor).

    p|q: q is the comparison's negation, combined likewise; with a packed type p is the comparison
    of the lower halves, q of the upper ones.
    """
    parts = instruction.parts
    name = parts[-1]
    compare = comparison(parts[1], "f" in name)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(parts[2])
    dtype = F16 if name == "f16" else type_of(name)
    a, b = (read(operand, dtype) for operand in instruction.operands[1:3])
    third = read(instruction.operands[3], BOOL) if combine else None
    target = instruction.operands[0]
    results = target.items if isinstance(target, Vector) else (target,)
    puts = [write(result) for result in results]

    def step(cta: Any, mask: Mask) -> None:
        x, y = a(cta), b(cta)
        if name.endswith("x2"):
            kind = name.removesuffix("x2")
            found = [compare(*pair) for pair in zip(halves(x, kind), halves(y, kind), strict=True)]
        else:
            if dtype == U16 and name == "bf16":
                x, y = from_bf16(x), from_bf16(y)
            found = [compare(x, y)]
            if len(puts) == 2:
                found.append(~found[0])
        for put, value in zip(puts, found, strict=True):
            put(cta, combine(value, third(cta)) if combine and third else value, mask)

    return step
