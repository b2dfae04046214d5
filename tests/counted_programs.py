"""Count launches whole and by a few of their programs, and a step's launches; print both.

test_predicted_step.py runs this file in a process of its own: here Triton compiles, in the tests it
interprets.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

# ptxas need not optimise what is not run.
os.environ |= {"TRITON_INTERPRET": "0", "DISABLE_PTXAS_OPT": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import torch  # noqa: E402
from cost_model import n_bytes  # noqa: E402
from instruction_counts import count  # noqa: E402
from ptx.launch import arguments, counted, install, launch  # noqa: E402
from ptx.machine import Launch  # noqa: E402
from step_trace import Trace  # noqa: E402
from torch import Tensor  # noqa: E402
from workloads import STEPS, WORKLOADS  # noqa: E402

BF16 = torch.bfloat16
Case = Callable[[], object]
found: dict[str, dict[str, Any]] = {}


def compare(compiled: Any, grid: Any, named: dict[str, Any]) -> None:
    """Run a launch whole, then some of its programs, and note both."""
    launch(compiled, grid, named)
    some = count(Launch(*arguments(compiled, grid, named)), named)
    name = compiled.metadata.name
    blocks = {k: v for k, v in named.items() if k in ("BLOCK_M", "BLOCK_N")}
    found[name] = {"some": asdict(some), "n_bytes": n_bytes(name, named), **blocks}


def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def cases() -> Iterator[Case]:
    """Yield calls of launchers, each of which launches a kernel once."""
    from gptfast.kernels.triton import attention, cross_entropy, gelu, norm
    from gptfast.kernels.triton.adamw import grad_norm

    def attend() -> None:
        qkv, dout = zeros(1, 256, 3 * 3 * 64), zeros(1, 256, 3 * 64)
        options = (0.125, 0.0, None, None)
        out, lse = attention.attention_qkv_fwd(qkv, 3, *options)
        attention.attention_qkv_bwd(dout, qkv, out, lse, 3, *options)

    def lose() -> None:
        logits, target = zeros(16, 5001), torch.arange(16)
        options = (-100, 0.0, 0.0)
        loss, stats = cross_entropy.cross_entropy_fwd(logits, target, *options)
        cross_entropy.cross_entropy_bwd(loss, logits, target, stats, *options)

    def normalise() -> None:
        x, weight = zeros(256, 768), zeros(768)
        a, stats = norm.norm_fwd(x, weight, weight, 1e-5, BF16)
        norm.norm_bwd(a, x, weight, weight, stats, dresidual=x, with_a=True)

    yield attend
    yield lose
    yield normalise
    yield lambda: gelu.gelu_fwd(zeros(1024, 256))
    yield lambda: gelu.gelu_bwd_(zeros(1024, 256), zeros(1024, 256), with_g=True, with_sums=True)
    yield lambda: grad_norm([zeros(70_000), zeros(300)])


def launches_of(workload: str) -> dict[str, Any]:
    """Return how often a workload launches each kernel, and PyTorch's operators; nothing runs."""
    from triton.runtime.jit import JITFunction

    names: Counter[str] = Counter()

    def run(self: Any, *args: Any, **options: Any) -> None:
        names[self.__name__] += 1

    def record(function: Case) -> None:
        names.clear()
        trace.operators.clear()
        function()

    JITFunction.run = run
    with Trace() as trace:
        WORKLOADS[workload](record)
    return {"kernels": names, "operators": list(trace.operators.items())}


def main() -> None:
    """Print what was counted as JSON."""
    install(compare)
    for case in cases():
        for name, counts in counted(case).items():
            found[name]["whole"] = asdict(counts)
    steps = {name: launches_of(name) for name in STEPS}
    print(json.dumps({"kernels": found, "steps": steps}))


if __name__ == "__main__":
    main()
