"""The tables in which AdamW's kernels look up their tensors.

They are built on the host and kept on the device, column by column, as int64.
"""

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

    def reserve(self, device: torch.device, n: int) -> None:
        """Make sure that a few tables of n words fit."""
        if self.free is None or self.free.numel() < 8 * n:
            pin = device.type == "cuda"
            self.free = torch.empty(
                max(self.MIN_WORDS, 32 * n), dtype=torch.int64, device="cpu", pin_memory=pin
            )

    def take(self, values: tuple[int, ...]) -> Tensor:
        """Return a table of these values in the memory, for good."""
        n = len(values)
        if self.free is None or self.free.numel() < n:
            raise RuntimeError(
                f"no page-locked memory for a table of {n} words; "
                "run the step once before capturing it in a CUDA graph"
            )
        source, self.free = self.free[:n], self.free[n:]
        _captured.append(source.copy_(torch.tensor(values, dtype=torch.int64, device="cpu")))
        return source


class _Recent(dict[tuple, Any]):
    """A cache of the SIZE values that were added last.

    The oldest value is dropped, not the least used: so a look-up hashes its key only once.
    """

    SIZE = 32

    def keep(self, key: tuple, value: Any) -> Any:
        """Add the value, drop the oldest one if there are too many, and return the value."""
        self[key] = value
        if len(self) > self.SIZE:
            del self[next(iter(self))]
        return value


_staging = _Staging()
_captured: list[Tensor] = []
_tables = _Recent()
_plans = _Recent()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def table_on(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a tensor of these values on device, from the cache if it is there."""
    if _capturing(device):
        return _staging.take(values).to(device, non_blocking=True)
    _staging.reserve(device, len(values))
    pin = device.type == "cuda"
    # One table per stream: another stream would not wait for the copy.
    key = (values, device, torch.cuda.current_stream(device).cuda_stream if pin else 0)
    table = _tables.get(key)
    if table is not None:
        return table
    source = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=pin)
    return _tables.keep(key, source.to(device, non_blocking=True))


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


class Plan(NamedTuple):
    """A table and the launches that work on it.

    used: the tensors to work on, if some of those given had to be copied; else None.
    """

    values: tuple[int, ...]
    n_rows: int
    launches: list[Launch]
    used: list[list[Tensor]] | None


def _plan(
    rows: list[tuple[tuple, NormRow | StepRow]],
    elements_per_program: int,
    used: list[list[Tensor]] | None,
) -> Plan:
    """Sort rows of (kind, row) by kind and set each row's first program."""
    table: list[NormRow | StepRow] = []
    launches = []
    for kind in dict.fromkeys(kind for kind, _ in rows):
        first_row, n_programs = len(table), 0
        for other, row in rows:
            if other == kind:
                table.append(row._replace(first_program=n_programs))
                n_programs += -(-row.numel // elements_per_program)
        launches.append(Launch(kind, first_row, len(table) - first_row, n_programs))
    values = tuple(word for column in zip(*table, strict=True) for word in column)
    return Plan(values, len(table), launches, used)


def _signature(tensors: list[Tensor]) -> tuple:
    """Return all that a plan depends on; most steps need no more work on the host than this."""
    addresses, strides = map(Tensor.data_ptr, tensors), map(Tensor.stride, tensors)
    return (
        tuple(addresses),
        tuple(strides),
        tuple(map(Tensor.size, tensors)),
        tuple([t.dtype for t in tensors]),
    )


def _check_device(tensors: list[Tensor], device: torch.device) -> None:
    for t in tensors:
        if t.device != device:
            raise ValueError(f"every tensor must be on {device}, got one on {t.device}")


def norm_plan(grads: list[Tensor], chunk: int) -> Plan:
    """Return the plan of grad_norm_kernel, whose programs each take `chunk` elements."""
    key = (_signature(grads), chunk)
    plan = _plans.get(key)
    if plan is not None:
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
    plan = _plan(rows, chunk, [used] if copied else None)
    return plan if copied else _plans.keep(key, plan)


def step_plan(
    columns: list[list[Tensor]],
    steps: list[Tensor],
    param_ids: list[int],
    stochastic: bool,
    block: int,
) -> Plan:
    """Return the plan of adamw_kernel, whose programs each take `block` elements.

    columns: params, grads, exp_avgs, exp_avg_sqs and, if there are any, masters.
    """
    every = [t for column in (*columns, steps) for t in column]
    key = (_signature(every), len(columns), tuple(param_ids), stochastic, block)
    plan = _plans.get(key)
    if plan is not None:
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
        shape = tensors[0].shape
        for t in tensors:
            if t.shape != shape:
                raise ValueError(
                    f"adamw: the parameter has the shape {tuple(shape)}, its gradient and state "
                    f"must have it too, got {tuple(t.shape)}"
                )
        used.append(_in_one_order(tensors, stochastic))
        copied |= any(u is not t for u, t in zip(used[-1], tensors, strict=True))
        param, grad, exp_avg, exp_avg_sq, *master = [t.data_ptr() for t in used[-1]]
        row = StepRow(
            first_program=0,
            numel=shape.numel(),
            param=param,
            grad=grad,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            master=master[0] if master else 0,
            step=step.data_ptr(),
            param_id=param_id,
        )
        rows.append((_kind_of(used[-1]), row))
    plan = _plan(rows, block, used if copied else None)
    return plan if copied else _plans.keep(key, plan)


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
    counts elements in their logical order, and asks for it.
    """
    param = tensors[0]
    if in_logical_order or not _is_dense(param):
        return [t.contiguous() for t in tensors]
    return [
        t if _same_order(param, t) else torch.empty_like(param, dtype=t.dtype).copy_(t)
        for t in tensors
    ]
