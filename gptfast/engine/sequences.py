"""Rows of the engine that a search goes through together, as `gptfast.sequences` for a model."""

from collections.abc import Sequence

from torch import Tensor

from gptfast.engine.rows import Rows
from gptfast.generation.sequences import Sequences


class EngineSequences(Sequences):
    """Prompts and their continuations; a row that others continue is shared, not copied."""

    def __init__(self, rows: Rows, prompts: Sequence[Sequence[int]]) -> None:
        self._hold(prompts, rows.device)
        self._rows = rows
        size = rows.block_size
        self._mine = []
        for prompt in prompts:
            self._mine.append(rows.start(prompt[-size:]))
        self._new = [
            list(prompt[-size:])[len(rows.ids[row]) :]
            for row, prompt in zip(self._mine, prompts, strict=True)
        ]

    def logits(self) -> Tensor:
        """Next-token logits (B, V)."""
        return self._rows.forward(self._mine, self._new)[0]

    def append(self, ids: Tensor) -> None:
        """Add one token to each row: ids (B,) int64."""
        super().append(ids)
        self._new = [[i] for i in ids.tolist()]

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] is; there may be more rows than before."""
        self.tokens, self.length = self.tokens[rows], self.length[rows]
        before, left = self._mine, set(self._mine)
        self._mine = []
        for parent in rows.tolist():
            row = before[parent]
            # The first to continue a row has it; others share what it holds.
            self._mine.append(row if row in left else self._rows.fork(row))
            left.discard(row)
        for row in left:
            self._rows.release(row)

    def close(self) -> None:
        """Let go of all rows."""
        for row in self._mine:
            self._rows.release(row)
        self._mine = []
