"""Speculative decoding: guesses at the next tokens, several of which the engine checks at a time.

A guess costs little, and checking k of them reads the weights once. The tokens do not change: the
engine samples its own token at each position, which its logits, the seed and the position decide,
and keeps them up to and including the first that differs from its guess.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from gptfast.engine.request import Request
from gptfast.engine.rows import BaseRows

MAX_GUESSES = 11
"""Guesses at a time: with the token before them few enough for one pass over the weights."""


class Guesser(Protocol):
    """Guesses the next tokens of requests."""

    FIRST_GUESSES: int
    """How many to try at first: twice as many after all were right, fewer after one was wrong."""
    MIN_GUESSES: int

    def guess(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        """Return up to limits[i] guessed tokens that may follow request i's ids."""

    def forget(self, request: Request) -> None:
        """Release what is kept of a request that has ended."""


class PromptLookup:
    """Prompt lookup (Saxena, 2023): guesses what followed an earlier occurrence of the last tokens.

    It is good where a text repeats itself, as edits of code and summaries do.
    """

    FIRST_GUESSES, MIN_GUESSES = 8, 4  # a guess costs no more than its row of the check
    MAX_NGRAM_TOKENS, MIN_NGRAM_TOKENS = 6, 2

    def __init__(self) -> None:
        # By request: the last two ends of each n-gram of its ids (0: there is none), and how many
        # ids were read.
        self._ngrams: dict[int, dict[tuple[int, ...], tuple[int, int]]] = {}
        self._n_read: dict[int, int] = {}

    def guess(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        return [self._guess_one(request, n) for request, n in zip(requests, limits, strict=True)]

    def forget(self, request: Request) -> None:
        self._ngrams.pop(request.index, None)
        self._n_read.pop(request.index, None)

    def _guess_one(self, request: Request, limit: int) -> list[int]:
        ids = request.ids
        ends = self._ngrams.setdefault(request.index, {})
        for end in range(self._n_read.get(request.index, 0) + 1, len(ids) + 1):
            for n in range(self.MIN_NGRAM_TOKENS, min(self.MAX_NGRAM_TOKENS, end) + 1):
                ngram = tuple(ids[end - n : end])
                ends[ngram] = (end, ends.get(ngram, (0, 0))[0])
        self._n_read[request.index] = len(ids)
        longest = min(self.MAX_NGRAM_TOKENS, len(ids))
        for n in range(longest, self.MIN_NGRAM_TOKENS - 1, -1):
            before = ends[tuple(ids[-n:])][1]
            if before:
                return ids[before : before + limit]
        return []


class DraftModel:
    """Guesses what a smaller model samples with the same seed at the same positions.

    rows: the draft model's KV cache. sampling: the parameters of `ops.sample` for each prompt.
    """

    FIRST_GUESSES, MIN_GUESSES = 4, 1

    def __init__(self, rows: BaseRows, sampling: Sequence[Tensor]) -> None:
        self._rows, self._sampling = rows, sampling
        self._row_of: dict[int, int] = {}  # by request

    def guess(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        room = self._rows.block_size
        guesses: list[list[int]] = [[] for _ in requests]
        for step in range(max(limits, default=0)):
            asked = [
                i
                for i, request in enumerate(requests)
                if step < limits[i] and len(request.ids) + step < room
            ]
            if not asked:
                break
            rows = [self._row(requests[i]) for i in asked]
            text = [requests[i].ids + guesses[i] for i in asked]
            new = [ids[self._rewind(row, ids) :] for row, ids in zip(rows, text, strict=True)]
            index = [requests[i].index for i in asked]
            sampling = [one[index] for one in self._sampling]
            positions = [len(ids) for ids in text]
            _, sampled = self._rows.forward(rows, new, None, sampling, positions)
            for i, token in zip(asked, sampled.tolist(), strict=True):
                guesses[i].append(token)
        return guesses

    def forget(self, request: Request) -> None:
        if (row := self._row_of.pop(request.index, None)) is not None:
            self._rows.release(row)

    def _row(self, request: Request) -> int:
        if request.index not in self._row_of:
            self._row_of[request.index] = self._rows.start(request.ids)
        return self._row_of[request.index]

    def _rewind(self, row: int, ids: list[int]) -> int:
        """Truncate a row to its longest common prefix with ids, short of all; return the length."""
        held = self._rows.ids[row]
        n = min(len(held), len(ids) - 1)
        while held[:n] != ids[:n]:
            n -= 1
        self._rows.truncate(row, n)
        return n
