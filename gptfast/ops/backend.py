"""Which backends are there and which one runs."""

import importlib.util
import os
import threading
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


def empty_cache() -> None:
    """Give the memory that the C++ kernels keep from step to step back to the system.

    Only what no tensor holds; the next step takes it anew. Without the extension nothing is kept.
    """
    if EXTENSION is not None:
        EXTENSION.empty_cache()


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
