"""The tables in which AdamW's kernels look up their tensors.

They are built on the host and kept on the device, column by column, as int64. Building one takes
Python a millisecond or more, so a plan is kept for each list of tensors. A step looks at the
tensors' addresses, strides, sizes and dtypes. Where only addresses changed, as those of gradients
do, it rewrites their columns; where nothing did, the table on the device serves as it is.
"""

import threading
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor


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


class _Recent(dict[Any, Any]):
    """A cache of the SIZE values that were added last.

    The oldest value is dropped, not the least used: so a look-up hashes its key only once.
    """

    SIZE = 32

    def keep(self, key: Any, value: Any) -> Any:
        """Add the value, drop the oldest one if there are too many, and return the value."""
        self[key] = value
        if len(self) > self.SIZE:
            del self[next(iter(self))]
        return value


class _Plans(threading.local):
    """The plans of a thread. A plan changes when tensors move, so threads do not share any."""

    def __init__(self) -> None:
        self.recent = _Recent()


_staging = _Staging()
_plans = _Plans()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_dtype = attrgetter("dtype")


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


class Seen(NamedTuple):
    """What a plan depends on, as it is now: the addresses, and all else."""

    addresses: list[int]
    strides: list[tuple[int, ...]]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]


def look_at(tensors: list[Tensor], steps: list[Tensor]) -> Seen:
    """Return what a plan for these tensors depends on; most steps need no more work than this.

    steps: tensors of one element each, whose addresses and dtypes come last.
    """
    every = tensors + steps
    return Seen(
        list(map(Tensor.data_ptr, every)),
        list(map(Tensor.stride, tensors)),
        list(map(Tensor.size, tensors)),
        list(map(_dtype, every)),
    )


class Plan:
    """A table and the launches that work on it.

    used: the tensors to work on, if some of those given had to be copied; else None.
    """

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
        self.words = torch.tensor(list(zip(*table, strict=True)), dtype=torch.int64, device="cpu")
        self.addresses: list[int] = []
        self.alignment: list[int] = []
        self.layout: tuple = ()
        self.columns: list[int] = []
        self.version = 0
        """How often the addresses in `words` changed."""
        self._tables = _Recent()
        """The version and the table on the device, by stream."""

    def remember(self, seen: Seen, layout: tuple, columns: list[int]) -> None:
        """Keep what the plan was made from; `columns` of the table hold its addresses in turn."""
        self.addresses, self.layout, self.columns = seen.addresses, layout, columns
        self.alignment = [address % 16 for address in seen.addresses]

    def follow(self, seen: Seen, layout: tuple, tensors: list[Tensor]) -> bool:
        """Rewrite the addresses that changed; return False if the plan does not fit any more."""
        if layout != self.layout:
            return False
        addresses, n = seen.addresses, self.n_rows
        if addresses == self.addresses:
            return True
        moved = []
        for i, column in enumerate(self.columns):
            part = slice(i * n, i * n + n)
            new = addresses[part]
            if new != self.addresses[part]:
                if [address % 16 for address in new] != self.alignment[part]:
                    return False
                if set(map(Tensor.get_device, tensors[part])) != {tensors[0].get_device()}:
                    return False
                moved.append((column, [new[row] for row in self.order]))
        for column, values in moved:
            self.words[column] = torch.tensor(values, dtype=torch.int64, device="cpu")
        self.addresses = addresses
        self.version += 1
        return True

    def table_on(self, device: torch.device) -> Tensor:
        """Return the table on the device, copied there if addresses have changed."""
        if _capturing(device):
            return _staging.take(self.words).to(device, non_blocking=True)
        _staging.reserve(device, self.words.numel())
        # One table per stream: another stream would not wait for the copy.
        cuda = device.type == "cuda"
        stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
        version, table = self._tables.get(stream, (-1, None))
        if version != self.version:
            if table is None:
                table = torch.empty_like(self.words, device=device)
            upload(self.words, table)
            self._tables.keep(stream, (self.version, table))
        return table


def upload(words: Tensor, table: Tensor) -> None:
    """Copy a table to the device, without waiting."""
    # PyTorch keeps page-locked memory until such a copy has read it.
    source = words.pin_memory() if table.device.type == "cuda" else words
    table.copy_(source, non_blocking=True)


def _check_device(tensors: list[Tensor], device: torch.device) -> None:
    for t in tensors:
        if t.device != device:
            raise ValueError(f"every tensor must be on {device}, got one on {t.device}")


def norm_plan(grads: list[Tensor], seen: Seen, chunk: int) -> Plan:
    """Return the plan of grad_norm_kernel, whose programs each take `chunk` elements."""
    key = (chunk, grads[0].get_device(), tuple(seen.shapes))
    layout = (seen.strides, seen.shapes, seen.dtypes)
    plan = _plans.recent.get(key)
    if plan is not None and plan.follow(seen, layout, grads):
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
    if copied:
        return plan
    plan.remember(seen, layout, [NormRow._fields.index("grad")])
    return _plans.recent.keep(key, plan)


# The columns of addresses, in the order of the lists of tensors.
_MOVING = [StepRow._fields.index(name) for name in ("param", "grad", "exp_avg", "exp_avg_sq")]
_MASTER, _STEP = (StepRow._fields.index(name) for name in ("master", "step"))


def step_plan(
    columns: list[list[Tensor]],
    seen: Seen,
    param_ids: list[int],
    stochastic: bool,
    block: int,
) -> Plan:
    """Return the plan of adamw_kernel, whose programs each take `block` elements.

    columns: params, grads, exp_avgs, exp_avg_sqs, masters if there are any, and steps; seen: what
    these tensors are, one column after the other.
    """
    key = (block, stochastic, len(columns), tuple(seen.addresses[: len(param_ids)]))
    layout = (seen.strides, seen.shapes, seen.dtypes, param_ids)
    every = [t for column in columns for t in column]
    plan = _plans.recent.get(key)
    if plan is not None and plan.follow(seen, layout, every):
        return plan
    _check_device(every, every[0].device)
    *columns, steps = columns
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
    if copied:
        return plan
    plan.remember(seen, layout, [*_MOVING, *([_MASTER] if masters else []), _STEP])
    return _plans.recent.keep(key, plan)


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
