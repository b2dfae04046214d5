"""The instructions of a launch, counted by the emulator of tests/ptx on a few of its programs.

Which of the programs run, and how many of the launch each of them stands for:

- attention: all blocks of one head, each for as many programs as there are heads. A block's loop
  has as many steps as the causal mask leaves, which all heads share, so the count is exact.
- sampling of few rows: all programs, as the next launch needs their results.
- cross entropy of rows that are not padded: eight rows, as each eighth row begins at the same
  distance from a multiple of 16 bytes; exact.
- kernels whose programs differ with the data (VARIED): SAMPLED programs at equal distances, each
  for as many as lie between two of them. This is an estimate, unless there are no more programs.
- all others: the first program, the last one, and three in between. These three must issue the same
  instructions, and stand for all in between: exact, as what differs at the edges is masked.

Counts are of PTX; what ptxas makes of it has other instructions, some more and some fewer.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from ptx.counts import Counts  # noqa: E402
from ptx.machine import Launch, Place  # noqa: E402

VARIED = ("embedding_bwd_kernel", "embedding_bwd_runs_kernel", "grad_norm_kernel", "adamw_kernel")
VARIED += ("column_totals_kernel",)
SAMPLED = 96
CYCLES = {"cross_entropy_fwd_kernel": 8, "cross_entropy_bwd_kernel": 8}
WHOLE = ("sample_extremes_kernel", "sample_histogram_kernel", "sample_collect_kernel")
WHOLE += ("sample_draw_kernel",)
ATTENTION = ("attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dk_dv_kernel")


@dataclass
class Counted:
    """What the programs of a launch issue: warp instructions by class, and tensor cores' FLOPs."""

    programs: int
    ran: int
    exact: bool
    instructions: dict[str, int] = field(default_factory=dict)
    flops: int = 0

    @property
    def issued(self) -> int:
        """All warp instructions."""
        return sum(self.instructions.values())


def place_of(number: int, grid: tuple[int, ...]) -> Place:
    """Return the place of a program in the grid, by its number; the first axis comes first."""
    x, y, _ = grid
    return number % x, number // x % y, number // (x * y)


def of_one_head(grid: tuple[int, ...], n_heads: int, group: int) -> list[int]:
    """Return the numbers of the programs of the first head: see `attention_access.program`."""
    return [block * min(group, n_heads) for block in range(grid[0] // n_heads)]


def run_one(launch: Launch, number: int) -> Counts:
    """Return what one program of a launch executes."""
    launch.visits[:] = [0] * len(launch.visits)
    launch.counts = Counts(launches=1)
    launch.run([place_of(number, launch.grid)])
    return launch.counts


@dataclass(frozen=True)
class Choice:
    """The programs to run, by number, with how many each stands for.

    exact: whether they stand for nothing but their like. alike: those that must prove it.
    """

    weights: dict[int, float]
    exact: bool = True
    alike: tuple[int, ...] = ()


def choose(name: str, grid: tuple[int, ...], named: dict[str, Any]) -> Choice:
    """Return which programs of a kernel's launch to run; named: its arguments by name."""
    n = math.prod(grid)
    if name in ATTENTION:
        programs = of_one_head(grid, named["n_heads"], named["group"])
        return Choice(dict.fromkeys(programs, named["n_heads"]))
    if n <= 5 or name in WHOLE or (name in VARIED and n <= SAMPLED):
        return Choice(dict.fromkeys(range(n), 1))
    if name in CYCLES and n % CYCLES[name] == 0:
        return Choice(dict.fromkeys(range(CYCLES[name]), n / CYCLES[name]))
    if name in VARIED:
        numbers = [(2 * i + 1) * n // (2 * SAMPLED) for i in range(SAMPLED)]
        return Choice(dict.fromkeys(numbers, n / SAMPLED), exact=False)
    alike = (1, n // 2, n - 2)
    return Choice({0: 1, n - 1: 1, **dict.fromkeys(alike, (n - 2) / 3)}, alike=alike)


def count(launch: Launch, named: dict[str, Any]) -> Counted:
    """Return the counts of a whole launch; named: its arguments by name.

    Raises ValueError where programs that should be alike are not.
    """
    name, choice = launch.kernel.name, choose(launch.kernel.name, launch.grid, named)
    counts = {number: run_one(launch, number) for number in choice.weights}
    if any(counts[i].instructions != counts[choice.alike[0]].instructions for i in choice.alike):
        raise ValueError(f"programs of {name} differ: add its name to VARIED")
    sums: dict[str, float] = {}
    for number, weight in choice.weights.items():
        for kind, issued in counts[number].instructions.items():
            sums[kind] = sums.get(kind, 0.0) + issued * weight
    return Counted(
        math.prod(launch.grid),
        len(counts),
        choice.exact,
        {kind: round(issued) for kind, issued in sorted(sums.items())},
        round(sum(counts[i].flops * weight for i, weight in choice.weights.items())),
    )
