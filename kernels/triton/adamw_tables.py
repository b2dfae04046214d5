"""The tables by which AdamW's kernels find their tensors: built on the host, kept on the device."""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor


class _Staging:
    """Page-locked memory for the tables that CUDA graphs copy: each replay reads it again.

    Taken before any capture, where allocating is not allowed, and never given back: how long a
    graph lives is not known here. A capture costs some 10 KB.
    """

    WORDS = 1 << 17

    def __init__(self) -> None:
        self.free: Tensor | None = None

    def reserve(self, device: torch.device, n: int) -> None:
        """Have room for a few tables of n words."""
        if self.free is None or self.free.numel() < 8 * n:
            pin = device.type == "cuda"
            self.free = torch.empty(
                max(self.WORDS, 32 * n), dtype=torch.int64, device="cpu", pin_memory=pin
            )

    def take(self, values: tuple[int, ...]) -> Tensor:
        n = len(values)
        if self.free is None or self.free.numel() < n:
            raise RuntimeError("run the step once before capturing it in a CUDA graph")
        source, self.free = self.free[:n], self.free[n:]
        _captured.append(source.copy_(torch.tensor(values, dtype=torch.int64, device="cpu")))
        return source


class _Recent(dict):
    """The SIZE values last made. Oldest first out, not least used: a find hashes its key once."""

    SIZE = 32

    def keep(self, key: tuple, value: Any) -> Any:
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
    """The table `values`, on device: the last one of the same values, or a new copy."""
    if _capturing(device):
        return _staging.take(values).to(device, non_blocking=True)
    _staging.reserve(device, len(values))
    pin = device.type == "cuda"
    # Another stream would not wait for the copy.
    key = (values, device, torch.cuda.current_stream(device).cuda_stream if pin else 0)
    table = _tables.get(key)
    if table is not None:
        return table
    source = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=pin)
    return _tables.keep(key, source.to(device, non_blocking=True))


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _kind_of(tensors: list[Tensor]) -> tuple:
    """What a launch is compiled for: the dtypes, and the elements on whose bounds all tensors lie.

    These, or 0 if one lies askew, are what a thread takes of each at once: 128 bits of the widest.
    """
    for t in tensors:
        if t.dtype not in _DTYPES:
            raise ValueError(f"adamw takes float32, bfloat16 and float16 tensors, got {t.dtype}")
    aligned = 16 // max(t.itemsize for t in tensors)
    if any(t.data_ptr() % (aligned * t.itemsize) for t in tensors):
        aligned = 0
    return (*(_DTYPES[t.dtype] for t in tensors), aligned)


class Plan(NamedTuple):
    """values: the table, column by column. launches: (kind, first row, rows, programs).

    used: the tensors that take the place of those given, where some had to be copied.
    """

    values: tuple[int, ...]
    n_rows: int
    launches: list[tuple]
    used: list[list[Tensor]] | None


def _plan(rows: list[tuple], per_program: int, used: list[list[Tensor]] | None) -> Plan:
    """Rows of (kind, numel, ...) become (first program of their kind's launch, numel, ...)."""
    table, launches = [], []
    for kind in dict.fromkeys(row[0] for row in rows):
        begin, programs = len(table), 0
        for row in rows:
            if row[0] == kind:
                table.append((programs, *row[1:]))
                programs += -(-row[1] // per_program)
        launches.append((kind, begin, len(table) - begin, programs))
    values = tuple(word for column in zip(*table, strict=True) for word in column)
    return Plan(values, len(table), launches, used)


def _signature(tensors: list[Tensor]) -> tuple:
    """All that a plan depends on: taking it is what most steps do on the host."""
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
    key = (_signature(grads), chunk)
    plan = _plans.get(key)
    if plan is not None:
        return plan
    _check_device(grads, grads[0].device)
    # In any order of the elements, as long as each is there once.
    used = [
        g if _is_dense(g) and _kind_of([g])[-1] else g.clone(memory_format=torch.contiguous_format)
        for g in grads
    ]
    copied = any(u is not g for u, g in zip(used, grads, strict=True))
    rows, n_partials = [], 0
    for g in used:
        rows.append((_kind_of([g]), g.numel(), g.data_ptr(), n_partials))
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
    """columns: params, grads, exp_avgs, exp_avg_sqs and, if there are any, masters."""
    every = [t for column in (*columns, steps) for t in column]
    key = (_signature(every), len(columns), tuple(param_ids), stochastic, block)
    plan = _plans.get(key)
    if plan is not None:
        return plan
    _check_device(every, every[0].device)
    params, masters = columns[0], columns[4:]
    if any(t.dtype != torch.float32 for t in (*steps, *(masters[0] if masters else []))):
        raise ValueError("adamw: masters and steps must be float32")
    if stochastic and any(p.dtype != torch.bfloat16 for p in params):
        raise ValueError("adamw: stochastic rounding is for bfloat16 parameters")
    rows, used, copied = [], [], False
    for *tensors, step, param_id in zip(*columns, steps, param_ids, strict=True):
        shape = tensors[0].shape
        if any(t.shape != shape for t in tensors):
            raise ValueError(f"adamw: a tensor does not fit its parameter of shape {tuple(shape)}")
        used.append(_in_one_order(tensors, stochastic))
        copied |= any(u is not t for u, t in zip(used[-1], tensors, strict=True))
        addresses = [t.data_ptr() for t in used[-1]] + [0] * (not masters)
        words = (shape.numel(), *addresses, step.data_ptr(), param_id)
        rows.append((_kind_of(used[-1]), *words))
    plan = _plan(rows, block, used if copied else None)
    return plan if copied else _plans.keep(key, plan)


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory, each once, in whatever order."""
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
    """Each tensor, or a copy, with the elements in the first one's memory order, if that is dense.

    Stochastic rounding counts elements in their logical order.
    """
    param = tensors[0]
    if in_logical_order or not _is_dense(param):
        return [t.contiguous() for t in tensors]
    return [
        t if _same_order(param, t) else torch.empty_like(param, dtype=t.dtype).copy_(t)
        for t in tensors
    ]
