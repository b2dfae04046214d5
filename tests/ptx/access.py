"""The instructions that access memory: ld, st, atom.

The manual's "Data Movement and Conversion Instructions: ld, st" and "Parallel Synchronization and
Communication Instructions: atom".
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import UnknownInstruction
from ptx.memory import Space, address_of, fetched, threads_of, touch, touch_atomically
from ptx.parse import Address, Immediate, Instruction, Symbol
from ptx.values import (
    F32,
    F64,
    RAW,
    U32,
    U64,
    WARP,
    Array,
    Mask,
    Read,
    Step,
    items,
    read,
    type_of,
    write,
)

if TYPE_CHECKING:
    from ptx.machine import CTA


ROUNDINGS = 2.0**-21
"""Four times the distance of float32 neighbours, relative to them: a few roundings."""


@dataclass(frozen=True)
class Place:
    """What an instruction addresses: bytes of each thread in one of the memories."""

    is_global: bool
    address: Read
    size: int

    def accessed(self, cta: "CTA", mask: Mask) -> tuple[Space, Array, Array]:
        """Return the memory, the threads that access it, and their addresses, which are checked."""
        threads = threads_of(cta, mask)
        space: Space = cta.global_memory if self.is_global else cta.shared
        addresses = np.broadcast_to(self.address(cta), (cta.n_threads,))[threads]
        if len(threads):
            space.check(cta, addresses, self.size)
        return space, threads, addresses


def _shape(parts: list[str]) -> tuple[bool, int]:
    """Return whether an ld or st is of global memory, and the length of its vector."""
    spaces = {"global": True, "shared": False, "shared::cta": False}
    known = {"v2", "v4", "v8", *spaces, "relaxed", "weak", "volatile", "L1::no_allocate"}
    known |= {"nc", "L1::evict_last", "L1::evict_first", "L1::evict_normal"}
    chosen = [spaces[part] for part in parts if part in spaces]
    if len(chosen) != 1 or not {*parts} <= known:
        raise UnknownInstruction("ld or st with ." + ".".join(parts))
    lengths = [int(part[1:]) for part in parts if part in ("v2", "v4", "v8")]
    return chosen[0], lengths[0] if lengths else 1


def load(instruction: Instruction) -> Step:
    """ld: a value or a vector; one of less bits than its register is extended by its type."""
    _, *modifiers, name = instruction.parts
    if "param" in modifiers:
        return _load_param(instruction)
    is_global, n = _shape(modifiers)
    dtype = type_of(name)
    size = dtype.itemsize
    puts = [write(item) for item in items(instruction.operands[0])]
    if len(puts) != n:
        raise UnknownInstruction(instruction.text)
    place = Place(is_global, address_of(instruction.operands[1]), size * n)

    def step(cta: "CTA", mask: Mask) -> None:
        space, threads, addresses = place.accessed(cta, mask)
        if not len(threads):
            return
        values = fetched(cta, space, addresses, size, n, threads // WARP)
        if mask is not None:
            spread = np.zeros((n, cta.n_threads), values.dtype)
            spread[:, threads] = values
            values = spread
        for put, value in zip(puts, values, strict=True):
            put(cta, value.view(dtype), mask)

    return step


def store(instruction: Instruction) -> Step:
    """st: a value or a vector, the lower bits of its registers."""
    _, *modifiers, name = instruction.parts
    if "param" in modifiers:
        return _store_param(instruction)
    is_global, n = _shape(modifiers)
    size = type_of(name).itemsize
    reads = [read(item, RAW[8 * size]) for item in items(instruction.operands[1])]
    if len(reads) != n:
        raise UnknownInstruction(instruction.text)
    place = Place(is_global, address_of(instruction.operands[0]), size * n)

    def step(cta: "CTA", mask: Mask) -> None:
        space, threads, addresses = place.accessed(cta, mask)
        if not len(threads):
            return
        shape = (cta.n_threads,)
        values = np.stack([np.broadcast_to(part(cta), shape)[threads] for part in reads])
        changed = (space.get(addresses, size, n) != values).any(0)
        touch(cta, space, addresses, size * n, threads // WARP, changed)
        if is_global:
            cta.launch.counts.bytes_stored += len(threads) * size * n
        space.put(addresses, size, values)
        if differing := difference(space.get(addresses, size, n), values):
            cta.report("race", f"threads write {differing} to one {space.name} address")
            if cta.interval % 2:  # which thread wins is arbitrary: the last one, or the first one
                space.put(addresses[::-1], size, values[:, ::-1])

    return step


def difference(stored: Array, given: Array) -> str:
    """Return how the values that threads gave differ from what one of them stored, or ""."""
    if (stored == given).all():
        return ""
    if stored.dtype == U32:
        a, b = (x.view(F32).astype(F64) for x in (stored, given))
        if (np.abs(a - b) <= ROUNDINGS * np.abs(a).max()).all():
            return "values that differ by roundings"
    return "different values"


def _load_param(instruction: Instruction) -> Step:
    """ld.param: an argument of the kernel or of the function that runs."""
    dtype = type_of(instruction.parts[-1])
    unsigned = RAW[8 * dtype.itemsize]
    put, operand = write(instruction.operands[0]), instruction.operands[1]
    if not isinstance(operand, Address) or not isinstance(operand.base, Symbol) or operand.offset:
        raise UnknownInstruction(instruction.text)
    name = operand.base.name
    return lambda cta, mask: put(cta, cta.params[name].astype(unsigned).view(dtype), mask)


def _store_param(instruction: Instruction) -> Step:
    """st.param: an argument of the call that follows."""
    source = read(instruction.operands[1], type_of(instruction.parts[-1]))
    operand = instruction.operands[0]
    if not isinstance(operand, Address) or not isinstance(operand.base, Symbol) or operand.offset:
        raise UnknownInstruction(instruction.text)
    name = operand.base.name

    def step(cta: "CTA", mask: Mask) -> None:
        cta.set_param(name, source(cta).astype(U64), mask)

    return step


def atomic(instruction: Instruction) -> Step:
    """atom.add: read, add and write, thread after thread, for all CTAs of the GPU."""
    parts = instruction.parts
    known = {"atom", "global", "relaxed", "gpu", "add", "u32", "s32", "u64"}
    if not {"global", "add"} <= {*parts} <= known:
        raise UnknownInstruction(instruction.text)
    size = type_of(parts[-1]).itemsize
    put = write(instruction.operands[0])
    place = Place(True, address_of(instruction.operands[1]), size)
    source = read(instruction.operands[2], RAW[8 * size])

    def step(cta: "CTA", mask: Mask) -> None:
        space, threads, addresses = place.accessed(cta, mask)
        if not len(threads):
            return
        touch_atomically(cta, space, addresses, size, threads // WARP)
        added = np.broadcast_to(source(cta), (cta.n_threads,))[threads]
        old = np.zeros(cta.n_threads, RAW[8 * size])
        places = (addresses - space.origin) // size
        memory = space.views[size]
        for thread, at, value in zip(threads, places, added, strict=True):
            old[thread] = memory[at]
            memory[at] += value
        put(cta, old, mask)

    return step


def granule_of(instructions: list[Instruction]) -> tuple[int, int]:
    """Return the fewest bytes that an access of global and of shared memory has, at most 16."""
    smallest = {True: 16, False: 16}
    for instruction in instructions:
        parts = instruction.parts
        if parts[0] in ("ld", "st") and "param" not in parts:
            is_global, n = _shape(parts[1:-1])
            size = n * type_of(parts[-1]).itemsize
        elif parts[0] == "atom":
            is_global, size = True, type_of(parts[-1]).itemsize
        elif instruction.opcode.startswith("cp.async.") and len(instruction.operands) > 2:
            assert isinstance(instruction.operands[2], Immediate), instruction.text
            is_global, size = True, instruction.operands[2].bits
            smallest[False] = min(smallest[False], size)
        else:
            continue
        smallest[is_global] = min(smallest[is_global], size)
    return smallest[True], smallest[False]
