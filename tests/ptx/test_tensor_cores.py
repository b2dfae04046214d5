"""Products of matrices against numpy's, from fragments and layouts laid out here by the manual."""

import itertools

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.snippets import addresses, aligned, element, kinds, launch
from ptx.values import Array

DTYPES = ["f16", "bf16"]


def numbers(shape: tuple[int, ...], seed: int) -> Array:
    """Return multiples of 1/8 whose products and sums are exact in every format here."""
    return np.random.default_rng(seed).integers(-16, 17, shape).astype("f4") / 8


def bits16(x: Array, dtype: str) -> Array:
    """Return the bits of numbers that the format holds exactly."""
    if dtype == "f16":
        return x.astype("f2").view("u2")
    return (x.astype("f4").view("u4") >> 16).astype("u2")


def pack(first: int, second: int) -> int:
    return int(first) | int(second) << 16


def a_registers(a: Array, warp_rows: int = 0) -> list[list[int]]:
    """Return the four registers of each lane for 16 rows of a matrix of bits.

    The figure of mma.m16n8k16: a0, a1: row = group; a2, a3: row = group + 8; a4 to a7 the same,
    8 columns on. The column is 2 * (lane % 4) + (i & 1), + 8 for i >= 4.
    """
    out = []
    for lane in range(32):
        group, place = lane >> 2, lane % 4
        values = []
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            column = place * 2 + (i & 1) + (8 if i >= 4 else 0)
            values.append(a[row + warp_rows, column])
        out.append([pack(*values[2 * r : 2 * r + 2]) for r in range(4)])
    return out


def b_registers(b: Array) -> list[list[int]]:
    """Return the two registers of each lane for a (16, 8) matrix: row 2 (lane % 4) + (i & 1) ..."""
    out = []
    for lane in range(32):
        rows = [lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0) for i in range(4)]
        values = [b[row, lane >> 2] for row in rows]
        out.append([pack(*values[:2]), pack(*values[2:])])
    return out


def loads(parameter: int, n: int, first: int) -> str:
    """Return lines that load n consecutive 32-bit values of this thread into %r(first) and on."""
    lines = [element(parameter, 4 * n, 1)]
    lines += [f"ld.global.b32 %r{first + i}, [%rd1+{4 * i}];" for i in range(n)]
    return "\n".join(lines)


def stores(parameter: int, n: int, first: int) -> str:
    lines = [element(parameter, 4 * n, 1)]
    lines += [f"st.global.b32 [%rd1+{4 * i}], %r{first + i};" for i in range(n)]
    return "\n".join(lines)


def registers(first: int, n: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(n)) + "}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma(dtype: str) -> None:
    """Two warps, each with matrices of its own."""
    a, b, c = numbers((2, 16, 16), 0), numbers((2, 16, 8), 1), numbers((2, 16, 8), 2)
    fragments = [
        aligned([f(bits16(x, dtype)) for x in side], "u4")
        for f, side in ((a_registers, a), (b_registers, b))
    ]
    place = [(lane >> 2, lane % 4 * 2) for lane in range(32)]
    # c0, c1: row = group; c2, c3: row = group + 8; the column is 2 * (lane % 4) + (i & 1).
    c_fragment = [
        [[m[g + 8 * (i >= 2), q + (i & 1)] for i in range(4)] for g, q in place] for m in c
    ]
    out = aligned(np.zeros((2, 32, 4)), "f4")
    name = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    body = addresses(4) + loads(0, 4, 10) + loads(1, 2, 14) + loads(2, 4, 16)
    body += f"{name} {registers(20, 4)}, {registers(10, 4)}, {registers(14, 2)}, "
    body += f"{registers(16, 4)}; {stores(3, 4, 20)}"
    running = launch(body, *fragments, aligned(c_fragment, "f4"), out, threads=64)
    want = a.astype("f8") @ b + c
    for warp, (lane, (g, q)), i in itertools.product(range(2), enumerate(place), range(4)):
        assert out[warp, lane, i] == want[warp, g + 8 * (i >= 2), q + (i & 1)]
    assert running.counts.flops == 2 * 2 * 16 * 8 * 16


def test_mma_of_float64() -> None:
    """Lane l has a(i): row l / 4 + 8 (i odd), column l % 4 + 4 (i / 2); b(i): row l % 4 + 4 i."""
    shapes = [(16, 16), (16, 8), (16, 8)]
    a, b, c = (numbers(shape, 10 + i).astype("f8") for i, shape in enumerate(shapes))
    lanes = [(lane >> 2, lane % 4) for lane in range(32)]
    fragments = [
        [[a[g + (8 if i & 1 else 0), q + (i >> 1) * 4] for i in range(8)] for g, q in lanes],
        [[b[q + 4 * i, g] for i in range(4)] for g, q in lanes],
        [[c[g + 8 * (i >= 2), 2 * q + (i & 1)] for i in range(4)] for g, q in lanes],
    ]
    out = aligned(np.zeros((32, 4)), "f8")
    body, first = addresses(4), 4
    for parameter, n in enumerate((8, 4, 4)):
        body += element(parameter, 8 * n, 1)
        for i in range(n):
            body += f"ld.global.b64 %rd{first + i + 30}, [%rd1+{8 * i}];"
        first += n
    a_names, b_names, c_names = (
        "{" + ", ".join(f"%rd{34 + i}" for i in part) + "}"
        for part in (range(8), range(8, 12), range(12, 16))
    )
    name = "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64"
    body += f"{name} {c_names}, {a_names}, {b_names}, {c_names}; {element(3, 32, 1)}"
    body += "".join(f"st.global.b64 [%rd1+{8 * i}], %rd{46 + i};" for i in range(4))
    launch(body, *(aligned(x, "f8") for x in fragments), out)
    want = a @ b + c
    for (lane, (g, q)), i in itertools.product(enumerate(lanes), range(4)):
        assert out[lane, i] == want[g + 8 * (i >= 2), 2 * q + (i & 1)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix_and_stmatrix(n: int, transposed: bool) -> None:
    """Lane l gets row l / 4, columns 2 (l % 4) and the next; stmatrix puts them back."""
    matrices = np.arange(n * 64, dtype="u2").reshape(n, 8, 8)
    order = np.random.default_rng(3).permutation(8 * n)  # the rows lie anywhere
    memory = np.zeros((8 * n, 8), "u2")
    memory[order] = matrices.reshape(-1, 8)
    data, out = aligned(memory.reshape(-1).view("u4"), "u4"), aligned(np.zeros((32, n)), "u4")
    rows = aligned(np.resize(order * 16, 32), "u4")
    copied = aligned(np.zeros(8 * n * 4), "u4")
    trans = ".trans" if transposed else ""
    fill = "\n".join(
        f"ld.global.b32 %r1, [%rd20+{4 * i}]; st.shared.b32 [global_smem+{4 * i}], %r1;"
        for i in range(32 * n)
    )
    back = "\n".join(
        f"ld.shared.b32 %r1, [global_smem+{1024 + 4 * i}]; st.global.b32 [%rd23+{4 * i}], %r1;"
        for i in range(32 * n)
    )
    body = f"""{addresses(4)} {fill} bar.sync 0; {element(1, 4, 1)} ld.global.b32 %r2, [%rd1];
        mov.b32 %r3, global_smem; add.s32 %r4, %r2, %r3;
        ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 {registers(10, n)}, [%r4];
        {stores(2, n, 10)}
        stmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 [%r4+1024], {registers(10, n)};
        bar.sync 0; {back}"""
    running = launch(body, data, rows, out, copied, shared=2048)
    assert not running.findings
    for i, lane in itertools.product(range(n), range(32)):
        matrix = matrices[i].T if transposed else matrices[i]
        row, column = lane // 4, lane % 4 * 2
        assert out[lane, i] == pack(matrix[row, column], matrix[row, column + 1])
    assert copied.tolist() == data.tolist()


SWIZZLES = {"none": (0, 16), "128": (1, 128), "64": (2, 64), "32": (3, 32)}


def chunk_place(row: int, chunk: int, width: int) -> int:
    """Return the place of a row's 16-byte chunk in a pattern of 8 rows of `width` bytes.

    Swizzling exchanges chunks: by the row for 128 bytes, by row / 2 for 64, by row / 4 for 32.
    """
    turn = {128: row % 8, 64: row // 2 % 4, 32: row // 4 % 2, 16: 0}[width]
    return row * width + 16 * (chunk ^ turn)


def lay_out(matrix: Array, swizzle: str, transposed: bool) -> tuple[Array, int, int]:
    """Return a (rows, 16) matrix of bits as shared memory, with its leading and stride offsets.

    K-major: the 16 columns are contiguous; transposed: the rows are. Patterns of 8 lines of `width`
    bytes follow one another, those along the contiguous dimension first.
    """
    _, width = SWIZZLES[swizzle]
    lines = matrix.T if transposed else matrix  # (lines, contiguous numbers)
    n_lines, length = lines.shape
    per = width // 2
    across = max(1, length // per)
    memory = np.zeros(max(n_lines, 8) * max(length, per), "u2")
    for line, first in itertools.product(range(n_lines), range(0, length, 8)):
        pattern = line // 8 * across + first // per
        place = 8 * width * pattern + chunk_place(line % 8, first % per // 8, width)
        memory[place // 2 : place // 2 + 8] = lines[line, first : first + 8]
    along, other = 8 * width, 8 * width * across  # to the next pattern along a line, across lines
    if swizzle == "none" and transposed:
        return memory, other, along
    return memory, along, other


def descriptor(start: int, leading: int, stride: int, swizzle: str) -> int:
    mode, _ = SWIZZLES[swizzle]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def fill_shared(parameter: int, n_bytes: int, at: int) -> str:
    """Return lines in which 128 threads copy a parameter to shared memory."""
    lines = [f"mov.u32 %r39, %tid.x; mad.wide.u32 %rd1, %r39, 4, %rd{20 + parameter};"]
    lines.append("mov.b32 %r3, global_smem; shl.b32 %r4, %r39, 2; add.s32 %r4, %r3, %r4;")
    for i in range(0, n_bytes, 512):
        lines.append(f"ld.global.b32 %r1, [%rd1+{i}]; st.shared.b32 [%r4+{at + i}], %r1;")
    return "\n".join(lines)


def padded(memory: Array) -> Array:
    """Return memory as 32-bit numbers, in whole rounds of 128 threads."""
    out = np.zeros(-(-memory.nbytes // 512) * 256, "u2")
    out[: len(memory)] = memory
    return aligned(out.view("u4"), "u4")


def product(
    a: Array, b: Array, dtype: str, layouts: list[tuple[str, bool]], tail: str, in_registers: bool
) -> tuple[Array, set[str]]:
    """Return (64, n) A B^T by one wgmma on top of 1, and what was found."""
    n = len(b)
    (a_memory, *a_offsets), (b_memory, *b_offsets) = (
        lay_out(bits16(x, dtype), *layout) for x, layout in zip((a, b), layouts, strict=True)
    )
    tensors = [padded(a_memory), padded(b_memory)]
    fragments = [a_registers(bits16(a, dtype), 16 * warp) for warp in range(4)]
    out = aligned(np.zeros((128, n // 2)), "f4")
    at = 8192
    first, second = (
        descriptor(1024 + base, *offsets, layout[0])
        for base, offsets, layout in zip((0, at), (a_offsets, b_offsets), layouts, strict=True)
    )
    d = registers(100, n // 2)
    one = "".join(f"mov.b32 %r{100 + i}, 0f3F800000;" for i in range(n // 2))
    left = registers(10, 4) if in_registers else "%rd2"
    flags = [*([] if in_registers else [layouts[0][1]]), layouts[1][1]]
    body = f"""{addresses(4)} {fill_shared(0, tensors[0].nbytes, 0)}
        {fill_shared(1, tensors[1].nbytes, at)} {loads(2, 4, 10)} {one}
        fence.proxy.async.shared::cta; bar.sync 0;
        mov.b64 %rd2, {first}; mov.b64 %rd3, {second}; wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} {d}, {left}, %rd3, 1, 1, 1,
        {", ".join(str(int(flag)) for flag in flags)};
        wgmma.commit_group.sync.aligned; {tail} {stores(3, n // 2, 100)}"""
    running = launch(body, *tensors, aligned(fragments, "u4"), out, threads=128, shared=at + 8192)
    matrix = np.zeros((64, n))
    for thread, i in itertools.product(range(128), range(n // 2)):
        # The figure of wgmma's D: like mma's, 16 rows for each warp, 8 columns for 4 registers.
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
        matrix[row, 8 * (i // 4) + thread % 4 * 2 + i % 2] = out[thread, i]
    assert running.counts.flops == 2 * 64 * n * 16
    return matrix, kinds(running)


WAIT = "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("transposed", itertools.product([False, True], repeat=2))
def test_wgmma(swizzle: str, transposed: tuple[bool, bool], dtype: str) -> None:
    """A and B in shared memory, each K-major or not, in every swizzle."""
    n = 64
    a, b = numbers((64, 16), 4), numbers((n, 16), 5)
    layouts = [(swizzle, flag) for flag in transposed]
    got, found = product(a, b, dtype, layouts, WAIT, in_registers=False)
    assert found == set()
    assert (got == a.astype("f8") @ b.T + 1).all()


@pytest.mark.parametrize("n", [8, 16, 32, 128, 256])
def test_wgmma_with_a_in_registers(n: int) -> None:
    a, b = numbers((64, 16), 6), numbers((n, 16), 7)
    layouts = [("none", False), ("32", False)]
    got, found = product(a, b, "bf16", layouts, WAIT, in_registers=True)
    assert found == set()
    assert (got == a.astype("f8") @ b.T + 1).all()


def test_an_operand_of_wgmma_is_overwritten() -> None:
    a, b = numbers((64, 16), 8), numbers((8, 16), 9)
    layouts = [("none", False), ("none", False)]
    overwrite = "bar.sync 0; st.shared.b32 [%r4+8192], 0;"
    _, found = product(a, b, "bf16", layouts, overwrite + WAIT, in_registers=True)
    assert found == {"race"}
    _, found = product(a, b, "bf16", layouts, WAIT + overwrite, in_registers=True)
    assert found == set()
    _, found = product(a, b, "bf16", layouts, WAIT + overwrite[11:], in_registers=True)
    assert found == {"race"}  # no barrier: the other warps of the group may still read


def test_a_descriptor_out_of_bounds() -> None:
    body = """mov.b64 %rd3, {}; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {{%r1, %r2, %r3, %r4}}, %rd3, %rd3, 0, 1, 1, 0, 0;"""
    launch(body.format(descriptor(1024, 128, 256, "none")), threads=128, shared=2048)
    with pytest.raises(Fault, match="out of bounds"):
        launch(body.format(descriptor(1040, 128, 256, "none")), threads=128, shared=2048)
