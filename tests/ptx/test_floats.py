"""Floating-point instructions against exact fractions and float64, by the manual's definitions."""

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from ptx.exact import F32_EDGES, INF, NAN, SPECIAL, bf16, bits_of, flushed, nearest, pairs
from ptx.snippets import evaluate

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


@pytest.mark.parametrize("operation", OPERATIONS)
def test_arithmetic_f64(operation: str) -> None:
    values = [*SPECIAL, 1 / 3, 2.0**-1040, -(2.0**1000)]
    a, b = pairs(values)

    def expected(x: float, y: float) -> float:
        if not (math.isfinite(x) and math.isfinite(y)) or (operation == "div.rn" and not y):
            return float(OPERATIONS[operation](np.float64(x), np.float64(y)))
        u, v = Fraction(x), Fraction(y)
        exact = {"add": u + v, "sub": u - v, "mul": u * v}
        out = nearest(u / v if operation == "div.rn" else exact[operation], "f8")
        # Of an exact zero, the fraction has lost the sign.
        return out or float(OPERATIONS[operation](np.float64(x), np.float64(y)))

    name = operation if "." in operation else f"{operation}.rn"
    got = evaluate(f"{name}.f64 $d, a, b;", "f8", (a, "f8"), (b, "f8"))
    with np.errstate(all="ignore"):
        want = np.array([expected(*pair) for pair in zip(a, b, strict=True)])
    assert bits_of(got) == bits_of(want)
    if name != operation:  # .rn is the default
        again = evaluate(f"{operation}.f64 $d, a, b;", "f8", (a, "f8"), (b, "f8"))
        assert bits_of(again) == bits_of(want)
        x, y = (np.array(side, "f4") for side in pairs(SPECIAL))
        both = [
            evaluate(f"{o}.f32 $d, a, b;", "f4", (x, "f4"), (y, "f4")) for o in (name, operation)
        ]
        assert bits_of(both[0]) == bits_of(both[1])


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
    fused = f"fma.rn.ftz.f32 $d, a, {'b, c' if operation == 'mul' else 'c, b'};"
    c = 0.0 if operation == "mul" else 1.0  # a * b + 0, or a * 1 + b
    got = evaluate(fused, "f4", (a, "f4"), (b, "f4"), ([c] * len(a), "f4"))
    assert (got == want).all()


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


def test_min_max_of_three_and_ftz() -> None:
    rows = [(1.0, 3.0, 2.0), (NAN, 5.0, NAN), (-1.0, -INF, NAN), (0.0, -0.0, -0.0), (NAN, NAN, NAN)]
    given = [(column, "f4") for column in zip(*rows, strict=True)]
    got = evaluate("max.f32 $d, a, b, c;", "f4", *given)
    assert bits_of(got) == bits_of(np.array([3, 5, -1, 0, NAN], "f4"))
    got = evaluate("min.NaN.f32 $d, a, b, c;", "f4", *given)
    assert bits_of(got) == bits_of(np.array([1, NAN, NAN, -0.0, NAN], "f4"))
    small = [2.0**-127, -(2.0**-127), 2.0**-126]
    got = evaluate("max.ftz.f32 $d, a, b;", "f4", (small, "f4"), ([-1.0] * 3, "f4"))
    assert bits_of(got) == bits_of(np.array([0.0, -0.0, 2.0**-126], "f4"))


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_arithmetic_f16(operation: str) -> None:
    """Float64 has more than twice float16's digits."""
    a, b = pairs([0.0, -0.0, 1.0, 1.5, -3.140625, 65504.0, 6e-8, 0.333, 2049.0, INF, NAN])
    x, y = np.array(a, "f2"), np.array(b, "f2")
    with np.errstate(all="ignore"):
        want = OPERATIONS[operation](x.astype("f8"), y.astype("f8")).astype("f2")
    got = evaluate(f"{operation}.f16 $d, a, b;", "f2", (x, "f2"), (y, "f2"))
    assert bits_of(got) == bits_of(want)


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
    for result, want in (("%p1", True), ("%p2", False)):
        for kind, x, y in (("f16", a, b), ("bf16", 0xC0403F80, 0x40003F00)):
            body = f"setp.ge.{kind}x2 %p1|%p2, a, b; mov.pred p, {result};"
            assert evaluate(body, bool, ([x], "u4"), ([y], "u4")).tolist() == [want]


@pytest.mark.parametrize(("dtype", "kind"), [("f32", "f4"), ("f64", "f8")])
def test_neg_abs(dtype: str, kind: str) -> None:
    got = evaluate(f"neg.{dtype} $d, a;", kind, (SPECIAL, kind))
    assert bits_of(got) == bits_of(-np.array(SPECIAL, kind))
    got = evaluate(f"abs.{dtype} $d, a;", kind, (SPECIAL, kind))
    assert bits_of(got) == bits_of(np.array([math.fabs(x) for x in SPECIAL], kind))
    got = evaluate("abs.ftz.f32 $d, a;", "f4", (F32_EDGES, "f4"))
    assert bits_of(got) == bits_of(np.array([abs(flushed(x)) for x in F32_EDGES], "f4"))
    for kind in ("bf16", "f16"):
        bits = [0x8000, 0xFF80, 0x3F80]
        assert evaluate(f"abs.{kind} $d, a;", "u2", (bits, "u2")).tolist() == [0, 0x7F80, 0x3F80]
        got = evaluate(f"neg.{kind} $d, a;", "u2", (bits, "u2"))
        assert got.tolist() == [0, 0x7F80, 0xBF80]


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


def test_packed() -> None:
    """add, sub, mul, fma.f32x2 work on both halves alone."""
    x, y = np.array([1.5, -2.0, 0.1, 3e38], "f4"), np.array([0.3, 7.0, -0.1, 3e38], "f4")
    given = [(v.view("u8"), "u8") for v in (x, y, x)]
    with np.errstate(all="ignore"):
        for operation in ("add", "sub", "mul"):
            got = evaluate(f"{operation}.f32x2 $d, a, b;", "u8", *given[:2])
            want = OPERATIONS[operation](x.astype("f8"), y.astype("f8")).astype("f4")
            assert bits_of(got.view("f4")) == bits_of(want)
    got = evaluate("fma.rn.f32x2 $d, a, b, c;", "u8", *given).view("f4")
    rows = ([Fraction(float(v)) for v in row] for row in zip(x, y, x, strict=True))
    assert got.tolist() == [nearest(a * b + c, "f4") for a, b, c in rows]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mixed(kind: str) -> None:
    """add, sub, fma.f32.bf16 widen their 16-bit operands, which is exact."""
    x, y = np.array([1.5, -2.0, 0.1, 300.0], "f4"), np.array([0.3, 7.0, -0.1, 3e38], "f4")
    if kind == "bf16":
        halves = np.array([bf16(float(v)) for v in x], "u2")
        wide = (halves.astype("u4") << 16).view("f4")
    else:
        halves = x.astype("f2").view("u2")
        wide = x.astype("f2").astype("f4")
    for operation in ("add", "sub"):
        got = evaluate(f"{operation}.rn.f32.{kind} $d, a, b;", "f4", (halves, "u2"), (y, "f4"))
        want = OPERATIONS[operation](wide.astype("f8"), y.astype("f8")).astype("f4")
        assert bits_of(got) == bits_of(want)
    given = ((halves, "u2"), (halves[::-1].copy(), "u2"), (y, "f4"))
    got = evaluate(f"fma.rn.f32.{kind} $d, a, b, c;", "f4", *given)
    rows = ([Fraction(float(v)) for v in row] for row in zip(wide, wide[::-1], y, strict=True))
    assert got.tolist() == [nearest(a * b + c, "f4") for a, b, c in rows]
