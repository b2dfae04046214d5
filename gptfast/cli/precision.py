"""Whether bf16 or fp32 multiplies a model's matrices faster on this CPU."""

import time
from collections.abc import Callable

import torch

from gptfast import ops
from gptfast.config import GPTConfig

MAX_FLOPS, MIN_ROWS = 2e9, 64
"""Of a measured product, forward and backward: a few hundredths of a second on most CPUs."""
PRODUCTS, MAX_SECONDS = 4, 0.3
"""Each precision is measured until so many products are done or so much time has passed."""
MIN_FLOPS = 1e8
"""Of such a product too. In less time the clock says little, and products are little of a step."""
MIN_GAIN = 1.1
"""Nothing is said of a smaller gain, which the other parts of a step make smaller still."""

Clock = Callable[[], float]


def precision_advice(
    config: GPTConfig, tokens: int, precision: str, *, clock: Clock = time.perf_counter
) -> str | None:
    """Return a line of advice if the other of fp32 and bf16 is faster on this CPU, else None.

    tokens: in a batch. precision: of the run, "fp32" or "bf16". Takes about a third of a second:
    each precision multiplies matrices of the model's own shape, forward and backward.
    """
    other = "fp32" if precision == "bf16" else "bf16"
    if _flops(config, tokens) < MIN_FLOPS:
        return None
    seconds = _fastest_products(config, tokens, clock)
    gain = seconds[precision] / seconds[other]
    if gain < MIN_GAIN:
        return None
    return (
        f"this CPU multiplies the model's matrices {gain:.1f} times as fast in {other}: "
        f"--precision {other} would be faster"
    )


def _flops(config: GPTConfig, rows: int) -> int:
    """Return the FLOPs of the MLP's first product of so many rows, forward and backward."""
    return 6 * rows * config.n_embd * 4 * config.n_embd


def _fastest_products(config: GPTConfig, tokens: int, clock: Clock) -> dict[str, float]:
    """Return the time of the MLP's first product in each precision, forward and backward."""
    C = config.n_embd
    N = min(tokens, max(MIN_ROWS, int(MAX_FLOPS / _flops(config, 1))))
    # Random numbers would need a generator, and these take as long on a CPU.
    x = torch.full((N, C), 0.5, dtype=torch.float32, requires_grad=True)
    weight = torch.full((4 * C, C), 0.5, dtype=torch.float32, requires_grad=True)
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    begin = clock()
    for i in range(1 + PRODUCTS):
        # In turn, so that other work on the machine slows both of them.
        for precision, found in seconds.items():
            start = clock()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out = ops.linear(x, weight)
            torch.autograd.grad(out, (x, weight), torch.full_like(out, 0.5))
            found.append(clock() - start)
        if i > 0 and clock() - begin > MAX_SECONDS:
            break
    return {precision: min(found[1:]) for precision, found in seconds.items()}  # first: a warm-up
