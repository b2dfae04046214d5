"""Global and shared memory: loads, stores and atomics, with bounds, alignment and races checked.

The manual's "Data Movement and Conversion Instructions: ld, st", "Parallel Synchronization and
Communication Instructions: atom" and "Memory Consistency Model". Between two barriers, hardware may
run warps in any order: where one warp writes what another one reads or writes in the same interval,
the result depends on luck. CTAs of a launch are never ordered.
"""

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.faults import Fault, UnknownInstruction
from ptx.parse import Address, Immediate, Instruction, Register, Symbol
from ptx.values import (
    RAW,
    SHARED_BASE,
    U64,
    WARP,
    Array,
    Mask,
    Read,
    Step,
    items,
    read,
    special,
    type_of,
    write,
)

if TYPE_CHECKING:
    from ptx.machine import CTA

_ORIGIN = 4096
MANY, ASYNC = 255, 254
"""In a stamp, in the place of a warp: several warps; the tensor cores for a warpgroup."""


class Shadow:
    """The stamps of who read and wrote each granule of a memory last.

    A stamp is interval * 256 + warp. Intervals count the barriers of a launch from 1, CTA after
    CTA; 0 is a granule that nobody touched.
    """

    def __init__(self, n: int) -> None:
        # Zeros take no memory until they are written.
        self.writer, self.reader = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.read_by_ctas = np.zeros(n, bool)

    def read(self, granules: Array, stamps: Array, first: int) -> str:
        """Record a read; return the conflict, or "". first: the first stamp of this CTA."""
        found = _conflict(self.writer[granules], stamps, first, "read after a write")
        old = self.reader[granules]
        if first and ((old > 0) & (old < first)).any():
            self.read_by_ctas[granules[(old > 0) & (old < first)]] = True
        new = np.where((old >> 8 == stamps >> 8) & (old != stamps), stamps | MANY, stamps)
        self.reader[granules] = new
        lost = self.reader[granules] != new  # read by several warps of this one instruction
        if lost.any():
            self.reader[granules[lost]] |= MANY
        return found

    def write(self, granules: Array, stamps: Array, first: int, changed: Array) -> str:
        """Record a write; return the conflict, or "".

        changed: where the write changes a value. Two warps that write the same value agree.
        """
        found = _conflict(self.reader[granules], stamps, first, "write after a read")
        if not found and self.read_by_ctas[granules].any():
            found = "write after a read by another CTA"
        writers = self.writer[granules]
        found = found or _conflict(writers[changed], stamps[changed], first, "write after a write")
        self.writer[granules] = stamps
        return found


def _conflict(last: Array, stamps: Array, first: int, what: str) -> str:
    if ((last > 0) & (last < first)).any():
        return f"{what} by another CTA"
    if ((last >> 8 == stamps >> 8) & (last != stamps)).any():
        return f"{what} by another warp, no barrier between"
    return ""


class Space:
    """A memory: its bytes as integers of each width, and its shadow."""

    name: str
    origin: int
    granule: int
    views: dict[int, Array]
    shadow: Shadow

    def check(self, cta: "CTA", addresses: Array, size: int) -> None:
        """Raise Fault for an access that is out of bounds or not aligned to its size."""
        if (addresses & (size - 1)).any():
            bad = addresses[(addresses & (size - 1)) != 0][0]
            raise Fault(f"misaligned {self.name} access of {size} bytes at {bad:#x} by {cta.where}")
        self.check_bounds(cta, addresses, size)

    def check_bounds(self, cta: "CTA", addresses: Array, size: int) -> None:
        raise NotImplementedError

    def granules(self, addresses: Array, size: int) -> Array:
        """Return the places in the shadow of accesses, one row for each granule of an access."""
        n = -(-size // self.granule)
        return self.first_granule(addresses) + np.arange(n)[:, None]

    def first_granule(self, addresses: Array) -> Array:
        return (addresses - self.origin) // self.granule

    def first_stamp(self, cta: "CTA") -> int:
        """Return the stamp below which another CTA wrote it; shared memory has no other CTA."""
        return 0

    def get(self, addresses: Array, size: int, n: int = 1) -> Array:
        """Return n integers of `size` bytes at each address: (n, addresses)."""
        places = (addresses - self.origin) // size
        return self.views[size][places + np.arange(n)[:, None]]

    def put(self, addresses: Array, size: int, values: Array) -> None:
        """Write what `get` returned."""
        places = (addresses - self.origin) // size
        self.views[size][places + np.arange(len(values))[:, None]] = values


class SharedMemory(Space):
    """The shared memory of one CTA; it begins as poison, all ones."""

    name = "shared"
    origin = 0

    def __init__(self, size: int, granule: int) -> None:
        self.size, self.granule = size, granule
        data = np.full(SHARED_BASE + -(-size // 16) * 16, 0xFF, np.uint8)
        self.views = {n: data.view(f"u{n}") for n in (1, 2, 4, 8)}
        n = len(data) // granule
        self.shadow = Shadow(n)
        # Copies on their way here, and operands that tensor cores still read.
        self.arriving, self.in_use = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.n_arriving = self.n_in_use = 0

    def check_bounds(self, cta: "CTA", addresses: Array, size: int) -> None:
        low, high = int(addresses.min()), int(addresses.max()) + size
        if low < SHARED_BASE or high > SHARED_BASE + self.size:
            raise Fault(
                f"shared access out of bounds: bytes {low - SHARED_BASE} to {high - SHARED_BASE} "
                f"of {self.size} by {cta.where}"
            )


class GlobalMemory(Space):
    """The tensors that a launch may touch, in the memory of this process.

    tensors: (address, bytes, name); they may overlap.
    """

    name = "global"
    origin = _ORIGIN

    def __init__(self, tensors: list[tuple[int, int, str]], granule: int) -> None:
        self.granule = granule
        everything = (ctypes.c_uint8 * ((1 << 47) - _ORIGIN)).from_address(_ORIGIN)
        data = np.ctypeslib.as_array(everything)
        self.views = {n: data.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.tensors = _merged(tensors)
        starts, sizes = ([t[i] for t in self.tensors] for i in (0, 1))
        self.starts, self.ends = np.array(starts, np.int64), np.add(starts, sizes).astype(np.int64)
        n = [size // granule + 2 for size in sizes]
        # A granule's place in the shadow is (address - origin) // granule + shift[tensor].
        offsets = np.cumsum([0, *n])
        self.shift = offsets[:-1] - (self.starts - _ORIGIN) // granule if n else offsets
        self.shadow = Shadow(int(offsets[-1]))

    def check_bounds(self, cta: "CTA", addresses: Array, size: int) -> None:
        tensor = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = (tensor < 0) | (addresses + size > self.ends[tensor])
        if outside.any():
            bad, near = int(addresses[outside][0]), self.tensors[int(tensor[outside][0])]
            raise Fault(
                f"global access out of bounds: {size} bytes at {bad - near[0]} of the {near[1]} "
                f"of {near[2]} by {cta.where}"
            )

    def first_granule(self, addresses: Array) -> Array:
        tensor = np.searchsorted(self.starts, addresses, side="right") - 1
        return (addresses - self.origin) // self.granule + self.shift[tensor]

    def first_stamp(self, cta: "CTA") -> int:
        return cta.first_interval << 8


def _merged(tensors: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Return the tensors by address, those that overlap as one."""
    out: list[tuple[int, int, str]] = []
    for start, size, name in sorted(tensors):
        if out and start < out[-1][0] + out[-1][1]:
            first, length, other = out[-1]
            out[-1] = (first, max(length, start + size - first), other)
        elif size:
            out.append((start, size, name))
    return out


def touch(
    cta: "CTA", space: Space, addresses: Array, size: int, warps: Array, changed: Array | None
) -> None:
    """Record an access in the shadow and report its conflicts.

    changed: None for a read; for a write, where it changes a value.
    """
    granules = space.granules(addresses, size)
    stamps = np.broadcast_to((cta.interval << 8) + warps, granules.shape).ravel()
    if changed is None:
        found = space.shadow.read(granules.ravel(), stamps, space.first_stamp(cta))
    else:
        changed = np.broadcast_to(changed, granules.shape).ravel()
        found = space.shadow.write(granules.ravel(), stamps, space.first_stamp(cta), changed)
    if found:
        cta.report("race", f"{space.name} {found}")
    if isinstance(space, SharedMemory):
        flat = granules.ravel()
        if space.n_arriving and space.arriving[flat if changed is None else flat[changed]].any():
            cta.report("early", "shared memory is used before the wait for its cp.async")
        if changed is not None and space.n_in_use and space.in_use[flat].any():
            cta.report("race", "an operand of wgmma is overwritten before its wait")


def address_of(operand: Any) -> Read:
    """Return the reader of an address: int64, of all threads or of 1."""
    assert isinstance(operand, Address), operand
    offset = operand.offset
    if operand.base is None:
        constant = np.array([offset], np.int64)
        return lambda cta: constant
    if isinstance(operand.base, Symbol):
        base = special(operand.base.name)
    else:
        assert isinstance(operand.base, Register)
        base = read(operand.base, RAW[operand.base.bits])
    return lambda cta: base(cta).astype(np.int64) + offset


def threads_of(cta: "CTA", mask: Mask) -> Array:
    """Return the numbers of the threads that execute an instruction."""
    return cta.thread_numbers if mask is None else np.flatnonzero(mask)


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
    where = address_of(instruction.operands[1])

    def step(cta: "CTA", mask: Mask) -> None:
        threads = threads_of(cta, mask)
        if not len(threads):
            return
        space: Space = cta.global_memory if is_global else cta.shared
        addresses = np.broadcast_to(where(cta), (cta.n_threads,))[threads]
        space.check(cta, addresses, size * n)
        touch(cta, space, addresses, size * n, threads // WARP, None)
        if is_global:
            cta.launch.counts.bytes_loaded += len(threads) * size * n
        values = space.get(addresses, size, n)
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
    where = address_of(instruction.operands[0])

    def step(cta: "CTA", mask: Mask) -> None:
        threads = threads_of(cta, mask)
        if not len(threads):
            return
        space: Space = cta.global_memory if is_global else cta.shared
        addresses = np.broadcast_to(where(cta), (cta.n_threads,))[threads]
        space.check(cta, addresses, size * n)
        shape = (cta.n_threads,)
        values = np.stack([np.broadcast_to(part(cta), shape)[threads] for part in reads])
        changed = (space.get(addresses, size, n) != values).any(0)
        touch(cta, space, addresses, size * n, threads // WARP, changed)
        if is_global:
            cta.launch.counts.bytes_stored += len(threads) * size * n
        space.put(addresses, size, values)
        if (space.get(addresses, size, n) != values).any():
            cta.report("race", f"threads write different values to one {space.name} address")

    return step


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
    """atom.add: read, add and write, thread after thread; conflicts with nothing but itself."""
    parts = instruction.parts
    if "add" not in parts or parts[-1] not in ("u32", "s32", "u64") or "global" not in parts:
        raise UnknownInstruction(instruction.text)
    size = type_of(parts[-1]).itemsize
    put, where = write(instruction.operands[0]), address_of(instruction.operands[1])
    source = read(instruction.operands[2], RAW[8 * size])

    def step(cta: "CTA", mask: Mask) -> None:
        threads = threads_of(cta, mask)
        if not len(threads):
            return
        space, shape = cta.global_memory, (cta.n_threads,)
        addresses = np.broadcast_to(where(cta), shape)[threads]
        space.check(cta, addresses, size)
        added = np.broadcast_to(source(cta), shape)[threads]
        old = np.zeros(cta.n_threads, RAW[8 * size])
        places = (addresses - space.origin) // size
        memory = space.views[size]
        for thread, place, value in zip(threads, places, added, strict=True):
            old[thread] = memory[place]
            memory[place] += value
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
