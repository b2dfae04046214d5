"""Global and shared memory: its bytes, with bounds, alignment and conflicts of accesses checked.

The manual's "State Spaces" and "Memory Consistency Model"; shadow.py has the rules of conflicts.
"""

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.faults import Fault
from ptx.parse import Address, Register, Symbol
from ptx.shadow import MANY, Race, Shadow
from ptx.values import RAW, SHARED_BASE, U64, Array, Mask, Read, read, special

if TYPE_CHECKING:
    from ptx.machine import CTA

_ORIGIN = 4096


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

    def misread(self, cta: "CTA", values: Array, addresses: Array, warps: Array) -> Array:
        """Return the values (n, threads) that threads read, or others, to see if they matter."""
        return values

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
        self.distrusted: dict[int, tuple[Array, Array]] = {}

    def saved(self) -> list[Array]:
        """Return the bytes of all tensors."""
        return [self._bytes_of(i).copy() for i in range(len(self.tensors))]

    def restore(self, saved: list[Array]) -> None:
        """Write what `saved` returned."""
        for i, data in enumerate(saved):
            self._bytes_of(i)[:] = data

    def _bytes_of(self, tensor: int) -> Array:
        start, size, _ = self.tensors[tensor]
        return self.views[1][start - self.origin : start - self.origin + size]

    def distrust(self, races: list[Race]) -> None:
        """Let `misread` falsify what warps read where another one writes in the same interval."""
        for interval in {race.interval for race in races}:
            mine = [race for race in races if race.interval == interval]
            granules, writers = (np.concatenate(x) for x in list(zip(*mine, strict=True))[1:])
            unique, places = np.unique(granules, return_inverse=True)
            least, most = (np.full(len(unique), x) for x in (MANY, -1))
            np.minimum.at(least, places, writers)
            np.maximum.at(most, places, writers)
            self.distrusted[interval] = unique, np.where(least == most, least, MANY)

    def misread(self, cta: "CTA", values: Array, addresses: Array, warps: Array) -> Array:
        """Return values (n, threads) that were read, falsified where they are distrusted."""
        if cta.interval not in self.distrusted:
            return values
        size = values.dtype.itemsize
        granules, writers = self.distrusted[cta.interval]
        mine = self.granules(addresses, size * len(values))  # (granules, threads)
        place = np.minimum(np.searchsorted(granules, mine), len(granules) - 1)
        wrong = (granules[place] == mine) & (writers[place] != warps)
        # By bytes, then by values: a granule may have several values, and the reverse.
        wrong = np.repeat(wrong, self.granule, 0)[: size * len(values)]
        wrong = wrong.reshape(len(values), size, -1).any(1)
        mixed = (addresses + 1).astype(U64) * U64.type(0x9E3779B97F4A7C15)
        noise = (mixed >> U64.type(64 - 8 * size)).astype(values.dtype) | values.dtype.type(1)
        return np.where(wrong, values ^ noise, values)

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
    granules, stamps = _stamped(cta, space, addresses, size, warps)
    if changed is None:
        found = space.shadow.read(granules, stamps, space.first_stamp(cta))
    else:
        changed = np.broadcast_to(
            changed, (len(granules) // len(addresses), len(addresses))
        ).ravel()
        found = space.shadow.write(granules, stamps, space.first_stamp(cta), changed)
    if found:
        cta.report("race", f"{space.name} {found}")
    if isinstance(space, SharedMemory):
        used = granules if changed is None else granules[changed]
        if space.n_arriving and space.arriving[used].any():
            cta.report("early", "shared memory is used before the wait for its cp.async")
        if changed is not None and space.n_in_use and space.in_use[granules].any():
            cta.report("race", "an operand of wgmma is overwritten before its wait")


def fetched(cta: "CTA", space: Space, addresses: Array, size: int, n: int, warps: Array) -> Array:
    """Return what threads read: (n, threads) integers of `size` bytes."""
    touch(cta, space, addresses, size * n, warps, None)
    if space is cta.global_memory:
        cta.launch.counts.bytes_loaded += len(addresses) * size * n
    return space.misread(cta, space.get(addresses, size, n), addresses, warps)


def touch_atomically(cta: "CTA", space: Space, addresses: Array, size: int, warps: Array) -> None:
    """Record atomic operations in the shadow and report their conflicts."""
    granules, stamps = _stamped(cta, space, addresses, size, warps)
    places = np.broadcast_to(
        addresses * 16 + size, (len(granules) // len(addresses), len(addresses))
    )
    found = space.shadow.atomic(granules, stamps, space.first_stamp(cta), places.ravel())
    if found:
        cta.report("race", f"{space.name} {found}")


def _stamped(
    cta: "CTA", space: Space, addresses: Array, size: int, warps: Array
) -> tuple[Array, Array]:
    """Return the granules of accesses, of all threads and then of all again, and their stamps."""
    granules = space.granules(addresses, size)
    return granules.ravel(), np.broadcast_to((cta.interval << 8) + warps, granules.shape).ravel()


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
