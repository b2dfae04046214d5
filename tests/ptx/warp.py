"""Exchange between the 32 threads of a warp: the manual's "shfl.sync", "redux.sync", "vote.sync".

All threads of a warp must execute these together: their masks name all 32.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import UnknownInstruction
from ptx.parse import Instruction, Vector
from ptx.values import BOOL, U32, WARP, Array, Mask, Step, read, type_of, write

if TYPE_CHECKING:
    from ptx.machine import CTA

LANES = np.arange(WARP)


def converged(cta: "CTA", mask: Mask) -> None:
    """Report a warp of which some threads, but not all, execute an instruction for warps."""
    if mask is not None:
        warps = mask.reshape(-1, WARP)
        if (warps.any(1) != warps.all(1)).any():
            cta.report("divergence", "a part of a warp executes an instruction for whole warps")


def warps_of(cta: "CTA", mask: Mask) -> Array:
    """Return the numbers of the warps that execute an instruction for whole warps."""
    converged(cta, mask)
    if mask is None:
        return np.arange(cta.n_threads // WARP)
    return np.flatnonzero(mask.reshape(-1, WARP).all(1))


def whole(instruction: Instruction) -> Step:
    """Return the check of the last operand, the mask of members: it must name whole warps."""
    members = read(instruction.operands[-1], U32)

    def check(cta: "CTA", mask: Mask) -> None:
        named = np.broadcast_to(members(cta), (cta.n_threads,))
        if (named[slice(None) if mask is None else mask] != 0xFFFFFFFF).any():
            raise UnknownInstruction(f"{instruction.text}: only the mask -1 is known")
        converged(cta, mask)

    return check


def lanes_read(mode: str, b: Array, c: Array) -> tuple[Array, Array]:
    """Return the lane that each lane of a warp reads, and whether it is in range.

    c: its bits 0 to 4 clamp the lane, its bits 8 to 12 divide the warp into segments. A lane out of
    range reads itself.
    """
    b, clamp, segment = b & 31, c & 31, (c >> 8) & 31
    last = (LANES & segment) | (clamp & ~segment)
    first = LANES & segment
    lane, valid = {
        "up": (LANES - b, LANES - b >= last),
        "down": (LANES + b, LANES + b <= last),
        "bfly": (LANES ^ b, (LANES ^ b) <= last),
        "idx": (first | (b & ~segment), (first | (b & ~segment)) <= last),
    }[mode]
    return np.where(valid, lane, LANES), valid


def shuffle(instruction: Instruction) -> Step:
    """shfl.sync: the value of another lane; p of d|p says whether that lane is in range."""
    check = whole(instruction)
    mode = instruction.parts[2]
    value, b, c = (read(operand, U32) for operand in instruction.operands[1:4])
    target = instruction.operands[0]
    targets = target.items if isinstance(target, Vector) else (target,)
    puts = [write(item) for item in targets]

    def by_warp(cta: "CTA", values: Array) -> Array:
        return np.broadcast_to(values, (cta.n_threads,)).reshape(-1, WARP)

    def step(cta: "CTA", mask: Mask) -> None:
        check(cta, mask)
        values = by_warp(cta, value(cta))
        ways = (x.astype(np.int64) for x in (b(cta), c(cta)))
        lanes, valid = lanes_read(mode, *(x if len(x) == 1 else by_warp(cta, x) for x in ways))
        lanes, valid = (np.broadcast_to(x, values.shape) for x in (lanes, valid))
        puts[0](cta, np.take_along_axis(values, lanes, 1).reshape(-1), mask)
        for put in puts[1:]:
            put(cta, valid.reshape(-1), mask)

    return step


_REDUCTIONS: dict[str, Callable[[Array], Array]] = {
    "add": lambda x: x.sum(1, dtype=x.dtype),
    "min": lambda x: x.min(1),
    "max": lambda x: x.max(1),
    "and": lambda x: np.bitwise_and.reduce(x, 1),
    "or": lambda x: np.bitwise_or.reduce(x, 1),
    "xor": lambda x: np.bitwise_xor.reduce(x, 1),
}


def _reduced(instruction: Instruction, f: Callable[[Array], Array], dtype: np.dtype) -> Step:
    """Return the step that gives every thread f of its warp's values."""
    check = whole(instruction)
    source, put = read(instruction.operands[1], dtype), write(instruction.operands[0])

    def step(cta: "CTA", mask: Mask) -> None:
        check(cta, mask)
        values = np.broadcast_to(source(cta), (cta.n_threads,)).reshape(-1, WARP)
        put(cta, np.repeat(f(values), WARP), mask)

    return step


def reduce(instruction: Instruction) -> Step:
    """redux.sync: add, min, max, and, or, xor over a warp's integers."""
    dtype = type_of(instruction.parts[-1])
    if dtype.kind not in "iu" or dtype.itemsize != 4:
        raise UnknownInstruction(instruction.text)
    return _reduced(instruction, _REDUCTIONS[instruction.parts[2]], dtype)


def vote(instruction: Instruction) -> Step:
    """vote.sync: any, all, uni (all the same) of a warp's predicates; ballot: them as bits."""
    functions: dict[str, Callable[[Array], Array]] = {
        "any": lambda p: p.any(1),
        "all": lambda p: p.all(1),
        "uni": lambda p: p.any(1) == p.all(1),
        "ballot": lambda p: (p.astype(np.int64) << LANES).sum(1).astype(U32),
    }
    return _reduced(instruction, functions[instruction.parts[2]], BOOL)


def synchronise(instruction: Instruction) -> Step:
    """bar.warp.sync: a warp's threads meet; they are never apart here, but must all be there."""
    return whole(instruction)
