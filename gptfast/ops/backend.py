"""The backends: which of them are there, and which one runs.

`use_backend` is a dispatch mode: it sees every operator call of its thread, forward and backward,
and sends gptfast's to the implementation asked for.
"""

import importlib.util
import os
import threading
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch

from gptfast.installed import REBUILD, why_not_loaded
from gptfast.torch_private import OpOverload, TorchDispatchMode

BACKENDS = ("auto", "reference", "cpp", "triton")
IMPLEMENTATIONS: dict[str, dict[OpOverload, Callable]] = {"reference": {}, "triton": {}}
"""Python implementations by backend and operator; the dispatcher holds the C++ kernels."""


def _load_extension() -> tuple[ModuleType | None, str]:
    """Return the C++ extension and "", or None and the reason why it is not there."""
    if reason := why_not_loaded():
        return None, reason
    try:
        return importlib.import_module("gptfast._C"), ""
    except ImportError as error:
        return None, f"{error}; run {REBUILD}"


def _choose_isa() -> str:
    """Set the instruction-set level that GPTFAST_ISA names; return the error, or ""."""
    isa = os.environ.get("GPTFAST_ISA")
    if EXTENSION is not None and isa:
        try:
            EXTENSION.set_isa(isa)
        except ValueError as error:
            return str(error)
    return ""


EXTENSION, MISSING = _load_extension()
if EXTENSION is not None:
    # GNU OpenMP's threads do not survive a fork: a child that opened a parallel region, in our
    # kernels, in MKL's products or in PyTorch's operators, would wait for them forever.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
TRITON_MISSING = "" if importlib.util.find_spec("triton") else "triton is not installed"
# Not raised at import, where the caller could not catch it and would see a traceback.
ISA_ERROR = _choose_isa()


def check_isa(*args: Any) -> None:
    """Raise ValueError if GPTFAST_ISA names a level that this CPU lacks, for any arguments."""
    if ISA_ERROR:
        raise ValueError(ISA_ERROR)


def empty_cache() -> None:
    """Give the memory that the C++ kernels keep between steps back to the system.

    Memory of tensors that are in use stays; the next step takes new memory. Without the extension
    this does nothing.
    """
    if EXTENSION is not None:
        EXTENSION.empty_cache()


class _Switch(TorchDispatchMode):
    """The dispatch mode of one thread. A nested `use_backend` changes `backend` for its block."""

    backend = "auto"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        implementation = IMPLEMENTATIONS.get(self.backend, {}).get(func, func)
        if func.namespace == "gptfast":
            if self.backend == "cpp":
                _require_device("cpu", func, args)
            elif self.backend == "triton" and not _interpreted():
                _require_device("cuda", func, args)
        return implementation(*args, **(kwargs or {}))


def _interpreted() -> bool:
    """Return whether Triton's kernels run on CPU tensors, in its interpreter."""
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
            raise RuntimeError(f"backend 'cpp' is missing: {MISSING}")
        if name == "triton" and TRITON_MISSING:
            raise RuntimeError(
                f"backend 'triton' is missing: {TRITON_MISSING}; run pip install triton"
            )
        if name == "triton" and not torch.cuda.is_available() and not _interpreted():
            raise RuntimeError(
                "backend 'triton' needs a GPU; to run its kernels on the CPU in Triton's "
                "interpreter, set TRITON_INTERPRET=1 before Python starts"
            )
        self.name = name

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "use_backend works in eager mode only; leave it out of torch.compile"
            )
        switch: _Switch | None = getattr(_thread, "switch", None)
        self.outermost = switch is None
        if switch is None:
            switch = _thread.switch = _Switch()
            switch.__enter__()
        self.switch = switch
        self.previous, switch.backend = switch.backend, self.name

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


def chosen_backend() -> str:
    """Return the name of the `use_backend` that this thread is inside of, else "auto"."""
    switch: _Switch | None = getattr(_thread, "switch", None)
    return "auto" if switch is None else switch.backend
