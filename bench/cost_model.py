"""Predict what each Triton kernel costs on an H200, from the compiler's report: no measurement.

For a reference problem of GPT-2 124M in bf16, a kernel moves `n_bytes`, does `flops` on the tensor
cores and computes `exps` exponentials, in `programs` programs. It takes the longest of

    bytes / (4.8 TB/s * min(1, bytes in flight on an SM / 33 KB))
    flops / 989 TFLOP/s, with the exponentials beside them where an SM holds two programs or more,
                         and after them where it holds one (16 an SM and cycle at 1.75 GHz)

times the rounding up of its waves: programs / (132 * programs an SM holds). The bytes in flight are
those that all resident programs load in one step of their loops; 33 KB is the bandwidth times 0.9
us of latency (Little's law). The limit is the larger of bytes / 4.8 TB/s and useful FLOPs / 989
TFLOP/s: a tile on the causal diagonal computes more than it has to.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

SMS, CLOCK = 132, 1.75e9
BYTES_PER_S, FLOPS_PER_S, EXPS_PER_S = 4.8e12, 989e12, 16.0 * SMS * CLOCK
LATENCY = 0.9e-6

B, H, T, D = 16, 12, 1024, 64
N, V, C = B * T, 50257, H * D
PARAMS = 124_439_808
DECODE_ROWS = 64
CHUNK_ROWS = 4096
"""Rows that linear cross entropy handles at once."""


@dataclass(frozen=True)
class Cost:
    """The work of a kernel on the reference problem; `step`: bytes a program loads at once."""

    programs: float
    n_bytes: float
    step: float = 0.0
    flops: float = 0.0
    exps: float = 0.0
    useful_flops: float = 0.0


def _tile(tile: str) -> tuple[int, ...]:
    return tuple(int(x) for x in tile.split("x")) if tile else ()


def _attention(products: int, tensors: int, by_queries: bool) -> Callable[[str], Cost]:
    """Return the cost, by tile, of a kernel with `products` products per score that reads or writes
    `tensors` tensors (B, H, T, D)."""

    def cost(tile: str) -> Cost:
        m, n = _tile(tile)[:2]
        # Blocks of scores that the causal mask does not remove entirely.
        blocks = sum(math.ceil(min(T, i + m) / n) for i in range(0, T, m))
        scores, useful = B * H * blocks * m * n, B * H * T * (T + 1) / 2
        per_score = 2 * products * D
        return Cost(
            B * H * math.ceil(T / (m if by_queries else n)),
            tensors * N * C * 2.0,
            step=2.0 * D * 2 * (n if by_queries else m),
            flops=per_score * scores,
            exps=scores,
            useful_flops=per_score * useful,
        )

    return cost


def _decode(tile: str) -> Cost:
    n_bytes = 2 * 2.0 * DECODE_ROWS * H * T * D
    block = _tile(tile)[0]
    return Cost(DECODE_ROWS * H * T / (4 * block), n_bytes, step=4.0 * block * D)


def _rows(passes: float) -> Callable[[str], Cost]:
    return lambda tile: Cost(N, passes * 2.0 * N * V, step=2.0 * _tile(tile)[0])


def _chunk_rows(tile: str) -> Cost:
    return Cost(CHUNK_ROWS, 2 * 2.0 * CHUNK_ROWS * V, step=2.0 * _tile(tile)[0])


def _dweight(tile: str) -> Cost:
    v, c, n = _tile(tile)
    flops = 2.0 * CHUNK_ROWS * V * C
    n_bytes = 2.0 * CHUNK_ROWS * (V + C) + 8.0 * V * C
    programs = math.ceil(V / v) * math.ceil(C / c)
    return Cost(programs, n_bytes, step=2.0 * n * (v + c), flops=flops, useful_flops=flops)


def _by_rows(reads: float, writes: float, rows: int, at_once: float) -> Callable[[str], Cost]:
    """Return the cost of a kernel whose programs take `rows` rows of C channels, `at_once` of them
    at a time; reads and writes: tensors (N, C)."""
    n_bytes = (reads + writes) * 2.0 * N * C
    return lambda tile: Cost(N / rows, n_bytes, step=at_once * reads * 2.0 * C)


def _elements(tile: str) -> Cost:
    block = _tile(tile)[0]
    return Cost(N * 4 * C / block, 2 * 2.0 * N * 4 * C, step=2.0 * block)


def _blocks(reads: float, writes: float, columns: int) -> Callable[[str], Cost]:
    """Return the cost of a kernel whose programs take 128 rows of a block of columns, 16 at a
    time; reads and writes: tensors (N, columns)."""

    def cost(tile: str) -> Cost:
        block = _tile(tile)[0]
        programs = N / 128 * math.ceil(columns / block)
        n_bytes = (reads + writes) * 2.0 * N * columns
        return Cost(programs, n_bytes, step=16 * reads * 2.0 * block)

    return cost


def _adamw(tile: str) -> Cost:
    block = _tile(tile)[0]
    return Cost(PARAMS / block, 28.0 * PARAMS, step=16.0 * block)


COSTS: dict[str, Callable[[str], Cost]] = {
    "attention_fwd_kernel": _attention(2, 4, True),
    "attention_bwd_dq_kernel": _attention(3, 6, True),
    "attention_bwd_dk_dv_kernel": _attention(4, 6, False),
    "attention_decode_kernel": _decode,
    "cross_entropy_fwd_kernel": _rows(1),
    "cross_entropy_bwd_kernel": _rows(2),
    "linear_cross_entropy_rows_kernel": _chunk_rows,
    "linear_cross_entropy_dweight_kernel": _dweight,
    "adamw_kernel": _adamw,
    "norm_fwd_kernel": _by_rows(1, 1, 2, 2),
    "norm_bwd_kernel": _by_rows(3, 2, 32, 2),
    "gelu_fwd_kernel": _elements,
    "gelu_bwd_kernel": _blocks(2, 2, 4 * C),
    "column_sums_kernel": _blocks(1, 0, C),
}


def predict(kernel: str, tile: str, programs_per_sm: int) -> tuple[Cost, float, float]:
    """Return the cost, the predicted seconds, and the share of the H200's limit."""
    cost = COSTS[kernel](tile)
    # A launch may have fewer programs than there is room for.
    programs_per_sm = min(programs_per_sm, math.ceil(cost.programs / SMS))
    in_flight = min(1.0, programs_per_sm * cost.step * SMS / (BYTES_PER_S * LATENCY))
    memory = cost.n_bytes / (BYTES_PER_S * in_flight)
    products, exps = cost.flops / FLOPS_PER_S, cost.exps / EXPS_PER_S
    compute = max(products, exps) if programs_per_sm > 1 else products + exps
    waves = cost.programs / (SMS * programs_per_sm)
    seconds = max(memory, compute) * math.ceil(waves) / waves
    limit = max(cost.n_bytes / BYTES_PER_S, cost.useful_flops / FLOPS_PER_S)
    return cost, seconds, limit / seconds
