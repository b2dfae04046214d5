"""The batches of each step, which the host prepares while a GPU computes the step before."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch.utils.data import DataLoader

from gptfast.device import pinned
from gptfast.training.step import Batch


class Feed:
    """Takes the batches of one step after another from a stream of batches without end.

    On the CPU, which computes itself, nothing is prepared.
    """

    def __init__(self, stream: Iterator[Batch], per_step: int, device: torch.device) -> None:
        self._stream, self._per_step, self._device = stream, per_step, device
        self._ready: list[Batch] | None = None
        self._error: Exception | None = None

    def take(self) -> list[Batch]:
        """Return the batches of the next step."""
        if self._error is not None:
            raise self._error
        batches, self._ready = self._ready, None
        return self._load() if batches is None else batches

    def prepare(self) -> None:
        """Load what `take` will return. An error is raised there: here a step is under way."""
        if self._device.type == "cpu" or self._ready is not None or self._error is not None:
            return
        try:
            self._ready = self._load()
        except Exception as error:
            self._error = error

    def _load(self) -> list[Batch]:
        """Return the next batches, for a GPU in memory from which copies need not wait."""
        return [
            (pinned(x, self._device), pinned(y, self._device))
            for x, y in islice(self._stream, self._per_step)
        ]


def forever(loader: DataLoader) -> Iterator[Batch]:
    """Yield the batches of one epoch after another, without end."""
    while True:
        yield from loader
