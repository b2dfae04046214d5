"""cp.async: copies from global to shared memory that are done at their wait, and no earlier.

The manual's "Data Movement and Conversion Instructions: Non-bulk copy". Each thread has its own
groups. Until a thread waits for a group, the bytes that it copies are poison: all ones, a NaN.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import UnknownInstruction
from ptx.memory import address_of, fetched, threads_of, touch
from ptx.parse import Immediate, Instruction
from ptx.values import U32, WARP, Array, Mask, Read, Step, constant_of, read

if TYPE_CHECKING:
    from ptx.machine import CTA


@dataclass
class Copy:
    """What one cp.async of some threads copies: a row of bytes for each."""

    threads: Array
    addresses: Array  # in shared memory
    data: Array  # (threads, bytes)
    groups: Array  # the number of each thread's group

    def taken(self, chosen: Array) -> "Copy":
        return Copy(
            self.threads[chosen], self.addresses[chosen], self.data[chosen], self.groups[chosen]
        )


class Copies:
    """The copies of a CTA that no wait has completed."""

    def __init__(self, n_threads: int, n_bytes: int) -> None:
        self.open = np.zeros(n_threads, np.int64)  # the number of the group that a thread fills
        self.pending: list[Copy] = []
        self.incoming = np.zeros(n_bytes, np.uint8)  # what will be in shared memory


def copy_async(instruction: Instruction) -> Step:
    """cp.async.ca, .cg: 4, 8 or 16 bytes; those past src-size are zeros and are not read."""
    operands = instruction.operands
    size = operands[2]
    if not isinstance(size, Immediate) or size.bits not in (4, 8, 16):
        raise UnknownInstruction(instruction.text)
    n = size.bits
    to, source = address_of(operands[0]), address_of(operands[1])
    constant = constant_of(size, U32)
    used: Read = read(operands[3], U32) if len(operands) > 3 else lambda cta: constant

    def step(cta: "CTA", mask: Mask) -> None:
        threads = threads_of(cta, mask)
        if not len(threads):
            return
        shape = (cta.n_threads,)
        addresses = np.broadcast_to(to(cta), shape)[threads]
        cta.shared.check(cta, addresses, n)
        sources = np.broadcast_to(source(cta), shape)[threads]
        data = _fetch(cta, threads, sources, np.broadcast_to(used(cta), shape)[threads], n)
        start(cta, Copy(threads, addresses, data, cta.copies.open[threads]))

    return step


def _fetch(cta: "CTA", threads: Array, sources: Array, used: Array, n: int) -> Array:
    """Return n bytes for each thread: `used` bytes of global memory, then zeros."""
    data = np.zeros((len(threads), n), np.uint8)
    for length in np.unique(used[used > 0]).tolist():
        chosen = np.flatnonzero(used == length)
        cta.global_memory.check(cta, sources[chosen], n if length == n else 1)
        cta.global_memory.check_bounds(cta, sources[chosen], length)
        warps = threads[chosen] // WARP
        data[chosen, :length] = fetched(cta, cta.global_memory, sources[chosen], 1, length, warps).T
    return data


def start(cta: "CTA", copy: Copy) -> None:
    """Poison the bytes that a copy will write, and mark them as arriving.

    Several threads may copy the same bytes to one place.
    """
    n, shared = copy.data.shape[1], cta.shared
    granules = shared.granules(copy.addresses, n)
    again = shared.arriving[granules].all(0)
    again &= (cta.copies.incoming[copy.addresses[:, None] + np.arange(n)] == copy.data).all(1)
    touch(cta, shared, copy.addresses, n, copy.threads // WARP, ~again)
    shared.put(copy.addresses, 1, np.full((n, 1), 0xFF, np.uint8))
    cta.copies.incoming[copy.addresses[:, None] + np.arange(n)] = copy.data
    np.add.at(shared.arriving, granules.ravel(), 1)
    shared.n_arriving += len(copy.threads)
    cta.copies.pending.append(copy)


def commit(instruction: Instruction) -> Step:
    """cp.async.commit_group: the copies of each thread since its last commit are a group."""

    def step(cta: "CTA", mask: Mask) -> None:
        cta.copies.open[threads_of(cta, mask)] += 1

    return step


def wait(instruction: Instruction) -> Step:
    """cp.async.wait_group n: all but the last n groups of each thread are done; wait_all: all."""
    if instruction.opcode == "cp.async.wait_all":
        return lambda cta, mask: land(cta, mask, -1)
    (n,) = instruction.operands
    assert isinstance(n, Immediate), instruction.text
    return lambda cta, mask: land(cta, mask, n.bits)


def land(cta: "CTA", mask: Mask, n: int) -> None:
    """Complete the copies of all groups of the threads but the last n; -1: also what is open."""
    waiting = np.zeros(cta.n_threads, bool)
    waiting[threads_of(cta, mask)] = True
    landing, rest, shared = [], [], cta.shared
    for copy in cta.copies.pending:
        done = waiting[copy.threads] & (copy.groups < cta.copies.open[copy.threads] - n)
        if done.any():
            landing.append(copy.taken(done))
        if not done.all():
            rest.append(copy.taken(~done))
    cta.copies.pending = rest
    for copy in landing:
        granules = shared.granules(copy.addresses, copy.data.shape[1])
        np.subtract.at(shared.arriving, granules.ravel(), 1)
        shared.n_arriving -= len(copy.threads)
    for copy in landing:
        size = copy.data.shape[1]
        changed = (shared.get(copy.addresses, 1, size) != copy.data.T).any(0)
        touch(cta, shared, copy.addresses, size, copy.threads // WARP, changed)
        shared.put(copy.addresses, 1, copy.data.T)
