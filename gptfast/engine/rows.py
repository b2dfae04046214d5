"""The engine's cache of keys and values, and the rows of tokens that it holds.

A row is a list of slots, one a token; the cache has a place for each slot. Rows that begin with the
same tokens share their slots: a prompt that others have, the beams of a search. Nothing is ever
copied; a slot is free once no row has it, and the lowest free one is taken first, so that memory
stays where it was.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from gptfast.engine.packed import CACHE_DTYPES, Packed

CHUNK = 512
"""Tokens that one call of the operator takes: more only need more memory."""


class Rows:
    """Rows of up to block_size tokens each. A token's logits do not depend on what it is computed
    beside, bit for bit: neither on other rows nor on how a row is cut into calls.
    """

    device = torch.device("cpu")

    def __init__(self, packed: Packed) -> None:
        self._packed, self._shape = packed, packed.shape
        config = packed.config
        self.block_size = config.block_size
        self._width = -(-(config.n_embd // config.n_head) // 16) * 16
        self._cache = torch.empty(0, dtype=CACHE_DTYPES[packed.dtype], device=self.device)
        self._n_slots = 0
        self._users: list[int] = []  # rows that have the slot
        self._free: list[int] = []  # a heap
        self._slots = torch.zeros(0, self.block_size, dtype=torch.int32, device=self.device)
        self._table = self._slots.numpy()
        self.ids: list[list[int]] = []
        """Of each row the tokens it holds."""
        self._spare: list[int] = []  # rows that nobody has

    def new(self) -> int:
        """An empty row."""
        if not self._spare:
            n, more = len(self.ids), max(4, len(self.ids))
            self._slots = torch.cat([self._slots, self._slots.new_zeros(more, self.block_size)])
            self._table = self._slots.numpy()
            self.ids += [[] for _ in range(more)]
            self._spare = list(range(n + more - 1, n - 1, -1))
        return self._spare.pop()

    def release(self, row: int) -> None:
        """The row is gone, and so are its tokens if no other has them."""
        self.truncate(row, 0)
        self._spare.append(row)

    def truncate(self, row: int, n: int) -> None:
        """Keep the first n tokens."""
        for slot in self._table[row, n : len(self.ids[row])].tolist():
            self._users[slot] -= 1
            if not self._users[slot]:
                heapq.heappush(self._free, slot)
        del self.ids[row][n:]

    def fork(self, row: int, n: int | None = None) -> int:
        """A new row that begins with the first n tokens of another (None: with all)."""
        new = self.new()
        ids = self.ids[row][:n]
        self._table[new, : len(ids)] = self._table[row, : len(ids)]
        for slot in self._table[new, : len(ids)].tolist():
            self._users[slot] += 1
        self.ids[new] = ids
        return new

    def start(self, ids: Sequence[int]) -> int:
        """A row that shares with another as many of the first tokens as it can, but not all of
        them: of the last there must be logits."""
        best, most = -1, 0
        for row, held in enumerate(self.ids):
            if len(held) > most and (n := _common(held, ids)) > most:
                best, most = row, n
        most = min(most, len(ids) - 1)
        return self.new() if most <= 0 else self.fork(best, most)

    def forward(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        wanted: Sequence[int] | None = None,
        sampling: Sequence[Tensor] = (),
        positions: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Append tokens to rows: logits (M, V) fp32 behind the last wanted[i] of row i's, None
        meaning one of each; and, with sampling (`ops.sample`'s first five parameters, each (M,))
        and positions (M), ids (M,) drawn from them.

        A row that would outgrow block_size restarts with its last block_size tokens, at positions
        from 0: all of them are computed anew.
        """
        try:
            return self._forward(rows, tokens, wanted or [1] * len(rows), sampling, positions)
        except BaseException:
            for row in rows:  # of which nobody knows what was computed
                self.truncate(row, 0)
            raise

    def fitting(self, row: int, new: Sequence[int]) -> list[int]:
        """new; or, of a row that would outgrow block_size, its last tokens, and the row emptied."""
        if len(self.ids[row]) + len(new) <= self.block_size:
            return list(new)
        window = [*self.ids[row], *new][-self.block_size :]
        self.truncate(row, 0)
        return window

    def _forward(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        wanted: Sequence[int],
        sampling: Sequence[Tensor],
        positions: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        pieces: list[tuple[int, int, Sequence[int], int]] = []  # row, start, tokens, wanted
        for row, new, n in zip(rows, tokens, wanted, strict=True):
            new = self.fitting(row, new)
            start = len(self.ids[row])
            self._append(row, new)
            cut = (len(new) - max(n, 1)) // CHUNK * CHUNK
            for i in range(0, cut, CHUNK):
                self._step([(row, start + i, new[i : i + CHUNK], 0)], (), ())
            pieces.append((row, start + cut, new[cut:], n))
        return self._step(pieces, sampling, positions)

    def _step(
        self,
        pieces: Sequence[tuple[int, int, Sequence[int], int]],
        sampling: Sequence[Tensor],
        positions: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        rows, starts, counts, ids, at = [], [], [], [], []
        for row, start, new, n in pieces:
            rows.append(row)
            starts.append(start)
            counts.append(len(new))
            ids += new
            at += range(len(ids) - n, len(ids))
        packed, cache, slots = self._packed.data, self._cache, self._slots
        return torch.ops.gptfast.engine_step(
            packed, self._shape, cache, slots, rows, starts, counts, ids, at, sampling, positions
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
        """Room for at least n more tokens: at first for one row, then double."""
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


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
