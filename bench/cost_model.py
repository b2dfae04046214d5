"""The time of a kernel on an H100, predicted from what it executes and moves: no measurement.

A kernel takes at least the longest of

    memory   bytes / 3.0 TB/s: each tensor once, whatever the L2 cache serves again
    tensor   FLOPs of its tensor-core instructions / 989 TFLOP/s
    issue    warp instructions / (132 multiprocessors * 4 a cycle * 1.7 GHz)
    launch   2 us

where a launch of fewer programs has as many multiprocessors; the longest of them is what binds it.
If nothing overlaps, it takes the sum of the first three;
the truth lies between. 989 TFLOP/s and the clock are NVIDIA's figures for the H100 SXM; 3.0 TB/s is
nine tenths of the 3.35 TB/s of its memory, about what copies reach. Latency, the rounding up of
waves of programs, conflicts of banks and bandwidth of the L2 cache are left out.
"""

from dataclasses import dataclass, field
from typing import Any

from instruction_counts import Counted
from step_trace import Operator, size_of
from torch import Tensor

SMS, SCHEDULERS, CLOCK = 132, 4, 1.7e9
ISSUED_PER_S = SMS * SCHEDULERS * CLOCK
BYTES_PER_S, FLOPS_PER_S = 3.0e12, 989e12
PRODUCTS_PER_S = 600e12
"""What cuBLAS's products are assumed to reach."""
LAUNCH = 2e-6
"""Seconds that the shortest kernel takes, with the gap to the next one."""

# What kernels read and write, by the names of their arguments; a word that comes twice counts
# twice. Tensors of a few numbers are left out.
TENSORS = {
    "attention_fwd_kernel": ("q k v", "out lse_ptr"),
    "attention_bwd_dq_kernel": ("dout q k v out lse_ptr", "dq stats"),
    "attention_bwd_dk_dv_kernel": ("dout q k v stats", "dk dv"),
    "attention_decode_kernel": ("q k v", "acc_ptr peak_ptr total_ptr"),
    "attention_combine_kernel": ("acc_ptr peak_ptr total_ptr", "out lse_ptr"),
    "norm_fwd_kernel": ("x_ptr weight_ptr bias_ptr", "a_ptr stats_ptr"),
    "norm_bwd_kernel": (
        "da_ptr dresidual_ptr x_ptr stats_ptr weight_ptr bias_ptr",
        "dx_ptr a_ptr partial_ptr",
    ),
    "gelu_fwd_kernel": ("h_ptr", "g_ptr"),
    "gelu_bwd_kernel": ("dg_ptr h_ptr", "dh_ptr g_ptr partial_ptr"),
    "column_sums_kernel": ("x_ptr", "partial_ptr"),
    "column_totals_kernel": ("partial_ptr", "first_ptr second_ptr"),
    "cross_entropy_fwd_kernel": ("logits_ptr target_ptr", "loss_ptr stats_ptr"),
    "cross_entropy_bwd_kernel": ("logits_ptr target_ptr stats_ptr", "dlogits_ptr"),
    # The second time that a program reads its row, the L2 cache serves it.
    "linear_cross_entropy_rows_kernel": ("logits_ptr target_ptr", "logits_ptr loss_ptr"),
    "linear_cross_entropy_dweight_kernel": (
        "dlogits_ptr input_ptr dweight_ptr low_ptr",
        "dweight_ptr low_ptr",
    ),
    # The factor is 1 in training, and then nothing is multiplied.
    "scale_kernel": ("factor_ptr", ""),
    # As many rows of the weight as x has.
    "embedding_fwd_kernel": ("idx_ptr x_ptr", "x_ptr"),
    # At most as many rows of dweight as dx has are read and written.
    "embedding_bwd_kernel": ("ids_ptr order_ptr dx_ptr dx_ptr", "dx_ptr"),
    "embedding_bwd_runs_kernel": ("ids_ptr", ""),
    "grad_norm_sum_kernel": ("partial_ptr", ""),
    "adamw_steps_kernel": ("table_ptr", "scalar_ptr"),
    "decode_linear_rows_kernel": (
        "x_ptr norm_weight_ptr norm_bias_ptr weight_ptr scale_ptr bias_ptr residual_ptr",
        "y_ptr",
    ),
    "decode_linear_tiles_kernel": ("x_ptr weight_ptr scale_ptr bias_ptr residual_ptr", "y_ptr"),
    "sample_fwd_kernel": ("logits_ptr", "ids_ptr"),
    "sample_extremes_kernel": ("logits_ptr", "extremes_ptr memory_ptr"),
    "sample_histogram_kernel": ("logits_ptr", "memory_ptr"),
    "sample_collect_kernel": ("logits_ptr memory_ptr", "memory_ptr"),
    "sample_draw_kernel": ("memory_ptr", "ids_ptr"),
}
# The kernels that find their tensors in a table, by the numbers of bytes that they move per
# element: the constants that hold their data types, which are read, and those that are written.
TABLES = {
    "grad_norm_kernel": ("DTYPE", ""),
    "adamw_kernel": ("PARAM GRAD EXP_AVG EXP_AVG_SQ MASTER", "PARAM EXP_AVG EXP_AVG_SQ MASTER"),
}
NUMEL = 1
"""The column of their tables that has the number of elements."""


def n_bytes(kernel: str, named: dict[str, Any]) -> int:
    """Return the bytes that a launch reads and writes; named: its arguments by name."""
    if kernel in TABLES:
        return _from_table(TABLES[kernel], named)
    read, written = (words.split() for words in TENSORS[kernel])
    if kernel == "linear_cross_entropy_dweight_kernel":
        sums = ("dweight_ptr", "low_ptr")
        read = [word for word in read if word not in sums or not named["FIRST"]]
        written = [word for word in written if word != "low_ptr" or not named["LAST"]]
    return sum(_size(named[word]) for word in (*read, *written))


def _size(argument: Any) -> int:
    """Return the bytes of a tensor, of a view that begins with one, or of None."""
    x = argument[0] if isinstance(argument, tuple) else argument
    return size_of(x) if isinstance(x, Tensor) else 0


def _from_table(words: tuple[str, str], named: dict[str, Any]) -> int:
    rows = slice(named["begin"], named["begin"] + named["n_rows"])
    elements = int(named["table_ptr"][NUMEL, rows].sum())

    def width(name: str) -> int:
        if name == "MASTER":
            return 4 if named["MASTER"] else 0
        return int(named[name].primitive_bitwidth) // 8

    return elements * sum(width(name) for name in " ".join(words).split())


@dataclass(frozen=True)
class Bounds:
    """The seconds that a launch takes if one thing alone held it up."""

    memory: float
    tensor: float
    issue: float

    @property
    def seconds(self) -> float:
        """The prediction if all overlaps."""
        return max(self.memory, self.tensor, self.issue, LAUNCH)

    @property
    def apart(self) -> float:
        """The prediction if nothing overlaps."""
        return max(self.memory + self.tensor + self.issue, LAUNCH)

    @property
    def binding(self) -> str:
        """What binds the launch."""
        times = {
            "memory": self.memory,
            "tensor cores": self.tensor,
            "issue": self.issue,
            "launch": LAUNCH,
        }
        return max(times, key=lambda name: times[name])


def bounds(n_bytes: float, flops: float, instructions: float, programs: int) -> Bounds:
    """Return the bounds of a launch of ours. A program runs on one multiprocessor."""
    share = min(1.0, programs / SMS)
    return Bounds(
        n_bytes / BYTES_PER_S,
        flops / (FLOPS_PER_S * share),
        instructions / (ISSUED_PER_S * share),
    )


def library(n_bytes: float, flops: float) -> Bounds:
    """Return the bounds of a kernel of PyTorch or cuBLAS, whose instructions nobody counted.

    In its products, memory and tensor cores overlap.
    """
    memory, tensor = n_bytes / BYTES_PER_S, flops / PRODUCTS_PER_S
    return Bounds(memory if memory >= tensor else 0.0, tensor if tensor > memory else 0.0, 0.0)


@dataclass
class Kernel:
    """A kernel of ours with arguments of certain sizes; `calls` launches of it in a workload."""

    name: str
    tile: str
    grid: tuple[int, ...]
    n_bytes: int
    counted: Counted
    calls: int = 0

    @property
    def bounds(self) -> Bounds:
        """The bounds of one launch."""
        counted = self.counted
        return bounds(self.n_bytes, counted.flops, counted.issued, counted.programs)


@dataclass
class Call:
    """An operator of PyTorch on tensors of certain shapes; `calls` of it in a workload."""

    operator: Operator
    calls: int

    @property
    def bounds(self) -> Bounds:
        """The bounds of one call, which is taken to be one launch."""
        return library(self.operator.n_bytes, self.operator.flops)


@dataclass
class Workload:
    """All that a workload launches."""

    name: str
    kernels: list[Kernel] = field(default_factory=list)
    operators: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """The sum of a workload's launches of one sort; seconds: if all overlaps; apart: if nothing."""

    launches: int
    n_bytes: int
    flops: int
    seconds: float
    apart: float


def part(launches: list[Kernel] | list[Call]) -> Part:
    """Return the sum of launches."""
    out = Part(0, 0, 0, 0.0, 0.0)
    for one in launches:
        size, flops = _work(one)
        out = Part(
            out.launches + one.calls,
            out.n_bytes + one.calls * size,
            out.flops + one.calls * flops,
            out.seconds + one.calls * one.bounds.seconds,
            out.apart + one.calls * one.bounds.apart,
        )
    return out


def _work(one: Kernel | Call) -> tuple[int, int]:
    if isinstance(one, Kernel):
        return one.n_bytes, one.counted.flops
    return one.operator.n_bytes, one.operator.flops


def parts(workload: Workload) -> dict[str, Part]:
    """Return the parts of a workload, and "together"."""
    products = [call for call in workload.operators if call.operator.flops]
    others = [call for call in workload.operators if not call.operator.flops]
    out = {
        "our kernels": part(workload.kernels),
        "cuBLAS's products": part(products),
        "PyTorch's other kernels": part(others),
    }
    sums = (sum(x) for x in zip(*(vars(p).values() for p in out.values()), strict=True))
    return {**out, "together": Part(*sums)}
