"""Functions: approximate ones within the errors of the manual, and those that are rounded."""

from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest

from ptx.exact import INF, NAN, bits_of, nearest
from ptx.floats import Noise
from ptx.snippets import evaluate


@pytest.fixture
def exact() -> Iterator[None]:
    """Take the error of approximate instructions away."""
    before, Noise.share = Noise.share, 0.0
    yield
    Noise.share = before


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Return the distance from float64 results in units in the last place of float32."""
    return np.abs(got.astype("f8") - want) / np.spacing(np.abs(want.astype("f4"))).astype("f8")


def relative(share: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return the bound of an error that is relative to the result."""
    return lambda x, want: np.abs(want) * share


def in_ulps(n: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return the bound of an error of n units, on top of rounding."""
    return lambda x, want: (n + 0.5) * np.spacing(np.abs(want.astype("f4"))).astype("f8")


def of_lg2(x: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Return the bound of lg2: absolute in (0.5, 2), else relative."""
    return np.where((x > 0.5) & (x < 2), 1, np.abs(want)) * 2.0**-22


WIDE = np.geomspace(1e-30, 1e30, 499)
# The function, its arguments, and the largest error in the manual.
APPROXIMATE = {
    "ex2.approx.f32": (np.exp2, np.linspace(-120, 120, 997), in_ulps(2)),
    "ex2.approx.ftz.f32": (np.exp2, np.linspace(-120, 120, 997), in_ulps(2)),
    "lg2.approx.f32": (np.log2, np.concatenate([WIDE, np.linspace(0.4, 2.5, 499)]), of_lg2),
    "rcp.approx.f32": (np.reciprocal, WIDE, in_ulps(1)),
    "sqrt.approx.ftz.f32": (np.sqrt, WIDE, relative(2.0**-23)),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), WIDE, relative(2.0**-22.9)),
    "tanh.approx.f32": (np.tanh, np.linspace(-9, 9, 500), relative(2.0**-11)),
}


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_approximate(opcode: str, exact: None) -> None:
    """Without noise, results are rounded once; with noise, they reach the bound and keep to it."""
    f, values, bound = APPROXIMATE[opcode]
    x = values.astype("f4")
    want = f(x.astype("f8"))
    got = evaluate(f"{opcode} $d, a;", "f4", (x, "f4"))
    assert bits_of(got) == bits_of(want.astype("f4"))
    Noise.share = 1.0
    got = evaluate(f"{opcode} $d, a;", "f4", (x, "f4"))
    error = np.abs(got.astype("f8") - want) / bound(x, want)
    assert 0.75 < error.max() <= 1


def test_ex2_specials(exact: None) -> None:
    """2^±0 is 1, whatever the noise; .ftz flushes a subnormal argument and a subnormal result."""
    Noise.share = 1.0
    got = evaluate("ex2.approx.f32 $d, a;", "f4", ([0.0, -0.0], "f4"))
    assert got.tolist() == [1, 1]
    Noise.share = 0.0
    x = [0.0, -0.0, 1e-42, INF, -INF, NAN, 128.0, -149.0, -200.0]
    got = evaluate("ex2.approx.f32 $d, a;", "f4", (x, "f4"))
    assert bits_of(got) == bits_of(np.array([1, 1, 1, INF, 0, NAN, INF, 2.0**-149, 0], "f4"))
    got = evaluate("ex2.approx.ftz.f32 $d, a;", "f4", (x, "f4"))
    assert bits_of(got) == bits_of(np.array([1, 1, 1, INF, 0, NAN, INF, 0, 0], "f4"))


def test_special_values_of_approximate_functions() -> None:
    x = [0.0, -0.0, INF, -INF, -1.0, NAN]
    want = {
        "lg2": [-INF, -INF, INF, NAN, NAN, NAN],
        "rcp": [INF, -INF, 0.0, -0.0, None, NAN],
        "sqrt": [0.0, -0.0, INF, NAN, NAN, NAN],
        "rsqrt": [INF, -INF, 0.0, NAN, NAN, NAN],
        "tanh": [0.0, -0.0, 1.0, -1.0, None, NAN],
    }
    for name, values in want.items():
        got = bits_of(evaluate(f"{name}.approx.f32 $d, a;", "f4", (x, "f4")))
        rows = zip(got, values, strict=True)
        assert [bits for bits, value in rows if value is not None] == bits_of(
            np.array([value for value in values if value is not None], "f4")
        )


@pytest.mark.parametrize("kind", ["full", "approx"])
def test_approximate_division(kind: str) -> None:
    """At most 2 ulp; the divisor of div.approx may not be above 2^126, or the result is zero."""
    generator = np.random.default_rng(1)
    a, b = (generator.standard_normal(512).astype("f4") for _ in range(2))
    got = evaluate(f"div.{kind}.f32 $d, a, b;", "f4", (a, "f4"), (b, "f4"))
    error = ulps(got, a.astype("f8") / b)
    assert 1.4 < error.max() <= 2.5
    a, b = [1.0, 0.0, 1.0, -1.0, 2.0**127, INF], [0.0, 0.0, INF, 0.0, -(2.0**127), 2.0**127]
    got = evaluate(f"div.{kind}.f32 $d, a, b;", "f4", (a, "f4"), (b, "f4"))
    assert bits_of(got[:4]) == bits_of(np.array([INF, NAN, 0, -INF], "f4"))
    if kind == "approx":
        assert bits_of(got[4:]) == bits_of(np.array([-0.0, NAN], "f4"))
    else:
        assert abs(got[4] + 1) < 3e-7 and got[5] == INF


def test_rounded_functions() -> None:
    x = [0.0, -0.0, 2.0, 3.0, 1e-40, INF, -1.0, NAN]
    want = [0.0, -0.0, 2**0.5, 3**0.5, float(np.float32(1e-40)) ** 0.5, INF, NAN, NAN]
    got = evaluate("sqrt.rn.f32 $d, a;", "f4", (x, "f4"))
    assert bits_of(got) == bits_of(np.array(want, "f4"))
    want[4] = 1e-40**0.5
    got = evaluate("sqrt.rn.f64 $d, a;", "f8", (x, "f8"))
    assert bits_of(got) == bits_of(np.array(want, "f8"))
    x = [3.0, -7.0, 0.1, 3e38, 0.0, -INF]
    for name, dtype in (("f32", "f4"), ("f64", "f8")):
        given = np.array(x, dtype)
        want = [nearest(1 / Fraction(float(v)), dtype) for v in given[:4]]
        got = evaluate(f"rcp.rn.{name} $d, a;", dtype, (given, dtype))
        assert bits_of(got) == bits_of(np.array([*want, INF, -0.0], dtype))


def test_rcp_f64() -> None:
    """rcp.approx.ftz.f64 keeps the upper 32 bits: 20 bits of the fraction."""
    x = np.array([3.0, -7.0, 0.1, 1e300, 0.0, -INF, 1e-310, NAN])
    got = evaluate("rcp.approx.ftz.f64 $d, a;", "f8", (x, "f8"))
    assert (got.view("u8") & 0xFFFFFFFF == 0).all()
    assert (np.abs(got[:4] * x[:4] - 1) < 2.0**-19).all()
    assert bits_of(got[4:7]) == bits_of(np.array([INF, -0.0, INF]))
    assert got.view("u8")[7] == 0x7FFFFFFF00000000
