"""Memory, warps, barriers, calls and counts; and each detector fires. test_races.py has conflicts.

A test of a detector also runs the same program without its fault: nothing is reported then.
"""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from ptx.counts import Counts
from ptx.faults import Fault, UnknownInstruction
from ptx.instructions import MAKERS
from ptx.snippets import addresses, aligned, element, evaluate, kinds, launch

MINUS_1 = 0xFFFFFFFF


def test_ld_extends_and_st_cuts() -> None:
    """ld.s8 and .s16 extend the sign, .u and .b do not; st stores the lower bits."""
    data = aligned([0x80, 0xFF, 0x7F, 0x01], np.uint8)
    out = aligned(np.zeros(32 * 4), "u4")
    for kind, want in (("s8", 0xFFFFFF80), ("u8", 0x80), ("s16", 0xFFFFFF80), ("b16", 0xFF80)):
        body = f"ld.global.{kind} %r1, [%rd20]; {element(1, 4, 1)} st.global.b32 [%rd1], %r1;"
        launch(addresses(2) + body, data, out)
        assert out[0] == want
    body = f"mov.b32 %r1, 0x12345678; {element(1, 2, 1)} st.global.b16 [%rd1+64], %r1;"
    launch(addresses(2) + body, data, out)
    assert out[16] == 0x56785678


def test_vectors() -> None:
    data, out = aligned(np.arange(128), "u4"), aligned(np.zeros(128), "u4")
    body = f"""{element(0, 16, 1)} {element(1, 16, 2)}
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1+0];
        st.global.v2.b32 [%rd2], {{%r4, %r3}};
        st.global.v2.b32 [%rd2+8], {{%r2, %r1}};"""
    running = launch(addresses(2) + body, data, out)
    assert out.tolist() == data.reshape(-1, 4)[:, ::-1].reshape(-1).tolist()
    assert (running.counts.bytes_loaded, running.counts.bytes_stored) == (512, 512)
    body = f"""{element(0, 16, 1)} {element(1, 16, 2)} mov.b32 %r3, global_smem;
        mad.lo.s32 %r4, %r39, 16, %r3; ld.global.v2.b64 {{%rd3, %rd4}}, [%rd1];
        st.shared::cta.v2.b64 [%r4], {{%rd4, %rd3}}; ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r4];
        st.global.v4.b32 [%rd2], {{%r6, %r5, %r8, %r7}};"""
    out[:] = 0
    launch(addresses(2) + body, data, out, shared=512)
    assert out.tolist() == data.reshape(-1, 4)[:, ::-1].reshape(-1).tolist()


WIDTHS = [(8, 1), (8, 2), (16, 1), (16, 2), (16, 4), (32, 1), (32, 2), (32, 4), (64, 1), (64, 2)]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("bits", "n"), WIDTHS)
def test_every_width_of_memory(bits: int, n: int, space: str) -> None:
    """A vector's items follow one another; each thread reads what it wrote, and no more."""
    size = bits * n // 8
    data = aligned(np.arange(32 * size) * 7 + 1, np.uint8)
    out = aligned(np.zeros(32 * size), np.uint8)
    registers = [f"%{'rd' if bits == 64 else 'r' if bits == 32 else 'rs'}{i + 5}" for i in range(n)]
    given, turned = (", ".join(order) for order in (registers, registers[::-1]))
    if n > 1:
        given, turned = f"{{{given}}}", f"{{{turned}}}"
    kind = f"{f'v{n}.' if n > 1 else ''}b{bits}"
    body = f"{addresses(2)} {element(0, size, 1)} {element(1, size, 2)}"
    if space == "shared":
        body += f"mov.b32 %r3, global_smem; mad.lo.s32 %r4, %r39, {size}, %r3;"
        body += f"ld.global.{kind} {given}, [%rd1]; st.shared.{kind} [%r4], {turned};"
        body += f"ld.shared.{kind} {given}, [%r4]; st.global.{kind} [%rd2], {given};"
    else:
        body += f"ld.global.{kind} {given}, [%rd1]; st.global.{kind} [%rd2], {turned};"
    running = launch(body, data, out, shared=32 * size)
    assert not running.findings
    items = data.reshape(32, n, bits // 8)[:, ::-1]
    assert out.tolist() == items.reshape(-1).tolist()


def shuffled(mode: str, value: list[int], b: int, c: int) -> list[tuple[int, bool]]:
    """Return the pseudocode of the manual's "shfl.sync"."""
    out = []
    for lane in range(32):
        bval, cval, mask = b & 31, c & 31, c >> 8 & 31
        max_lane = (lane & mask) | (cval & ~mask)
        min_lane = lane & mask
        if mode == "up":
            j, valid = lane - bval, lane - bval >= max_lane
        elif mode == "down":
            j, valid = lane + bval, lane + bval <= max_lane
        elif mode == "bfly":
            j, valid = lane ^ bval, lane ^ bval <= max_lane
        else:
            j = min_lane | (bval & ~mask)
            valid = j <= max_lane
        out.append((value[j if valid else lane], valid))
    return out


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode: str) -> None:
    """Lanes out of range of the clamp or of a segment keep their own value."""
    value = [7 * i + 3 for i in range(32)]
    for b, c in itertools.product([0, 1, 5, 16, 31, 33], [31, 0, 0x1C1F, 0x1800, 0x0F1F, 7]):
        clamp = f"{b}, {c}, -1;"
        got = evaluate(f"shfl.sync.{mode}.b32 $d|p, a, {clamp}", "u4", (value, "u4"))
        valid = evaluate(f"shfl.sync.{mode}.b32 %r1|p, a, {clamp}", bool, (value, "u4"))
        assert [*zip(got.tolist(), valid.tolist(), strict=True)] == shuffled(mode, value, b, c)


def test_redux_and_vote() -> None:
    value = np.arange(64).astype("i4") * 37 % 101 - 50
    warps = value.reshape(2, 32)
    for name, want in (("add", warps.sum(1)), ("min", warps.min(1)), ("max", warps.max(1))):
        got = evaluate(f"redux.sync.{name}.s32 $d, a, -1;", "i4", (value, "i4"))
        assert got.reshape(2, 32).tolist() == [[int(x)] * 32 for x in want]
    for name, f in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        got = evaluate(f"redux.sync.{name}.b32 $d, a, -1;", "i4", (value, "i4"))
        assert got.reshape(2, 32)[:, 0].tolist() == f.reduce(warps, 1).tolist()
    body = "setp.gt.s32 %p1, a, 40; vote.sync.ballot.b32 $d, %p1, -1;"
    got = evaluate(body, "u4", (value, "i4"))
    want = [sum((x > 40) << i for i, x in enumerate(row)) for row in warps.tolist()]
    assert got.reshape(2, 32)[:, 5].tolist() == want
    for name, bound in (("any", 48), ("all", -51), ("uni", 90)):
        body = f"setp.gt.s32 %p1, a, {bound}; vote.sync.{name}.pred p, %p1, -1;"
        got = evaluate(body, bool, (value, "i4")).reshape(2, 32)
        f = {"any": any, "all": all, "uni": lambda row: len(set(row)) == 1}[name]
        assert got[:, 0].tolist() == [f([x > bound for x in row]) for row in warps.tolist()]


def test_redux_of_unsigned() -> None:
    value = [0x80000000, 1, 0xFFFFFFFF, 7] * 8
    for name, want in (("min", 1), ("max", 0xFFFFFFFF), ("add", sum(value) % 2**32)):
        got = evaluate(f"redux.sync.{name}.u32 $d, a, -1;", "u4", (value, "u4"))
        assert got.tolist() == [want] * 32


def test_only_whole_warps_exchange() -> None:
    with pytest.raises(UnknownInstruction, match="redux.sync.add.s32"):
        evaluate("redux.sync.add.s32 $d, a, 15;", "i4", ([1], "i4"))


def test_branches_and_loops() -> None:
    """Threads part at branches and meet again: each runs its own number of turns."""
    a = np.arange(64) % 7
    body = """mov.b32 $d, 0; mov.b32 %r1, a;
        $L_loop: setp.eq.s32 %p1, %r1, 0; @%p1 bra $L_end;
        add.s32 $d, $d, %r1; sub.s32 %r1, %r1, 1; bra.uni $L_loop;
        $L_end: shfl.sync.idx.b32 %r2, $d, 6, 31, -1;"""
    assert evaluate(body, "i4", (a, "i4")).tolist() == [x * (x + 1) // 2 for x in a]


def test_scopes_of_registers() -> None:
    """A block in braces has its own registers, which hide those of the same name."""
    body = "{ .reg .b32 l<3>; .reg .b32 a2; mov.b32 l1, 5; { .reg .b32 l1; mov.b32 l1, 9; } "
    body += "mov.b32 a2, l1; add.s32 $d, a, a2; }"
    assert evaluate(body, "i4", ([1, 2], "i4")).tolist() == [6, 7]


FUNCTION = """
.func twice_plus(.param .b64 f0, .param .b32 f1);
.visible .entry snippet(.param .u64 p0)
.reqntid 64
{
.reg .pred %p<3>; .reg .b32 %r<5>; .reg .b64 %rd<5>;
ld.param.b64 %rd1, [p0];
mov.u32 %r1, %tid.x;
setp.lt.u32 %p1, %r1, 40;
mad.wide.u32 %rd2, %r1, 4, %rd1;
@%p1 bra $L_first;
bra.uni $L_second;
$L_first:
{ .param .b64 a0; .param .b32 a1; st.param.b64 [a0], %rd2; st.param.b32 [a1], %r1;
call.uni twice_plus, (a0, a1); }
$L_second:
{ .param .b64 a0; .param .b32 a1; st.param.b64 [a0], %rd2; st.param.b32 [a1], 7;
call.uni twice_plus, (a0, a1); }
ret;
}
.func twice_plus(.param .b64 f0, .param .b32 f1)
{
.reg .b32 %r<5>; .reg .b64 %rd<3>;
ld.param.b64 %rd1, [f0]; ld.param.b32 %r1, [f1];
ld.global.b32 %r2, [%rd1];
mad.lo.s32 %r3, %r2, 2, %r1;
st.global.b32 [%rd1], %r3;
ret;
}
"""


def test_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some threads call a function twice, some once: each returns to its own place."""
    monkeypatch.setattr("ptx.snippets.module", lambda *args: FUNCTION)
    data = aligned(np.arange(64) + 100, "u4")
    launch("", data, threads=64)
    once = [2 * (x + 100) + x if x < 40 else x + 100 for x in range(64)]
    assert data.tolist() == [2 * x + 7 for x in once]


@pytest.mark.parametrize(("offset", "size"), [(62, 2), (60, 4), (56, 8), (48, 16)])
def test_out_of_bounds(offset: int, size: int) -> None:
    """The last access inside a tensor of 64 bytes is well, the next one is a fault."""
    data = aligned(np.zeros(64), np.uint8)
    target = "{%r1, %r2, %r3, %r4}" if size == 16 else "%rd1"
    kind = "v4.b32" if size == 16 else f"b{8 * size}"
    launch(f"{addresses(1)} ld.global.{kind} {target}, [%rd20+{offset}];", data)
    for wrong in (offset + size, -size):
        with pytest.raises(Fault, match=f"out of bounds: {size} bytes"):
            launch(f"{addresses(1)} ld.global.{kind} {target}, [%rd20+{wrong}];", data)


def test_two_bytes_past_a_tensor_of_odd_size() -> None:
    """An aligned access of 4 bytes that begins inside and ends 2 bytes past the end is a fault."""
    data = aligned(np.zeros(31), np.uint16)
    launch(f"{addresses(1)} ld.global.b16 %rs1, [%rd20+60];", data)
    with pytest.raises(Fault, match="out of bounds: 4 bytes at 60 of the 62"):
        launch(f"{addresses(1)} ld.global.b32 %r1, [%rd20+60];", data)


def test_null_pointers_and_shared_bounds() -> None:
    with pytest.raises(Fault, match="out of bounds"):
        launch("mov.b64 %rd1, 0; ld.global.b32 %r1, [%rd1];", aligned([0], "u4"))
    launch("st.shared.b32 [global_smem+60], 1;", shared=64)
    for wrong in ("[global_smem+64]", "[global_smem+-4]", "[0]"):
        with pytest.raises(Fault, match="shared access out of bounds"):
            launch(f"st.shared.b32 {wrong}, 1;", shared=64)


def test_masked_threads_access_nothing() -> None:
    data = aligned(np.arange(20), "u4")
    body = f"{element(0, 4, 1)} setp.lt.u32 %p1, %r39, 20; @%p1 ld.global.b32 %r1, [%rd1];"
    running = launch(addresses(1) + body, data)
    assert running.counts.bytes_loaded == 80


@pytest.mark.parametrize("size", [2, 4, 8])
def test_misaligned(size: int) -> None:
    data = aligned(np.zeros(64), np.uint8)
    for place in ("[%rd20+{}]", "[global_smem+{}]"):
        space = "global" if "rd" in place else "shared"
        access = f"ld.{space}.b{8 * size} %rd1, {place};"
        launch(addresses(1) + access.format(size), data, shared=64)
        with pytest.raises(Fault, match="misaligned"):
            launch(addresses(1) + access.format(size // 2), data, shared=64)
    with pytest.raises(Fault, match="misaligned"):
        body = f"{addresses(1)} ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd20+8];"
        launch(body, data)


def test_ends_and_fences() -> None:
    """ret and exit end some threads; fences and the barrier of a warp change nothing."""
    for end in ("ret", "exit"):
        data = aligned(np.zeros(64), "u4")
        body = f"""{addresses(1)} {element(0, 4, 1)} setp.lt.u32 %p1, %r39, 20; @%p1 {end};
            membar.gl; fence.acq_rel.gpu; st.global.b32 [%rd1], 7;"""
        launch(body, data, threads=64)
        assert data.tolist() == [0] * 20 + [7] * 44
    part = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, {}; @%p1 bar.warp.sync -1;"
    assert kinds(launch(part.format(32), threads=64)) == set()
    assert kinds(launch(part.format(16), threads=64)) == {"divergence"}


def test_divergence() -> None:
    part = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, {n}; @%p1 bra $L; {other} bra.uni $M;"
    part += " $L: {one} $M: mov.b32 %r2, 0;"
    for n, found in ((16, {"divergence"}), (32, set())):
        body = part.format(n=n, one="shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", other="")
        assert kinds(launch(body, threads=64)) == found
    body = part.format(n=32, one="bar.sync 0;", other="bar.sync 0;")
    assert kinds(launch(body, threads=64)) == {"divergence"}
    body = part.format(n=32, one="bar.sync 0;", other="ret;")
    assert kinds(launch(body, threads=64)) == {"divergence"}
    body = part.format(n=32, one="mov.b32 %r3, 1;", other="mov.b32 %r3, 2;") + "bar.sync 0;"
    assert kinds(launch(body, threads=64)) == set()


def test_a_register_that_nobody_wrote_and_an_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Fault, match="%r1 is read before it is written"):
        launch("add.s32 %r2, %r1, 1;")
    monkeypatch.setattr("ptx.machine._MAX_BLOCKS", 100)
    with pytest.raises(Fault, match="loop without an end"):
        launch("$L: bra.uni $L;")


COPY = """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; mov.b32 %r3, global_smem; add.s32 %r4, %r3, %r2;
    cp.async.cg.shared.global [%r4], [%rd1], 16; cp.async.commit_group;
    cp.async.ca.shared.global [%r4+512], [%rd1], 16, 4; cp.async.commit_group;
    cp.async.wait_group {first}; ld.shared.b32 %r5, [%r4+4]; st.global.b32 [%rd2], %r5;
    cp.async.wait_group {second}; ld.shared.b32 %r6, [%r4+512]; ld.shared.b32 %r7, [%r4+516];
    st.global.b32 [%rd2+4], %r6; st.global.b32 [%rd2+8], %r7;"""


@pytest.mark.parametrize(("first", "second"), [(1, 0), (2, 0), (1, 1)])
def test_cp_async(first: int, second: int) -> None:
    """What a thread copies is there after the wait for its group, and poison before.

    The second copy takes 4 bytes of 16 and fills the rest with zeros.
    """
    data, out = aligned(np.arange(128) + 1, "u4"), aligned(np.zeros(128), "u4")
    body = addresses(2) + element(0, 16, 1) + element(1, 16, 2)
    running = launch(body + COPY.format(first=first, second=second), data, out, shared=1024)
    assert kinds(running) == (set() if (first, second) == (1, 0) else {"early"})
    early, late = first == 2, second == 1
    want = [[MINUS_1 if early else 4 * i + 2, MINUS_1 if late else 4 * i + 1] for i in range(32)]
    got = out.reshape(32, 4)
    assert got[:, :2].tolist() == want
    assert got[:, 2].tolist() == [MINUS_1 if late else 0] * 32


def test_cp_async_of_8_bytes() -> None:
    """Also in the same group as another copy; what src-size leaves out is zero, even all of it."""
    data, out = aligned(np.arange(64) + 1, "u4"), aligned(np.zeros(64), "u4")
    body = f"""{addresses(2)} {element(0, 8, 1)} {element(1, 8, 2)} mov.b32 %r3, global_smem;
        mad.lo.s32 %r4, %r39, 8, %r3; setp.lt.u32 %p1, %r39, 9; selp.b32 %r5, 8, 0, %p1;
        cp.async.ca.shared.global [%r4], [%rd1], 8, %r5; cp.async.wait_all;
        ld.shared.v2.b32 {{%r6, %r7}}, [%r4]; st.global.v2.b32 [%rd2], {{%r6, %r7}};"""
    running = launch(body, data, out, shared=256)
    assert not running.findings
    assert out.tolist() == [i + 1 if i < 18 else 0 for i in range(64)]


def test_cp_async_of_other_warps_needs_a_barrier() -> None:
    data = aligned(np.arange(64), "u4")
    for barrier in ("bar.sync 0;", ""):
        body = f"""{addresses(1)} {element(0, 4, 1)} shl.b32 %r2, %r39, 2; mov.b32 %r3, global_smem;
            add.s32 %r4, %r3, %r2; xor.b32 %r5, %r4, 128;
            cp.async.ca.shared.global [%r4], [%rd1], 4; cp.async.wait_all; {barrier}
            ld.shared.b32 %r6, [%r5];"""
        running = launch(body, data, threads=64, shared=256)
        assert kinds(running) == (set() if barrier else {"race"})


def test_cp_async_is_bounded() -> None:
    data = aligned(np.zeros(28), np.uint8)
    body = f"{addresses(1)} cp.async.ca.shared.global [global_smem], [%rd20+16], 16{{}};"
    launch(body.format(", 12"), data, shared=16)
    with pytest.raises(Fault, match="out of bounds"):
        launch(body.format(""), data, shared=16)


def test_counts() -> None:
    """Instructions are counted once for each warp that issues them, by class."""
    data = aligned(np.zeros(96), "f4")
    body = f"""{addresses(1)} {element(0, 4, 1)} ld.global.b32 %r1, [%rd1];
        setp.lt.u32 %p1, %r39, 40; @%p1 bra $L; bra.uni $M;
        $L: fma.rn.f32 %r1, %r1, %r1, %r1; ex2.approx.f32 %r1, %r1;
        $M: bar.sync 0; st.global.b32 [%rd1], %r1;"""
    counts = launch(body, data, threads=96).counts
    three = {"global_load": 3, "global_store": 3, "move": 3, "parameter": 3, "barrier": 3}
    # Of three warps, one takes the branch as a whole and one in part; two go past it.
    want = {**three, "integer": 6, "float": 2, "special": 2, "branch": 3 + 2 + 3}
    assert counts.instructions == want
    assert (counts.ctas, counts.bytes_loaded, counts.bytes_stored) == (1, 384, 384)
    total = Counts()
    total.add(counts)
    total.add(counts)
    assert total.issued == 2 * counts.issued and total.launches == 2


@pytest.mark.parametrize("name", MAKERS)
def test_every_instruction_has_a_test(name: str) -> None:
    """The tests of single instructions have each one in a program, or in a list of operations."""
    sources = [path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    assert any(re.search(rf"(^|[\s\";])({name})(\.|\")", text) for text in sources)
