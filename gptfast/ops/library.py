"""How an operation reaches PyTorch's dispatcher, and the one switch that overrules it.

`register` defines an operator from its schema with the PyTorch reference for every device; the C++
extension, if it is there, adds its kernels for the CPU by the same names. `use_backend` is a
dispatch mode: it sees every operator call of its thread, forward and backward, and sends ours to
the implementation asked for.
"""

import importlib
import logging
import os
import threading
import warnings
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LIBRARY = torch.library.Library("gptfast", "DEF")
BACKENDS = ("auto", "reference", "cpp", "triton")

# Per backend: operator -> Python implementation. The dispatcher itself holds the C++ kernels.
_implementations: dict[str, dict[torch._ops.OpOverload, Callable]] = {"reference": {}, "triton": {}}


def _load_extension() -> tuple[ModuleType | None, str]:
    """The C++ extension, or None and the reason."""
    try:
        return importlib.import_module("gptfast._C"), ""
    except ImportError as error:
        return None, str(error)


def _choose_isa() -> str:
    """Set the instruction-set level that GPTFAST_ISA asks for; what is wrong with it, or ""."""
    isa = os.environ.get("GPTFAST_ISA")
    if EXTENSION is not None and isa:
        try:
            EXTENSION.set_isa(isa)
        except ValueError as error:
            return str(error)
    return ""


EXTENSION, MISSING = _load_extension()
# Not raised on import, where whoever called would see a traceback and could not catch it.
_WRONG_ISA = _choose_isa()


def check_isa(*args: Any) -> None:
    """ValueError if GPTFAST_ISA names no level of this CPU; every C++ kernel would raise it."""
    if _WRONG_ISA:
        raise ValueError(_WRONG_ISA)


class _Announced:
    """A reference standing in for a C++ kernel that was not built: says so once, then just runs."""

    said = False

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        if not _Announced.said:
            _Announced.said = True
            logging.getLogger("gptfast").warning(
                "gptfast: no C++ kernels (%s); the CPU runs the slower PyTorch reference", MISSING
            )
        return self.function(*args)


def register(schema: str, reference: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Define `gptfast::<schema>` with its reference for every device and its fake for tracing."""
    LIBRARY.define(schema)
    name = schema[: schema.index("(")]
    op = getattr(torch.ops.gptfast, name).default
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if EXTENSION is None:
        LIBRARY.impl(name, _Announced(reference), "CPU")
    elif _WRONG_ISA:
        with warnings.catch_warnings(action="ignore"):  # it overrides a kernel, on purpose
            LIBRARY.impl(name, check_isa, "CPU")
    torch.library.register_fake(f"gptfast::{name}", fake, lib=LIBRARY)
    _implementations["reference"][op] = reference
    return op


def register_autograd(op: torch._ops.OpOverload, backward: Callable, setup: Callable) -> None:
    torch.library.register_autograd(op.name(), backward, setup_context=setup, lib=LIBRARY)


def register_autocast(op: torch._ops.OpOverload, n_tensors: int) -> None:
    """Under autocast, run `op` with its first n_tensors arguments in the dtype autocast was given.

    `torch.library.register_autocast` fixes one dtype per device when it is called; a user may ask
    for bf16 or fp16, so the dtype is read here at each call.
    """
    name = op.name().removeprefix("gptfast::").removesuffix(".default")

    def cast(arg: torch.Tensor, device: str) -> torch.Tensor:
        return arg if arg.dtype == torch.float64 else arg.to(torch.get_autocast_dtype(device))

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def autocast(keyset: Any, *args: Any, device: str = device, key: str = key) -> Any:
            autocast_key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(autocast_key):
                return op(*(cast(arg, device) for arg in args[:n_tensors]), *args[n_tensors:])

        LIBRARY.impl(name, autocast, key, with_keyset=True)


class _Switch(TorchDispatchMode):
    """The dispatch mode of one thread; a nested `use_backend` changes `backend` for its block."""

    backend = "auto"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        implementation = _implementations.get(self.backend, {}).get(func, func)
        if self.backend == "cpp" and func.namespace == "gptfast":
            _require_cpu(func, args)
        return implementation(*args, **(kwargs or {}))


def _require_cpu(func: Any, args: tuple) -> None:
    for arg in args:
        for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
                raise ValueError(
                    f"backend 'cpp' needs CPU tensors, {func} got one on {tensor.device}; "
                    "move it with .cpu() or choose another backend"
                )


_thread = threading.local()


class use_backend:  # noqa: N801 - reads as the function it is used as
    """Run gptfast's operations on one backend inside a `with` block, forward and backward.

    name: "auto" (PyTorch's dispatcher decides by device), "reference" (plain PyTorch), "cpp" (the
    C++ kernels) or "triton". For tests, benchmarks and debugging: per thread, eager mode only.

    Raises ValueError for an unknown name, RuntimeError for a backend that is not there or inside
    torch.compile.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
        if name == "cpp" and EXTENSION is None:
            raise RuntimeError(
                f"backend 'cpp' is not there: {MISSING}; install g++ and reinstall gptfast"
            )
        if name == "triton" and not _implementations["triton"]:
            raise RuntimeError("backend 'triton' is not there: this version has no Triton kernels")
        self.name = name

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "use_backend works in eager mode only; leave it out of torch.compile"
            )
        self.switch = getattr(_thread, "switch", None)
        self.outermost = self.switch is None
        if self.outermost:
            self.switch = _thread.switch = _Switch()
            self.switch.__enter__()
        self.previous, self.switch.backend = self.switch.backend, self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.switch.backend = self.previous
        if self.outermost:
            _thread.switch = None
            self.switch.__exit__(kind, error, trace)


def backend_of(op: torch._ops.OpOverload, device: str) -> str:
    """The backend that serves `op` on "cpu" or "cuda" when the dispatcher decides."""
    if device == "cpu":
        return "reference" if EXTENSION is None else "cpp"
    return "triton" if op in _implementations["triton"] else "reference"


def operators() -> list[torch._ops.OpOverload]:
    """Every operator of gptfast, in the order of definition."""
    return list(_implementations["reference"])
