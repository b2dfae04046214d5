"""Which device a run or a model is on."""

import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one, else the CPU.

    Raises ValueError for a device that this machine does not have.
    """
    # Not every accelerator: the reference's float64 sums rule out Apple's, for one.
    known = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if name == "auto":
        return torch.device(known[0])
    if name not in known:
        raise ValueError(f"device must be auto or one of {', '.join(known)}, got {name!r}")
    return torch.device(name)


def random_state() -> list[Tensor]:
    """The states of torch's generators: the CPU's, then each GPU's."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpus]


def restore_random_state(state: list[Tensor]) -> None:
    """Set torch's generators to what `random_state` gave, as far as this machine has them."""
    torch.set_rng_state(state[0])
    for device, rng in zip(range(torch.cuda.device_count()), state[1:], strict=False):
        torch.cuda.set_rng_state(rng, device)


Product = Callable[[Tensor, Tensor], Tensor]

# Large enough that a product is bound by arithmetic, small enough to be quick.
_SIDE = {"cpu": 1536, "cuda": 8192}


def _product_seconds(
    n: int, device: torch.device, dtype: torch.dtype, product: Product
) -> Iterator[float]:
    """Yield the seconds of one (n, n) by (n, n) product after another; the first is a warm-up."""
    generator = torch.Generator(device).manual_seed(0)
    # Values in [0.5, 1.5): never denormal, and as random as real ones (a GPU draws less power, and
    # clocks higher, on constants).
    a, b = (torch.rand(n, n, device=device, generator=generator) + 0.5 for _ in "ab")
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
    """Measure the FLOP/s of a large matrix product, the fastest of a few.

    device, dtype: where and in what the product is computed. product: the function that computes
    it, of two (n, n) tensors.

    Takes about 0.5 s, with the threads torch has now; whatever else runs on the machine makes a
    product slower, none makes it faster. Draws nothing from torch's own generator.
    """
    device = torch.device(device)
    n, largest = _SIDE[device.type] // 4, _SIDE[device.type]
    # Some CPUs have 16-bit products a hundred times slower than fp32: there a smaller one must do.
    while n < largest and 8 * min(islice(_product_seconds(n, device, dtype, product), 4)) < 0.35:
        n *= 2
    begin, seconds = time.perf_counter(), []
    for elapsed in islice(_product_seconds(n, device, dtype, product), 16):
        seconds.append(elapsed)
        if len(seconds) > 3 and time.perf_counter() - begin > 0.25:
            break
    return 2.0 * n**3 / min(seconds)


def peak_memory(device: torch.device | str) -> int:
    """Bytes: the most this process has held on a GPU, or resident in main memory for the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Rather than getrusage's figure, which a child process begins with its parent's.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
