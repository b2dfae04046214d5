"""The processes that train one model together: how many there are, and what they tell one another.

A run of one process has a `World`, whose methods return at once; it imports nothing of
torch.distributed. Under torchrun, `world_of` (launched.py) returns `Processes` (processes.py).

How a run of several processes is the same run:
    rows        every process reads the batches of a step and takes its rows (shares.py)
    dropout     keyed by the row's place in the whole batch (gptfast/dropout.py)
    loss        each process divides by the number of targets in the whole step; losses and
                gradients are summed over the processes (parallel_step.py), on one machine through
                memory that they share (shared_step.py)
    evaluation  each process takes every n-th batch, and the losses of the batches are added in the
                order in which one process adds them (evaluation.py)
    decisions   what only one process can know (a signal, a non-finite loss) is agreed upon before
                anybody acts on it
    files       the first process alone writes them, and the others wait for it; each writes its own
                part of a checkpoint where they share the weights (shards.py)
    failures    a process that ends, hangs or is cut off is named by those that notice (failures.py)
tests/test_parallel.py compares 1, 2, 3 and 4 processes, and ends them in every way.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.device import choose_device
from gptfast.training.interrupt import Interrupt


class World:
    """A run of one process."""

    rank, size, local_rank, restarts = 0, 1, 0, 0

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Return the device of this process for the name in the configuration."""
        return choose_device(name)

    def interrupt(self) -> Interrupt:
        """Return the context in which signals ask the run to stop."""
        return Interrupt()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        return values

    def meet(self) -> None:
        """Wait until all processes have come here."""

    def shared_memory(self, n_bytes: int) -> Tensor | None:
        """Return zeros, (n_bytes,) uint8, that all processes share, or None where they cannot.

        All processes must call it.
        """
        return None

    def compare(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError that names the first value in which a process differs from the first."""

    def exchange(self, what: str, text: str) -> list[str]:
        """Return the texts of all processes, in their order, once all have come here.

        what: a name that is used once in a run.
        """
        return [text]

    def wait_for_first(self, what: str) -> None:
        """Wait until the first process has come here too, however long its work takes.

        what: a name that is used once in a run.
        """

    @contextlib.contextmanager
    def writing(self, where: Path) -> Iterator[None]:
        """End all processes if the block, which writes files of this process, takes too long."""
        yield

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Let the processes compile for longer in the block than they may otherwise be silent."""
        yield

    @contextlib.contextmanager
    def in_turn(self, what: str) -> Iterator[None]:
        """Let one process of each machine through the block before the others."""
        yield

    def same_random_state(self, device: torch.device) -> None:
        """Give the generators of all processes the first one's state."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Turn an error of communication in the block into one that names the process to blame."""
        yield

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """End all processes if one ends the block with an error, which one process prints."""
        yield


ONE = World()
