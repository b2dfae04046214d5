"""Floating-point instructions against exact fractions and float64, by the manual's definitions."""

import itertools
import math
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest

from ptx.floats import Noise
from ptx.snippets import evaluate

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


@pytest.fixture
def exact() -> Iterator[None]:
    """Take the error of approximate instructions away."""
    before, Noise.ulps = Noise.ulps, 0
    yield
    Noise.ulps = before


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
    limit = 2.0**128 if dtype == "f4" else INF
    return sign * INF if abs(out) >= limit else float(out)


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def pairs(values: list[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    a, b = zip(*itertools.product(values, repeat=2), strict=True)
    return a, b


OPERATIONS: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div.rn": np.divide,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_arithmetic_f32(operation: str) -> None:
    """Float64 has more than twice float32's digits, so rounding twice is rounding once."""
    a, b = pairs(SPECIAL)
    with np.errstate(all="ignore"):
        want = OPERATIONS[operation](*(np.array(x, "f8") for x in (a, b))).astype("f4")
    got = evaluate(f"{operation}.f32 $d, a, b;", "f4", (a, "f4"), (b, "f4"))
    assert bits_of(got) == bits_of(want)


@pytest.mark.parametrize("operation", ["add", "mul"])
def test_ftz(operation: str) -> None:
    """Subnormal inputs and results become zeros of their sign."""
    a, b = pairs([*F32_EDGES, 1e-20, -1e-20])
    with np.errstate(all="ignore"):
        small = [np.array([flushed(float(np.float32(x))) for x in side], "f8") for side in (a, b)]
        want = OPERATIONS[operation](*small).astype("f4")
    want = np.array([flushed(float(x)) for x in want], "f4")
    got = evaluate(f"{operation}.ftz.f32 $d, a, b;", "f4", (a, "f4"), (b, "f4"))
    assert bits_of(got) == bits_of(want)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_fma_rounds_once(dtype: str) -> None:
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal(2048).astype(dtype) for _ in range(3))
    c[:512] *= dtype == "f4" and 2.0**-24 or 2.0**-53
    c[512:1024] = (-(a * b))[512:1024]  # the product's rounding error is what remains
    # A product halfway between two floats, which a tiny addend decides.
    digits = 12 if dtype == "f4" else 27
    a[1024:1536] = 1 + generator.integers(1, 99, 512) * 2.0**-digits
    b[1024:1536] = 1 + generator.integers(1, 99, 512) * 2.0**-digits
    c[1024:1536] = generator.choice([1, -1], 512) * 2.0 ** generator.integers(-90, -60, 512)
    if dtype == "f4":
        a[1536:] *= 2.0**-70  # subnormal results
        b[1536:] *= 2.0**-70
        c[1536:] *= 2.0**-140
    name = "f32" if dtype == "f4" else "f64"
    got = evaluate(f"fma.rn.{name} $d, a, b, c;", dtype, *((x, dtype) for x in (a, b, c)))
    rows = ((Fraction(float(v)) for v in row) for row in zip(a, b, c, strict=True))
    want = np.array([nearest(x * y + z, dtype) for x, y, z in rows], dtype)
    assert (got == want).all(), np.flatnonzero(got != want)


def test_fma_specials() -> None:
    a, b = pairs(SPECIAL)
    for c in (0.0, INF, NAN):
        with np.errstate(all="ignore"):
            want = (np.array(a, "f8") * np.array(b, "f8") + c).astype("f4")
        got = evaluate("fma.rn.f32 $d, a, b, c;", "f4", (a, "f4"), (b, "f4"), ([c] * len(a), "f4"))
        assert bits_of(got) == bits_of(want)


@pytest.mark.parametrize("operation", ["min", "max"])
@pytest.mark.parametrize(("nan", "dtype"), [("", "f32"), (".NaN", "f32"), ("", "f64")])
def test_min_max(operation: str, nan: str, dtype: str) -> None:
    """A NaN gives way to a number, except with .NaN; -0 is less than +0."""

    def expected(a: float, b: float) -> float:
        if math.isnan(a) or math.isnan(b):
            return NAN if nan or (math.isnan(a) and math.isnan(b)) else b if math.isnan(a) else a
        key = lambda x: (x, math.copysign(1, x))  # noqa: E731
        return (min if operation == "min" else max)(a, b, key=key)

    a, b = pairs(SPECIAL)
    kind = "f4" if dtype == "f32" else "f8"
    got = evaluate(f"{operation}{nan}.{dtype} $d, a, b;", kind, (a, kind), (b, kind))
    assert bits_of(got) == bits_of(np.array([expected(*p) for p in zip(a, b, strict=True)], kind))


FLOAT_ORDERS = ["eq", "ne", "lt", "le", "gt", "ge"]


@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("order", [*FLOAT_ORDERS, *(f"{o}u" for o in FLOAT_ORDERS), "num", "nan"])
def test_setp(order: str, dtype: str) -> None:
    """Ordered comparisons with NaN are false, unordered ones true."""
    a, b = pairs([0.0, -0.0, 1.0, -2.5, INF, -INF, NAN])

    def expected(x: float, y: float) -> bool:
        unordered = math.isnan(x) or math.isnan(y)
        if order in ("num", "nan"):
            return unordered == (order == "nan")
        if unordered:
            return order.endswith("u")
        name = order.removesuffix("u") if order not in FLOAT_ORDERS else order
        return bool(getattr(x, f"__{name}__")(y))

    if dtype == "bf16":
        sides = [(np.array(x, "f4").view("u4") >> 16, "u2") for x in (a, b)]
    else:
        kind = {"f16": "f2", "f32": "f4", "f64": "f8"}[dtype]
        sides = [(x, kind) for x in (a, b)]
    got = evaluate(f"setp.{order}.{dtype} p, a, b;", bool, *sides)
    assert got.tolist() == [expected(*pair) for pair in zip(a, b, strict=True)]


def test_setp_of_halves() -> None:
    """setp.f16x2 p|q: p compares the lower halves, q the upper ones."""
    a, b = (struct.unpack("<I", struct.pack("<2e", *pair))[0] for pair in ((1.0, -3.0), (0.5, 2.0)))
    for result, want in (("p", True), ("q", False)):
        body = f"setp.ge.f16x2 %p1|%p2, a, b; mov.pred p, {'%p1' if result == 'p' else '%p2'};"
        assert evaluate(body, bool, ([a], "u4"), ([b], "u4")).tolist() == [want]


@pytest.mark.parametrize(("dtype", "kind"), [("f32", "f4"), ("f64", "f8")])
def test_neg_abs(dtype: str, kind: str) -> None:
    got = evaluate(f"neg.{dtype} $d, a;", kind, (SPECIAL, kind))
    assert bits_of(got) == bits_of(-np.array(SPECIAL, kind))
    got = evaluate(f"abs.{dtype} $d, a;", kind, (SPECIAL, kind))
    assert bits_of(got) == bits_of(np.array([math.fabs(x) for x in SPECIAL], kind))
    got = evaluate("abs.ftz.f32 $d, a;", "f4", (F32_EDGES, "f4"))
    assert bits_of(got) == bits_of(np.array([abs(flushed(x)) for x in F32_EDGES], "f4"))
    got = evaluate("abs.bf16 $d, a;", "u2", ([0x8000, 0xFF80, 0x3F80], "u2"))
    assert got.tolist() == [0, 0x7F80, 0x3F80]


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Return the distance from float64 results in units in the last place of float32."""
    return np.abs(got.astype("f8") - want) / np.spacing(np.abs(want.astype("f4"))).astype("f8")


APPROXIMATE = {
    "ex2.approx.f32": (np.exp2, np.linspace(-120, 120, 997), 2),
    "ex2.approx.ftz.f32": (np.exp2, np.linspace(-120, 120, 997), 2),
    "lg2.approx.f32": (np.log2, np.geomspace(3, 1e30, 499), 2),
    "rcp.approx.f32": (np.reciprocal, np.geomspace(1e-30, 1e30, 499), 1),
    "sqrt.approx.ftz.f32": (np.sqrt, np.geomspace(1e-30, 1e30, 499), 1),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), np.geomspace(1e-30, 1e30, 499), 2),
}


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_approximate(opcode: str, exact: None) -> None:
    """Without noise, results are rounded once; with noise, they reach the bound and keep to it."""
    f, values, bound = APPROXIMATE[opcode]
    x = values.astype("f4")
    want = f(x.astype("f8"))
    got = evaluate(f"{opcode} $d, a;", "f4", (x, "f4"))
    assert bits_of(got) == bits_of(want.astype("f4"))
    Noise.ulps = 2
    error = ulps(evaluate(f"{opcode} $d, a;", "f4", (x, "f4")), want)
    assert bound - 0.6 < error.max() <= bound + 0.5


def test_ex2_specials() -> None:
    """2^±0 is 1, also for subnormals; .ftz flushes a subnormal result."""
    x = [0.0, -0.0, 1e-42, INF, -INF, NAN, 128.0, -149.0, -200.0]
    got = evaluate("ex2.approx.f32 $d, a;", "f4", (x, "f4"))
    assert bits_of(got) == bits_of(np.array([1, 1, 1, INF, 0, NAN, INF, 2.0**-149, 0], "f4"))
    got = evaluate("ex2.approx.ftz.f32 $d, a;", "f4", (x, "f4"))
    assert bits_of(got) == bits_of(np.array([1, 1, 1, INF, 0, NAN, INF, 0, 0], "f4"))


def test_div_full() -> None:
    generator = np.random.default_rng(1)
    a, b = (generator.standard_normal(512).astype("f4") for _ in range(2))
    got = evaluate("div.full.f32 $d, a, b;", "f4", (a, "f4"), (b, "f4"))
    error = ulps(got, a.astype("f8") / b)
    assert 1.4 < error.max() <= 2.5
    a, b = [1.0, 0.0, 1.0, -1.0], [0.0, 0.0, INF, 0.0]
    got = evaluate("div.full.f32 $d, a, b;", "f4", (a, "f4"), (b, "f4"))
    assert bits_of(got) == bits_of(np.array([INF, NAN, 0, -INF], "f4"))


def test_rounded_functions() -> None:
    x = [0.0, -0.0, 2.0, 3.0, 1e-40, INF, -1.0, NAN]
    want = [0.0, -0.0, 2**0.5, 3**0.5, float(np.float32(1e-40)) ** 0.5, INF, NAN, NAN]
    got = evaluate("sqrt.rn.f32 $d, a;", "f4", (x, "f4"))
    assert bits_of(got) == bits_of(np.array(want, "f4"))
    want[4] = 1e-40**0.5
    got = evaluate("sqrt.rn.f64 $d, a;", "f8", (x, "f8"))
    assert bits_of(got) == bits_of(np.array(want, "f8"))


def test_rcp_f64() -> None:
    """rcp.approx.ftz.f64 keeps the upper 32 bits: 20 bits of the fraction."""
    x = np.array([3.0, -7.0, 0.1, 1e300, 0.0, -INF, 1e-310])
    got = evaluate("rcp.approx.ftz.f64 $d, a;", "f8", (x, "f8"))
    assert (got.view("u8") & 0xFFFFFFFF == 0).all()
    assert (np.abs(got[:4] * x[:4] - 1) < 2.0**-19).all()
    assert bits_of(got[4:]) == bits_of(np.array([INF, -0.0, INF]))


def bf16(x: float) -> int:
    """Return the bits of a float32 rounded to bf16, by comparing its two neighbours."""
    if math.isnan(x):
        return 0x7FFF
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    lower, rest = bits >> 16, bits & 0xFFFF
    return lower + (rest > 0x8000 or (rest == 0x8000 and lower & 1))


def test_bf16x2_arithmetic() -> None:
    a, b = (
        [bf16(x) for x in side] for side in pairs([0.0, -0.0, 1.0, 1.5, -3.140625, 1e15, 257.0])
    )
    packed = [[lo | hi << 16 for lo, hi in zip(s, reversed(s), strict=True)] for s in (a, b)]
    for operation in ("add", "sub", "mul"):
        got = evaluate(f"{operation}.bf16x2 $d, a, b;", "u4", *((x, "u4") for x in packed))
        f = OPERATIONS[operation]
        wide = [np.array(side, "u4") << 16 for side in (a, b)]
        exact = f(*(x.view("f4").astype("f8") for x in wide))
        want = [bf16(float(x)) for x in exact]
        assert (got & 0xFFFF).tolist() == want
        assert (got >> 16).tolist() == [*reversed(want)]


def test_packed_and_mixed() -> None:
    """add, mul, fma.f32x2 work on both halves; fma.rn.f32.bf16 widens its 16-bit operands."""
    x, y = np.array([1.5, -2.0, 0.1, 3e38], "f4"), np.array([0.3, 7.0, -0.1, 3e38], "f4")
    with np.errstate(all="ignore"):
        for operation in ("add", "mul"):
            got = evaluate(
                f"{operation}.f32x2 $d, a, b;", "u8", (x.view("u8"), "u8"), (y.view("u8"), "u8")
            )
            want = OPERATIONS[operation](x.astype("f8"), y.astype("f8")).astype("f4")
            assert bits_of(got.view("f4")) == bits_of(want)
    halves = [bf16(float(v)) for v in x]
    got = evaluate("add.rn.f32.bf16 $d, a, b;", "f4", (halves, "u2"), (y, "f4"))
    wide = (np.array(halves, "u4") << 16).view("f4")
    with np.errstate(all="ignore"):
        assert bits_of(got) == bits_of((wide.astype("f8") + y).astype("f4"))


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


def test_cvt_from_16_bits() -> None:
    bits = [0, 0x8000, 0x3C00, 0x0001, 0x7C00, 0x7BFF, 0xFBFF]
    want = [struct.unpack("<e", struct.pack("<H", b))[0] for b in bits]
    assert evaluate("cvt.f32.f16 $d, a;", "f4", (bits, "u2")).tolist() == want
    assert evaluate("cvt.f64.f16 $d, a;", "f8", (bits, "u2")).tolist() == want
    want = [struct.unpack("<f", struct.pack("<I", b << 16))[0] for b in bits]
    assert evaluate("cvt.f32.bf16 $d, a;", "f4", (bits, "u2")).tolist() == want


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
