"""Triton's launches on CPU tensors: compiled for a GPU and run by the emulator.

`install` puts this in the place of Triton's driver. The environment chooses: GPTFAST_TEST_PTX_ARCH
the GPU (90, also 80 or 120), GPTFAST_TEST_PTX_NOISE the error of approximate instructions, as a
share of the largest that the manual allows (1).
"""

import gc
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ptx import proof
from ptx.counts import Counts
from ptx.faults import Fault
from ptx.floats import Noise
from ptx.machine import Kernel

FOLLOWS_ADDRESSES = ("adamw", "grad_norm")
"""The beginnings of the names of kernels that read addresses of tensors from a table."""
REPEATED_SUM = "race: threads write values that differ by roundings to one shared address"
HARMLESS = {"decode_linear_rows_kernel": REPEATED_SUM}
"""Conflicts that results depend on by roundings only, by kernel. Of others, proof.py shows that no
result depends on them at all.

REPEATED_SUM: where a tile has one number a lane, lanes that repeat a sum fuse their own product
into it (`fma` of the own product and the other lane's rounded one). So they differ by the roundings
of two products, and either is right: the tests hold whichever lane the emulator lets win."""

counts: dict[str, Counts] = {}
"""What was executed since the last `reset_counts`, by kernel."""
_kernels: dict[str, Kernel] = {}

Run = Callable[[Any, Any, dict[str, Any]], None]
"""Takes a compiled kernel, its grid and its arguments by name."""


class Driver:
    """A driver of Triton for a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def utils(self) -> "Driver":
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared = {80: 163, 90: 227, 100: 227}.get(self.target.arch, 99)
        return {"max_shared_mem": shared << 10}


def install(run: Run | None = None) -> None:
    """Send every launch of this process to `run`, by default `launch`, with its arguments.

    Triton must not be interpreting.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from gptfast.ops import backend

    Noise.share = float(os.environ.get("GPTFAST_TEST_PTX_NOISE", "1"))
    driver.set_active(Driver(int(os.environ.get("GPTFAST_TEST_PTX_ARCH", "90"))))
    compile_for = JITFunction.run

    def compile_and_run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compile_for(self, *args, grid=grid, warmup=True, **options)
        if not warmup:
            named = {**dict(zip(self.arg_names, args, strict=False)), **options}
            (run or launch)(compiled, grid, named)
        return compiled

    JITFunction.run = compile_and_run
    # Kernels may run on CPU tensors, as in Triton's interpreter.
    backend._interpreted = lambda: True


def arguments(
    compiled: Any, grid: Any, named: dict[str, Any]
) -> tuple[Kernel, tuple[int, ...], list[int], list[tuple[int, int, str]]]:
    """Return what `Launch` takes for a compiled kernel. named: its arguments by name."""
    kernel = _kernels.get(compiled.hash)
    if kernel is None:
        kernel = Kernel(compiled.asm["ptx"], compiled.metadata.shared)
        _kernels[compiled.hash] = kernel
    types = compiled.src.signature
    given = [x for name in types if name in named for x in _flat(types[name], named[name])]
    bits = [_bits(kind, value) for kind, value in given]
    tensors = [value for _, value in given if isinstance(value, Tensor)]
    size = tuple(grid(named) if callable(grid) else grid)
    # The last parameters are memory for profilers, which nothing here uses.
    return kernel, size, [*bits, 0, 0], list(reachable(kernel.name, tensors))


def launch(compiled: Any, grid: Any, named: dict[str, Any]) -> None:
    """Run a compiled kernel; raise Fault for what it did wrong. named: its arguments by name."""
    kernel, *rest = arguments(compiled, grid, named)
    running, found = proof.run(kernel, *rest)
    counts.setdefault(kernel.name, Counts()).add(running.counts)
    harmless = HARMLESS.get(kernel.name)
    serious = [line for line in found if harmless is None or not line.startswith(harmless)]
    if serious:
        raise Fault("\n".join(serious))


def reset_counts() -> None:
    """Forget what was executed."""
    counts.clear()


def _flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the type and value of each parameter in an argument, which may be a tuple."""
    if isinstance(kind, tuple | list):
        for inner, part in zip(kind, value, strict=True):
            yield from _flat(inner, part)
    elif kind != "constexpr":
        yield kind, value


def _bits(kind: str, value: Any) -> int:
    """Return a parameter as the launcher packs it."""
    if hasattr(value, "data_ptr"):
        return int(value.data_ptr())
    if kind in ("fp32", "f32"):
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    if kind in ("fp64", "f64"):
        return int(struct.unpack("<Q", struct.pack("<d", value))[0])
    return int(value)


def reachable(name: str, tensors: list[Tensor]) -> Iterator[tuple[int, int, str]]:
    """Yield (address, bytes, name) of each storage that a kernel may use."""
    found: list[Any] = list(tensors)
    if name.startswith(FOLLOWS_ADDRESSES):
        kinds = (Tensor, torch.nn.Parameter)
        found += [x for x in gc.get_objects() if type(x) in kinds and x.layout == torch.strided]
    for i, tensor in enumerate(found):
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and storage.nbytes():
            yield storage.data_ptr(), storage.nbytes(), f"tensor {i} {tuple(tensor.shape)}"


def counted(run: Callable[[], object]) -> dict[str, Counts]:
    """Return what `run` executes, by kernel: for models of a kernel's time.

    Example: counted(lambda: attention.attention_fwd(q, k, v, ...)), after `install`.
    """
    reset_counts()
    run()
    return dict(counts)
