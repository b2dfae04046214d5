"""What a launch executes, counted: for a model of its time."""

import functools
import re
from dataclasses import dataclass, field

from ptx.parse import Instruction

_CLASSES = [
    ("tensor", r"w?gmma|mma|tcgen05"),
    ("global_load", r"ld\.global|cp\.async\.c[ag]"),
    ("global_store", r"st\.global|atom\.global"),
    ("shared", r"(ld|st)\.shared|ldmatrix|stmatrix"),
    ("parameter", r"(ld|st)\.param"),
    ("exchange", r"shfl|redux|vote|match|elect"),
    ("barrier", r"bar\.|barrier|fence|membar|cp\.async|mbarrier"),
    ("branch", r"bra|ret|exit|call"),
    ("special", r"(ex2|lg2|rcp|rsqrt|sqrt|tanh|sin|cos)\b|div\..*f(32|64)"),
    ("convert", r"cvt"),
    ("float64", r".*\.f64"),
    ("float", r"(add|sub|mul|fma|mad|min|max|neg|abs|div)\b.*f(16|32)"),
    ("move", r"mov"),
]
"""The classes of instructions, the first that matches; "integer" is the rest."""


def class_of(instruction: Instruction) -> str:
    """Return an instruction's class."""
    return _class_of(instruction.opcode)


@functools.cache
def _class_of(opcode: str) -> str:
    return next((name for name, of in _CLASSES if re.match(of, opcode)), "integer")


def flops_of(instruction: Instruction) -> int:
    """Return the FLOPs of one warp's share of a product, two for each multiply-add; else 0."""
    return _flops_of(instruction.opcode)


@functools.cache
def _flops_of(opcode: str) -> int:
    match = re.match(r"(w?g?mma)\..*?\.m(\d+)n(\d+)k(\d+)", opcode)
    if match is None:
        return 0
    m, n, k = (int(size) for size in match.groups()[1:])
    return 2 * m * n * k // (4 if match[1] == "wgmma" else 1)


@dataclass
class Counts:
    """One launch, or several that are added up.

    instructions: those issued, one for each warp, by class; a warp of which one thread executes
    counts like a whole one. flops: of tensor cores. Bytes of global memory are what threads ask
    for, wherever they come from.
    """

    launches: int = 0
    ctas: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    barriers: int = 0

    def add(self, other: "Counts") -> None:
        """Add another's counts to these."""
        for name, n in other.instructions.items():
            self.instructions[name] = self.instructions.get(name, 0) + n
        for name in ("launches", "ctas", "flops", "bytes_loaded", "bytes_stored", "barriers"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def issued(self) -> int:
        """All warp instructions."""
        return sum(self.instructions.values())
