"""Conflicts between warps and between CTAs: each kind is found, and only conflicts are.

A test runs the same program without its fault too: nothing is reported then.
"""

import numpy as np
import pytest

from ptx import proof
from ptx.faults import UnknownInstruction
from ptx.machine import Kernel
from ptx.snippets import addresses, aligned, element, kinds, launch, module
from ptx.values import Array

EXCHANGE = """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.b32 %r3, global_smem;
    add.s32 %r4, %r3, %r2; xor.b32 %r5, %r4, 128;
    st.shared.b32 [%r4], %r1; {barrier} ld.shared.b32 %r6, [%r5];"""


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_race_in_shared_memory(barrier: str) -> None:
    """Two warps exchange values: without a barrier the reads may come first."""
    running = launch(EXCHANGE.format(barrier=barrier), threads=64, shared=256)
    assert kinds(running) == (set() if barrier else {"race"})


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_race_by_a_later_write(barrier: str) -> None:
    body = EXCHANGE.format(barrier="bar.sync 0;") + f"{barrier} st.shared.b32 [%r4], %r6;"
    assert kinds(launch(body, threads=64, shared=256)) == (set() if barrier else {"race"})


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_race_in_global_memory(barrier: str) -> None:
    data = aligned(np.zeros(64), "u4")
    body = f"""{element(0, 4, 1)} xor.b64 %rd2, %rd1, 128; mov.u32 %r1, %tid.x;
        st.global.b32 [%rd1], %r1; {barrier} ld.global.b32 %r2, [%rd2];"""
    running = launch(addresses(1) + body, data, threads=64)
    assert kinds(running) == (set() if barrier else {"race"})


def test_threads_that_disagree() -> None:
    """Two threads store to one address: the same value is well, different values are not."""
    data = aligned([0], "u4")
    for value, found in (("7", set()), ("%r39", {"race"})):
        body = f"{addresses(1)} mov.u32 %r39, %tid.x; st.global.b32 [%rd20], {value};"
        running = launch(body, data, threads=32)
        assert kinds(running) == found


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("first", ["ld.global.b32 %r4, [%rd2];", ""])
def test_a_race_between_ctas(apart: bool, first: str) -> None:
    """CTAs write values of their own to places of their own, or all to the same ones."""
    data = aligned(np.zeros(128), "u4")
    body = f"""{element(0, 4, 1)} mov.u32 %r1, %ctaid.x; add.s32 %r3, %r1, %r39;
        mad.wide.u32 %rd2, %r1, {128 if apart else 0}, %rd1;
        {first} st.global.b32 [%rd2], %r3;"""
    running = launch(addresses(1) + body, data, grid=(4,))
    assert kinds(running) == (set() if apart else {"race"})


def test_reads_by_two_ctas_before_a_write() -> None:
    """The last CTA also writes what all have read."""
    data = aligned(np.zeros(32), "u4")
    body = f"""{element(0, 4, 1)} mov.u32 %r1, %ctaid.x; ld.global.b32 %r2, [%rd1];
        bar.sync 0; setp.eq.s32 %p1, %r1, 2; @%p1 st.global.b32 [%rd1], %r39;"""
    assert kinds(launch(addresses(1) + body, data, grid=(3,))) == {"race"}


@pytest.mark.parametrize("kind", ["u64", "u32", "s32"])
def test_atomic_add_counts_every_thread(kind: str) -> None:
    size = int(kind[1:]) // 8
    total, old = aligned([5], f"u{size}"), aligned(np.zeros(64), f"u{size}")
    register, bits = "%rd" if size == 8 else "%r", 8 * size
    body = f"""{element(1, size, 2)} mov.b{bits} {register}3, 3;
        atom.global.gpu.relaxed.add.{kind} {register}1, [%rd20], {register}3;
        st.global.b{bits} [%rd2], {register}1;"""
    running = launch(addresses(2) + body, total, old, threads=64)
    assert total[0] == 5 + 3 * 64
    assert sorted(old.tolist()) == [5 + 3 * i for i in range(64)]
    assert not running.findings


ADD = "atom.global.gpu.relaxed.add.u32 %r3, [%rd2], %r2;"
ACCESSES = {"read": "ld.global.b32 %r3, [%rd2];", "write": "st.global.b32 [%rd2], %r2;"}
IN_TURN = """mov.b32 %r2, 1; setp.lt.u32 %p1, %r39, 32; @%p1 bra $L_first; bra.uni $L_rest;
    $L_first: {first} $L_rest: {barrier} setp.ge.u32 %p1, %r39, 32; @%p1 bra $L_second;
    bra.uni $L_end; $L_second: {second} $L_end: mov.b32 %r4, 0;"""


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("atomic_first", [True, False])
def test_atomics_and_plain_accesses(access: str, atomic_first: bool, barrier: str) -> None:
    """One warp adds atomically, another one reads or writes the same number."""
    order = (ADD, ACCESSES[access]) if atomic_first else (ACCESSES[access], ADD)
    data = aligned([0, 0], "u4")
    body = IN_TURN.format(first=order[0], second=order[1], barrier=barrier)
    text = f"{addresses(1)} mov.u32 %r39, %tid.x; mov.b64 %rd2, %rd20; {body}"
    assert kinds(launch(text, data, threads=64)) == (set() if barrier else {"race"})
    apart = text.replace(order[1], order[1].replace("%rd2]", "%rd2+4]"))
    assert kinds(launch(apart, data, threads=64)) == set()
    both = text.replace(ACCESSES[access], ADD)
    assert kinds(launch(both, data, threads=64)) == set()


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("plain", [0, 1, 2])
def test_atomics_and_plain_accesses_of_ctas(access: str, plain: int) -> None:
    """One CTA reads or writes what the others add to, wherever it comes in their order."""
    body = f"""{addresses(1)} mov.u32 %r1, %ctaid.x; setp.eq.s32 %p1, %r1, {plain}; mov.b32 %r2, 1;
        mov.b64 %rd2, %rd20; @%p1 bra $L; {ADD} bra.uni $M; $L: {{}} $M: mov.b32 %r4, 0;"""
    data = aligned([0], "u4")
    assert kinds(launch(body.format(ACCESSES[access]), data, grid=(3,))) == {"race"}
    assert kinds(launch(body.format(ADD), data, grid=(3,))) == set()


@pytest.mark.parametrize("other", ["u64", "u32"])
def test_atomics_that_overlap_in_part(other: str) -> None:
    """Two atomic operations are ordered if they are on the same bytes."""
    second = f"atom.global.gpu.relaxed.add.{other} {'%rd5' if other == 'u64' else '%r3'}, [%rd2], "
    second += "%rd4;" if other == "u64" else "%r2;"
    body = IN_TURN.format(first=ADD, second=second, barrier="")
    text = f"{addresses(1)} mov.u32 %r39, %tid.x; mov.b64 %rd2, %rd20; mov.b64 %rd4, 1; {body}"
    found = kinds(launch(text, aligned([0], "u8"), threads=64))
    assert found == ({"race"} if other == "u64" else set())


def test_atomics_of_a_cta_alone_are_not_known() -> None:
    with pytest.raises(UnknownInstruction, match="atom.global.cta"):
        launch(addresses(1) + "atom.global.cta.add.u32 %r1, [%rd20], 1;", aligned([0], "u4"))


def found(body: str, *tensors: Array) -> list[str]:
    """Return the serious findings of a program with 64 threads."""
    kernel = Kernel(module(addresses(len(tensors)) + body, len(tensors), 64), 256)
    regions = [(t.ctypes.data, t.nbytes, f"p{i}") for i, t in enumerate(tensors)]
    return proof.run(kernel, (1,), [t.ctypes.data for t in tensors], regions)[1]


# Two warps read one number each of 32 threads and add 1; the first one stores.
REPEATED = """mov.u32 %r39, %tid.x; and.b32 %r38, %r39, 31;
    mad.wide.u32 %rd1, %r38, 4, %rd20; ld.global.b32 %r1, [%rd1]; add.s32 %r1, %r1, 1;
    setp.lt.u32 %p1, %r39, 32; @%p1 st.global.b32 [%rd1], %r1; {last}"""


def test_a_read_that_changes_no_result_may_race() -> None:
    """Warps repeat a load after the store by the warp whose numbers they are."""
    data = aligned(np.arange(32), "u4")
    assert found(REPEATED.format(last=""), data) == []
    assert data.tolist() == [*range(1, 33)]  # the proof leaves the results of the first run


@pytest.mark.parametrize("use", ["value", "address", "branch", "shared"])
def test_a_read_that_changes_a_result_may_not_race(use: str) -> None:
    """The second warp stores what it read, uses it as an address, or goes where it says."""
    last = {
        "value": f"{element(1, 4, 2)} st.global.b32 [%rd2], %r1;",
        "address": "mad.wide.u32 %rd2, %r1, 4, %rd21; ld.global.b32 %r2, [%rd2];",
        "branch": f"""setp.gt.s32 %p2, %r1, 32; @%p2 bra $L; bra.uni $M; $L: {element(1, 4, 2)}
            st.global.b32 [%rd2], 7; $M: mov.b32 %r3, 0;""",
        "shared": f"""mov.b32 %r3, global_smem; mad.lo.s32 %r4, %r39, 4, %r3; xor.b32 %r5, %r4, 128;
            st.shared.b32 [%r4], %r1; bar.sync 0; ld.shared.b32 %r6, [%r5]; {element(1, 4, 2)}
            st.global.b32 [%rd2], %r6;""",
    }[use]
    tensors = aligned(np.arange(32), "u4"), aligned(np.zeros(64), "u4")
    lines = found(REPEATED.format(last=last), *tensors)
    assert len(lines) == 1 and lines[0].startswith("race: global write after a read by another")
    barrier = REPEATED.replace("setp.lt.u32 %p1, %r39", "bar.sync 0; setp.lt.u32 %p1, %r39")
    assert found(barrier.format(last=last), *tensors) == []


def test_two_warps_that_read_and_write_the_same_numbers() -> None:
    """Both warps add 1 to the numbers that they read: one may read what the other has stored."""
    data = aligned(np.arange(32), "u4")
    both = REPEATED.format(last="").replace("@%p1 st.global", "st.global")
    assert len(found(both, data)) == 1


@pytest.mark.parametrize(
    ("b", "found"),
    [
        ("0f3F800001", "values that differ by roundings"),  # the next float32 after 1
        ("0f3F800005", "different values"),
        ("0f3F800000", ""),
    ],
)
def test_lanes_that_disagree_by_roundings(b: str, found: str) -> None:
    """A finding says whether the values that lanes store to one address are nearly the same."""
    body = f"""mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 7; selp.b32 %r2, 0f3F800000, {b}, %p1;
        st.shared.b32 [global_smem], %r2;"""
    lines = [text for _, text in launch(body, shared=16).findings]
    assert [text.partition(" to one shared")[0] for text in lines] == (
        [f"threads write {found}"] if found else []
    )
