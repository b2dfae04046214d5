"""Predict what GPT-2 124M's training step and its decoding take on an H100, without a GPU.

python bench/predicted_step.py [--only REGEX] [--store]

The real code runs inside a `Trace` (step_trace.py) at real sizes, so the launches are its own
(workloads.py). The emulator counts what each of them executes (instruction_counts.py), and the cost
model turns counts, FLOPs and bytes into times (cost_model.py). Nothing is measured.
"""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# The parent may be interpreting Triton; here it compiles.
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

from compile_audit import code
from cost_model import Call, Kernel, Workload, n_bytes
from instruction_counts import Counted, count
from predicted_page import page
from ptx.launch import arguments, install
from ptx.machine import Launch
from step_trace import Operator, Trace, size_of
from torch import Tensor
from workloads import WORKLOADS

from gptfast.files import replacing
from gptfast.torch_private import disable_modes

HERE = Path(__file__).parent
PAGE = HERE / "results" / "predicted_step.md"
RESULTS = PAGE.with_suffix(".json")
MODULES = ("cost_model", "instruction_counts", "predicted_page", "step_trace", "workloads")


def inputs_digest() -> str:
    """Return the SHA-256 of what decides the counts and the page: the kernels, the modules of this
    prediction, how the emulator counts, and the version of Triton."""
    import triton

    files = sorted((HERE.parent / "kernels").rglob("*.py"))
    files += [HERE / f"{name}.py" for name in MODULES]
    files += [Path(__file__), HERE.parent / "tests" / "ptx" / "counts.py"]
    digest = hashlib.sha256(triton.__version__.encode())
    for path in files:
        digest.update(f"\n{path.name}\n{code(path)}".encode())
    return digest.hexdigest()


class Recorder:
    """Takes Triton's launches and adds them to a workload, unless it is None.

    Launches of one kernel on tensors of the same sizes are counted once.
    """

    def __init__(self) -> None:
        self.workload: Workload | None = None
        self._counted: dict[tuple, Counted] = {}
        self._kernels: dict[tuple, Kernel] = {}

    def __call__(self, compiled: Any, grid: Any, named: dict[str, Any]) -> None:
        if self.workload is not None:
            # What reads numbers here is no part of the workload.
            with disable_modes():
                self._add(self.workload, compiled, grid, named)

    def _add(self, workload: Workload, compiled: Any, grid: Any, named: dict[str, Any]) -> None:
        name = compiled.metadata.name
        key = (compiled.hash, tuple(grid), *_sizes(named.values()))
        kernel = self._kernels.get((workload.name, *key))
        if kernel is None:
            # How a token is drawn depends on the logits and on options.
            shared = key if not name.startswith("sample") else (workload.name, *key)
            if shared not in self._counted:
                self._counted[shared] = count(Launch(*arguments(compiled, grid, named)), named)
            tile = "x".join(str(v) for k, v in named.items() if k.startswith("BLOCK"))
            size = n_bytes(name, named)
            kernel = Kernel(name, tile, tuple(grid), size, self._counted[shared])
            self._kernels[workload.name, *key] = kernel
            workload.kernels.append(kernel)
        kernel.calls += 1


def _sizes(values: Any) -> Any:
    """Yield what tells launches of one compiled kernel apart: sizes of tensors, and integers."""
    for value in values:
        if isinstance(value, tuple):
            yield from _sizes(value)
        elif isinstance(value, Tensor):
            yield tuple(value.shape), size_of(value)
        elif isinstance(value, int):
            yield value


def predict(wanted: Callable[[str], object]) -> list[Workload]:
    """Return the workloads whose names are wanted. Triton must not be interpreting."""
    recorder = Recorder()
    install(recorder)
    return [run(name, recorder) for name in WORKLOADS if wanted(name)]


def run(name: str, recorder: Recorder) -> Workload:
    """Return what a workload launches."""
    workload = Workload(name)

    def record(function: Callable[[], object]) -> None:
        trace.operators.clear()
        recorder.workload = workload
        function()
        recorder.workload = None

    with Trace() as trace:
        WORKLOADS[name](record)
    workload.operators = [Call(*item) for item in trace.operators.items()]
    return workload


def stored() -> tuple[str, list[Workload]]:
    """Return the digest and the workloads that `make audit` stored."""
    data = json.loads(RESULTS.read_text("utf-8"))
    return data["inputs"], [_workload(one) for one in data["workloads"]]


def _workload(one: dict[str, Any]) -> Workload:
    kernels = [Kernel(**{**k, "counted": Counted(**k["counted"])}) for k in one["kernels"]]
    calls = [Call(Operator(**c["operator"]), c["calls"]) for c in one["operators"]]
    return Workload(one["name"], kernels, calls)


def store(workloads: list[Workload]) -> None:
    """Write the page and the data behind it."""
    rows = []
    for workload in workloads:
        data = asdict(workload)
        for call, one in zip(workload.operators, data["operators"], strict=True):
            one["operator"] = call.operator._asdict()
        lists = [
            f'"{kind}": [\n' + ",\n".join(map(json.dumps, data[kind])) + "\n]"
            for kind in ("kernels", "operators")
        ]
        rows.append(f'{{"name": {json.dumps(workload.name)},\n{", ".join(lists)}}}')
    with replacing(PAGE) as text, replacing(RESULTS) as file:
        text.write(page(workloads))
        file.write(
            f'{{"inputs": "{inputs_digest()}", "workloads": [\n' + ",\n".join(rows) + "\n]}\n"
        )


def main() -> None:
    """Predict and print, or store, the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a pattern for some of " + "; ".join(WORKLOADS))
    parser.add_argument("--store", action="store_true", help=f"rewrite {PAGE.name} and its data")
    options = parser.parse_args()
    workloads = predict(lambda name: re.search(options.only, name))
    if options.store:
        store(workloads)
    else:
        print(page(workloads))


if __name__ == "__main__":
    main()
