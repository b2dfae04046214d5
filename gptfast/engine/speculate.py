"""Guesses at what comes next, which the engine checks several at a time.

A guess costs little, and checking k of them reads the weights once. What is drawn does not change:
the model's own draw at each position, which its logits, the seed and the position decide, is kept
up to and with the first that differs from the guess. So tokens are those of plain decoding, drawn
or greedy.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from gptfast.engine.rows import Rows

if TYPE_CHECKING:
    from gptfast.engine.request import Request

MOST = 11
"""Guesses at a time: with the token before them, few enough rows for one pass over the weights."""


class Guesser(Protocol):
    FIRST: int
    """How many to try at first: twice as many after all came true, fewer after one did not."""
    FEWEST: int

    def guess(self, requests: "Sequence[Request]", most: Sequence[int]) -> list[list[int]]:
        """Of each request up to so many tokens that may follow."""

    def forget(self, request: "Request") -> None:
        """The request has ended."""


class PromptLookup:
    """What followed the last few tokens where they stood before (Saxena, 2023): good where a text
    repeats itself, as edits of code and summaries do."""

    FIRST, FEWEST = 8, 4  # a guess costs no more than its row of the check
    LONGEST, SHORTEST = 6, 2

    def __init__(self) -> None:
        # Per request, of each run of tokens where its last two ends were; and how far it was read.
        self._ends: dict[int, tuple[dict[tuple[int, ...], tuple[int, int]], list[int]]] = {}

    def guess(self, requests: "Sequence[Request]", most: Sequence[int]) -> list[list[int]]:
        return [self._one(request, n) for request, n in zip(requests, most, strict=True)]

    def forget(self, request: "Request") -> None:
        self._ends.pop(request.index, None)

    def _one(self, request: "Request", most: int) -> list[int]:
        ids = request.ids
        ends, read = self._ends.setdefault(request.index, ({}, [0]))
        for end in range(read[0] + 1, len(ids) + 1):
            for n in range(self.SHORTEST, min(self.LONGEST, end) + 1):
                run = tuple(ids[end - n : end])
                ends[run] = (end, ends.get(run, (0, 0))[0])
        read[0] = len(ids)
        for n in range(min(self.LONGEST, len(ids)), self.SHORTEST - 1, -1):
            before = ends[tuple(ids[-n:])][1]
            if before:
                return ids[before : before + most]
        return []


class DraftModel:
    """What a smaller model with the same vocabulary draws, with the same seed at the same place."""

    FIRST, FEWEST = 4, 1

    def __init__(self, rows: Rows, sampling: Sequence[Tensor]) -> None:
        self._rows, self._sampling = rows, sampling
        self._of: dict[int, int] = {}  # request -> row

    def guess(self, requests: "Sequence[Request]", most: Sequence[int]) -> list[list[int]]:
        room = self._rows.block_size
        guesses: list[list[int]] = [[] for _ in requests]
        for step in range(max(most, default=0)):
            asked = [
                i
                for i, request in enumerate(requests)
                if step < most[i] and len(request.ids) + step < room
            ]
            if not asked:
                break
            rows = [self._row(requests[i]) for i in asked]
            text = [requests[i].ids + guesses[i] for i in asked]
            new = [ids[self._agree(row, ids) :] for row, ids in zip(rows, text, strict=True)]
            index = [requests[i].index for i in asked]
            sampling = [one[index] for one in self._sampling]
            positions = [len(ids) for ids in text]
            _, ids = self._rows.forward(rows, new, None, sampling, positions)
            for i, drawn in zip(asked, ids.tolist(), strict=True):
                guesses[i].append(drawn)
        return guesses

    def forget(self, request: "Request") -> None:
        if (row := self._of.pop(request.index, None)) is not None:
            self._rows.release(row)

    def _row(self, request: "Request") -> int:
        if request.index not in self._of:
            self._of[request.index] = self._rows.start(request.ids)
        return self._of[request.index]

    def _agree(self, row: int, ids: list[int]) -> int:
        """Take back what the row holds beyond its agreement with ids; how much it holds."""
        held = self._rows.ids[row]
        n = min(len(held), len(ids) - 1)
        while held[:n] != ids[:n]:
            n -= 1
        self._rows.truncate(row, n)
        return n
