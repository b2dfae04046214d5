"""The engine's KV cache on a GPU, with the decode step of one token per row as a CUDA graph.

Each row of tokens has a slot of a static cache. The rows of a step are moved to the first slots, in
the order in which they are given; moving one costs little more than reading its keys and values
once. So a step's tensors never move in memory, and it is captured once for each power of two of
rows, and again where some ids must not be sampled; unused slots compute values that nobody reads.
Prompts, steps of several tokens per row and
windows that slide past block_size run the same layers eagerly, as does everything on devices
without graphs (a CPU, for tests).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast import ops
from gptfast.engine.gpu_model import GpuModel
from gptfast.engine.packed import Packed
from gptfast.engine.rows import MAX_STEP_TOKENS, BaseRows, Rows, sample
from gptfast.generation.options import SAMPLING
from gptfast.model import GPT

MAX_TOKENS_TO_BATCH = 32
"""Tokens per row up to which rows run as one padded batch: more tokens fill a GPU alone."""
NO_IDS = torch.empty(0, dtype=torch.int64, device="cpu")


class _Ahead(NamedTuple):
    """A decode step that was started before it was asked for: its assumed inputs, its outputs."""

    step: "_Step"
    rows: list[int]
    ids: list[int]
    held: list[int]
    positions: list[int]
    out: tuple[Tensor, Tensor]


class _Inputs(NamedTuple):
    """The inputs of a step, each with one integer per slot: the rows of one tensor, in this order.

    The rows from `time` on grow by 1 per step.
    """

    ids: Any
    in_use: Any
    """1 for slots in use, else 0."""
    time: Any
    """Positions of the ids."""
    place: Any
    """Places in the cache for their keys and values."""
    kv_len: Any
    """Lengths with these ids."""
    position: Any
    """Positions of the tokens to sample."""


_GROWING = slice(_Inputs._fields.index("time"), None)


class _Step:
    """The decode step of n rows in the first n slots, with inputs and outputs at fixed addresses.

    A step writes the inputs of the next one. Two graphs take turns, so that a step can run while
    the outputs of the one before are still read.
    """

    def __init__(self, rows: "GraphRows", n: int, lacks_ids: bool) -> None:
        self._rows, self._n = rows, n
        device = rows.device
        # One tensor, which `_Inputs` names, so that all inputs are copied at once.
        self.inputs = torch.zeros(len(_Inputs._fields), n, dtype=torch.int64, device=device)
        one = torch.ones(n, dtype=torch.float32, device=device)
        # These defaults sample the likeliest token.
        self._sampling = [one * 0, one.long(), one, one * 0, one.long()]
        self._lacking: Tensor | None = None
        if lacks_ids:
            V = rows.model.config.vocab_size
            self._lacking = torch.zeros(V, dtype=torch.bool, device=device)
        self._set: tuple[Sequence[Tensor], Tensor | None] = (), None
        self._graphs: list[tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = []
        if rows.captures:
            self._host = torch.empty(n, dtype=torch.int64, device="cpu", pin_memory=True)

    def has_sampling(self, sampling: Sequence[Tensor], lacking: Tensor | None) -> bool:
        """Return whether these very objects were set last; False if sampling is empty."""
        return bool(sampling) and sampling is self._set[0] and lacking is self._set[1]

    def set_sampling(self, sampling: Sequence[Tensor], lacking: Tensor | None) -> None:
        """Copy the parameters (M,) of the first rows, and lacking (V,) of all."""
        for mine, given in zip(self._sampling, sampling, strict=True):
            mine[: len(given)] = given
        if self._lacking is not None and lacking is not None:
            self._lacking.copy_(lacking)
        self._set = sampling, lacking

    def _compute(self) -> tuple[Tensor, Tensor]:
        model, cache = self._rows.model, self._rows.cache[:, :, : self._n]
        inputs = _Inputs(*self.inputs)
        ids, time, place = (x[:, None] for x in (inputs.ids, inputs.time, inputs.place))  # (n, 1)
        x = model.hidden(ids, time, cache, place, inputs.kv_len, model.config.block_size)
        logits = model.head(x[:, 0], fp32_out=True)  # (n, V)
        scores = logits
        if self._lacking is not None:
            scores = logits.masked_fill(self._lacking, -math.inf)
        sampling = dict(zip(SAMPLING, self._sampling, strict=True))
        drawn = ops.sample(scores, position=inputs.position, **sampling)
        inputs.ids.copy_(drawn.clamp(min=0))
        self.inputs[_GROWING] += inputs.in_use
        return logits, drawn

    def _capture(self) -> None:
        before = self.inputs.clone()
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Before the capture, kernels are compiled and libraries make their workspaces.
            for _ in range(2):
                self._compute()
                self.inputs.copy_(before)
        current.wait_stream(stream)
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU during the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = self._compute()
            self._graphs.append((graph, out))

    def launch(self) -> tuple[Tensor, Tensor]:
        """Run a step; return logits (n, V) fp32 and ids (n,), which the next but one overwrites."""
        if not self._rows.captures:
            return self._compute()
        if not self._graphs:
            self._capture()
        self._graphs.reverse()
        self._graphs[0][0].replay()
        return self._graphs[0][1]

    def fetch(self, drawn: Tensor) -> Callable[[], Tensor]:
        """Start to copy the ids to the host; return a function that waits for them."""
        if not self._rows.captures:
            return drawn.clone
        self._host.copy_(drawn, non_blocking=True)
        sent = torch.cuda.Event()
        sent.record()

        def wait() -> Tensor:
            sent.synchronize()
            return self._host.clone()

        return wait


class GraphRows(BaseRows):
    """Rows on a GPU, or on another device for tests.

    max_batch: rows for which there is room at first; for more, the cache doubles. Unlike on the
    CPU, rounding may depend on the number of rows of a call, and a fork copies its tokens.
    """

    def __init__(self, model: GpuModel, max_batch: int) -> None:
        self.model, self.device = model, model.device
        self.block_size = model.config.block_size
        self.captures = self.device.type == "cuda"
        """Whether steps are replayed as CUDA graphs."""
        self.ids: list[list[int]] = []
        self._slot: list[int] = []  # of each row
        self._row: list[int] = []  # at each slot
        self._spare: list[int] = []  # rows that are not in use
        self._steps: dict[tuple[int, bool], _Step] = {}
        self._ahead: _Ahead | None = None
        self.cache = model.new_cache(0)
        self._grow(max_batch)

    def new(self) -> int:
        if not self._spare:
            self._grow(len(self.ids) + 1)
        return self._spare.pop()

    def release(self, row: int) -> None:
        self.truncate(row, 0)
        self._spare.append(row)

    def truncate(self, row: int, n: int) -> None:
        del self.ids[row][n:]
        self._ahead = None

    @torch.inference_mode()
    def fork(self, row: int, n: int | None = None) -> int:
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
        lacking: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Append tokens as `BaseRows.forward` says.

        sampling, lacking and logits are on the device, ids on the CPU. Logits are valid until the
        next call. An id is -1 where the logits are NaN, +inf or nothing but -inf.

        If sampling and lacking are the same objects as in the call before, they are not copied
        again, and the most likely next step is started: the sampled ids, appended to the same rows.
        """
        last = [1] * len(rows) if wanted is None else list(wanted)
        new = [self.fitting(row, ids) for row, ids in zip(rows, tokens, strict=True)]
        ahead, self._ahead = self._ahead, None
        with torch.cuda.device_of(self.cache):
            if all(len(ids) == 1 for ids in new) and all(n == 1 for n in last):
                one_each = [ids[0] for ids in new]
                return self._decode(list(rows), one_each, sampling, list(positions), lacking, ahead)
            logits = self._extend(rows, new, last)
            if not sampling:
                return logits, NO_IDS
            return logits, sample(logits, sampling, positions, lacking).cpu()

    def _extend(self, rows: Sequence[int], new: Sequence[list[int]], last: Sequence[int]) -> Tensor:
        if len(rows) > 1 and max(map(len, new)) <= MAX_TOKENS_TO_BATCH:
            states = self._run_batched(rows, new, last)
        else:
            states = [self._run_alone(*one) for one in zip(rows, new, last, strict=True)]
        for row, ids in zip(rows, new, strict=True):
            self.ids[row] += ids
        return self.model.head(torch.cat(states), fp32_out=True)  # (M, V)

    def _decode(
        self,
        rows: list[int],
        ids: list[int],
        sampling: Sequence[Tensor],
        positions: list[int],
        lacking: Tensor | None,
        ahead: _Ahead | None,
    ) -> tuple[Tensor, Tensor]:
        n, held = len(rows), [len(self.ids[row]) for row in rows]
        step, begun = self._step(n, lacking is not None), None
        steady = step.has_sampling(sampling, lacking)
        if sampling and not steady:
            step.set_sampling(sampling, lacking)
        if steady and ahead and ahead[:5] == (step, rows, ids, held, positions):
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
            # It runs while the host reads these ids, which it most likely passes back unchanged.
            begun = step.launch()
        on_host = fetched()[:n]
        if begun:
            more = [length + 1 for length in held], [position + 1 for position in positions]
            self._ahead = _Ahead(step, rows, on_host.tolist(), *more, begun)
        return logits[:n], on_host

    def _step(self, n: int, lacks_ids: bool) -> _Step:
        kind = _power_of_2(n), lacks_ids
        if kind not in self._steps:
            self._steps[kind] = _Step(self, *kind)
        return self._steps[kind]

    def _fill(self, step: _Step, ids: list[int], held: list[int], positions: Sequence[int]) -> None:
        n = len(ids)
        after = [length + 1 for length in held]
        used = _Inputs(ids, [1] * n, time=held, place=held, kv_len=after, position=positions)
        # Unused slots: token 0 at position 0, written to the unread last place, seeing one key.
        unused = _Inputs(0, 0, time=0, place=self.block_size, kv_len=1, position=0)
        rest = _int64(unused)[:, None].expand(-1, step.inputs.shape[1] - n)
        step.inputs.copy_(torch.cat((_int64(used), rest), 1))

    def _run_batched(
        self, rows: Sequence[int], new: Sequence[list[int]], last: Sequence[int]
    ) -> list[Tensor]:
        self._place(rows)
        x = self._run(0, new, [len(self.ids[row]) for row in rows])
        pairs = zip(x, new, last, strict=True)
        return [states[len(ids) - n : len(ids)] for states, ids, n in pairs]

    def _run_alone(self, row: int, new: list[int], n: int) -> Tensor:
        start, slot = len(self.ids[row]), self._slot[row]
        cut = (len(new) - max(n, 1)) // MAX_STEP_TOKENS * MAX_STEP_TOKENS
        for i in range(0, cut, MAX_STEP_TOKENS):
            self._run(slot, [new[i : i + MAX_STEP_TOKENS]], [start + i])
        x = self._run(slot, [new[cut:]], [start + cut])[0]  # (T, C)
        return x[len(x) - n :]

    def _run(self, slot: int, new: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Append new tokens, padded to T, to the rows from a slot on; return (B, T, C)."""
        T, end = max(map(len, new)), self.block_size
        numbers: list[list[list[int]]] = [[], [], []]  # ids, positions, places in the cache
        for ids, start in zip(new, starts, strict=True):
            at, rest = list(range(start, start + len(ids))), T - len(ids)
            rows = ([*ids, *[0] * rest], [*at, *[0] * rest], [*at, *[end] * rest])
            for number, row in zip(numbers, rows, strict=True):
                number.append(row)
        idx, time, place = _int64(numbers).to(self.device)
        kv_len = _int64([start + T for start in starts]).to(self.device)
        cache = self.cache[:, :, slot : slot + len(new)]
        size = min(end, max(starts) + T)
        return self.model.hidden(idx, time, cache, place, kv_len, size)

    def _place(self, rows: Sequence[int]) -> None:
        """Move the rows to the first slots, in this order."""
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
        """Make room for at least n rows: a power of two, like the steps."""
        before, after = len(self.ids), _power_of_2(n)
        cache = self.model.new_cache(after)
        cache[:, :, :before] = self.cache
        # The graphs hold the address of the old cache.
        self.cache, self._steps, self._ahead = cache, {}, None
        self.ids += [[] for _ in range(before, after)]
        self._slot += range(before, after)
        self._row += range(before, after)
        self._spare += range(after - 1, before - 1, -1)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _int64(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def gpu_rows(model: GPT, dtype: str, max_batch: int) -> GraphRows:
    """Return the rows of a model on its device, with weights in "fp32", "bf16" or "int8".

    Raises ValueError for another dtype.
    """
    return GraphRows(GpuModel(model, dtype), max_batch)


def rows_of(packed: Packed | GpuModel, max_batch: int) -> BaseRows:
    """Return new rows for packed weights, on their device; max_batch: see GraphRows."""
    return GraphRows(packed, max_batch) if isinstance(packed, GpuModel) else Rows(packed)
