"""wgmma: products by four warps together, of operands in shared memory, beside the program.

The manual's "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions". Between a
wgmma.mma_async and the wait for its group, nobody may write its operands in shared memory.
"""

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.faults import Fault, UnknownInstruction
from ptx.memory import touch
from ptx.parse import Immediate, Instruction, Operand, Register, Vector
from ptx.shadow import ASYNC
from ptx.tensor_cores import a_fragment, accumulator_place, in_warps
from ptx.values import (
    BOOL,
    F16,
    F32,
    F64,
    U32,
    U64,
    WARP,
    Array,
    Mask,
    Step,
    from_bf16,
    items,
    poison,
    read,
    write,
)
from ptx.warp import converged

if TYPE_CHECKING:
    from ptx.machine import CTA

WARPGROUP = 4 * WARP
# The bytes of a row before the pattern repeats, and the bits of the address that the swizzle flips
# by bits 7 to 9: by the number of the mode in a descriptor.
_SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}


@lru_cache(4096)
def element_addresses(descriptor: int, rows: int, transposed: bool) -> Array:
    """Return the addresses of a (rows, 16) operand of 16-bit numbers ("Matrix Descriptor Format").

    rows: M of A, N of B; the 16 columns are K. transposed: M or N is contiguous in memory instead
    of K. The two offsets lead from one core matrix (8 rows of the swizzle's bytes) to the next
    along the contiguous dimension (leading) and along the other one (stride).
    """
    start, leading, stride = ((descriptor >> place & 0x3FFF) << 4 for place in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise UnknownInstruction("a wgmma descriptor with a base offset")
    width, flipped = _SWIZZLES[descriptor >> 62 & 3]
    row, k = np.arange(rows)[:, None], np.arange(16)
    if not transposed and flipped:
        place = row % 8 * width + row // 8 * stride + k * 2
    elif not transposed:
        place = row % 8 * 16 + row // 8 * stride + k % 8 * 2 + k // 8 * leading
    elif flipped:
        across = width // 2
        place = row % across * 2 + row // across * leading + k % 8 * width + k // 8 * stride
    else:
        place = row % 8 * 2 + row // 8 * stride + k % 8 * 16 + k // 8 * leading
    address = start + place
    return address ^ ((address >> 7 & flipped) << 4)


@lru_cache(4096)
def _granules(descriptor: int, rows: int, transposed: bool, granule: int) -> Array:
    return np.unique(element_addresses(descriptor, rows, transposed) // granule)


class Groups:
    """The operands that the tensor cores may still read, as granules of shared memory.

    For each warpgroup: its committed groups, the oldest first, and last the open one.
    """

    def __init__(self, n_warpgroups: int) -> None:
        self.of: list[list[list[Array]]] = [[[]] for _ in range(n_warpgroups)]


def warpgroups_of(cta: "CTA", mask: Mask) -> list[int]:
    """Return the warpgroups that execute an instruction; report those that do only in part."""
    converged(cta, mask)
    n = cta.n_threads // WARPGROUP
    if mask is None:
        return [*range(n)]
    groups = mask.reshape(-1, WARPGROUP)
    if (groups.any(1) != groups.all(1)).any():
        cta.report("divergence", "a part of a warpgroup executes a wgmma instruction")
    return [int(group) for group in np.flatnonzero(groups.all(1))]


class Product:
    """A decoded wgmma.mma_async.sync.aligned.m64nNk16.f32: D = A B, or D = A B + D."""

    def __init__(self, instruction: Instruction) -> None:
        match = re.fullmatch(
            r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2",
            instruction.opcode,
        )
        if match is None:
            raise UnknownInstruction(instruction.text)
        self.n, self.dtype = int(match[1]), match[2]
        d, a, b, accumulate, *flags = instruction.operands
        numbers = [flag.bits for flag in flags if isinstance(flag, Immediate)]
        in_registers = isinstance(a, Vector)
        # scale-A and scale-B are 1 (or -1); then which operands in shared memory are transposed.
        transposed = [bool(flag) for flag in numbers[2:]]
        if numbers[:2] != [1, 1] or len(transposed) != (1 if in_registers else 2):
            raise UnknownInstruction(instruction.text)
        self.puts = [write(item) for item in items(d)]
        self.old = [_accumulator(item) for item in items(d)]
        self.a = [read(item, U32) for item in items(a)] if in_registers else [read(a, U64)]
        self.a_transposed = None if in_registers else transposed[0]
        self.b, self.b_transposed = read(b, U64), transposed[-1]
        self.accumulate = read(accumulate, BOOL)
        rows, columns = zip(*(accumulator_place(i) for i in range(len(self.puts))), strict=True)
        # The place of register i of each thread of a warpgroup: warp w has rows 16 w and on.
        warp = 16 * np.repeat(np.arange(4), WARP)
        self.rows = np.tile(np.stack(rows), 4) + warp
        self.columns = np.tile(np.stack(columns), 4)

    def operand(self, cta: "CTA", value: Array, group: int, rows: int, transposed: bool) -> Array:
        """Return an operand in shared memory as (rows, 16), and note that it is being read."""
        threads = slice(group * WARPGROUP, (group + 1) * WARPGROUP)
        descriptors = np.broadcast_to(value, (cta.n_threads,))[threads]
        descriptor = int(descriptors[0])
        if (descriptors != descriptors[0]).any():
            raise Fault(f"a descriptor differs within a warpgroup: {cta.where}")
        addresses = element_addresses(descriptor, rows, transposed)
        cta.shared.check_bounds(cta, addresses, 2)
        granules = _granules(descriptor, rows, transposed, cta.shared.granule)
        touch(
            cta,
            cta.shared,
            granules * cta.shared.granule,
            cta.shared.granule,
            np.full(len(granules), ASYNC),
            None,
        )
        cta.shared.in_use[granules] += 1
        cta.shared.n_in_use += 1
        cta.groups.of[group][-1].append(granules)
        bits = cta.shared.views[2][addresses // 2]
        return from_bf16(bits) if self.dtype == "bf16" else bits.view(F16).astype(F32)

    def left(self, cta: "CTA", group: int) -> Array:
        """Return A, (64, 16)."""
        if self.a_transposed is not None:
            return self.operand(cta, self.a[0](cta), group, 64, self.a_transposed)
        warps = np.arange(4 * group, 4 * group + 4)
        return a_fragment([in_warps(cta, x(cta), warps) for x in self.a], self.dtype).reshape(
            64, 16
        )

    def __call__(self, cta: "CTA", mask: Mask) -> None:
        out = np.zeros((len(self.puts), cta.n_threads), F32)
        shape = (cta.n_threads,)
        accumulate = np.broadcast_to(self.accumulate(cta), shape)
        for group in warpgroups_of(cta, mask):
            threads = slice(group * WARPGROUP, (group + 1) * WARPGROUP)
            right = self.operand(cta, self.b(cta), group, self.n, self.b_transposed)
            product = self.left(cta, group).astype(F64) @ right.astype(F64).T
            total = product[self.rows, self.columns]
            if accumulate[threads].any():
                old = [np.broadcast_to(x(cta), shape)[threads] for x in self.old]
                total = total + np.where(accumulate[threads], np.stack(old), F32.type(0))
            out[:, threads] = total
        for put, values in zip(self.puts, out, strict=True):
            put(cta, values, mask)


def _accumulator(operand: Operand) -> Any:
    """Return the reader of an accumulator, which may be one that was never written."""
    assert isinstance(operand, Register), operand
    index = operand.index

    def value(cta: "CTA") -> Array:
        old = cta.registers[index]
        return (poison(np.dtype(U32)) if old is None else old).view(F32)

    return value


def commit(instruction: Instruction) -> Step:
    """wgmma.commit_group: the products of a warpgroup since its last commit are a group."""

    def step(cta: "CTA", mask: Mask) -> None:
        for group in warpgroups_of(cta, mask):
            cta.groups.of[group].append([])

    return step


def wait(instruction: Instruction) -> Step:
    """wgmma.wait_group n: all but the last n groups of a warpgroup are done."""
    (n,) = instruction.operands
    assert isinstance(n, Immediate), instruction.text

    def step(cta: "CTA", mask: Mask) -> None:
        for group in warpgroups_of(cta, mask):
            groups = cta.groups.of[group]
            while len(groups) - 1 > n.bits:
                for granules in groups.pop(0):
                    cta.shared.in_use[granules] -= 1
                    cta.shared.n_in_use -= 1

    return step
