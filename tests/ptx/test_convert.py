"""Conversions against exact fractions and Python's struct, by the manual's definitions."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest

from ptx.exact import INF, NAN, bf16, bits_of, nearest
from ptx.snippets import evaluate

CVT = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, -1.00390625, 3.3895e38, 65519.0, 65520.0, 2.0**-24]
CVT += [2.0**-25, 1e-8, 0.1, INF, -INF, NAN]


def test_cvt_to_16_bits() -> None:
    """Ties go to the even neighbour; too large numbers to infinity; NaN to 0x7FFF."""
    x = [float(np.float32(v)) for v in CVT]
    got = evaluate("cvt.rn.bf16.f32 $d, a;", "u2", (x, "f4"))
    want = [bf16(v) for v in x]
    assert got.tolist() == want
    got = evaluate("cvt.rn.bf16x2.f32 $d, a, b;", "u4", (x, "f4"), (x[::-1], "f4"))
    assert got.tolist() == [hi << 16 | lo for hi, lo in zip(want, want[::-1], strict=True)]

    def half(v: float) -> int:
        if math.isnan(v):
            return 0x7FFF
        try:
            return int(struct.unpack("<H", struct.pack("<e", v))[0])  # struct rounds to even
        except OverflowError:
            return 0xFC00 if v < 0 else 0x7C00

    want = [half(v) for v in x]
    assert evaluate("cvt.rn.f16.f32 $d, a;", "u2", (x, "f4")).tolist() == want
    got = evaluate("cvt.rn.f16x2.f32 $d, a, b;", "u4", (x, "f4"), (x[::-1], "f4"))
    assert got.tolist() == [hi << 16 | lo for hi, lo in zip(want, want[::-1], strict=True)]


def test_cvt_of_float64_rounds_once() -> None:
    """Through float32, a number just above a tie would become the tie."""
    x = [1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40, -(2.0**-140), INF, NAN]
    got = evaluate("cvt.rn.bf16.f64 $d, a;", "u2", (x, "f8"))
    assert got.tolist() == [0x3F80, 0x3F81, 0x3F81, 0x8000, 0x7F80, 0x7FFF]
    x = [1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-40, 65520.0, 65519.999, NAN]
    got = evaluate("cvt.rn.f16.f64 $d, a;", "u2", (x, "f8"))
    assert got.tolist() == [0x3C00, 0x3C01, 0x7C00, 0x7BFF, 0x7FFF]


def test_cvt_from_16_bits() -> None:
    bits = [0, 0x8000, 0x3C00, 0x0001, 0x7C00, 0x7BFF, 0xFBFF]
    want = [struct.unpack("<e", struct.pack("<H", b))[0] for b in bits]
    assert evaluate("cvt.f32.f16 $d, a;", "f4", (bits, "u2")).tolist() == want
    assert evaluate("cvt.f64.f16 $d, a;", "f8", (bits, "u2")).tolist() == want
    want = [struct.unpack("<f", struct.pack("<I", b << 16))[0] for b in bits]
    assert evaluate("cvt.f32.bf16 $d, a;", "f4", (bits, "u2")).tolist() == want
    assert evaluate("cvt.f64.bf16 $d, a;", "f8", (bits, "u2")).tolist() == want


ROUNDINGS = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("of", ["f32", "f64"])
def test_cvt_to_integers(rounding: str, to: str, of: str) -> None:
    """Out of range: the nearest number of the type; NaN: 0, with 64 bits on a side the sign bit."""
    x = [0.0, -0.5, 0.5, 1.5, 2.5, -2.5, -3.7, 2.0**31, -(2.0**31), 3e9, 1e19, -1e19, 1e30, INF]
    x = [float(np.float32(v)) for v in [*x, -INF, NAN]]
    bits = int(to[1:])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if to[0] == "s" else (0, 2**bits - 1)

    def expected(v: float) -> int:
        if math.isnan(v):
            return 1 << (bits - 1) if bits == 64 or of == "f64" else 0
        if math.isinf(v):
            return (high if v > 0 else low) % (1 << bits)
        return min(max(ROUNDINGS[rounding](v), low), high) % (1 << bits)

    kind = "f4" if of == "f32" else "f8"
    got = evaluate(f"cvt.{rounding}.{to}.{of} $d, a;", f"u{bits // 8}", (x, kind))
    assert got.tolist() == [expected(v) for v in x]


def test_cvt_between_floats_and_from_integers() -> None:
    x = [0.1, 1 + 2.0**-24, 1 + 3 * 2.0**-24, 1e300, 1e-320, -0.0, 2.5]
    want = np.array([nearest(Fraction(v), "f4") for v in x], "f4")
    got = evaluate("cvt.rn.f32.f64 $d, a;", "f4", (x, "f8"))
    assert got.tolist() == want.tolist()
    assert evaluate("cvt.f64.f32 $d, a;", "f8", (want, "f4")).tolist() == want.tolist()
    got = evaluate("cvt.rzi.f64.f64 $d, a;", "f8", ([2.7, -2.7, 1e300, -0.3], "f8"))
    assert bits_of(got) == bits_of(np.array([2.0, -2.0, 1e300, -0.0]))
    integers = [0, 1, 2**24 + 1, 2**24 + 3, 2**31 - 1, 2**53 + 1, 2**63 - 1, -1, -(2**40) - 1]
    for of in ("s64", "s32"):
        given = [i for i in integers if of == "s64" or abs(i) < 2**31]
        kind = f"i{int(of[1:]) // 8}"
        for to, dtype in (("f32", "f4"), ("f64", "f8")):
            got = evaluate(f"cvt.rn.{to}.{of} $d, a;", dtype, (given, kind))
            assert got.tolist() == [nearest(Fraction(i), dtype) for i in given]
    got = evaluate("cvt.rn.f64.u64 $d, a;", "f8", ([2**64 - 1, 2**63 + 1025], "u8"))
    assert got.tolist() == [2.0**64, 2.0**63 + 2048]
    got = evaluate("cvt.rn.f16.s16 $d, a;", "f2", ([2049, 2051, -32768], "i2"))
    assert got.tolist() == [2048.0, 2052.0, -32768.0]


def test_cvt_between_integers() -> None:
    """The source is cut or extended by its own sign; a wide destination by the target's sign."""
    x = [0, 1, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFFFFFF, 0x80000000]
    signed8 = [(v & 255) - 256 * (v >> 7 & 1) for v in x]
    got = evaluate("cvt.s8.s32 %rs1, a; cvt.s32.s16 $d, %rs1;", "i4", (x, "u4"))
    assert got.tolist() == signed8
    got = evaluate("cvt.rn.f32.s8 $d, a;", "f4", (x, "u4"))
    assert got.tolist() == signed8
    assert evaluate("cvt.u64.u32 $d, a;", "u8", (x, "u4")).tolist() == x
    got = evaluate("cvt.s64.s32 $d, a;", "i8", (x, "u4"))
    assert got.tolist() == [v - 2**32 * (v >> 31) for v in x]
    assert evaluate("cvt.u16.u32 $d, a;", "u2", (x, "u4")).tolist() == [v & 0xFFFF for v in x]
    wide = [v << 16 | v for v in x]
    got = evaluate("cvt.u32.u64 $d, a;", "u4", (wide, "u8"))
    assert got.tolist() == [v % 2**32 for v in wide]
    got = evaluate("cvt.s16.s8 $d, a;", "i2", (x, "u4"))
    assert got.tolist() == signed8
    signed16 = [(v & 0xFFFF) - 2**16 * (v >> 15 & 1) for v in x]
    assert evaluate("cvt.rn.f32.s16 $d, a;", "f4", (x, "u4")).tolist() == signed16
