"""How an operation reaches PyTorch's dispatcher, and the one switch that overrules it.

`register` defines an operator from its schema with the PyTorch reference for every device and the
Triton launcher of the same name for CUDA; the C++ extension, if it is there, adds its kernels for
the CPU by the same names. `use_backend` is a dispatch mode: it sees every operator call of its
thread, forward and backward, and sends ours to the implementation asked for.
"""

import importlib
import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Callable, Collection
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
TRITON_MISSING = "" if importlib.util.find_spec("triton") else "triton is not installed"
# Not raised on import, where whoever called would see a traceback and could not catch it.
_WRONG_ISA = _choose_isa()


def check_isa(*args: Any) -> None:
    """ValueError if GPTFAST_ISA names no level of this CPU; every C++ kernel would raise it."""
    if _WRONG_ISA:
        raise ValueError(_WRONG_ISA)


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


def empty_cache() -> None:
    """Give the memory that the C++ kernels keep from step to step back to the system.

    Only what no tensor holds; the next step takes it anew. Without the extension nothing is kept.
    """
    if EXTENSION is not None:
        EXTENSION.empty_cache()


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


class _Switch(TorchDispatchMode):
    """The dispatch mode of one thread; a nested `use_backend` changes `backend` for its block."""

    backend = "auto"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        implementation = _implementations.get(self.backend, {}).get(func, func)
        if func.namespace == "gptfast":
            if self.backend == "cpp":
                _require_device("cpu", func, args)
            elif self.backend == "triton" and not _interpreted():
                _require_device("cuda", func, args)
        return implementation(*args, **(kwargs or {}))


def _interpreted() -> bool:
    """Whether Triton's kernels run on CPU tensors, in its interpreter."""
    return importlib.import_module("triton").knobs.runtime.interpret


def _require_device(device: str, func: Any, args: tuple) -> None:
    backend, kind = {"cpu": ("cpp", "CPU"), "cuda": ("triton", "CUDA")}[device]
    first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
    if isinstance(first, torch.Tensor) and first.device.type != device:
        raise ValueError(
            f"backend {backend!r} needs {kind} tensors, {func} got one on {first.device}; "
            f"move it with .to({device!r}) or choose another backend"
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
        if name == "triton" and TRITON_MISSING:
            raise RuntimeError(f"backend 'triton' is not there: {TRITON_MISSING}; pip install it")
        if name == "triton" and not torch.cuda.is_available() and not _interpreted():
            raise RuntimeError(
                "backend 'triton' is not there: no GPU; to run its kernels on the CPU in Triton's "
                "interpreter, set TRITON_INTERPRET=1 before Python starts"
            )
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


def overruled() -> bool:
    """Whether this thread is inside a `use_backend` that names a backend."""
    switch = getattr(_thread, "switch", None)
    return switch is not None and switch.backend != "auto"


def backend_of(op: torch._ops.OpOverload, device: str) -> str:
    """The backend that serves `op` on "cpu" or "cuda" when the dispatcher decides."""
    if device == "cpu":
        in_cpp = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU")
        return "cpp" if EXTENSION is not None and in_cpp else "reference"
    return "triton" if isinstance(_implementations["triton"].get(op), _Launcher) else "reference"


def operators() -> list[torch._ops.OpOverload]:
    """Every operator of gptfast, in the order of definition."""
    return list(_implementations["reference"])
