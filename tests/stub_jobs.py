"""Run the jobs of bench/gpu.py as on a GPU, up to their launches; print what each launched.

test_gpu_bench.py runs this file in a process of its own. Data are tiny and on the CPU, but the code
is the one for a GPU: capture, events, memory, warm-up. Triton's driver runs over a libcuda that
launches nothing (bench/stub_cuda.py), torch.cuda has stand-ins, and each launch is bound to its
kernel's parameters and counted (stub_launches.py compiles launches and compares their parameters).
Nothing is computed: what our operations return is zero, and no result is checked.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import stub_cuda  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

STUB = stub_cuda.install(Path(tempfile.mkdtemp()))

import gpu_device  # noqa: E402 - the first of these: the others read what is set here

gpu_device.DEVICE = "cpu"

import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_steps  # noqa: E402
import gpu_timing  # noqa: E402
from gpu_train import Steps  # noqa: E402
from host_cost import use_triton_on_cpu  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

from gptfast.training import cuda_graph, step  # noqa: E402

launched: list[str] = []
"""The kernels that were launched, in order."""


class Zeros(TorchDispatchMode):
    """What our operations return is zero, as no kernel runs."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        return tree_map_only(torch.Tensor, torch.zero_, out) if func.namespace == "gptfast" else out


class Event:
    """An event on a GPU that takes a millisecond for everything."""

    def __init__(self, enable_timing: bool) -> None:
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded

    def elapsed_time(self, end: "Event") -> float:
        assert self.recorded and end.recorded
        return 1.0


class Graph:
    """A CUDA graph: it is replayed only after its capture."""

    captures = replays = 0
    captured = False

    def replay(self) -> None:
        assert self.captured
        Graph.replays += 1


def capture(graph: Graph, **options: Any) -> nullcontext:
    graph.captured = True
    Graph.captures += 1
    return nullcontext()


def stand_in() -> None:
    """Put stand-ins in the place of what asks torch for a GPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    generator = SimpleNamespace(clone_state=lambda: None)
    functions = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": lambda: stream,
        "stream": lambda given: nullcontext(),
        "current_stream": lambda: stream,
        "default_generators": [generator],
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    for name in ("synchronize", "_sleep", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *args: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        setattr(torch.cuda, name, lambda: 0)


def shrink() -> None:
    """Give the jobs tiny data, and leave out what compares results."""
    measure, operations = gpu_timing.measure, gpu_checks.operations

    def measured(case: Any, limit: dict, emit: Any) -> None:
        def build(smoke: bool) -> Any:
            return replace(case.build(True), check=lambda: None)

        measure(replace(case, build=build, rounds=2), limit, emit)

    def watch(
        tool: str, options: list, launch: list, run: Callable[[], None], log: Path, emit: Any
    ) -> None:
        run()
        emit(tool)

    gpu_timing.measure = measured
    gpu_timing.limits = partial(gpu_timing.limits, small=True)
    gpu_checks.operations = lambda dtype, small: operations(dtype, True)
    gpu_checks.launch_case = partial(gpu_checks.launch_case, small=True)
    gpu_checks.REPEATS, gpu_checks._watch = 2, watch
    gpu_steps.SMOKE, gpu_steps.Steps = True, lambda B, smoke: Steps(B, True)
    gpu_checks.SMOKE = gpu_timing.SMOKE = False

    def recorder(config: Any, device: torch.device) -> Any:
        return cuda_graph.CudaGraphs() if config.cuda_graph and not config.compile else None

    step.recorder_for = recorder


def count_launches() -> None:
    """Count each launch by its kernel's name."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append(self.__name__)
        names = {param.name for param in self.params}
        self.signature.bind(*args, **{name: x for name, x in options.items() if name in names})
        assert all(type(n) is int and n >= 0 for n in grid), grid

    JITFunction.run = run


def ran(job: Any) -> dict[str, Any]:
    """Run a job; return what it launched and how it ended."""
    launched.clear()
    start = time.monotonic()
    before, results = (Graph.captures, Graph.replays), []
    try:
        with Zeros():
            job.run(results.append)
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"[:500]
    else:
        ended = "done"
    graphs = {"captures": Graph.captures - before[0], "replays": Graph.replays - before[1]}
    counts = {name: launched.count(name) for name in sorted(set(launched))}
    graphs["seconds"] = round(time.monotonic() - start, 2)
    return {"ended": ended, "kernels": counts, **graphs, "result": results[-1] if results else None}


def main() -> None:
    """Run all jobs and print the results as JSON."""
    stand_in()
    shrink()
    count_launches()
    libraries = use_triton_on_cpu()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "jobs").mkdir()
        # The machine and the tests are not what is tried here; racecheck is memcheck's code.
        chosen = [
            job
            for job in gpu.jobs("all", out)
            if job.section not in ("machine", "parity") and not job.name.startswith("racecheck")
        ]
        results = {job.name: ran(job) for job in chosen}
    del libraries
    print(json.dumps(results))


if __name__ == "__main__":
    main()
