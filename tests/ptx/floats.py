"""Floating-point arithmetic.

The manual's "Floating Point Instructions", "Half Precision Floating Point Instructions" and "Mixed
Precision Floating Point Instructions". Results are rounded to nearest, ties to even. .ftz replaces
subnormal inputs and results by zero of the same sign. The approximate instructions are exact here
but for an error that the caller chooses: see `Noise`.
"""

from collections.abc import Callable

import numpy as np

from ptx.faults import UnknownInstruction
from ptx.parse import Instruction
from ptx.values import F16, F32, F64, U16, U32, U64, Array, Step, from_bf16, pure, to_bf16, type_of

SMALLEST_NORMAL, LARGE = np.float32(2.0**-126), np.float32(1.7e38)


class Noise:
    """The error of approximate instructions: `share` of the largest one that the manual allows.

    The error of a result is a function of its bits, so that runs agree.
    """

    share = 1.0


def within(exact: Array, bound: Array) -> Array:
    """Return float32 numbers at a distance of up to Noise.share * bound from float64 results.

    Infinities and NaN stay as they are, and so do zeros and subnormals with a relative bound: the
    manual gives special values for them.
    """
    x = exact.astype(F32)
    size = np.abs(x)
    # Rounding has its part in the error.
    room = Noise.share * bound - np.spacing(size).astype(F64) / 2
    far = (size >= 2 * SMALLEST_NORMAL) | (bound > size)
    moved = (room > 0) & far & (size < LARGE) & bool(Noise.share)
    error = 2 * _hash(x) / 0xFFFF - 1
    return np.where(moved, exact + error * np.where(moved, room, 0), x).astype(F32)


def near(exact: Array, ulps: int) -> Array:
    """Return float32 numbers up to Noise.share * ulps units from correctly rounded results.

    Zeros, subnormals, infinities and NaN stay as they are.
    """
    x, most = exact.astype(F32), int(ulps * Noise.share)
    moved = (np.abs(x) >= 2 * SMALLEST_NORMAL) & (np.abs(x) < LARGE)
    error = _hash(x) % U32.type(2 * most + 1) - U32.type(most)
    bits = x.view(U32)
    return np.where(moved, bits + error, bits).view(F32)


def _hash(x: Array) -> Array:
    """Return a number below 2^16 for each float32, by its bits."""
    return (x.view(U32) * U32.type(2654435761)) >> 16


def flush(x: Array) -> Array:
    """Replace subnormal float32 numbers by zero of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(F32.type(0), x), x)


def flushing(f: Callable[..., Array]) -> Callable[..., Array]:
    """Return f of flushed inputs, flushed."""
    return lambda *xs: flush(f(*map(flush, xs)))


_BINARY: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
}


def arithmetic(instruction: Instruction) -> Step:
    """add, sub, mul, div and fma, rounded to nearest, of f16, f32, f64, bf16x2, f32x2 and mixed.

    The order of the modifiers: .rn, .ftz, then the type of the result and, for mixed precision, the
    type of the 16-bit operands: all but the last.
    """
    operation, *modifiers = instruction.parts
    types = [part for part in modifiers if part not in ("rn", "ftz", "full", "approx")]
    if len(types) == 2 and types[0] == "f32":
        return _mixed(instruction, types[1])
    (name,) = types
    if name == "f32x2":
        return _packed(instruction, operation)
    if name == "bf16x2":
        return _bf16x2(instruction, operation)
    dtype = type_of(name)
    if operation == "fma":
        f: Callable[..., Array] = fma32 if dtype == F32 else fma64
        if dtype == F16 or name == "bf16":
            raise UnknownInstruction(instruction.text)
    else:
        f = _BINARY[operation]
    if operation == "div" and {"full", "approx"} & {*modifiers}:
        f = _full_division if "full" in modifiers else _approximate_division
    f = flushing(f) if "ftz" in modifiers else f
    return pure(instruction, f, [dtype] * (3 if operation == "fma" else 2))


def _full_division(a: Array, b: Array) -> Array:
    """div.full: at most 2 ulp, and a / 1 = a: that a sigmoid is 1 far out rests on it."""
    return np.where(b == 1, a, near(np.divide(a.astype(F64), b), 2))


def _approximate_division(a: Array, b: Array) -> Array:
    """div.approx: a * (1 / b), at most 2 ulp for |b| in [2^-126, 2^126]; beyond, 1 / b is zero."""
    out = near(np.divide(a.astype(F64), b), 2)
    large = (np.abs(b) > 2.0**126) & np.isfinite(b)
    return np.where(large, a * np.copysign(F32.type(0), b), out)


def _mixed(instruction: Instruction, half: str) -> Step:
    """add, sub, fma.rn.f32.bf16 or .f16: the last operand is float32, the others have 16 bits."""
    operation = instruction.parts[0]
    widen = from_bf16 if half == "bf16" else lambda x: x.view(F16).astype(F32)
    if operation == "fma":
        return pure(
            instruction, lambda a, b, c: fma32(widen(a), widen(b), c), [U16, U16, type_of("f32")]
        )
    f = _BINARY[operation]
    return pure(instruction, lambda a, c: f(widen(a), c), [U16, F32])


def _packed(instruction: Instruction, operation: str) -> Step:
    """add, sub, mul, fma.f32x2: two float32 numbers in 64 bits."""
    f = fma32 if operation == "fma" else _BINARY[operation]

    def each(*pairs: Array) -> Array:
        parts = [pair.view(F32).reshape(-1, 2) for pair in pairs]
        lower, upper = (f(*[part[:, i] for part in parts]) for i in (0, 1))
        return np.stack(np.broadcast_arrays(lower, upper), 1).astype(F32).view(U64).reshape(-1)

    return pure(instruction, each, [U64] * (3 if operation == "fma" else 2))


def _bf16x2(instruction: Instruction, operation: str) -> Step:
    """add, sub, mul.bf16x2: each half alone, rounded once (the sum of two is exact in float64)."""
    f = _BINARY[operation]

    def each(a: Array, b: Array) -> Array:
        out = np.zeros(1, U32)
        for shift in (0, 16):
            x, y = (from_bf16((v >> shift).astype(U16)).astype(F64) for v in (a, b))
            half = to_bf16(to_odd_f32(f(x, y)))
            out = out | (half.astype(U32) << shift)
        return out

    return pure(instruction, each, [U32, U32])


def to_odd_f32(x: Array) -> Array:
    """Round float64 to float32 to odd, so that a second rounding to fewer bits is right."""
    near = x.astype(F32)
    error = x - near.astype(F64)
    bits = near.view(U32)
    toward = np.where((error > 0) == (near > 0), U32.type(1), U32.type(0xFFFFFFFF))
    inexact = np.isfinite(near) & (error != 0) & (bits & 1 == 0)
    return np.where(inexact, bits + toward, bits).view(F32)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f32: a * b + c with one rounding.

    The product is exact in float64. The sum is rounded there and again to float32, which may differ
    from one rounding only where the first lands between two float32 numbers, or near subnormals:
    such sums are rounded to odd first.
    """
    product = a.astype(F64) * b
    total = product + c
    bits = total.view(U64)
    middle = (bits & U64.type(0x1FFFFFFF)) == U64.type(0x10000000)
    risky = middle | ((np.abs(total) < 2.0**-125) & (total != 0))
    if risky.any():
        total = np.where(risky, odd_sum(product, c.astype(F64)), total)
    return total.astype(F32)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b rounded, and the rounding error, exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def odd_sum(a: Array, b: Array) -> Array:
    """Return a + b of float64 rounded to odd: an inexact result has its last bit set."""
    total, error = two_sum(a, b)
    bits = total.view(U64)
    toward = np.where((error > 0) == (total > 0), U64.type(1), ~U64.type(0))
    inexact = np.isfinite(total) & (error != 0) & ((bits & U64.type(1)) == 0)
    return np.where(inexact, bits + toward, bits).view(F64)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a * b rounded, and the rounding error (Dekker); |a|, |b| below 2^995."""

    def split(x: Array) -> tuple[Array, Array]:
        big = x * (2.0**27 + 1)
        upper = big - (big - x)
        return upper, x - upper

    product = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def fma64(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f64: a * b + c with one rounding (Boldo and Melquiond, "Emulation of FMA").

    Where the exact parts leave float64's range the plain result stands.
    """
    plain = a * b + c
    upper, lower = two_product(a, b)
    total, rest = two_sum(c, lower)
    high, low = two_sum(upper, total)
    fused = high + odd_sum(low, rest)
    return np.where(np.isfinite(plain) & np.isfinite(fused), fused, plain)


def min_max(instruction: Instruction) -> Step:
    """min, max: of a number and NaN, the number; with .NaN, NaN. -0 is less than +0."""
    parts = instruction.parts
    dtype = type_of(parts[-1])
    unsigned = U32 if dtype == F32 else U64
    least = parts[0] == "min"
    if dtype not in (F32, F64):
        raise UnknownInstruction(instruction.text)

    def pick(a: Array, b: Array) -> Array:
        better = (a < b) if least else (a > b)
        # Of two zeros, the sign decides: its bit is set in the result if in one (min) or both.
        signs = (np.bitwise_or if least else np.bitwise_and)(a.view(unsigned), b.view(unsigned))
        chosen = np.where((a == 0) & (b == 0), signs.view(dtype), np.where(better, a, b))
        nan = np.isnan(a) | np.isnan(b) if "NaN" in parts else np.isnan(a) & np.isnan(b)
        if "NaN" not in parts:
            chosen = np.where(np.isnan(a), b, np.where(np.isnan(b), a, chosen))
        return np.where(nan, dtype.type(np.nan), chosen)

    def pick_all(*values: Array) -> Array:
        out = pick(values[0], values[1])
        return out if len(values) == 2 else pick(out, values[2])

    f = flushing(pick_all) if "ftz" in parts else pick_all
    return pure(instruction, f, [dtype] * (len(instruction.operands) - 1))


def sign(instruction: Instruction) -> Step:
    """neg, abs: the sign's bit is flipped or cleared."""
    operation, name = instruction.parts[0], instruction.parts[-1]
    dtype = type_of(name)
    if name in ("f16", "bf16"):
        bit = U16.type(0x8000)
        f: Callable[[Array], Array] = (
            (lambda x: x ^ bit) if operation == "neg" else lambda x: x & ~bit
        )
        return pure(instruction, f, [U16])
    f = np.negative if operation == "neg" else np.abs
    return pure(instruction, flushing(f) if "ftz" in instruction.parts else f, [dtype])


def ex2(x: Array) -> Array:
    """ex2.approx.f32: 2^x, at most 2 ulp from the correctly rounded result; 2^±0 = 1."""
    return np.where(x == 0, F32.type(1), near(np.exp2(x.astype(F64)), 2))


def lg2(x: Array) -> Array:
    """lg2.approx.f32: log2 x, of absolute error 2^-22 between 0.5 and 2, else of relative error."""
    exact = np.log2(x.astype(F64))
    return within(exact, np.where((x > 0.5) & (x < 2), 1, np.abs(exact)) * 2.0**-22)


def rcp(x: Array) -> Array:
    """rcp.approx.f32: 1 / x, at most 1 ulp."""
    return near(1 / x.astype(F64), 1)


def rsqrt(x: Array) -> Array:
    """rsqrt.approx.f32: 1 / sqrt(x), of relative error 2^-22.9."""
    exact = 1 / np.sqrt(x.astype(F64))
    return within(exact, np.abs(exact) * 2.0**-22.9)


def sqrt(x: Array) -> Array:
    """sqrt.approx.f32: of relative error 2^-23."""
    exact = np.sqrt(x.astype(F64))
    return within(exact, exact * 2.0**-23)


def tanh(x: Array) -> Array:
    """tanh.approx.f32: of relative error 2^-11; subnormal numbers pass through, ±inf gives ±1."""
    exact = np.tanh(x.astype(F64))
    return np.where(np.isinf(x), np.sign(x), within(exact, np.abs(exact) * 2.0**-11))


_APPROXIMATE = {"ex2": ex2, "lg2": lg2, "rcp": rcp, "rsqrt": rsqrt, "sqrt": sqrt, "tanh": tanh}


def function(instruction: Instruction) -> Step:
    """ex2, lg2, rcp, rsqrt, sqrt, tanh: approximate; rcp and sqrt.rn: rounded to nearest."""
    operation, *modifiers = instruction.parts
    name = modifiers[-1]
    if instruction.opcode == "rcp.approx.ftz.f64":
        return pure(instruction, rcp_f64, [F64])
    dtype = type_of(name)
    if "approx" in modifiers and dtype == F32:
        f: Callable[[Array], Array] = _APPROXIMATE[operation]
    elif "rn" in modifiers and operation in ("sqrt", "rcp") and dtype in (F32, F64):
        f = np.sqrt if operation == "sqrt" else np.reciprocal
    else:
        raise UnknownInstruction(instruction.text)
    return pure(instruction, flushing(f) if "ftz" in modifiers else f, [dtype])


def rcp_f64(x: Array) -> Array:
    """rcp.approx.ftz.f64: from the upper 32 bits of x; the lower 32 of the result are zero.

    Subnormal numbers are flushed. The manual calls it a gross approximation and gives no bound:
    here 1 / x is truncated to the 20 bits of its fraction that are kept.
    """
    upper = U64.type(0xFFFFFFFF00000000)
    given = (x.view(U64) & upper).view(F64)
    tiny = np.finfo(F64).tiny
    given = np.where(np.abs(given) < tiny, np.copysign(0.0, given), given)
    exact = 1 / given
    exact = np.where(np.abs(exact) < tiny, np.copysign(0.0, exact), exact)
    nan = U64.type(0x7FFFFFFF00000000)
    return np.where(np.isnan(x), nan, exact.view(U64) & upper).view(F64)
