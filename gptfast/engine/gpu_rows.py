"""The engine's rows on a GPU: a static cache, and the step of one token a row as a CUDA graph.

A row of tokens has a slot of the cache. The rows of a step stand in the first slots, in the order
in which they are given: one that comes from elsewhere changes places, which costs little more than
reading its keys and values once. So a step's tensors never move, and it is captured once for each
power of two of rows; places left over compute something that nobody reads. Prompts, several tokens
a row and what slides past block_size run the same layers eagerly. Where there are no graphs (a CPU,
for tests) everything does.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast import ops
from gptfast.engine.gpu_model import GpuModel
from gptfast.engine.packed import Packed
from gptfast.engine.rows import CHUNK, Rows
from gptfast.generation.options import SAMPLING
from gptfast.model import GPT

TOGETHER = 32
"""Tokens a row up to which rows run together, padded: more of them fill a GPU alone."""
NO_IDS = torch.empty(0, dtype=torch.int64, device="cpu")


class _Ahead(NamedTuple):
    """A step that was begun before it was asked for: what it takes for granted, and its outputs."""

    rows: list[int]
    ids: list[int]
    held: list[int]
    positions: list[int]
    out: tuple[Tensor, Tensor]


class _Step:
    """One token for each of n rows, in the first n slots: inputs and outputs that stay in place.

    A step leaves the inputs of the one that follows. Two graphs take turns, so that a step may run
    while the outputs of the one before are still read.
    """

    def __init__(self, rows: "GraphRows", n: int) -> None:
        self._rows, self._n = rows, n
        device = rows.device
        # ids, positions, places in the cache, lengths with this token, indices of the token drawn,
        # whether somebody is there
        self.numbers = torch.zeros(6, n, dtype=torch.int64, device=device)
        one = torch.ones(n, device=device)
        # What is never set draws the likeliest token.
        self._sampling = [one * 0, one.long(), one, one * 0, one.long()]
        self._given: Sequence[Tensor] = ()
        self._graphs: list[tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = []
        if rows.captures:
            self._host = torch.empty(n, dtype=torch.int64, device="cpu", pin_memory=True)

    def give(self, sampling: Sequence[Tensor]) -> bool:
        """Take over the parameters (M,) of the first rows; whether they are those of before."""
        if not sampling or sampling is self._given:
            return bool(sampling)
        for mine, given in zip(self._sampling, sampling, strict=True):
            mine[: len(given)] = given
        self._given = sampling
        return False

    def _compute(self) -> tuple[Tensor, Tensor]:
        model, cache = self._rows.model, self._rows.cache[:, :, : self._n]
        ids, time, place, kv_len, position, there = self.numbers
        size = model.config.block_size
        x = model.hidden(ids[:, None], time[:, None], cache, place[:, None], kv_len, size)
        logits = model.head(x[:, 0], wide=True)  # (n, V)
        sampling = dict(zip(SAMPLING, self._sampling, strict=True))
        drawn = ops.sample(logits, position=position, **sampling)
        ids.copy_(drawn.clamp(min=0))
        self.numbers[1:5] += there
        return logits, drawn

    def _capture(self) -> None:
        before = self.numbers.clone()
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # What kernels there are is compiled, and what libraries need is made, before.
            for _ in range(2):
                self._compute()
                self.numbers.copy_(before)
        current.wait_stream(stream)
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with what is theirs.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = self._compute()
            self._graphs.append((graph, out))

    def launch(self) -> tuple[Tensor, Tensor]:
        """Logits (n, V) fp32 and ids (n,), which the call after the next writes over."""
        if not self._rows.captures:
            return self._compute()
        if not self._graphs:
            self._capture()
        self._graphs.reverse()
        self._graphs[0][0].replay()
        return self._graphs[0][1]

    def fetch(self, drawn: Tensor) -> Callable[[], Tensor]:
        """Have the ids sent to the host, where the function that is returned waits for them."""
        if not self._rows.captures:
            return drawn.clone
        self._host.copy_(drawn, non_blocking=True)
        sent = torch.cuda.Event()
        sent.record()

        def wait() -> Tensor:
            sent.synchronize()
            return self._host.clone()

        return wait


class GraphRows:
    """`Rows` on a device: rows of up to block_size tokens each, that come and go.

    max_batch: rows for which there is room at first; with more, the cache doubles. Unlike there,
    rounding may depend on how many rows a call has, and what a row begins with another is copied.
    """

    def __init__(self, model: GpuModel, max_batch: int) -> None:
        self.model, self.device = model, model.device
        self.block_size = model.config.block_size
        self.captures = self.device.type == "cuda"
        """Whether steps are replayed as CUDA graphs."""
        self.ids: list[list[int]] = []
        """Of each row the tokens it holds."""
        self._slot: list[int] = []  # of each row
        self._row: list[int] = []  # at each slot
        self._spare: list[int] = []  # rows that nobody has
        self._steps: dict[int, _Step] = {}
        self._ahead: _Ahead | None = None
        self.cache = model.new_cache(0)
        self._grow(max_batch)

    start = Rows.start
    fitting = Rows.fitting

    def new(self) -> int:
        """An empty row."""
        if not self._spare:
            self._grow(len(self.ids) + 1)
        return self._spare.pop()

    def release(self, row: int) -> None:
        """The row is gone, and so are its tokens."""
        self.truncate(row, 0)
        self._spare.append(row)

    def truncate(self, row: int, n: int) -> None:
        """Keep the first n tokens."""
        del self.ids[row][n:]
        self._ahead = None

    @torch.inference_mode()
    def fork(self, row: int, n: int | None = None) -> int:
        """A new row that begins with the first n tokens of another (None: with all)."""
        new = self.new()
        self.ids[new], self._ahead = self.ids[row][:n], None
        self._copy(self._slot[row], self._slot[new], len(self.ids[new]))
        return new

    @torch.inference_mode()
    def forward(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        wanted: Sequence[int] | None = None,
        sampling: Sequence[Tensor] = (),
        positions: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """`Rows.forward` with sampling and logits on the device, and ids on the CPU. Logits are
        good until the next call. An id is -1 where they are NaN, +inf or nothing but -inf.

        Where sampling is the same object as in the call before, it is not read again, and the step
        that is most likely to follow is begun: the ids that were drawn, by the same rows.
        """
        last = [1] * len(rows) if wanted is None else list(wanted)
        new = [self.fitting(row, ids) for row, ids in zip(rows, tokens, strict=True)]
        ahead, self._ahead = self._ahead, None
        with torch.cuda.device_of(self.cache):
            if all(len(ids) == 1 for ids in new) and all(n == 1 for n in last):
                one_each = [ids[0] for ids in new]
                return self._decode(list(rows), one_each, sampling, list(positions), ahead)
            return self._extend(rows, new, last, sampling, positions)

    def _extend(
        self,
        rows: Sequence[int],
        new: Sequence[list[int]],
        last: Sequence[int],
        sampling: Sequence[Tensor],
        positions: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        if len(rows) > 1 and max(map(len, new)) <= TOGETHER:
            states = self._together(rows, new, last)
        else:
            states = [self._alone(*one) for one in zip(rows, new, last, strict=True)]
        for row, ids in zip(rows, new, strict=True):
            self.ids[row] += ids
        logits = self.model.head(torch.cat(states), wide=True)  # (M, V)
        if not sampling:
            return logits, NO_IDS
        position = torch.tensor(positions, device=self.device)
        parameters = dict(zip(SAMPLING, sampling, strict=True))
        return logits, ops.sample(logits, position=position, **parameters).cpu()

    def _decode(
        self,
        rows: list[int],
        ids: list[int],
        sampling: Sequence[Tensor],
        positions: list[int],
        ahead: _Ahead | None,
    ) -> tuple[Tensor, Tensor]:
        n, held = len(rows), [len(self.ids[row]) for row in rows]
        step, begun = self._step(n), None
        steady = step.give(sampling)
        if steady and ahead and ahead[:4] == (rows, ids, held, positions):
            logits, drawn = ahead.out
        else:
            self._place(rows)
            self._fill(step, ids, held, positions or held)
            logits, drawn = step.launch()
        for row, i in zip(rows, ids, strict=True):
            self.ids[row].append(i)
        if not sampling:
            return logits[:n], NO_IDS
        fetched = step.fetch(drawn)
        if steady and max(held) + 2 <= self.block_size:
            # While the host reads these ids, and most likely only hands them back.
            begun = step.launch()
        on_host = fetched()[:n]
        if begun:
            more = [length + 1 for length in held], [position + 1 for position in positions]
            self._ahead = _Ahead(rows, on_host.tolist(), *more, begun)
        return logits[:n], on_host

    def _step(self, n: int) -> _Step:
        size = _power_of_2(n)
        if size not in self._steps:
            self._steps[size] = _Step(self, size)
        return self._steps[size]

    def _fill(self, step: _Step, ids: list[int], held: list[int], positions: Sequence[int]) -> None:
        n = len(ids)
        after = [length + 1 for length in held]
        numbers = torch.tensor([ids, held, held, after, positions, [1] * n], device="cpu")
        # Nobody's: token 0 at position 0, put where nobody looks; of the keys it sees one.
        nobody = torch.tensor([0, 0, self.block_size, 1, 0, 0], device="cpu")[:, None]
        rest = nobody.expand(-1, step.numbers.shape[1] - n)
        step.numbers.copy_(torch.cat((numbers, rest), 1))

    def _together(
        self, rows: Sequence[int], new: Sequence[list[int]], last: Sequence[int]
    ) -> list[Tensor]:
        self._place(rows)
        x = self._run(0, new, [len(self.ids[row]) for row in rows])
        pairs = zip(x, new, last, strict=True)
        return [states[len(ids) - n : len(ids)] for states, ids, n in pairs]

    def _alone(self, row: int, new: list[int], n: int) -> Tensor:
        start, slot = len(self.ids[row]), self._slot[row]
        cut = (len(new) - max(n, 1)) // CHUNK * CHUNK
        for i in range(0, cut, CHUNK):
            self._run(slot, [new[i : i + CHUNK]], [start + i])
        x = self._run(slot, [new[cut:]], [start + cut])[0]  # (T, C)
        return x[len(x) - n :]

    def _run(self, slot: int, new: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """New tokens of the rows from a slot on, padded to T, behind those held: (B, T, C)."""
        T, end = max(map(len, new)), self.block_size
        numbers: list[list[list[int]]] = [[], [], []]  # ids, positions, places in the cache
        for ids, start in zip(new, starts, strict=True):
            time, rest = list(range(start, start + len(ids))), T - len(ids)
            rows = ([*ids, *[0] * rest], [*time, *[0] * rest], [*time, *[end] * rest])
            for number, row in zip(numbers, rows, strict=True):
                number.append(row)
        ids, time, place = torch.tensor(numbers, device="cpu").to(self.device)
        kv_len = torch.tensor([start + T for start in starts], device="cpu").to(self.device)
        cache = self.cache[:, :, slot : slot + len(new)]
        size = min(end, max(starts) + T)
        return self.model.hidden(ids, time, cache, place, kv_len, size)

    def _place(self, rows: Sequence[int]) -> None:
        """Let the rows stand in the first slots, in this order."""
        for slot, row in enumerate(rows):
            at, other = self._slot[row], self._row[slot]
            if at == slot:
                continue
            n = len(self.ids[other])
            held = self.cache[:, :, slot, :, :n].clone()
            self._copy(at, slot, len(self.ids[row]))
            self.cache[:, :, at, :, :n] = held
            self._slot[row], self._slot[other] = slot, at
            self._row[slot], self._row[at] = row, other

    def _copy(self, source: int, target: int, n: int) -> None:
        self.cache[:, :, target, :, :n] = self.cache[:, :, source, :, :n]

    @torch.inference_mode()
    def _grow(self, n: int) -> None:
        """Room for at least n rows: a power of two, as the steps are."""
        before, after = len(self.ids), _power_of_2(n)
        cache = self.model.new_cache(after)
        cache[:, :, :before] = self.cache
        # The graphs know the old one's address.
        self.cache, self._steps, self._ahead = cache, {}, None
        self.ids += [[] for _ in range(before, after)]
        self._slot += range(before, after)
        self._row += range(before, after)
        self._spare += range(after - 1, before - 1, -1)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def gpu_rows(model: GPT, dtype: str, max_batch: int) -> GraphRows:
    """Rows of a model on its device, with weights in "fp32", "bf16" or "int8".

    Raises ValueError for another dtype.
    """
    return GraphRows(GpuModel(model, dtype), max_batch)


def rows_of(packed: Packed | GpuModel, max_batch: int) -> Rows | GraphRows:
    """Rows of what an engine has packed, wherever that is; max_batch: see GraphRows."""
    return GraphRows(packed, max_batch) if isinstance(packed, GpuModel) else Rows(packed)
