"""The launches of a whole launcher, made again without the launcher's Python.

A launcher makes views, looks up tiles and computes grids: 20 to 60 microseconds for numbers that
follow from the shapes. `repeat` records its launches once for tensors of certain shapes, strides,
dtypes, devices and addresses modulo 16, and for certain numbers. The next time it makes them with
the addresses of the new tensors, each at its old distance from the tensor that it was a part of.
"""

import threading
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from gptfast.kernels.triton import target
from gptfast.kernels.triton.launch import Recorded, record, watched

# The most series that are kept; shapes that never come again must not fill the memory.
MAX_SERIES = 512

_dtype = attrgetter("dtype")
_lock = threading.Lock()


class _Pointer(NamedTuple):
    """An argument that is a part of a tensor, or a tuple with one such element."""

    place: int
    tensor: int
    distance: int
    before: tuple | None
    after: tuple


class _Step(NamedTuple):
    """A launch; `pointers` say which of the arguments are addresses."""

    kernel: Any
    plan: Any
    grid: tuple[int, ...]
    args: list[Any]
    pointers: list[_Pointer]

    def launch(self, addresses: list[int], stream: int) -> None:
        args = self.args.copy()
        for place, tensor, distance, before, after in self.pointers:
            address = addresses[tensor] + distance
            args[place] = address if before is None else (*before, address, *after)
        self.plan.launch(self.grid, stream, args)


class _Series(NamedTuple):
    """The launches, and the (shape, dtype) of the scratch tensors that they use."""

    steps: list[_Step]
    scratch: list[tuple[tuple[int, ...], torch.dtype]]


class _Scratch(threading.local):
    """The scratch tensors of this thread while a series is recorded."""

    tensors: list[Tensor] | None = None


_series: dict[tuple, _Series | None] = {}
_scratch = _Scratch()


def forget() -> None:
    """Drop all series; a test calls this after it has changed a constant of a launcher."""
    _series.clear()


def scratch(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory on like's device, for the launches of the function that `repeat` calls."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=like.device)
    if _scratch.tensors is not None:
        _scratch.tensors.append(tensor)
    return tensor


def repeat(fill: Callable[..., None], tensors: Sequence[Tensor | None], *numbers: Any) -> None:
    """Do what `fill(*tensors, *numbers)` does; it may launch kernels, by `launch`, and no more.

    What it launches may depend on the tensors' shapes, strides, dtypes, devices and addresses
    modulo 16, and on the numbers. Memory for its own use must come from `scratch`. If an argument
    of a launch is not a part of one of these tensors, `fill` is called each time.
    """
    if knobs.runtime.interpret or record.launches is not None:
        fill(*tensors, *numbers)
        return
    present = [t for t in tensors if t is not None]
    addresses = list(map(Tensor.data_ptr, present))
    active = driver.active
    device = active.get_current_device()
    key = (
        fill,
        tuple(map(type, tensors)),
        tuple(map(Tensor.size, present)),
        tuple(map(Tensor.stride, present)),
        tuple(map(_dtype, present)),
        tuple(map(Tensor.get_device, present)),
        tuple([address % 16 for address in addresses]),
        numbers,
        tuple(map(type, numbers)),
        (active, device, target.arch()),
        (knobs.runtime.debug, knobs.compilation.instrumentation_mode),
    )
    series = _series.get(key)
    if series is None and key not in _series:
        _record(key, fill, tensors, numbers)
        return
    if series is None or any([watched(step.kernel) for step in series.steps]):
        fill(*tensors, *numbers)
        return
    # They stay until the launches are made; later work on the stream may then have their memory.
    temporary = [
        torch.empty(shape, dtype=dtype, device=present[0].device) for shape, dtype in series.scratch
    ]
    addresses += map(Tensor.data_ptr, temporary)
    stream = active.get_current_stream(device)
    for step in series.steps:
        step.launch(addresses, stream)


def _record(key: tuple, fill: Callable[..., None], tensors: Sequence, numbers: tuple) -> None:
    """Call `fill` and keep its launches, or None if they cannot be repeated."""
    launches: list[Recorded] = []
    temporary: list[Tensor] = []
    # A tensor that is given twice becomes two: the series must also serve two different ones.
    tensors = [
        t.detach() if t is not None and any(t is u for u in tensors[:i]) else t
        for i, t in enumerate(tensors)
    ]
    record.launches, _scratch.tensors = launches, temporary
    lowered = target.lowered()
    try:
        fill(*tensors, *numbers)
    finally:
        record.launches = _scratch.tensors = None
    # A launcher that started over with a smaller tile has launched some kernels twice. Its next
    # call records them, once each: a kernel steps down a few times in a process at most.
    if lowered != target.lowered() or any(watched(kernel) for kernel, *_ in launches):
        return
    given = [t for t in tensors if t is not None]
    fits = len({t.get_device() for t in given}) == 1
    fits &= all(t.data_ptr() % 16 == 0 for t in temporary)
    bases = [*given, *temporary]
    steps = [_step(launch, bases) if fits else None for launch in launches]
    series: _Series | None = None
    if None not in steps:
        kinds = [(tuple(t.shape), t.dtype) for t in temporary]
        series = _Series([step for step in steps if step is not None], kinds)
    with _lock:
        _series[key] = series
        if len(_series) > MAX_SERIES:
            del _series[next(iter(_series))]


def _step(launch: Recorded, bases: list[Tensor]) -> _Step | None:
    """Return the launch in terms of the bases' addresses, or None if that is not possible."""
    kernel, plan, grid, args = launch
    pointers = []
    for place, arg in enumerate(args):
        elements = arg if type(arg) is tuple else (arg,)
        at = [i for i, element in enumerate(elements) if isinstance(element, Tensor)]
        if not at:
            continue
        found = _place(elements[at[0]], bases)
        if found is None or len(at) > 1:
            return None
        around = (arg[: at[0]], arg[at[0] + 1 :]) if type(arg) is tuple else (None, ())
        pointers.append(_Pointer(place, *found, *around))
    if plan is None:
        return None
    # No tensor is kept alive.
    kept = list(args)
    for pointer in pointers:
        kept[pointer.place] = None
    return _Step(kernel, plan, grid, kept, pointers)


def _place(part: Tensor, bases: list[Tensor]) -> tuple[int, int] | None:
    """Return which of the bases a tensor is a part of, and its distance from it in bytes."""
    same = [i for i, base in enumerate(bases) if base is part]
    if not same:
        storage = part.untyped_storage().data_ptr()
        same = [i for i, t in enumerate(bases) if t.untyped_storage().data_ptr() == storage]
        # Of two bases in one memory, the part may come from either.
        if len(same) != 1 or not storage:
            return None
    return same[0], part.data_ptr() - bases[same[0]].data_ptr()
