"""Products of matrices: mma, ldmatrix, stmatrix.

The manual's "Warp Level Matrix Multiply-Accumulate Instructions". In a fragment, lane l is in group
g = l / 4 and has place q = l % 4 there. Sums are exact here (float64) and rounded once; hardware
keeps fewer bits, in an order that is not documented.
"""

import re
from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import UnknownInstruction
from ptx.memory import address_of, touch
from ptx.parse import Instruction
from ptx.values import (
    F32,
    F64,
    U16,
    U32,
    WARP,
    Array,
    Mask,
    Step,
    halves,
    items,
    joined,
    read,
    write,
)
from ptx.warp import LANES, warps_of

if TYPE_CHECKING:
    from ptx.machine import CTA

GROUP, PLACE = LANES // 4, LANES % 4


def in_warps(cta: "CTA", values: Array, warps: Array) -> Array:
    """Return a register's values by warp: (warps, 32)."""
    return np.broadcast_to(values, (cta.n_threads,)).reshape(-1, WARP)[warps]


def spread(cta: "CTA", values: Array, warps: Array) -> Array:
    """Return values by warp, (warps, 32), as a register of all threads."""
    if len(warps) * WARP == cta.n_threads:
        return np.ascontiguousarray(values).reshape(-1)
    out = np.zeros((cta.n_threads // WARP, WARP), values.dtype)
    out[warps] = values
    return out.reshape(-1)


def a_fragment(registers: list[Array], dtype: str) -> Array:
    """Return the (warps, 16, 16) matrix A of four registers by warp, as float32.

    Register i has row g + 8 (i % 2) and columns 2 q + 8 (i / 2) and the next.
    """
    out = np.empty((len(registers[0]), 16, 16), F32)
    for i, register in enumerate(registers):
        row, column = GROUP + 8 * (i % 2), 2 * PLACE + 8 * (i // 2)
        out[:, row, column], out[:, row, column + 1] = halves(register, dtype)
    return out


def b_fragment(registers: list[Array], dtype: str) -> Array:
    """Return the (warps, 16, 8) matrix B: register i has rows 2 q + 8 i and the next, column g."""
    out = np.empty((len(registers[0]), 16, 8), F32)
    for i, register in enumerate(registers):
        row = 2 * PLACE + 8 * i
        out[:, row, GROUP], out[:, row + 1, GROUP] = halves(register, dtype)
    return out


def accumulator_place(i: int) -> tuple[Array, Array]:
    """Return row and column of register i of a 16 x n accumulator, by lane."""
    return GROUP + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * PLACE + i % 2


def a_fragment_f64(registers: list[Array]) -> Array:
    """Return the (warps, 16, 16) A of eight float64: row g + 8 (i % 2), column q + 4 (i / 2)."""
    out = np.empty((len(registers[0]), 16, 16), F64)
    for i, register in enumerate(registers):
        out[:, GROUP + 8 * (i % 2), PLACE + 4 * (i // 2)] = register
    return out


def b_fragment_f64(registers: list[Array]) -> Array:
    """Return the (warps, 16, 8) B of four float64: row q + 4 i, column g."""
    out = np.empty((len(registers[0]), 16, 8), F64)
    for i, register in enumerate(registers):
        out[:, PLACE + 4 * i, GROUP] = register
    return out


def mma(instruction: Instruction) -> Step:
    """mma.sync.aligned.m16n8k16.row.col: D = A B + C of a warp.

    A and B are bf16 or f16, C and D float32; or all are float64.
    """
    match = re.fullmatch(
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\."
        r"(?:f32\.(bf16|f16)\.\1\.f32|f64\.f64\.f64\.f64)",
        instruction.opcode,
    )
    if match is None:
        raise UnknownInstruction(instruction.text)
    dtype = match[1]
    given, result = (U32, F32) if dtype else (F64, F64)
    puts = [write(item) for item in items(instruction.operands[0])]
    a, b = ([read(x, given) for x in items(operand)] for operand in instruction.operands[1:3])
    c = [read(item, result) for item in items(instruction.operands[3])]

    def step(cta: "CTA", mask: Mask) -> None:
        warps = warps_of(cta, mask)
        left, right = ([in_warps(cta, x(cta), warps) for x in side] for side in (a, b))
        if dtype:
            product = a_fragment(left, dtype).astype(F64) @ b_fragment(right, dtype)
        else:
            product = a_fragment_f64(left) @ b_fragment_f64(right)
        addends = [in_warps(cta, addend(cta), warps) for addend in c]
        for i, (put, addend) in enumerate(zip(puts, addends, strict=True)):
            row, column = accumulator_place(i)
            total = product[:, row, column] + addend
            put(cta, spread(cta, total.astype(result), warps), mask)

    return step


def _shape(instruction: Instruction) -> tuple[int, bool]:
    """Return how many 8 x 8 matrices are loaded or stored, and if they are transposed."""
    match = re.fullmatch(
        r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16",
        instruction.opcode,
    )
    if match is None:
        raise UnknownInstruction(instruction.text)
    return int(match[1]), match[2] is not None


def _rows(cta: "CTA", addresses: Array, warps: Array, i: int) -> tuple[Array, Array]:
    """Return the addresses of the rows of matrix i, (warps * 8), and the warp of each."""
    rows = np.ascontiguousarray(in_warps(cta, addresses, warps)[:, 8 * i : 8 * i + 8]).reshape(-1)
    cta.shared.check(cta, rows, 16)
    return rows, np.repeat(warps, 8)


def load_matrix(instruction: Instruction) -> Step:
    """ldmatrix: lane 8 i + j has the address of row j of matrix i.

    A lane gets from each matrix row g, columns 2 q and 2 q + 1; .trans: of the transposed matrix.
    """
    n, transposed = _shape(instruction)
    puts = [write(item) for item in items(instruction.operands[0])]
    where = address_of(instruction.operands[1])

    def step(cta: "CTA", mask: Mask) -> None:
        warps, addresses = warps_of(cta, mask), where(cta)
        for i in range(n):
            rows, owners = _rows(cta, addresses, warps, i)
            touch(cta, cta.shared, rows, 16, owners, None)
            matrix = cta.shared.get(rows, 2, 8).T.reshape(-1, 8, 8)
            if transposed:
                matrix = matrix.transpose(0, 2, 1)
            values = joined(*(matrix[:, GROUP, 2 * PLACE + half] for half in (0, 1)))
            puts[i](cta, spread(cta, values, warps), mask)

    return step


def store_matrix(instruction: Instruction) -> Step:
    """stmatrix: the reverse of ldmatrix."""
    n, transposed = _shape(instruction)
    reads = [read(item, U32) for item in items(instruction.operands[1])]
    where = address_of(instruction.operands[0])

    def step(cta: "CTA", mask: Mask) -> None:
        warps, addresses = warps_of(cta, mask), where(cta)
        for i in range(n):
            rows, owners = _rows(cta, addresses, warps, i)
            values = in_warps(cta, reads[i](cta), warps)
            matrix = np.empty((len(warps), 8, 8), U16)
            matrix[:, GROUP, 2 * PLACE] = values.astype(U16)
            matrix[:, GROUP, 2 * PLACE + 1] = (values >> 16).astype(U16)
            if transposed:
                matrix = matrix.transpose(0, 2, 1)
            columns = matrix.reshape(-1, 8).T
            changed = (cta.shared.get(rows, 2, 8) != columns).any(0)
            touch(cta, cta.shared, rows, 16, owners, changed)
            cta.shared.put(rows, 2, columns)

    return step
