"""Who read and wrote memory last, and which accesses conflict.

The manual's "Memory Consistency Model", section "Conflict and Data-races". Between two barriers,
hardware may run warps in any order: where one warp writes what another one reads or writes in the
same interval, the result depends on luck. CTAs of a launch are never ordered. Atomic operations do
not conflict with one another if they are of the same bytes, but they do with all other accesses.
"""

from typing import NamedTuple

import numpy as np

from ptx.values import Array

MANY, ASYNC = 255, 254
"""In a stamp, in the place of a warp: several warps; the tensor cores for a warpgroup."""
BY_WARP = "by another warp, no barrier between"
LATE_WRITE = "write after a read"


class Race(NamedTuple):
    """A write that follows reads by other warps in an interval: its granules, and their writers."""

    interval: int
    granules: Array
    writers: Array


class Trace:
    """The accesses of one kind that do not conflict with one another.

    A stamp is interval * 256 + warp. Intervals count the barriers of a launch from 1, CTA after
    CTA; 0 is a granule that nobody touched.
    """

    def __init__(self, n: int) -> None:
        # Zeros take no memory until they are written.
        self.last, self.by_ctas = np.zeros(n, np.int64), np.zeros(n, bool)
        self.used = self.used_by_ctas = False

    def add(self, granules: Array, stamps: Array, first: int) -> None:
        """Record accesses. first: the first stamp of this CTA."""
        self.used = True
        old = self.last[granules]
        if first and ((old > 0) & (old < first)).any():
            self.by_ctas[granules[(old > 0) & (old < first)]] = self.used_by_ctas = True
        new = np.where((old >> 8 == stamps >> 8) & (old != stamps), stamps | MANY, stamps)
        self.last[granules] = new
        lost = self.last[granules] != new  # accessed by several warps of this one instruction
        if lost.any():
            self.last[granules[lost]] |= MANY

    def conflict(self, granules: Array, stamps: Array, first: int, what: str) -> str:
        """Return how accesses of another kind conflict with these, or ""."""
        if not self.used:
            return ""
        last = self.last[granules]
        if ((last > 0) & (last < first)).any():
            return f"{what} by another CTA"
        if self.used_by_ctas and self.by_ctas[granules].any():
            return f"{what} by another CTA"
        if self.others(granules, stamps).any():
            return f"{what} {BY_WARP}"
        return ""

    def others(self, granules: Array, stamps: Array) -> Array:
        """Return where another warp has accessed a granule in the same interval."""
        last = self.last[granules]
        return (last >> 8 == stamps >> 8) & (last != stamps)


class Shadow:
    """The accesses to each granule of a memory."""

    def __init__(self, n: int) -> None:
        self.writes, self.reads, self.atomics = Trace(n), Trace(n), Trace(n)
        self.atomic_places = np.zeros(n, np.int64)
        self.races: list[Race] = []
        """Every write after a read by another warp."""

    def read(self, granules: Array, stamps: Array, first: int) -> str:
        """Record a read; return the conflict, or "". first: the first stamp of this CTA."""
        at = granules, stamps, first
        found = self.writes.conflict(*at, "read after a write")
        found = found or self.atomics.conflict(*at, "read after an atomic operation")
        self.reads.add(*at)
        return found

    def write(self, granules: Array, stamps: Array, first: int, changed: Array) -> str:
        """Record a write; return the conflict, or "".

        changed: where the write changes a value. Two warps that write the same value agree.
        """
        found = self.reads.conflict(granules, stamps, first, LATE_WRITE)
        found = found or self.atomics.conflict(
            granules, stamps, first, "write after an atomic operation"
        )
        found = found or self.writes.conflict(
            granules[changed], stamps[changed], first, "write after a write"
        )
        if found == f"{LATE_WRITE} {BY_WARP}":
            racing = self.reads.others(granules, stamps)
            where = granules[racing], stamps[racing] & MANY
            self.races.append(Race(int(stamps[0]) >> 8, *where))
        self.writes.used = True
        self.writes.last[granules] = stamps
        return found

    def atomic(self, granules: Array, stamps: Array, first: int, places: Array) -> str:
        """Record an atomic operation; return the conflict, or "".

        places: a number for each granule that tells atomic operations on other bytes apart.
        """
        at = granules, stamps, first
        found = self.writes.conflict(*at, "atomic operation after a write")
        found = found or self.reads.conflict(*at, "atomic operation after a read")
        other = (self.atomics.last[granules] > 0) & (self.atomic_places[granules] != places)
        found = found or self.atomics.conflict(
            granules[other], stamps[other], first, "atomic operation after one on other bytes"
        )
        self.atomic_places[granules] = places
        self.atomics.add(*at)
        return found
