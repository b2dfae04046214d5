"""Numbers that tests of floating-point instructions compare with, made by Python's integers."""

import itertools
import math
import struct
from fractions import Fraction

import numpy as np

NAN, INF = math.nan, math.inf
F32_EDGES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.5,
    2.0**-126,
    -(2.0**-127),
    2.0**-149,
    3.4e38,
    0.1,
    -7.25,
    1e-30,
]
F32_EDGES = [float(np.float32(x)) for x in F32_EDGES]
SPECIAL = [*F32_EDGES, INF, -INF, NAN]


def bits_of(x: object) -> list[int]:
    """Return the bits of floats, with one pattern for every NaN."""
    array = np.asarray(x)
    bits = array.view(f"u{array.itemsize}")
    return np.where(np.isnan(array), bits.dtype.type(-1 % (1 << 8 * array.itemsize)), bits).tolist()


def nearest(x: Fraction, dtype: str) -> float:
    """Round a fraction once to float32 or float64, ties to even, by Python's integers."""
    digits, lowest = (24, -149) if dtype == "f4" else (53, -1074)
    if x == 0:
        return 0.0
    sign, x = (-1 if x < 0 else 1), abs(x)
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= x < Fraction(2) ** exponent  # now 2^exponent <= x < 2^(exponent + 1)
    unit = Fraction(2) ** max(exponent - digits + 1, lowest)
    out = sign * round(x / unit) * unit  # round() goes to even
    limit = Fraction(2) ** (128 if dtype == "f4" else 1024)
    return sign * INF if abs(out) >= limit else float(out)


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def pairs(values: list[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    a, b = zip(*itertools.product(values, repeat=2), strict=True)
    return a, b


def bf16(x: float) -> int:
    """Return the bits of a float32 rounded to bf16, by comparing its two neighbours."""
    if math.isnan(x):
        return 0x7FFF
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    lower, rest = bits >> 16, bits & 0xFFFF
    return lower + (rest > 0x8000 or (rest == 0x8000 and lower & 1))
