"""The prediction of a step: its counts, its bytes, its sums, and that it is of today's kernels."""

import ast
import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from cost_model import (  # noqa: E402
    BYTES_PER_S,
    FLOPS_PER_S,
    ISSUED_PER_S,
    LAUNCH,
    SMS,
    TABLES,
    TENSORS,
    Kernel,
    Workload,
    bounds,
    library,
    parts,
)
from instruction_counts import choose, of_one_head  # noqa: E402
from predicted_page import HEADING, page  # noqa: E402
from predicted_step import PAGE, inputs_digest, stored  # noqa: E402
from step_trace import Trace, size_of  # noqa: E402
from test_launch import kernel_names, printed  # noqa: E402
from workloads import STEPS  # noqa: E402

KERNELS = Path(__file__).parents[1] / "kernels" / "triton"
# Of GPT-2 124M: channels, layers, vocabulary, parameters; tokens of a step.
C, LAYERS, V, PARAMETERS, N = 768, 12, 50257, 124_439_808, 16 * 1024


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what counted_programs.py prints."""
    return printed("counted_programs.py")


@cache
def of_today() -> tuple[str, dict[str, Workload]]:
    """Return the stored digest and workloads; skip what another Triton would count."""
    import triton

    if HEADING.format(triton.__version__) not in PAGE.read_text("utf-8"):
        pytest.skip(f"the page is of another Triton than {triton.__version__}")
    digest, workloads = stored()
    return digest, {workload.name: workload for workload in workloads}


def launches(workload: Workload, name: str) -> list[Kernel]:
    return [kernel for kernel in workload.kernels if kernel.name == name]


def test_the_page_is_up_to_date() -> None:
    digest, workloads = of_today()
    assert digest == inputs_digest(), "the counts are of other sources: run make audit"
    assert PAGE.read_text("utf-8") == page(list(workloads.values())), "run make audit"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_launches_what_was_counted(found: dict[str, Any], name: str) -> None:
    """The model decides the launches, and it is no part of the digest."""
    workload, step = of_today()[1][name], found["steps"][name]
    counted: Counter[str] = Counter()
    for kernel in workload.kernels:
        counted[kernel.name] += kernel.calls
    assert counted == step["kernels"], "a step launches other kernels: run make audit"
    operators = [[list(call.operator), call.calls] for call in workload.operators]
    assert operators == step["operators"], "a step calls other operators: run make audit"


def test_some_programs_stand_for_all(found: dict[str, Any]) -> None:
    some = {name: kernel["some"] for name, kernel in found["kernels"].items()}
    assert len(some) >= 11 and sum(s["ran"] < s["programs"] for s in some.values()) >= 8
    for name, kernel in found["kernels"].items():
        whole = kernel["whole"]
        assert kernel["some"]["exact"] and whole["launches"] == 1, name
        assert kernel["some"]["instructions"] == whole["instructions"], name
        assert kernel["some"]["flops"] == whole["flops"], name


def test_instructions_of_gelu_by_hand(found: dict[str, Any]) -> None:
    """16 bytes a thread: one load and one store of a warp for each 512 bytes; one ex2 and one
    division for each number of a thread."""
    instructions = found["kernels"]["gelu_fwd_kernel"]["some"]["instructions"]
    numbers = 1024 * 256
    assert instructions["global_load"] == instructions["global_store"] == numbers * 2 // 512
    assert instructions["special"] == 2 * numbers // 32
    assert "tensor" not in instructions


def blocks(T: int, m: int, n: int) -> int:
    """Return how many blocks of m queries and n keys the causal mask leaves."""
    return sum(math.ceil(min(T, i + m) / n) for i in range(0, T, m))


PRODUCTS = {
    "attention_fwd_kernel": 2,
    "attention_bwd_dq_kernel": 3,
    "attention_bwd_dk_dv_kernel": 4,
}


def test_flops_of_attention_by_hand(found: dict[str, Any]) -> None:
    for name, products in PRODUCTS.items():
        kernel = found["kernels"][name]
        m, n = kernel["BLOCK_M"], kernel["BLOCK_N"]
        if name.endswith("dk_dv_kernel"):
            n_blocks = sum((256 - key // m * m) // m for key in range(0, 256, n))
        else:
            n_blocks = blocks(256, m, n)
        assert kernel["some"]["flops"] == 3 * n_blocks * products * 2 * m * n * 64, name


def test_bytes_are_what_programs_ask_for(found: dict[str, Any]) -> None:
    """These kernels ask for each byte once, but for a few that all programs read."""
    for name in ("gelu_fwd_kernel", "gelu_bwd_kernel", "column_totals_kernel"):
        whole, n_bytes = found["kernels"][name]["whole"], found["kernels"][name]["n_bytes"]
        stored_once = whole["bytes_stored"]
        assert whole["bytes_loaded"] + stored_once == pytest.approx(n_bytes, rel=0.01), name
    norm = found["kernels"]["norm_bwd_kernel"]
    rows = 2 * 256 * 768
    assert norm["whole"]["bytes_stored"] == 2 * rows + 8 * 2 * 768 * 4
    weights, stats = 2 * 2 * 768, 2 * 4 * 256
    assert norm["n_bytes"] == 3 * rows + weights + stats + norm["whole"]["bytes_stored"]


def test_bytes_of_a_step_by_hand() -> None:
    step = of_today()[1]["step, bf16"]
    # p, m, v and the master are read and written, g is read.
    updates = launches(step, "adamw_kernel")
    assert sum(k.calls * k.n_bytes for k in updates) == PARAMETERS * (2 * (2 + 4 + 4 + 4) + 2)
    assert sum(k.n_bytes for k in launches(step, "grad_norm_kernel")) == 2 * PARAMETERS
    (forward,) = launches(step, "attention_fwd_kernel")
    assert forward.calls == LAYERS and forward.n_bytes == N * (4 * 2 * C + 8 * 12)
    (norm,) = launches(step, "norm_fwd_kernel")
    assert norm.calls == 2 * LAYERS and norm.n_bytes == N * (2 * 2 * C + 8) + 2 * 2 * C


def test_flops_of_a_step_by_hand() -> None:
    step = of_today()[1]["step, bf16"]
    # Four matrices a block, forward and twice backward; of the head, the logits and dinput.
    head = 2 * N * C * V
    assert parts(step)["cuBLAS's products"].flops == 3 * 2 * N * LAYERS * 12 * C * C + 2 * head
    dweight = launches(step, "linear_cross_entropy_dweight_kernel")
    flops = sum(k.calls * k.counted.flops for k in dweight)
    assert head <= flops <= 1.01 * head  # its tiles are padded


def test_a_step_is_the_sum_of_its_launches() -> None:
    for workload in of_today()[1].values():
        seconds = sum(k.calls * k.bounds.seconds for k in workload.kernels)
        seconds += sum(c.calls * c.bounds.seconds for c in workload.operators)
        together = parts(workload)["together"]
        assert together.seconds == pytest.approx(seconds) and together.seconds <= together.apart
        n = sum(one.calls for one in (*workload.kernels, *workload.operators))
        assert together.launches == n


def test_the_longest_bound_binds() -> None:
    memory = bounds(BYTES_PER_S, FLOPS_PER_S / 2, ISSUED_PER_S / 4, 1000)
    assert (memory.seconds, memory.apart, memory.binding) == (1.0, 1.75, "memory")
    assert bounds(0, FLOPS_PER_S, 1, 1000).binding == "tensor cores"
    assert bounds(1, 1, ISSUED_PER_S, 1000).seconds == 1.0
    # One program has one multiprocessor.
    assert bounds(0, 0, ISSUED_PER_S / SMS, 1).seconds == pytest.approx(1.0)
    assert bounds(1, 1, 1, 1).binding == "launch" and bounds(1, 1, 1, 1).apart == LAUNCH
    assert library(BYTES_PER_S, 1.0).apart == 1.0


def arguments_of_kernels() -> dict[str, set[str]]:
    """Return the names of every kernel's arguments, from its source."""
    trees = [ast.parse(path.read_text("utf-8")) for path in KERNELS.glob("*.py")]
    functions = [x for tree in trees for x in tree.body if isinstance(x, ast.FunctionDef)]
    return {f.name: {argument.arg for argument in f.args.args} for f in functions}


def test_every_kernel_has_its_bytes() -> None:
    tables = TENSORS | TABLES
    assert set(tables) == kernel_names()
    known = arguments_of_kernels()
    for kernel, words in tables.items():
        assert set(" ".join(words).split()) <= known[kernel], kernel


def test_which_programs_run() -> None:
    # 3 heads in groups of 2: the first block of heads 0 and 1, the second of both, then head 2.
    assert of_one_head((6, 1, 1), 3, 2) == [0, 2]
    alike = choose("gelu_fwd_kernel", (100, 2, 1), {})
    assert sum(alike.weights.values()) == pytest.approx(200) and alike.alike == (1, 100, 198)
    every = choose("sample_collect_kernel", (50, 1, 1), {})
    assert every.weights == dict.fromkeys(range(50), 1)
    estimate = choose("adamw_kernel", (1920, 1, 1), {})
    assert not estimate.exact and list(estimate.weights)[:2] == [10, 30]
    assert sum(estimate.weights.values()) == pytest.approx(1920)


def test_a_trace_notes_what_operators_move() -> None:
    import torch

    with Trace() as trace:
        a, b = torch.empty(1 << 20, 64), torch.empty(64, 32)
        (a @ b).add_(1.0)
        small = torch.ones(3) + torch.ones(3)
    assert small.tolist() == [2.0] * 3  # small tensors have their values
    noted = {operator.name: operator for operator in trace.operators}
    out = 4 * 32 << 20
    assert noted["mm"].flops == 2 * (1 << 20) * 64 * 32
    assert noted["mm"].n_bytes == (4 * 64 << 20) + 4 * 64 * 32 + out
    assert noted["add_"].n_bytes == 2 * out and trace.operators[noted["ones"]] == 2
    assert size_of(torch.ones(3).expand(5, 3)) == 12
