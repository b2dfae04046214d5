"""A CTA: its threads run in lockstep wherever they can, and meet at barriers.

The manual's "Control Flow Instructions" and "Parallel Synchronization and Communication
Instructions: bar". Of the threads that can run, those at the earliest place in the program do; so
warps run side by side from one barrier to the next, and the checks of memory.py say whether another
order could give another result. Reported are

- race: two warps use the same bytes without a barrier between, or two CTAs do; an operand of wgmma
  is overwritten before its wait;
- early: bytes of a cp.async are used before its wait;
- divergence: a part of a warp executes an instruction for whole warps, or threads wait at
  different barriers, or some wait while others are gone.

An access out of bounds or misaligned, a register that nobody wrote, and an endless loop end the run
with a Fault.
"""

import random
from dataclasses import dataclass, field

import numpy as np

from ptx.access import granule_of
from ptx.asynchronous import Copies
from ptx.counts import Counts, class_of, flops_of
from ptx.faults import Fault, UnknownInstruction
from ptx.instructions import decode
from ptx.memory import GlobalMemory, SharedMemory
from ptx.parse import Immediate, Instruction, Program, Symbol, Vector, parse
from ptx.values import BOOL, U32, U64, WARP, Array, Mask, Read, Step, read
from ptx.wgmma import WARPGROUP, Groups

_MAX_BLOCKS = 2_000_000
_CONTROL = ("bra", "ret", "exit", "bar.sync", "barrier.sync", "call")

Place = tuple[int, int, int]
"""A CTA's place in the grid."""


@dataclass
class Block:
    """Instructions that run together: only the last one may go elsewhere."""

    start: int
    function: str
    body: list[Instruction]
    last: Instruction | None  # the branch, barrier, call or return that ends it
    steps: list[Step] = field(default_factory=list)
    condition: Read | None = None
    target: int = -1

    def __post_init__(self) -> None:
        self.whole_warps = any(".sync" in instruction.opcode for instruction in self.body)


def is_control(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(_CONTROL)


class Kernel:
    """A compiled kernel: its program in blocks, each decoded when it first runs."""

    def __init__(self, ptx: str, shared_bytes: int) -> None:
        self.program: Program = parse(ptx)
        self.name, self.n_threads = self.program.entry, self.program.n_threads
        self.shared_bytes = shared_bytes
        if self.n_threads % WARP:
            raise UnknownInstruction(f"{self.name} has {self.n_threads} threads, no whole warps")
        self.granules = granule_of(self.program.instructions)
        self.blocks: list[Block] = []
        self.block_at: dict[int, int] = {}
        self._divide()

    def _divide(self) -> None:
        instructions, functions = self.program.instructions, self.program.functions
        starts = {0, *self.program.labels.values(), *(f.start for f in functions.values())}
        starts |= {i + 1 for i, x in enumerate(instructions) if is_control(x)}
        edges = sorted(x for x in starts if x < len(instructions)) + [len(instructions)]
        by_start = sorted((f.start, name) for name, f in functions.items())
        for start, end in zip(edges, edges[1:], strict=False):
            body = instructions[start:end]
            last = body.pop() if is_control(body[-1]) else None
            name = [name for first, name in by_start if first <= start][-1]
            self.block_at[start] = len(self.blocks)
            self.blocks.append(Block(start, name, body, last))

    def block(self, number: int) -> Block:
        """Return a block, decoded."""
        if number >= len(self.blocks):
            raise Fault(f"{self.name} runs past its end")
        block = self.blocks[number]
        if len(block.steps) < len(block.body):
            block.steps = [decode(instruction) for instruction in block.body]
        if block.last is not None and block.target < 0:
            self._decode_last(block, block.last)
        return block

    def _decode_last(self, block: Block, last: Instruction) -> None:
        block.target = 0
        if last.guard is not None:
            block.condition = read(last.guard, BOOL)
        name = (
            last.operands[0].name if last.operands and isinstance(last.operands[0], Symbol) else ""
        )
        if last.parts[0] == "bra":
            block.target = self.block_at[self.program.labels[name]]
        elif last.parts[0] == "call":
            if name not in self.program.functions or last.guard is not None:
                raise UnknownInstruction(last.text)
            block.target = self.block_at[self.program.functions[name].start]
        elif last.parts[0] in ("bar", "barrier"):
            whole = [operand == Immediate(0) for operand in last.operands]
            if whole != [True] or last.guard is not None:
                raise UnknownInstruction(f"{last.text}: only a barrier 0 of all threads is known")


class Launch:
    """One grid: the CTAs run one after the other in an arbitrary, fixed order.

    args: the kernel's parameters as bits. tensors: (address, bytes, name) of all memory that it may
    use.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        args: list[int],
        tensors: list[tuple[int, int, str]],
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        names = kernel.program.functions[kernel.name].params
        if len(args) < len(names):
            raise ValueError(f"{kernel.name} has {len(names)} parameters, got {len(args)}")
        bits = [np.array([arg & (1 << 64) - 1], U64) for arg in args]
        self.params = dict(zip(names, bits, strict=False))
        self.memory = GlobalMemory(tensors, kernel.granules[0])
        self.counts = Counts(launches=1)
        self.visits = [0] * len(kernel.blocks)  # warps that ran each block
        self.interval = 1
        self.findings: dict[tuple[str, str], int] = {}

    def run(self, places: list[Place] | None = None) -> dict[tuple[str, str], int]:
        """Run all CTAs, or those at some places; return what was found: (kind, text), how often."""
        x, y, z = self.grid
        if places is None:
            places = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
            random.Random(1).shuffle(places)
        with np.errstate(all="ignore"):
            for place in places:
                CTA(self, place).run()
        self._count(len(places))
        return self.findings

    def _count(self, n_ctas: int) -> None:
        self.counts.ctas = n_ctas
        for block, warps in zip(self.kernel.blocks, self.visits, strict=True):
            for instruction in (
                [*block.body, *([block.last] if block.last else [])] if warps else []
            ):
                name = class_of(instruction)
                self.counts.instructions[name] = self.counts.instructions.get(name, 0) + warps
                self.counts.flops += warps * flops_of(instruction)


class CTA:
    """The threads of one CTA with their registers and their shared memory."""

    def __init__(self, launch: Launch, place: tuple[int, int, int]) -> None:
        kernel = launch.kernel
        n = self.n_threads = kernel.n_threads
        self.launch, self.kernel, self.place = launch, kernel, place
        self.sizes = {"ctaid": place, "nctaid": launch.grid, "ntid": (n, 1, 1)}
        self.thread_numbers = np.arange(n)
        self.tid = np.arange(n, dtype=U32)
        self.registers: list[Array | None] = [None] * len(kernel.program.registers)
        self.params = dict(launch.params)
        self.global_memory = launch.memory
        self.shared = SharedMemory(kernel.shared_bytes, kernel.granules[1])
        self.copies = Copies(n, len(self.shared.views[1]))
        self.groups = Groups(max(1, n // WARPGROUP))
        launch.interval += 1
        self.first_interval = launch.interval
        self.at: Instruction | None = None
        # The block that each thread runs next, and where it goes from a function; the block that
        # all run next, or None where they differ.
        self.next_block = np.zeros(n, np.int64)
        self.returns: dict[str, Array] = {}
        self.waiting, self.gone = np.zeros(n, bool), np.zeros(n, bool)
        self.together: int | None = kernel.block_at[kernel.program.functions[kernel.name].start]

    @property
    def interval(self) -> int:
        """The number of this stretch between two barriers, over the whole launch."""
        return self.launch.interval

    @property
    def where(self) -> str:
        """The place of the current instruction, for messages."""
        return f"{self.kernel.name}, CTA {self.place}: {self.at.text[:120] if self.at else ''}"

    def report(self, kind: str, text: str) -> None:
        """Record a finding at the current instruction."""
        key = (kind, f"{text}: {self.kernel.name}: {self.at.text[:120] if self.at else ''}")
        self.launch.findings[key] = self.launch.findings.get(key, 0) + 1

    def set_param(self, name: str, value: Array, mask: Mask) -> None:
        """Set a parameter of a call."""
        value = np.broadcast_to(value, (self.n_threads,))
        if mask is not None:
            value = np.where(mask, value, self.params.get(name, U64.type(0)))
        self.params[name] = value

    def run(self) -> None:
        """Run until every thread has returned."""
        visits, warps = self.launch.visits, self.n_threads // WARP
        for _ in range(_MAX_BLOCKS):
            mask: Mask = None
            number = self.together
            if number is None:
                ready = ~(self.waiting | self.gone)
                if not ready.any():
                    if self.gone.all():
                        return
                    self._pass_barrier()
                    continue
                number, mask = self._choose(ready)
            elif number < 0:
                return
            visits[number] += warps if mask is None else int(mask.reshape(-1, WARP).any(1).sum())
            block = self.kernel.block(number)
            for self.at, step in zip(block.body, block.steps, strict=True):
                step(self, mask)
            self._leave(number, block, None if mask is not None and mask.all() else mask)
        raise Fault(f"{self.kernel.name} does not end: a loop without an end")

    def _choose(self, ready: Array) -> tuple[int, Array]:
        """Return the block to run next and the threads that do: the earliest one.

        An instruction with .sync waits for all threads of its warp, so a block with one runs for
        whole warps, unless nothing else can run.
        """
        numbers = np.unique(self.next_block[ready])
        for number in numbers:
            mask = ready & (self.next_block == number)
            if self.kernel.blocks[number].whole_warps:
                mask &= np.repeat(mask.reshape(-1, WARP).all(1), WARP)
            if mask.any():
                return int(number), mask
        return int(numbers[0]), ready & (self.next_block == numbers[0])

    def _leave(self, number: int, block: Block, mask: Mask) -> None:
        """Send the threads that ran a block to their next one."""
        last = self.at = block.last
        name = "" if last is None else last.parts[0]
        taken = True if block.condition is None else block.condition(self)
        if name == "bra":
            self._go(mask, np.where(taken, block.target, number + 1))
        elif name == "bar" or name == "barrier":
            self._wait(number + 1, mask)
        elif name == "call" and last is not None:
            self._call(last, number + 1, mask)
            self._go(mask, np.array(block.target))
        elif name and block.function != self.kernel.name:
            self._go(mask, np.where(taken, self.returns[block.function], number + 1))
        elif name:
            self._go(mask, np.where(taken, -1, number + 1))
        else:
            self._go(mask, np.array(number + 1))

    def _go(self, mask: Mask, to: Array) -> None:
        """Set the next block, -1 for the end; find out whether all threads are together."""
        if mask is None and self.together is not None and (to == to.flat[0]).all():
            self.together = int(to.flat[0])
            return
        if self.together is not None:
            self.next_block[:] = self.together
            self.together = None
        np.copyto(self.next_block, to, where=True if mask is None else mask)
        self.gone = self.next_block < 0
        self._join()

    def _join(self) -> None:
        first = self.next_block[0]
        if first >= 0 and not self.waiting.any() and (self.next_block == first).all():
            self.together = int(first)

    def _call(self, last: Instruction, after: int, mask: Mask) -> None:
        """call.uni f, (arguments): functions without a result, and without recursion."""
        function = self.kernel.program.functions[last.operands[0].name]  # type: ignore[union-attr]
        given = last.operands[1].items if isinstance(last.operands[1], Vector) else ()
        for name, operand in zip(function.params, given, strict=True):
            assert isinstance(operand, Symbol), last.text
            self.set_param(name, self.params[operand.name], mask)
        back = self.returns.setdefault(function.name, np.zeros(self.n_threads, np.int64))
        back[slice(None) if mask is None else mask] = after

    def _wait(self, after: int, mask: Mask) -> None:
        """bar.sync 0: wait until all threads of the CTA are there."""
        self.launch.counts.barriers += self.together is not None
        if self.together is not None:
            self.together = after
            self.launch.interval += 1
            return
        chosen = np.ones(self.n_threads, bool) if mask is None else mask
        self.next_block[chosen] = after
        self.waiting |= chosen

    def _pass_barrier(self) -> None:
        """Let the threads that wait go on; all others are gone."""
        after = np.unique(self.next_block[self.waiting])
        if len(after) > 1:
            self.report("divergence", "threads wait at different barriers")
        if self.gone.any():
            self.report("divergence", "threads wait at a barrier that others never reach")
        self.launch.counts.barriers += 1
        self.launch.interval += 1
        self.waiting[:] = False
        self._join()
