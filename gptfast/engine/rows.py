"""The engine's KV cache on the CPU, and the rows of tokens that it holds.

A row is a list of slots of the cache, one per token. Rows that begin with the same tokens share
slots: those of a prompt that others begin with, or of the beams of a search. Nothing is ever
copied. A slot is free when no row uses it, and the lowest free slot is taken first, which keeps the
memory in use together.
"""

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast import ops
from gptfast.engine.packed import CACHE_DTYPES, Packed
from gptfast.generation.options import SAMPLING

MAX_STEP_TOKENS = 512
"""Tokens that one call of the operator takes for a row: more only need more memory."""


class Piece(NamedTuple):
    """Tokens of a row for one call of the operator."""

    row: int
    start: int  # the position of the first token
    tokens: Sequence[int]
    wanted: int  # the number of last tokens whose logits are wanted


class BaseRows(ABC):
    """Rows of up to block_size tokens each, with their keys and values, on one device."""

    device: torch.device
    block_size: int
    ids: list[list[int]]
    """The tokens that each row holds."""

    @abstractmethod
    def new(self) -> int:
        """Return an empty row."""

    @abstractmethod
    def release(self, row: int) -> None:
        """Give a row back."""

    @abstractmethod
    def truncate(self, row: int, n: int) -> None:
        """Keep only the first n tokens of a row."""

    @abstractmethod
    def fork(self, row: int, n: int | None = None) -> int:
        """Return a new row with the first n tokens of another (None: with all)."""

    @abstractmethod
    def forward(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        wanted: Sequence[int] | None = None,
        sampling: Sequence[Tensor] = (),
        positions: Sequence[int] = (),
        lacking: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Append tokens to rows; return logits and sampled ids.

        The logits (M, V) fp32 are those after the last wanted[i] tokens of row i; None means one of
        each row. With sampling, the first five parameters of `ops.sample` as (M,) tensors, and M
        positions, ids (M,) int64 are sampled from them; without, ids is empty. lacking: (V,) bool,
        True for ids that are not sampled, whatever their logits.

        A row that would outgrow block_size starts again with its last block_size tokens, at
        positions from 0, all of which are computed again.
        """

    def start(self, ids: Sequence[int]) -> int:
        """Return a row that begins with as many of the ids as another row does, but not with all.

        The last one is left out because its logits are needed.
        """
        best, longest = -1, 0
        for row, held in enumerate(self.ids):
            if len(held) > longest and (n := n_common(held, ids)) > longest:
                best, longest = row, n
        longest = min(longest, len(ids) - 1)
        return self.new() if longest <= 0 else self.fork(best, longest)

    def fitting(self, row: int, new: Sequence[int]) -> list[int]:
        """Return the tokens to append for `new`.

        A row that would outgrow block_size is emptied, and gets its last block_size tokens.
        """
        if len(self.ids[row]) + len(new) <= self.block_size:
            return list(new)
        window = [*self.ids[row], *new][-self.block_size :]
        self.truncate(row, 0)
        return window


class Rows(BaseRows):
    """Rows on the CPU. A token's logits are the same bits whatever is computed beside it.

    They depend neither on other rows nor on how a row is cut into calls.
    """

    device = torch.device("cpu")

    def __init__(self, packed: Packed) -> None:
        self._packed, self._shape = packed, packed.shape
        config = packed.config
        self.block_size = config.block_size
        self._width = -(-(config.n_embd // config.n_head) // 16) * 16
        self._cache = torch.empty(0, dtype=CACHE_DTYPES[packed.dtype], device=self.device)
        self._n_slots = 0
        self._users: list[int] = []  # the number of rows that use each slot
        self._free: list[int] = []  # a heap
        self._slots = torch.zeros(0, self.block_size, dtype=torch.int32, device=self.device)
        self._table = self._slots.numpy()
        self.ids: list[list[int]] = []
        self._spare: list[int] = []  # rows that are not in use

    def new(self) -> int:
        if not self._spare:
            n, more = len(self.ids), max(4, len(self.ids))
            self._slots = torch.cat([self._slots, self._slots.new_zeros(more, self.block_size)])
            self._table = self._slots.numpy()
            self.ids += [[] for _ in range(more)]
            self._spare = list(range(n + more - 1, n - 1, -1))
        return self._spare.pop()

    def release(self, row: int) -> None:
        self.truncate(row, 0)
        self._spare.append(row)

    def truncate(self, row: int, n: int) -> None:
        for slot in self._table[row, n : len(self.ids[row])].tolist():
            self._users[slot] -= 1
            if not self._users[slot]:
                heapq.heappush(self._free, slot)
        del self.ids[row][n:]

    def fork(self, row: int, n: int | None = None) -> int:
        new = self.new()
        ids = self.ids[row][:n]
        self._table[new, : len(ids)] = self._table[row, : len(ids)]
        for slot in self._table[new, : len(ids)].tolist():
            self._users[slot] += 1
        self.ids[new] = ids
        return new

    def forward(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        wanted: Sequence[int] | None = None,
        sampling: Sequence[Tensor] = (),
        positions: Sequence[int] = (),
        lacking: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        wanted = wanted or [1] * len(rows)
        try:
            if lacking is None or not sampling:
                return self._forward(rows, tokens, wanted, sampling, positions)
            logits, _ = self._forward(rows, tokens, wanted, (), ())
            return logits, sample(logits, sampling, positions, lacking)
        except BaseException:
            for row in rows:  # it is unknown how much of them was computed
                self.truncate(row, 0)
            raise

    def _forward(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        wanted: Sequence[int],
        sampling: Sequence[Tensor],
        positions: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        pieces: list[Piece] = []
        for row, new, n in zip(rows, tokens, wanted, strict=True):
            new = self.fitting(row, new)
            start = len(self.ids[row])
            self._append(row, new)
            cut = (len(new) - max(n, 1)) // MAX_STEP_TOKENS * MAX_STEP_TOKENS
            for i in range(0, cut, MAX_STEP_TOKENS):
                piece = Piece(row, start + i, new[i : i + MAX_STEP_TOKENS], 0)
                self._step([piece], (), ())
            pieces.append(Piece(row, start + cut, new[cut:], n))
        return self._step(pieces, sampling, positions)

    def _step(
        self,
        pieces: Sequence[Piece],
        sampling: Sequence[Tensor],
        positions: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        rows = [piece.row for piece in pieces]
        starts = [piece.start for piece in pieces]
        counts = [len(piece.tokens) for piece in pieces]
        ids: list[int] = []
        wanted: list[int] = []
        for piece in pieces:
            ids += piece.tokens
            wanted += range(len(ids) - piece.wanted, len(ids))
        packed, cache, slots = self._packed.data, self._cache, self._slots
        return torch.ops.gptfast.engine_step(
            packed,
            self._shape,
            cache,
            slots,
            rows,
            starts,
            counts,
            ids,
            wanted,
            sampling,
            positions,
        )

    def _append(self, row: int, new: Sequence[int]) -> None:
        n = len(new)
        if len(self._free) < n:
            self._grow(n)
        start = len(self.ids[row])
        slots = [heapq.heappop(self._free) for _ in range(n)]
        for slot in slots:
            self._users[slot] = 1
        self._table[row, start : start + n] = slots
        self.ids[row] += new

    def _grow(self, n: int) -> None:
        """Make room for at least n more tokens: at first for one row, then twice as many."""
        config, before = self._packed.config, self._n_slots
        after = max(2 * before, before + n, min(256, self.block_size))
        heads = 2 * config.n_layer * config.n_head
        dtype = self._cache.dtype
        memory = torch.ops.gptfast.engine_new(heads * after * self._width * dtype.itemsize)
        cache = memory.view(dtype).view(heads, after, self._width)
        cache[:, :before] = self._cache.view(heads, before, self._width)
        self._cache, self._n_slots = cache.view(-1), after
        self._users += [0] * (after - before)
        self._free += range(before, after)
        heapq.heapify(self._free)


def sample(
    logits: Tensor, sampling: Sequence[Tensor], positions: Sequence[int], lacking: Tensor | None
) -> Tensor:
    """Return ids (M,) sampled from logits (M, V), none that is lacking; see `BaseRows.forward`."""
    if lacking is not None:
        logits = logits.masked_fill(lacking, -math.inf)
    position = torch.tensor(positions, dtype=torch.int64, device=logits.device)
    return ops.sample(logits, position=position, **dict(zip(SAMPLING, sampling, strict=True)))


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many of the first tokens are the same."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
