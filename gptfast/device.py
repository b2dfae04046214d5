"""Devices: chosen by name, their random state, their speed and their memory."""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_M_MMAP_THRESHOLD = -3  # of malloc.h


def choose_device(name: str) -> torch.device:
    """Return the device of a name: cpu, cuda, or auto for a GPU if there is one, else the CPU.

    Raises ValueError for a device that this machine does not have.
    """
    # Other accelerators lack something: Apple's has no float64, in which the reference sums.
    known = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if name == "auto":
        return torch.device(known[0])
    if name not in known:
        names = " or ".join([", ".join(["auto", *known[:-1]]), known[-1]])
        raise ValueError(f"device must be {names}, got {name!r}{_why_absent(name)}")
    return torch.device(name)


def threads_of(processes: int) -> int:
    """Return the number of threads of each of some processes that share the CPU's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // processes)


def _why_absent(name: str) -> str:
    """Return the remedy where a GPU was asked for and torch has none; else nothing."""
    if not name.startswith("cuda") or torch.cuda.is_available():
        return ""
    lacks = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
    return f": this torch {lacks}; use --device cpu, or mend the driver or the installation"


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor where copies to a device can start from without waiting.

    For a GPU, that is page-locked memory.
    """
    to_gpu = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory() if to_gpu else tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device. The copy to a GPU is queued, and nobody waits for it."""
    # The other way, a tensor would be read before its values have arrived.
    return pinned(tensor, device).to(device, non_blocking=device.type == "cuda")


def random_state() -> list[Tensor]:
    """Return the states of torch's generators: the CPU's, then each GPU's."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpus]


def restore_random_state(state: list[Tensor]) -> None:
    """Set torch's generators to a `random_state`; those of GPUs that are not here are left out."""
    torch.set_rng_state(state[0])
    for device, rng in zip(range(torch.cuda.device_count()), state[1:], strict=False):
        torch.cuda.set_rng_state(rng, device)


def return_freed_memory() -> None:
    """Let this process give freed memory back to the system at once, in blocks of 1 MB and more.

    glibc's malloc keeps blocks of up to 32 MB once they were freed, and what lives between them
    tears them apart. New memory takes 0.2 s per GB. Other allocators are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


Product = Callable[[Tensor, Tensor], Tensor]

# Sides of square matrices large enough to be bound by arithmetic and small enough to be quick.
_LARGEST_SIDE = {"cpu": 1536, "cuda": 8192}


def _product_seconds(
    n: int, device: torch.device, dtype: torch.dtype, product: Product
) -> Iterator[float]:
    """Yield the seconds of one (n, n) by (n, n) product after another; the first is a warm-up."""
    generator = torch.Generator(device).manual_seed(0)
    # Random values in [0.5, 1.5): none is denormal. With constants a GPU would draw less power and
    # clock higher.
    a, b = (
        torch.rand(n, n, dtype=torch.float32, device=device, generator=generator) + 0.5
        for _ in "ab"
    )
    a, b = a.to(dtype), b.to(dtype)
    while True:
        start = time.perf_counter()
        # Reading one number waits for the whole product.
        product(a, b)[0, 0].item()
        yield time.perf_counter() - start


@torch.no_grad()
def measured_peak(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    product: Product = F.linear,
) -> float:
    """Return the FLOP/s of a large matrix product on a device in a dtype: the fastest of a few.

    product: the function that computes it, of two (n, n) tensors.

    Takes about 0.5 s with torch's current number of threads. The fastest counts because other
    programs can only make a product slower. Draws nothing from torch's own generator.
    """
    device = torch.device(device)
    n, largest = _LARGEST_SIDE[device.type] // 4, _LARGEST_SIDE[device.type]
    # On some CPUs 16-bit products are a hundred times slower than fp32: those take a smaller size.
    while n < largest and 8 * min(islice(_product_seconds(n, device, dtype, product), 4)) < 0.35:
        n *= 2
    begin, seconds = time.perf_counter(), []
    for elapsed in islice(_product_seconds(n, device, dtype, product), 16):
        seconds.append(elapsed)
        if len(seconds) > 3 and time.perf_counter() - begin > 0.25:
            break
    return 2.0 * n**3 / min(seconds)


def peak_memory(device: torch.device | str) -> int:
    """Return the most bytes that this process has held on a GPU or, for the CPU, in main memory."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Preferred to getrusage, whose figure a child process inherits from its parent.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
