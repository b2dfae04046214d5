"""The instructions of a launch, counted by the emulator of tests/ptx on a few of its programs.

Which of the programs run, and how many of the launch each of them stands for:

- attention: all blocks of one head, each for as many programs as there are heads. A block's loop
  has as many steps as the causal mask leaves, which all heads share, so the count is exact.
- sampling of few rows: all programs, as the next launch needs their results.
- kernels whose programs differ with the data (VARIED): SAMPLED programs at equal distances, each
  for as many as lie between two of them. This is an estimate.
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
SAMPLED = 192
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


def weights(launch: Launch, named: dict[str, Any]) -> tuple[dict[int, float], bool]:
    """Return the programs to run, by number, with how many each stands for; whether it is exact."""
    name, n = launch.kernel.name, math.prod(launch.grid)
    if name in ATTENTION:
        n_heads = named["n_heads"]
        programs = of_one_head(launch.grid, n_heads, named["group"])
        return dict.fromkeys(programs, n_heads), True
    if n <= 5 or name in WHOLE:
        return dict.fromkeys(range(n), 1), True
    if name in VARIED and n > SAMPLED:
        numbers = [i * n // SAMPLED + n // (2 * SAMPLED) for i in range(SAMPLED)]
        return dict.fromkeys(numbers, n / SAMPLED), False
    if name in VARIED:
        return dict.fromkeys(range(n), 1), True
    return {0: 1, n // 4: (n - 2) / 3, n // 2: (n - 2) / 3, n - 2: (n - 2) / 3, n - 1: 1}, True


def count(launch: Launch, named: dict[str, Any]) -> Counted:
    """Return the counts of a whole launch; named: its arguments by name.

    Raises ValueError where programs that should be alike are not.
    """
    chosen, exact = weights(launch, named)
    n = math.prod(launch.grid)
    total, inner = Counted(n, len(chosen), exact), []
    sums: dict[str, float] = {}
    flops = 0.0
    for number, weight in chosen.items():
        counts = run_one(launch, number)
        if weight == (n - 2) / 3 and exact:
            inner.append(counts.instructions)
        for kind, issued in counts.instructions.items():
            sums[kind] = sums.get(kind, 0.0) + issued * weight
        flops += counts.flops * weight
    if any(other != inner[0] for other in inner):
        raise ValueError(f"programs of {launch.kernel.name} differ: add its name to VARIED")
    total.instructions = {kind: round(issued) for kind, issued in sorted(sums.items())}
    total.flops = round(flops)
    return total
