"""How much arithmetic training is, how much the machine can do, and the share that is used.

A weight that multiplies a token costs 2 FLOPs forward and 4 backward (Kaplan et al., 2020, section
2.1), so a step costs 6 FLOPs per token and weight. Attention's two products, q k^T and p v, cost
another 12 n_layer n_embd T per token for all T keys (Chowdhery et al., 2022, PaLM, appendix B);
causal attention computes half of them:

    6 (12 n_layer n_embd^2 + vocab_size n_embd)  +  6 n_layer n_embd T
"""

import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from gptfast.config import GPTConfig

# Large enough that a product is bound by arithmetic, small enough to be quick.
_SIDE = {"cpu": 1536, "cuda": 8192}


def flops_per_token(config: GPTConfig, T: int) -> float:
    """FLOPs of one training step, forward and backward, per token of a sequence of T tokens.

    Counts every matrix that is multiplied: four per block and the head, tied or not. Embedding
    look-ups, biases, norms, softmax and the optimizer are left out, as in PaLM's appendix B.
    Raises ValueError for a T outside [1, block_size].
    """
    if not 1 <= T <= config.block_size:
        raise ValueError(f"T must be in [1, block_size={config.block_size}], got {T}")
    C = config.n_embd
    weights = 12 * config.n_layer * C * C + config.vocab_size * C
    return 6.0 * weights + 6.0 * config.n_layer * C * T


def _product_seconds(n: int, device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """Seconds of one (n, n) by (n, n) product after the other, the first a warm-up."""
    generator = torch.Generator(device).manual_seed(0)
    # Values in [0.5, 1.5): never denormal, and as random as real ones (a GPU draws less power, and
    # clocks higher, on constants).
    a, b = (torch.rand(n, n, device=device, generator=generator) + 0.5 for _ in "ab")
    a, b = a.to(dtype), b.to(dtype)
    while True:
        start = time.perf_counter()
        # Reading one number waits for the whole product.
        F.linear(a, b)[0, 0].item()
        yield time.perf_counter() - start


@torch.no_grad()
def measured_peak(device: torch.device | str, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large matrix product on this device in this dtype, the fastest of a few.

    Takes about 0.5 s, with the threads torch has now; whatever else runs on the machine makes a
    product slower, none makes it faster. Draws nothing from torch's own generator.
    """
    device = torch.device(device)
    n, largest = _SIDE[device.type] // 4, _SIDE[device.type]
    # Some CPUs have 16-bit products a hundred times slower than fp32: there a smaller one must do.
    while n < largest and 8 * min(islice(_product_seconds(n, device, dtype), 4)) < 0.35:
        n *= 2
    begin, seconds = time.perf_counter(), []
    for elapsed in islice(_product_seconds(n, device, dtype), 16):
        seconds.append(elapsed)
        if len(seconds) > 3 and time.perf_counter() - begin > 0.25:
            break
    return 2.0 * n**3 / min(seconds)


def mfu(tokens_per_second: float, config: GPTConfig, T: int, peak: float) -> float:
    """Model FLOPs utilisation (PaLM, appendix B): the share of `peak` FLOP/s that training uses."""
    if not peak > 0:
        raise ValueError(f"peak must be a number of FLOP/s > 0, got {peak}")
    return tokens_per_second * flops_per_token(config, T) / peak


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
