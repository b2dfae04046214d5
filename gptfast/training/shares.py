"""Which rows of a step's batches each process computes.

A step takes `accumulation` batches of `batch_size` rows, whatever the number of processes. The
processes form groups. A group takes whole batches, as many as the others, and its members share the
rows of each: so every process has equally many batches and, of each, equally many rows. There are
as many groups as possible, because larger pieces compute faster and whole batches need no dropout
masks of other rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptfast.dropout import Rows
from gptfast.training.step import Batch


@dataclass(frozen=True)
class Piece:
    """What a process does with one batch of a step."""

    x: Tensor
    y: Tensor
    count: int
    """The number of targets in the piece."""
    rows: Rows | None
    """Which rows of the batch it has; None for all."""
    mine: bool
    """Whether this process computes the piece. If not, x and y are the whole batch."""


class Split:
    """The share of one process.

    Raises ValueError for a number of processes that does not divide the rows of a step.
    """

    def __init__(self, rank: int, size: int, batch_size: int, accumulation: int) -> None:
        rows = batch_size * accumulation
        if rows % size:
            able = [n for n in range(1, rows + 1) if rows % n == 0]
            listed = ", ".join(map(str, able[-8:] if len(able) > 8 else able))
            raise ValueError(
                f"{size} processes cannot share the {rows} rows of a step equally (batch_size "
                f"{batch_size} x accumulation_steps {accumulation}): start a number of processes "
                f"that divides them ({listed}), or change the rows"
            )
        groups = math.gcd(size, accumulation)
        self._members, self._batches = size // groups, accumulation // groups
        self._group, self._member = divmod(rank, self._members)

    @property
    def takes_whole_batches(self) -> bool:
        """Whether some batches are computed by other processes alone."""
        return self._members == 1

    def pieces(self, batches: Sequence[Batch]) -> list[Piece]:
        """Return what this process does with each batch of a step."""
        return [self._piece(i, x, y) for i, (x, y) in enumerate(batches)]

    def _piece(self, i: int, x: Tensor, y: Tensor) -> Piece:
        if i // self._batches != self._group:
            return Piece(x, y, 0, None, False)
        n = len(x)
        first, end = (n * at // self._members for at in (self._member, self._member + 1))
        if first == end:  # of a last, smaller batch; the process must still take part
            x, y, first = x[:1], torch.full_like(y[:1], -100), 0
        else:
            x, y = x[first:end], y[first:end]
        rows = None if self._members == 1 else Rows(first, n)
        return Piece(x, y, int((y != -100).sum()), rows, True)
