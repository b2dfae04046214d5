"""The tables in which AdamW's kernels look up their tensors.

They are built on the host and kept on the device, column by column, as int64. Building one takes
Python a millisecond or more, so a plan is kept for each list of tensors. A step reads the tensors'
addresses, and asks PyTorch once whether all else about them is as it was. Where only addresses
changed, as those of gradients do, it rewrites their columns; where nothing did, the table on the
device serves as it is.
"""

import threading
from array import array
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from gptfast.torch_private import likeness


class NormRow(NamedTuple):
    """A row of the table of grad_norm_kernel, that is a gradient. Addresses are in bytes."""

    first_program: int  # of the launch that works on the row
    numel: int
    grad: int
    first_partial: int  # where the first program stores its sum


class StepRow(NamedTuple):
    """A row of the table of adamw_kernel, that is a parameter. Addresses are in bytes."""

    first_program: int  # of the launch that works on the row
    numel: int
    param: int
    grad: int
    exp_avg: int
    exp_avg_sq: int
    master: int  # 0 if there is none
    step: int
    param_id: int


class _Staging:
    """Page-locked memory for the tables that CUDA graphs copy: each replay reads it again.

    It is allocated before a capture, as a capture does not allow it. It is never freed, as it is
    not known here how long a graph lives. A capture takes about 10 KB.
    """

    MIN_WORDS = 1 << 17

    def __init__(self) -> None:
        self.free: Tensor | None = None
        self.taken: list[Tensor] = []
        self.lock = threading.Lock()

    def reserve(self, device: torch.device, n: int) -> None:
        """Make sure that a few tables of n words fit."""
        if self.free is None or self.free.numel() < 8 * n:
            pin = device.type == "cuda"
            self.free = torch.empty(
                max(self.MIN_WORDS, 32 * n), dtype=torch.int64, device="cpu", pin_memory=pin
            )

    def take(self, words: Tensor) -> Tensor:
        """Return a copy of a table in the memory, for good."""
        n = words.numel()
        with self.lock:
            if self.free is None or self.free.numel() < n:
                raise RuntimeError(
                    f"no page-locked memory for a table of {n} words; "
                    "run the step once before capturing it in a CUDA graph"
                )
            source, self.free = self.free[:n].view(words.shape), self.free[n:]
            self.taken.append(source.copy_(words))
        return source


class _Plans(threading.local):
    """The plans of a thread. A plan changes when tensors move, so threads do not share any."""

    SIZE = 32
    """The most plans that are kept; the one that was made first goes first."""

    def __init__(self) -> None:
        self.recent: deque[Plan] = deque(maxlen=self.SIZE)


_staging = _Staging()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _kind_of(tensors: list[Tensor]) -> tuple:
    """Return what a launch is compiled for: the dtypes, then the alignment in elements.

    A thread loads that many elements at once, 128 bits of the widest dtype. The alignment is 0 if
    one of the tensors does not start at a multiple of it.
    """
    for t in tensors:
        if t.dtype not in _DTYPES:
            raise ValueError(f"adamw takes float32, bfloat16 and float16 tensors, got {t.dtype}")
    aligned = 16 // max(t.itemsize for t in tensors)
    if any(t.data_ptr() % (aligned * t.itemsize) for t in tensors):
        aligned = 0
    return (*(_DTYPES[t.dtype] for t in tensors), aligned)


class Launch(NamedTuple):
    """A launch for the rows of one kind, which are neighbours in the table."""

    kind: tuple
    first_row: int
    n_rows: int
    n_programs: int


class Plan:
    """A table and the launches that work on it.

    used: the tensors to work on, if some of those given had to be copied; else None.
    """

    MAX_STREAMS = 32
    """The most streams that have a table of their own."""

    def __init__(
        self,
        rows: list[tuple[tuple, NormRow | StepRow]],
        elements_per_program: int,
        used: list[list[Tensor]] | None,
    ) -> None:
        """Sort rows of (kind, row) by kind and set each row's first program."""
        table: list[NormRow | StepRow] = []
        self.used = used
        self.launches: list[Launch] = []
        self.order: list[int] = []
        """The places, in the lists of tensors, of the table's rows."""
        for kind in dict.fromkeys(kind for kind, _ in rows):
            first_row, n_programs = len(table), 0
            for i, (other, row) in enumerate(rows):
                if other == kind:
                    self.order.append(i)
                    table.append(row._replace(first_program=n_programs))
                    n_programs += -(-row.numel // elements_per_program)
            self.launches.append(Launch(kind, first_row, len(table) - first_row, n_programs))
        self.n_rows = len(table)
        self.n_programs = sum(launch.n_programs for launch in self.launches)
        # Python writes faster to an array than to the tensor of its memory.
        self._array = array("q", [word for column in zip(*table, strict=True) for word in column])
        words = torch.frombuffer(self._array, dtype=torch.int64)
        self.words = words.view(-1, self.n_rows)
        self.version = 0
        """How often the addresses in `words` changed."""
        self._tables: dict[int, tuple[int, Tensor]] = {}
        """The version and the table on the device, by stream."""

    def keep(self, key: tuple, tensors: list[Tensor], columns: Sequence[int]) -> None:
        """Keep the plan for calls with this key and tensors like these, wherever they are.

        columns: of the table, each with the addresses of the next `n_rows` tensors.
        """
        if len(set(map(id, tensors))) < len(tensors):
            return  # `likeness` takes no tensor twice
        self._key, self._columns = (len(tensors), *key), columns
        self._are_alike = likeness(tensors)
        self._layout: object = None
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._alignment = [address % 16 for address in self._addresses]
        _plans.recent.appendleft(self)

    def follow(
        self, key: tuple, tensors: list[Tensor], addresses: list[int], layout: object
    ) -> bool:
        """Rewrite the addresses that changed; return False if the plan does not fit any more.

        layout: an object that stands for all about the tensors but their addresses, or None.
        """
        if key != self._key:
            return False
        if layout is None or layout is not self._layout:
            if not self._are_alike(*tensors):
                return False
            self._layout = layout
        if addresses == self._addresses:
            return True
        n, moved = self.n_rows, []
        for i, column in enumerate(self._columns):
            part = slice(i * n, i * n + n)
            new = addresses[part]
            if new != self._addresses[part]:
                if [address % 16 for address in new] != self._alignment[part]:
                    return False
                moved.append((column * n, array("q", [new[row] for row in self.order])))
        for begin, column_words in moved:
            self._array[begin : begin + n] = column_words
        self._addresses = addresses
        self.version += 1
        return True

    def copy_back(self, columns: list[list[Tensor]]) -> None:
        """Copy what the launches wrote to the tensors whose copies they worked on.

        columns: params, grads and the others of `adamw_kernel`.
        """
        if self.used is None:
            return
        for tensors, used in zip(zip(*columns, strict=True), self.used, strict=True):
            for tensor, copy in zip(tensors, used, strict=True):
                # The gradient was only read.
                if copy is not tensor and tensor is not tensors[1]:
                    tensor.copy_(copy)

    def table_on(self, device: torch.device) -> Tensor:
        """Return the table on the device, copied there if addresses have changed."""
        if _capturing(device):
            return _staging.take(self.words).to(device, non_blocking=True)
        _staging.reserve(device, self.words.numel())
        # One table per stream: another stream would not wait for the copy.
        stream = driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
        version, table = self._tables.get(stream) or (
            -1,
            torch.empty_like(self.words, device=device),
        )
        if version != self.version:
            upload(self.words, table)
            if len(self._tables) == self.MAX_STREAMS:
                self._tables.clear()
            self._tables[stream] = self.version, table
        return table


_plans = _Plans()


def upload(words: Tensor, table: Tensor) -> None:
    """Copy a table to the device, without waiting."""
    # PyTorch keeps page-locked memory until such a copy has read it.
    source = words.pin_memory() if table.device.type == "cuda" else words
    table.copy_(source, non_blocking=True)


def _check_device(tensors: list[Tensor], device: torch.device) -> None:
    for t in tensors:
        if t.device != device:
            raise ValueError(f"every tensor must be on {device}, got one on {t.device}")


def _kept_plan(
    key: tuple, tensors: list[Tensor], addresses: list[int], layout: object
) -> Plan | None:
    """Return the plan that was kept for such tensors, with their addresses in its table."""
    key = (len(tensors), *key)
    for plan in _plans.recent:
        if plan.follow(key, tensors, addresses, layout):
            return plan
    return None


def norm_plan(grads: list[Tensor], chunk: int, layout: object) -> Plan | None:
    """Return the plan of grad_norm_kernel, whose programs each take `chunk` elements.

    layout: as in `Plan.follow`. Returns None if one of the gradients is float64, which the kernel
    does not take.
    """
    key = (chunk,)
    plan = _kept_plan(key, grads, list(map(Tensor.data_ptr, grads)), layout)
    if plan is not None or any(g.dtype == torch.float64 for g in grads):
        return plan
    _check_device(grads, grads[0].device)
    # The order of the elements does not matter, if each is there once.
    used = [
        g if _is_dense(g) and _kind_of([g])[-1] else g.clone(memory_format=torch.contiguous_format)
        for g in grads
    ]
    copied = any(u is not g for u, g in zip(used, grads, strict=True))
    rows: list[tuple[tuple, NormRow | StepRow]] = []
    n_partials = 0
    for g in used:
        rows.append((_kind_of([g]), NormRow(0, g.numel(), g.data_ptr(), n_partials)))
        n_partials += -(-g.numel() // chunk)
    plan = Plan(rows, chunk, [used] if copied else None)
    if not copied:
        plan.keep(key, grads, [NormRow._fields.index("grad")])
    return plan


# The columns of addresses, in the order of the lists of tensors.
_MOVING = [StepRow._fields.index(name) for name in ("param", "grad", "exp_avg", "exp_avg_sq")]
_MASTER, _STEP = (StepRow._fields.index(name) for name in ("master", "step"))


def step_plan(
    columns: list[list[Tensor]],
    param_ids: list[int],
    stochastic: bool,
    block: int,
    layout: object,
) -> Plan | None:
    """Return the plan of adamw_kernel, whose programs each take `block` elements.

    columns: params, grads, exp_avgs, exp_avg_sqs, masters if there are any, and steps; layout: as
    in `Plan.follow`. Returns None if a tensor of another column than the steps is float64, which
    the kernel does not take.
    """
    every = list(chain.from_iterable(columns))
    addresses = list(map(Tensor.data_ptr, every))
    # Models of the same shapes take turns with plans of their own.
    key = (block, stochastic, len(columns), param_ids, addresses[: len(columns[0])])
    plan = _kept_plan(key, every, addresses, layout)
    *columns, steps = columns
    if plan is not None or any(t.dtype == torch.float64 for column in columns for t in column):
        return plan
    _check_device(every, every[0].device)
    params, masters = columns[0], columns[4:]
    if any(t.dtype != torch.float32 for t in (*steps, *(masters[0] if masters else []))):
        raise ValueError("adamw: masters and steps must be float32; convert them with .float()")
    if stochastic and any(p.dtype != torch.bfloat16 for p in params):
        raise ValueError("adamw: stochastic rounding needs parameters in bfloat16")
    rows: list[tuple[tuple, NormRow | StepRow]] = []
    used, copied = [], False
    for *tensors, step, param_id in zip(*columns, steps, param_ids, strict=True):
        used.append(_in_one_order(tensors, stochastic))
        copied |= any(u is not t for u, t in zip(used[-1], tensors, strict=True))
        rows.append((_kind_of(used[-1]), _step_row(used[-1], step, param_id)))
    plan = Plan(rows, block, used if copied else None)
    if not copied:
        plan.keep(key, every, [*_MOVING, *([_MASTER] if masters else []), _STEP])
    return plan


def _step_row(tensors: list[Tensor], step: Tensor, param_id: int) -> StepRow:
    """Return the row of a parameter, without its first program."""
    param, grad, exp_avg, exp_avg_sq, *master = [t.data_ptr() for t in tensors]
    return StepRow(
        first_program=0,
        numel=tensors[0].numel(),
        param=param,
        grad=grad,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        master=master[0] if master else 0,
        step=step.data_ptr(),
        param_id=param_id,
    )


def _is_dense(t: Tensor) -> bool:
    """Return whether the elements fill their memory, each once, in any order."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _same_order(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _in_one_order(tensors: list[Tensor], in_logical_order: bool) -> list[Tensor]:
    """Return the tensors with their elements in the same memory order, copied where necessary.

    The order is that of the first tensor if it is dense, else the logical one. Stochastic rounding
    counts elements in their logical order, and asks for it. Raises ValueError if shapes differ.
    """
    param = tensors[0]
    for t in tensors:
        if t.shape != param.shape:
            raise ValueError(
                f"adamw: the parameter has the shape {tuple(param.shape)}, its gradient and state "
                f"must have it too, got {tuple(t.shape)}"
            )
    if in_logical_order or not _is_dense(param):
        return [t.contiguous() for t in tensors]
    return [
        t if _same_order(param, t) else torch.empty_like(param, dtype=t.dtype).copy_(t)
        for t in tensors
    ]
