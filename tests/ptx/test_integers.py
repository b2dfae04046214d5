"""Integer instructions against Python's integers, by the definitions in the manual."""

import itertools

import numpy as np
import pytest

from ptx.faults import UnknownInstruction
from ptx.snippets import evaluate

EDGES = {
    16: [0, 1, 2, 7, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234],
    32: [0, 1, 2, 7, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0x12345678],
    64: [0, 1, 3, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 0x123456789ABCDEF0],
}


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def value(x: int, kind: str) -> int:
    bits = int(kind[1:])
    return signed(x, bits) if kind[0] == "s" else x & ((1 << bits) - 1)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def pairs(bits: int) -> list[tuple[int, int]]:
    return list(itertools.product(EDGES[bits], repeat=2))


def check_pairs(opcode: str, bits: int, out_bits: int, expected) -> None:  # type: ignore[no-untyped-def]
    given = pairs(bits)
    if opcode.startswith(("div", "rem")):
        given = [(a, b) for a, b in given if b]
    a, b = zip(*given, strict=True)
    kind = f"u{bits // 8}"
    got = evaluate(f"{opcode} $d, a, b;", f"u{out_bits // 8}", (a, kind), (b, kind))
    want = [expected(*pair) & ((1 << out_bits) - 1) for pair in given]
    assert got.tolist() == want


@pytest.mark.parametrize("kind", ["s16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("operation", ["add", "sub", "min", "max"])
def test_arithmetic(operation: str, kind: str) -> None:
    f = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "min": min, "max": max}[operation]
    bits = int(kind[1:])
    check_pairs(f"{operation}.{kind}", bits, bits, lambda a, b: f(value(a, kind), value(b, kind)))


PRODUCTS = [*itertools.product(["lo", "hi"], ["s16", "u16", "s32", "u32", "s64", "u64"])]
PRODUCTS += [("wide", kind) for kind in ("s16", "u16", "s32", "u32")]


@pytest.mark.parametrize(("part", "kind"), PRODUCTS)
def test_mul(part: str, kind: str) -> None:
    bits = int(kind[1:])
    shift = bits if part == "hi" else 0
    out_bits = 2 * bits if part == "wide" else bits
    check_pairs(
        f"mul.{part}.{kind}",
        bits,
        out_bits,
        lambda a, b: value(a, kind) * value(b, kind) >> shift,
    )


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("operation", ["div", "rem"])
def test_div_rem(operation: str, kind: str) -> None:
    bits = int(kind[1:])

    def expected(a: int, b: int) -> int:
        a, b = value(a, kind), value(b, kind)
        quotient = truncated(a, b)
        return quotient if operation == "div" else a - b * quotient

    check_pairs(f"{operation}.{kind}", bits, bits, expected)


@pytest.mark.parametrize(
    ("opcode", "kind", "bits"),
    [
        ("mad.lo.s32", "s32", 32),
        ("mad.hi.s32", "s32", 32),
        ("mad.hi.u32", "u32", 32),
        ("mad.wide.s32", "s32", 64),
        ("mad.wide.u32", "u32", 64),
        ("mad.lo.s64", "s64", 64),
    ],
)
def test_mad(opcode: str, kind: str, bits: int) -> None:
    given = int(kind[1:])
    a, b = zip(*pairs(given), strict=True)
    c = [(2**63 + 12345 * i) % (1 << bits) for i in range(len(a))]
    factor, dtype = f"u{given // 8}", f"u{bits // 8}"
    got = evaluate(f"{opcode} $d, a, b, c;", dtype, (a, factor), (b, factor), (c, dtype))
    rows = zip(a, b, c, strict=True)
    shift = 32 if ".hi." in opcode else 0
    products = [((value(x, kind) * value(y, kind)) >> shift, z) for x, y, z in rows]
    assert got.tolist() == [(product + z) % (1 << bits) for product, z in products]


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
@pytest.mark.parametrize("operation", ["and", "or", "xor"])
def test_logic(operation: str, kind: str) -> None:
    f = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}[operation]
    bits = int(kind[1:])
    check_pairs(f"{operation}.{kind}", bits, bits, f)


def test_logic_of_predicates() -> None:
    a = [0, 0, 1, 1]
    b = [0, 1, 0, 1]
    body = "setp.ne.b32 %p1, a, 0; setp.ne.b32 %p2, b, 0; "
    for operation, want in (("and", [0, 0, 0, 1]), ("or", [0, 1, 1, 1]), ("xor", [0, 1, 1, 0])):
        got = evaluate(f"{body} {operation}.pred p, %p1, %p2;", bool, (a, "u4"), (b, "u4"))
        assert got.tolist() == [bool(x) for x in want]
    got = evaluate(f"{body} not.pred p, %p1;", bool, (a, "u4"), (b, "u4"))
    assert got.tolist() == [True, True, False, False]
    assert evaluate("mov.pred p, -1;", bool, (a, "u4")).all()


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_shl(kind: str) -> None:
    """A shift by the width or more gives 0: the amount is clamped, not taken modulo."""
    bits = int(kind[1:])
    given = list(itertools.product(EDGES[bits], [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 2**32 - 1]))
    a, n = zip(*given, strict=True)
    got = evaluate(f"shl.{kind} $d, a, b;", f"u{bits // 8}", (a, f"u{bits // 8}"), (n, "u4"))
    assert got.tolist() == [(x << min(y, bits)) % (1 << bits) for x, y in given]


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_shr(kind: str) -> None:
    """A signed shift fills with the sign, whatever the amount."""
    bits = int(kind[1:])
    given = list(itertools.product(EDGES[bits], [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 2**32 - 1]))
    a, n = zip(*given, strict=True)
    got = evaluate(f"shr.{kind} $d, a, b;", f"u{bits // 8}", (a, f"u{bits // 8}"), (n, "u4"))
    assert got.tolist() == [(value(x, kind) >> min(y, bits)) % (1 << bits) for x, y in given]


def bfe(a: int, place: int, n: int, kind: str) -> int:
    """Return the pseudocode of the manual's "bfe"."""
    msb = int(kind[1:]) - 1
    place, n = place & 0xFF, n & 0xFF
    sign = 0 if kind[0] == "u" or n == 0 else (a >> min(place + n - 1, msb)) & 1
    out = 0
    for i in range(msb + 1):
        out |= ((a >> (place + i)) & 1 if i < n and place + i <= msb else sign) << i
    return out


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfe(kind: str) -> None:
    bits = int(kind[1:])
    places = [0, 1, 5, 31, 32, 63, 255]
    given = list(itertools.product(EDGES[bits][3:8], places, [0, 1, 4, 32, 64, 255, 256]))
    a, place, n = zip(*given, strict=True)
    dtype = f"u{bits // 8}"
    got = evaluate(f"bfe.{kind} $d, a, b, c;", dtype, (a, dtype), (place, "u4"), (n, "u4"))
    assert got.tolist() == [bfe(*row, kind) for row in given]


def test_prmt() -> None:
    """Each nibble of the selector chooses a byte; with its top bit, the byte's sign, 8 times."""
    selectors = [0x3210, 0x7654, 0x5410, 0x7632, 0x7701, 0xBA98, 0xFEDC, 0x8080, 0x4043, 0xFFFF0123]
    given = list(itertools.product(EDGES[32][3:], EDGES[32][4:7], selectors))
    a, b, c = zip(*given, strict=True)

    def expected(a: int, b: int, selector: int) -> int:
        source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        out = []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = source[nibble & 7]
            out.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(out), "little")

    got = evaluate("prmt.b32 $d, a, b, c;", "u4", (a, "u4"), (b, "u4"), (c, "u4"))
    assert got.tolist() == [expected(*row) for row in given]


def test_one_operand() -> None:
    for bits, kind in ((32, "32"), (64, "64")):
        a, dtype = EDGES[bits], f"u{bits // 8}"
        got = evaluate(f"popc.b{kind} $d, a;", "u4", (a, dtype))
        assert got.tolist() == [x.bit_count() for x in a]
        got = evaluate(f"not.b{kind} $d, a;", dtype, (a, dtype))
        assert got.tolist() == [x ^ ((1 << bits) - 1) for x in a]
        got = evaluate(f"neg.s{kind} $d, a;", dtype, (a, dtype))
        assert got.tolist() == [-x % (1 << bits) for x in a]
        got = evaluate(f"abs.s{kind} $d, a;", dtype, (a, dtype))
        assert got.tolist() == [abs(signed(x, bits)) % (1 << bits) for x in a]


def test_halves_of_integers() -> None:
    """add, sub.s16x2: no carry goes from the lower half to the upper one."""
    a, b = zip(*pairs(32), strict=True)
    for operation, sign in (("add", 1), ("sub", -1)):
        got = evaluate(f"{operation}.s16x2 $d, a, b;", "u4", (a, "u4"), (b, "u4"))
        lower = [(x + sign * y) & 0xFFFF for x, y in pairs(32)]
        upper = [((x >> 16) + sign * (y >> 16)) & 0xFFFF for x, y in pairs(32)]
        assert got.tolist() == [lo | hi << 16 for lo, hi in zip(lower, upper, strict=True)]


def test_selp_and_mov() -> None:
    a, b = zip(*pairs(32), strict=True)
    got = evaluate("setp.lt.u32 %p1, a, b; selp.b32 $d, a, b, %p1;", "u4", (a, "u4"), (b, "u4"))
    assert got.tolist() == [min(pair) for pair in pairs(32)]
    got = evaluate("mov.b64 $d, {a, b};", "u8", (a, "u4"), (b, "u4"))
    assert got.tolist() == [x | y << 32 for x, y in pairs(32)]
    got = evaluate("mov.b64 {_, $d}, a;", "u4", ([0x1122334455667788], "u8"))
    assert got.tolist() == [0x11223344]
    unpack = "mov.b64 {%rs1, %rs2, %rs3, %rs4}, a; mov.b64 $d, {%rs4, %rs3, %rs2, %rs1};"
    assert evaluate(unpack, "u8", ([0x1122334455667788], "u8")).tolist() == [0x7788556633441122]
    unpack = "mov.b32 {%rs1, %rs2}, a; cvt.u32.u16 %r1, %rs1; cvt.u32.u16 %r2, %rs2;"
    got = evaluate(f"{unpack} shl.b32 %r1, %r1, 16; or.b32 $d, %r1, %r2;", "u4", (a, "u4"))
    assert got.tolist() == [(x & 0xFFFF) << 16 | x >> 16 for x in a]


@pytest.mark.parametrize("kind", ["b16", "f32", "b64", "f64"])
def test_selp_of_every_width(kind: str) -> None:
    """The values are bits: nothing is rounded or made canonical, not even a signalling NaN."""
    bits = int(kind[1:])
    a, b = zip(*pairs(bits), strict=True)
    dtype = f"u{bits // 8}"
    body = f"setp.eq.b{bits} %p1, a, b; selp.{kind} $d, a, 1, %p1;"
    if kind[0] == "b":
        got = evaluate(body, dtype, (a, dtype), (b, dtype))
        assert got.tolist() == [x if x == y else 1 for x, y in pairs(bits)]
    got = evaluate(f"setp.ne.b{bits} p, a, b;", bool, (a, dtype), (b, dtype))
    assert got.tolist() == [x != y for x, y in pairs(bits)]
    got = evaluate(
        f"setp.ne.b{bits} %p1, a, b; selp.{kind} $d, a, b, %p1;", dtype, (a, dtype), (b, dtype)
    )
    assert got.tolist() == [x for x, _ in pairs(bits)]


@pytest.mark.parametrize("kind", ["b16", "u16", "b32", "u64"])
def test_mov(kind: str) -> None:
    bits = int(kind[1:])
    dtype = f"u{bits // 8}"
    got = evaluate(f"mov.{kind} $d, a;", dtype, (EDGES[bits], dtype))
    assert got.tolist() == EDGES[bits]


ORDERS = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__"}
ORDERS |= {"ge": "__ge__"}


@pytest.mark.parametrize("kind", ["s16", "u16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("order", ORDERS)
def test_setp(order: str, kind: str) -> None:
    bits = int(kind[1:])
    a, b = zip(*pairs(bits), strict=True)
    dtype = f"u{bits // 8}"
    got = evaluate(f"setp.{order}.{kind} p, a, b;", bool, (a, dtype), (b, dtype))
    compare = getattr(int, ORDERS[order])
    assert got.tolist() == [compare(value(x, kind), value(y, kind)) for x, y in pairs(bits)]


def test_setp_combines() -> None:
    a, b = [0, 0, 5, 5], [0, 1, 0, 1]
    for combine, want in (("and", [0, 0, 0, 1]), ("or", [0, 1, 1, 1]), ("xor", [0, 1, 1, 0])):
        body = f"setp.ne.b32 %p1, b, 0; setp.gt.{combine}.s32 p|q, a, 3, %p1;"
        assert evaluate(body, bool, (a, "u4"), (b, "u4")).tolist() == [bool(x) for x in want]
        negated = [(x <= 3, y != 0) for x, y in zip(a, b, strict=True)]
        got = evaluate(f"{body} mov.pred p, q;", bool, (a, "u4"), (b, "u4"))
        f = {"and": bool.__and__, "or": bool.__or__, "xor": bool.__xor__}[combine]
        assert got.tolist() == [f(*pair) for pair in negated]


def test_predicated_execution() -> None:
    a = np.arange(64)
    body = "mov.b32 $d, a; setp.gt.s32 %p1, a, 9; @%p1 add.s32 $d, a, 100; @!%p1 neg.s32 $d, a;"
    assert evaluate(body, "i4", (a, "i4")).tolist() == [x + 100 if x > 9 else -x for x in a]


def test_special_registers() -> None:
    """%tid, %ntid, %ctaid, %nctaid and %laneid; only the dimension x has several threads."""
    body = """mov.u32 %r1, %laneid; mov.u32 %r2, %ntid.x; mov.u32 %r3, %nctaid.x;
        mov.u32 %r4, %ctaid.y; mov.u32 %r5, %tid.y; mov.u32 %r6, %ntid.z;
        mad.lo.s32 $d, %r2, 100, %r1; mad.lo.s32 $d, %r3, 100000, $d; add.s32 %r4, %r4, %r5;
        mad.lo.s32 $d, %r4, 7000000, $d; mad.lo.s32 $d, %r6, 1000000, $d;"""
    got = evaluate(body, "u4", (np.zeros(64), "u4"))
    assert got.tolist() == [1_000_000 + 100_000 + 6400 + i % 32 for i in range(64)]


@pytest.mark.parametrize("text", ["brev.b32 $d, a;", "add.q32 $d, a, a;", "shfl.b32 $d, a, 1, 2;"])
def test_an_unknown_instruction_is_named(text: str) -> None:
    with pytest.raises(UnknownInstruction, match=text.split()[0].replace(".", r"\.")):
        evaluate(text, "u4", ([1], "u4"))
