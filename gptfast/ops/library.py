"""The registration of operations with PyTorch's dispatcher.

`register` defines an operator from its schema, with the PyTorch reference for every device and the
Triton launcher of the same name for CUDA. The C++ extension, if it is there, adds its kernels for
the CPU under the same names.
"""

import importlib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import torch

from gptfast.installed import REBUILD
from gptfast.ops.backend import (
    EXTENSION,
    IMPLEMENTATIONS,
    ISA_ERROR,
    MISSING,
    TRITON_MISSING,
    check_isa,
    chosen_backend,
)
from gptfast.torch_private import (
    OpOverload,
    are_transforms_active,
    excluded,
    has_kernel,
    len_dispatch_stack,
)

LIBRARY = torch.library.Library("gptfast", "DEF")
# The same operators, always computed by their references: what C++ kernels call with float64.
_REFERENCES = torch.library.Library("gptfast_reference", "DEF")
# torch.amp.is_autocast_available would tell, but torch.compile cannot follow it before torch 2.12.
_WITHOUT_AUTOCAST = tuple("fpga hip ideep lazy meta mkldnn opencl opengl ve vulkan".split())
_OTHER_SOURCES = (
    f"{getattr(EXTENSION, '__file__', None)} was compiled from other sources than this gptfast; "
    f"run make, or {REBUILD}"
)


class _Fallback:
    """A reference in place of a missing kernel; its first call logs one line about it."""

    logged: set[str] = set()

    def __init__(self, function: Callable, line: str) -> None:
        self.function, self.line = function, line

    def __call__(self, *args: Any) -> Any:
        if self.line not in _Fallback.logged:
            _Fallback.logged.add(self.line)
            logging.getLogger("gptfast").warning(self.line)
        return self.function(*args)


class _Launcher:
    """The Triton launcher of an operator, imported by its first call, as not everyone has a GPU.

    The reference serves float64, as on the CPU.
    """

    def __init__(self, reference: Callable) -> None:
        self.reference = reference
        self.module = reference.__module__.replace(".reference.", ".triton.")

    def __call__(self, *args: Any) -> Any:
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if first.dtype == torch.float64:
            return self.reference(*args)
        module = sys.modules.get(self.module) or importlib.import_module(self.module)
        launcher = getattr(module, self.reference.__name__)
        # The device of the tensors need not be the current one; on the CPU this does nothing.
        with torch.cuda.device_of(first):
            return launcher(*args)


class _Keeping:
    """A reference for a C++ kernel: PyTorch loses what is raised there, so the module keeps it."""

    def __init__(self, reference: Callable, results: int) -> None:
        self.reference, self.results = reference, results

    def __call__(self, *args: Any) -> Any:
        try:
            return self.reference(*args)
        except BaseException as error:  # a KeyboardInterrupt, too
            assert EXTENSION is not None
            EXTENSION.keep_error(error, f"{type(error).__name__}: {error}")
        nothing = tuple(torch.empty(0, dtype=torch.uint8) for _ in range(self.results))
        return nothing[0] if self.results == 1 else nothing or None


def define(schema: str) -> OpOverload:
    """Define the operator `gptfast::<schema>` and return it.

    Raises ImportError if its C++ kernel takes or returns something else.
    """
    name, types = schema[: schema.index("(")], _types(schema)
    if _kernels().get(name, types) != types:
        raise ImportError(_OTHER_SOURCES)
    LIBRARY.define(schema)
    return getattr(torch.ops.gptfast, name).default


def _types(schema: str) -> str:
    """Return the types in a schema as the C++ module writes them: "Tensor, int[] -> Tensor"."""
    sides = re.sub(r"\(\w!\)", "", schema[schema.index("(") :]).split(" -> ")
    parts = ([part for part in side.strip("()").split(", ") if part] for side in sides)
    return " -> ".join(", ".join(part.split()[0] for part in side) for side in parts)


@cache
def _kernels() -> dict[str, str]:
    """Return the types of each operator that has a C++ kernel, by its name."""
    if EXTENSION is None:
        return {}
    if not hasattr(EXTENSION, "signatures"):
        raise ImportError(_OTHER_SOURCES)
    return EXTENSION.signatures()


def define_opaque(
    schema: str, function: Callable, fake: Callable, tags: Sequence[torch.Tag] = ()
) -> None:
    """Define the operator `gptfast::<schema>` that torch.compile calls without a look inside.

    function: its PyTorch implementation, for every device. fake: as in `register`.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gptfast::{name}", fake, lib=LIBRARY)


def register(schema: str, reference: Callable, fake: Callable) -> OpOverload:
    """Define the operator `gptfast::<schema>` and return it.

    reference: its PyTorch implementation, for every device. fake: its implementation for tracing,
    which returns empty outputs. The launcher for CUDA is the function in kernels/triton with the
    reference's name and file.
    """
    name = schema[: schema.index("(")]
    op = define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if TRITON_MISSING:
        line = f"gptfast: {TRITON_MISSING}; the GPU runs the slower PyTorch reference"
        LIBRARY.impl(name, _Fallback(reference, line), "CUDA")
    else:
        IMPLEMENTATIONS["triton"][op] = _Launcher(reference)
        LIBRARY.impl(name, IMPLEMENTATIONS["triton"][op], "CUDA")
    if EXTENSION is None:
        line = f"gptfast: no C++ kernels ({MISSING}); the CPU runs the slower PyTorch reference"
        LIBRARY.impl(name, _Fallback(reference, line), "CPU")
    else:
        _REFERENCES.define(schema)
        results = _types(schema).partition(" -> ")[2]
        keeping = _Keeping(reference, results.count("Tensor"))
        _REFERENCES.impl(name, keeping, "CompositeExplicitAutograd")
    if ISA_ERROR:
        with warnings.catch_warnings(
            action="ignore"
        ):  # about the kernel that it overrides on purpose
            LIBRARY.impl(name, check_isa, "CPU")
    torch.library.register_fake(f"gptfast::{name}", fake, lib=LIBRARY)
    IMPLEMENTATIONS["reference"][op] = reference
    return op


# By the type of the device. bench/host_cost.py adds the CPU.
_IN_PYTHON = {"cuda": IMPLEMENTATIONS["triton"]}


def direct(op: OpOverload, x: torch.Tensor) -> Callable | None:
    """Return the launcher that a call of op on x, a plain tensor, would end at, or None.

    To call it spares the dispatcher's copies of lists of tensors, which take longer than a launch.
    It is None for other kernels and where a mode or a transform must see the call. The
    caller must know that op has no gradient and that autocast does nothing to it.
    """
    if len_dispatch_stack() or are_transforms_active():
        return None
    return _IN_PYTHON.get(x.device.type, {}).get(op)


def autocast_enabled(x: torch.Tensor) -> bool:
    """Return whether autocast is on for x's device; some devices (meta) have no autocast."""
    device = x.device.type
    return device not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device)


def register_autocast(op: OpOverload, tensors: Collection[int], dtype: int | None = None) -> None:
    """Make autocast cast the arguments of `op` at these places to its dtype.

    dtype: the place of an argument that is the dtype to compute in. The C++ kernels get it instead
    and cast as they read, which spares copies of the weights.

    `torch.library.register_autocast` would fix one dtype per device, but a user may ask for bf16 or
    fp16, so the dtype is read here at each call.
    """
    name = op.name().removeprefix("gptfast::").removesuffix(".default")

    def cast(arg: torch.Tensor | None, device: str) -> torch.Tensor | None:
        if arg is None or arg.dtype == torch.float64:
            return arg
        return arg.to(torch.get_autocast_dtype(device))

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def autocast(keyset: Any, *args: Any, device: str = device, key: str = key) -> Any:
            with excluded(key):
                if dtype is not None and casts_itself(device, [args[i] for i in tensors]):
                    wanted = torch.get_autocast_dtype(device)
                    return op(*(wanted if i == dtype else a for i, a in enumerate(args)))
                return op(*(cast(a, device) if i in tensors else a for i, a in enumerate(args)))

        LIBRARY.impl(name, autocast, key, with_keyset=True)


def casts_itself(device: str, tensors: Collection[torch.Tensor | None]) -> bool:
    """Return whether a C++ kernel will get these tensors under autocast, and cast as it reads."""
    if device != "cpu" or EXTENSION is None or chosen_backend() not in ("auto", "cpp"):
        return False
    return all(t is None or t.dtype != torch.float64 for t in tensors)  # autocast leaves float64


def backend_of(op: OpOverload, device: str) -> str:
    """Return the backend that serves `op` on "cpu" or "cuda" when the dispatcher decides."""
    if device == "cpu":
        in_cpp = has_kernel(op.name(), "CPU")
        return "cpp" if EXTENSION is not None and in_cpp else "reference"
    return "triton" if isinstance(IMPLEMENTATIONS["triton"].get(op), _Launcher) else "reference"


def operators() -> list[OpOverload]:
    """Return every operator of gptfast, in the order of definition."""
    return list(IMPLEMENTATIONS["reference"])
