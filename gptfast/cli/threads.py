"""The number of threads of a command, and whether they help on a machine that is busy."""

import statistics
import time

import torch

from gptfast import ops

SIDE = 512
"""The side of the matrices that are multiplied to see whether threads help."""
PRODUCTS = 9
BUSY = 0.9
"""Threads that are slower than this share of one thread's speed get in each other's way."""


def set_threads(n: int | None) -> None:
    """Compute with n threads; None leaves the number as it is: OMP_NUM_THREADS, or all cores."""
    if n is not None:
        torch.set_num_threads(n)


def thread_advice() -> str | None:
    """Return a line of advice if one thread computes faster than all that are set, else None.

    On a machine with other work, each product waits for the slowest thread. Takes about a tenth of
    a second.
    """
    n = torch.get_num_threads()
    if n == 1:
        return None
    try:
        all_threads = _seconds()
        torch.set_num_threads(1)
        one = _seconds()
    finally:
        torch.set_num_threads(n)
    if one / all_threads > BUSY:
        return None
    return (
        f"the machine is busy: {n} threads compute {one / all_threads:.1f} times as fast as one; "
        "--threads 1 would be faster"
    )


@torch.no_grad()
def _seconds() -> float:
    """Return the median time of a product of matrices."""
    a = torch.full((SIDE, SIDE), 0.5, dtype=torch.float32)
    seconds = []
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        ops.linear(a, a)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
