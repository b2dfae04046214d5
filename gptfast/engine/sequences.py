"""Sequences of an engine for a beam search, as `gptfast.generation.sequences` has for a model."""

from collections.abc import Sequence

from torch import Tensor

from gptfast.engine.rows import BaseRows
from gptfast.generation.sequences import Sequences


class EngineSequences(Sequences):
    """Prompts and their continuations; sequences share what they have in common in the KV cache."""

    def __init__(self, rows: BaseRows, prompts: Sequence[Sequence[int]]) -> None:
        self._hold(prompts, rows.device)
        self._rows = rows
        size = rows.block_size
        self._mine: list[int] = []
        for prompt in prompts:
            self._mine.append(rows.start(prompt[-size:]))
        self._new = [
            list(prompt[-size:])[len(rows.ids[row]) :]
            for row, prompt in zip(self._mine, prompts, strict=True)
        ]

    def logits(self) -> Tensor:
        """Return next-token logits (B, V)."""
        return self._rows.forward(self._mine, self._new)[0]

    def append(self, ids: Tensor) -> None:
        """Add one token to each sequence: ids (B,) int64."""
        super().append(ids)
        self._new = [[i] for i in ids.tolist()]

    def select(self, rows: Tensor) -> None:
        """Replace sequence i by a copy of sequence rows[i]; their number may change."""
        self.tokens, self.length = self.tokens[rows], self.length[rows]
        before, left = self._mine, set(self._mine)
        self._mine = []
        for parent in rows.tolist():
            row = before[parent]
            # The first to continue a row keeps it; the others get rows that share its slots.
            self._mine.append(row if row in left else self._rows.fork(row))
            left.discard(row)
        for row in left:
            self._rows.release(row)

    def close(self) -> None:
        """Release all rows of the KV cache."""
        for row in self._mine:
            self._rows.release(row)
        self._mine = []
