"""How an operation reaches PyTorch's dispatcher, and the one switch that overrules it.

`register` defines an operator from its schema with the PyTorch reference for every device and the
Triton launcher of the same name for CUDA; the C++ extension, if it is there, adds its kernels for
the CPU by the same names. `use_backend` is a dispatch mode: it sees every operator call of its
thread, forward and backward, and sends ours to the implementation asked for.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch

from gptfast.ops.backend import (
    _WRONG_ISA,
    EXTENSION,
    MISSING,
    TRITON_MISSING,
    _implementations,
    check_isa,
)

LIBRARY = torch.library.Library("gptfast", "DEF")


class _Announced:
    """A reference standing in for a kernel that is not there: says so once, then just runs."""

    said: set[str] = set()

    def __init__(self, function: Callable, line: str) -> None:
        self.function, self.line = function, line

    def __call__(self, *args: Any) -> Any:
        if self.line not in _Announced.said:
            _Announced.said.add(self.line)
            logging.getLogger("gptfast").warning(self.line)
        return self.function(*args)


class _Launcher:
    """The Triton launcher of an operator, imported when first called: not everyone has a GPU.

    float64 is served by the reference, as on the CPU.
    """

    def __init__(self, reference: Callable) -> None:
        self.reference = reference
        self.module = reference.__module__.replace(".reference.", ".triton.")

    def __call__(self, *args: Any) -> Any:
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if first.dtype == torch.float64:
            return self.reference(*args)
        launcher = getattr(importlib.import_module(self.module), self.reference.__name__)
        # The device of the tensors need not be the current one; on the CPU this does nothing.
        with torch.cuda.device_of(first):
            return launcher(*args)


def register(
    schema: str, reference: Callable, fake: Callable, *, triton: bool = True
) -> torch._ops.OpOverload:
    """Define `gptfast::<schema>` with its reference for every device and its fake for tracing.

    The launcher for CUDA is the function in kernels/triton that has the reference's name and file;
    without triton, the reference serves the GPU too, where PyTorch's own kernels are the fast ones.
    """
    LIBRARY.define(schema)
    name = schema[: schema.index("(")]
    op = getattr(torch.ops.gptfast, name).default
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if not triton:
        _implementations["triton"][op] = reference
    elif TRITON_MISSING:
        line = f"gptfast: {TRITON_MISSING}; the GPU runs the slower PyTorch reference"
        LIBRARY.impl(name, _Announced(reference, line), "CUDA")
    else:
        _implementations["triton"][op] = _Launcher(reference)
        LIBRARY.impl(name, _implementations["triton"][op], "CUDA")
    if EXTENSION is None:
        line = f"gptfast: no C++ kernels ({MISSING}); the CPU runs the slower PyTorch reference"
        LIBRARY.impl(name, _Announced(reference, line), "CPU")
    elif _WRONG_ISA:
        with warnings.catch_warnings(action="ignore"):  # it overrides a kernel, on purpose
            LIBRARY.impl(name, check_isa, "CPU")
    torch.library.register_fake(f"gptfast::{name}", fake, lib=LIBRARY)
    _implementations["reference"][op] = reference
    return op


def register_autograd(op: torch._ops.OpOverload, backward: Callable, setup: Callable) -> None:
    torch.library.register_autograd(op.name(), backward, setup_context=setup, lib=LIBRARY)


def autocast_enabled(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device; not every device (meta) has one to ask."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def register_autocast(op: torch._ops.OpOverload, tensors: Collection[int]) -> None:
    """Under autocast, run `op` with the arguments at these places in the dtype autocast was given.

    `torch.library.register_autocast` fixes one dtype per device when it is called; a user may ask
    for bf16 or fp16, so the dtype is read here at each call.
    """
    name = op.name().removeprefix("gptfast::").removesuffix(".default")

    def cast(arg: torch.Tensor | None, device: str) -> torch.Tensor | None:
        if arg is None or arg.dtype == torch.float64:
            return arg
        return arg.to(torch.get_autocast_dtype(device))

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def autocast(keyset: Any, *args: Any, device: str = device, key: str = key) -> Any:
            autocast_key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(autocast_key):
                return op(*(cast(a, device) if i in tensors else a for i, a in enumerate(args)))

        LIBRARY.impl(name, autocast, key, with_keyset=True)


def backend_of(op: torch._ops.OpOverload, device: str) -> str:
    """The backend that serves `op` on "cpu" or "cuda" when the dispatcher decides."""
    if device == "cpu":
        in_cpp = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU")
        return "cpp" if EXTENSION is not None and in_cpp else "reference"
    return "triton" if isinstance(_implementations["triton"].get(op), _Launcher) else "reference"


def operators() -> list[torch._ops.OpOverload]:
    """Every operator of gptfast, in the order of definition."""
    return list(_implementations["reference"])
