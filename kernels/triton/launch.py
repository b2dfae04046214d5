"""Launches of Triton's kernels that cost the host a few microseconds.

Triton binds and classifies every argument of every launch, which takes 30 to 100 microseconds. Here
the first launch of a kind goes that way and leaves a plan: the compiled kernel and its constants.
Later launches of this kind compute their key and give the arguments to Triton's C launcher.

The key distinguishes all that Triton compiles separately, and more. It holds the types of the
arguments; the dtype of each tensor and whether its address is a multiple of 16; the value of each
integer, unless the kernel does not specialise on it and it fits 32 bits; the constants; the device,
the driver and Triton's settings. A float is a run-time argument whatever its value. Addresses,
other integers, floats, the grid, the device and the stream are read at each launch.

`repeat` (launch_series.py) spares a launcher's own Python too.

The interpreter, a replaced `JITFunction.run` and hooks see every launch: there are no plans then.
"""

import threading
from collections.abc import Sequence
from functools import reduce
from itertools import compress
from operator import attrgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from gptfast.kernels.triton import interpreter

if knobs.runtime.interpret:
    interpreter.mend()

# The most plans of one form, so that shapes that never come again do not fill the memory.
MAX_PLANS = 256

_TENSORS = (Tensor, torch.nn.Parameter)
_SCALARS = (int, bool, float, type(None))
_dtype = attrgetter("dtype")


class _Begin:
    """Stands before the elements of a tuple in a list of arguments."""


class _End:
    """Stands after them."""


_BEGIN, _END = _Begin(), _End()


def _triton_run() -> Any:
    """Return Triton's own `JITFunction.run`, or None if another function is in its place."""
    own = JITFunction.preload.__globals__
    return JITFunction.run if getattr(JITFunction.run, "__globals__", None) is own else None


_RUN = _triton_run()
_lock = threading.Lock()


class _Plan(NamedTuple):
    """A compiled kernel with its launcher; the constants follow the run-time arguments."""

    run: Any
    function: int
    metadata: Any
    constants: tuple

    def launch(self, grid: tuple[int, ...], stream: int, args: Sequence[Any]) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        self.run(
            x, y, z, stream, self.function, self.metadata, None, None, None, *args, *self.constants
        )


class _Form:
    """A kernel with arguments of certain types, and its plans.

    `tensors`, `values` and `integers` mark arguments: the key has the dtype and the alignment of
    the first, the second as they are, and of the third whether they fit 32 bits.
    """

    def __init__(self, kernel: Any, args: tuple, constants: dict[str, Any]) -> None:
        self.kernel = kernel  # its id is in the key of _forms, so it must live as long
        self.plans: dict[tuple, _Plan] = {}
        self.tensors: list[bool] = []
        self.values: list[bool] = []
        self.integers: list[bool] = []
        rest = kernel.params[len(args) :]
        self.names = [param.name for param in rest]
        self.plannable = all(param.is_constexpr and param.name in constants for param in rest)
        for param, arg in zip(kernel.params, args, strict=False):
            if type(arg) is tuple and not param.is_constexpr:
                for leaf in (_BEGIN, *arg, _END):
                    self._mark(param, leaf)
            else:
                self._mark(param, arg)
                # Where a constant is a tuple, `launch` would see its elements.
                self.plannable &= type(arg) is not tuple

    def _mark(self, param: Any, arg: object) -> None:
        kind = type(arg)
        tensor = kind in _TENSORS and not param.is_constexpr
        integer = kind is int and param.do_not_specialize and not param.is_constexpr
        run_time = tensor or integer or kind in (float, _Begin, _End)
        self.tensors.append(tensor)
        self.integers.append(integer)
        self.values.append(param.is_constexpr or not run_time)
        known = (*_TENSORS, *_SCALARS, _Begin, _End)
        self.plannable &= param.is_constexpr or kind in known

    def key(self, leaves: list, device: int, constants: dict[str, Any]) -> tuple:
        """Return all that decides which compiled kernel these arguments need."""
        tensors = list(compress(leaves, self.tensors))
        addresses = list(map(Tensor.data_ptr, tensors))
        aligned: Any = not reduce(or_, addresses, 0) % 16 or tuple(a % 16 == 0 for a in addresses)
        integers = tuple(compress(leaves, self.integers))
        narrow: Any = max(map(int.bit_length, integers), default=0) < 32 or integers
        settings = knobs.runtime.debug, knobs.compilation.instrumentation_mode
        return (
            tuple(map(_dtype, tensors)),
            aligned,
            narrow,
            tuple(compress(leaves, self.values)),
            tuple(constants.values()),
            device,
            driver.active,
            settings,
        )

    def keep(self, key: tuple, compiled: Any, constants: dict[str, Any]) -> _Plan | None:
        """Return the plan of a kernel that was launched; the oldest one goes if there are many."""
        # Triton's rules for AMD look at the sizes of tensors too.
        if type(compiled) is not CompiledKernel or compiled.metadata.target.backend != "cuda":
            return None
        values = tuple(constants[name] for name in self.names)
        plan = _Plan(compiled.run, compiled.function, compiled.packed_metadata, values)
        with _lock:
            self.plans[key] = plan
            if len(self.plans) > MAX_PLANS:
                del self.plans[next(iter(self.plans))]
        return plan


_forms: dict[tuple, _Form] = {}


Recorded = tuple[Any, _Plan | None, tuple[int, ...], tuple]
"""A launch: the kernel, its plan, the grid, the arguments."""


class _Record(threading.local):
    """The launches of this thread while a series is recorded."""

    launches: list[Recorded] | None = None


record = _Record()


def watched(kernel: Any) -> bool:
    """Return whether somebody must see each launch, as Triton itself makes it."""
    runtime = knobs.runtime
    return bool(
        type(kernel) is not JITFunction
        or getattr(kernel.run, "__func__", None) is not _RUN
        or kernel.pre_run_hooks
        or runtime.add_stages_inspection_hook
        # A chain of hooks, one hook, or None.
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
    )


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Do what `kernel[grid](*args, **constants)` does, in less time on the host.

    grid: one to three integers. args: the run-time arguments in order, tensors, numbers, None and
    tuples of them. constants: the kernel's constants and the options of the launch.
    """
    plan = None
    if watched(kernel):
        kernel[grid](*args, **constants)
    else:
        plan = _launch(kernel, grid, args, constants)
    if record.launches is not None:
        record.launches.append((kernel, plan, grid, args))


def _launch(kernel: Any, grid: tuple, args: tuple, constants: dict[str, Any]) -> _Plan | None:
    """Launch the kernel, and return its plan if it can have one."""
    leaves: list[Any] = []
    for arg in args:
        if type(arg) is tuple:
            leaves += (_BEGIN, *arg, _END)
        else:
            leaves.append(arg)
    # True == 1 and 1.0 == 1: only with their types do values tell kernels apart.
    types = tuple(map(type, leaves)), tuple(map(type, constants.values()))
    form_key = id(kernel), *types, tuple(constants)
    form = _forms.get(form_key)
    if form is None:
        form = _forms.setdefault(form_key, _Form(kernel, args, constants))
    if not form.plannable:
        kernel[grid](*args, **constants)
        return None
    active = driver.active
    device = active.get_current_device()
    key = form.key(leaves, device, constants)
    plan = form.plans.get(key)
    if plan is None:
        return form.keep(key, kernel[grid](*args, **constants), constants)
    plan.launch(grid, active.get_current_stream(device), args)
    return plan
