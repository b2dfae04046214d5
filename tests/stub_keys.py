"""Ask Triton and the plans which compiled kernel random arguments need; print where they differ.

test_launch.py runs this file in a process of its own. The compiler is replaced: each kernel that
Triton asks it for is only a number, so thousands of specialisations take a second. For the same
arguments, a launch from a plan must reach the same number with the same arguments.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import stub_cuda  # noqa: E402
import torch  # noqa: E402
from seeds import python_generator  # noqa: E402

stub_cuda.install(Path(tempfile.mkdtemp()))

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

from gptfast.kernels.triton.launch import launch  # noqa: E402
from gptfast.kernels.triton.launch_series import repeat, scratch  # noqa: E402

ROUNDS = 3000
Reached = tuple[int, tuple, tuple]
reached: list[Reached] = []


@triton.jit(do_not_specialize=["free"])
def kernel(a, n, free, x, pair, CONSTANT: tl.constexpr):
    pass


def compiler(src: Any, target: Any, options: dict[str, Any]) -> CompiledKernel:
    """Return a kernel that only notes that it was launched."""
    compiled = CompiledKernel.__new__(CompiledKernel)
    compiled.src, compiled.name, compiled.module = src, "kernel", 1
    compiled.metadata = SimpleNamespace(target=target)
    compiled.function = len(kernel.device_caches[0][0]) + 1
    compiled.packed_metadata = ()
    compiled._run = run
    return compiled


def run(*given: Any) -> None:
    """Note a launch, as Triton's launcher is called."""
    *grid, _, function, _, metadata, enter_hook, exit_hook = given[:9]
    for hook in (enter_hook, exit_hook):
        if hook is not None:
            hook(metadata)
    reached.append((function, tuple(grid), addresses(given[9:])))


def addresses(x: Any) -> Any:
    """Return the arguments with each tensor as its address."""
    if isinstance(x, tuple):
        return tuple(map(addresses, x))
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


INTEGERS = [0, 1, 2, 15, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40]
INTEGERS += [2**63 - 1, 2**63, -(2**63), True, False]
memory = torch.zeros(64, dtype=torch.int64)
TENSORS: list[Any] = [
    memory.view(dtype)[at:] for dtype in (torch.float32, torch.bfloat16) for at in (0, 1, 2, 4, 8)
]
TENSORS += [torch.nn.Parameter(torch.zeros(8)), memory, None]
OTHERS: list[Any] = [0.0, 1.0, 0.5, *INTEGERS[:4], True, None]


def draw(choose: Any) -> tuple[tuple, dict[str, Any], tuple[int, ...]]:
    """Return arguments, options and a grid."""
    pair = choose([None, (choose(TENSORS), choose(INTEGERS)), (choose(INTEGERS), 1, 0.5), 1, 2])
    values = (choose(TENSORS), choose([*INTEGERS, *OTHERS]), choose(INTEGERS), choose(OTHERS), pair)
    options = {"CONSTANT": choose([1, True, 1.0, 0, False, "ieee", tl.float32]), "num_warps": 4}
    return values, options, choose([(3,), (2, 5), (1, 2, 7)])


def compare_launches() -> list[str]:
    """Return the launches that differ from Triton's own."""
    wrong, random = [], python_generator(3)
    for _ in range(ROUNDS):
        args, options, grid = draw(random.choice)
        reached.clear()
        kernel[grid](*args, **options)
        launch(kernel, grid, *args, **options)
        launch(kernel, grid, *args, **options)
        if len(reached) != 3 or len(set(map(str, reached))) != 1:
            wrong.append(f"{args} {options}: {reached}")
    return wrong


def fill(x: torch.Tensor, y: torch.Tensor | None, at: int, scale: float) -> None:
    """Launch on parts of the tensors, and on memory of our own."""
    own = scratch(x, (2, 8), torch.float32)
    part = x[at:]
    launch(kernel, (len(x),), part, x.stride(0), at, scale, (y, at), CONSTANT=1, num_warps=4)
    # Scratch memory is new each time.
    launch(kernel, (2,), own, 8, at, scale, (part, 3), CONSTANT=2, num_warps=4)


def compare_series() -> list[str]:
    """Return the series that differ from the function's own launches."""
    wrong, random = [], python_generator(4)
    for _ in range(ROUNDS // 3):
        n, at = random.randrange(9, 12), random.randrange(5)
        x = torch.zeros(64)[random.randrange(6) :][: n * 2 : random.choice([1, 2])]
        y = random.choice([None, x, torch.zeros(3)])
        runs = []
        for way in (fill, lambda *a: repeat(fill, a[:2], *a[2:])):
            reached.clear()
            way(x, y, at, 0.5)
            first, (function, grid, (own, *rest)) = reached
            assert own % 16 == 0
            runs.append(str((first, function, grid, rest)))
        if runs[0] != runs[1]:
            wrong.append(f"{x.shape} {x.stride()} {at} {y}: {runs}")
    return wrong


def fill_from_two(x: torch.Tensor, y: torch.Tensor) -> None:
    launch(kernel, (1,), x, 16, 16, 0.5, (y, 16), CONSTANT=1, num_warps=4)


def compare_equal_tensors() -> list[str]:
    """Return the series that take one tensor for another because they once were the same."""
    wrong = []
    x, y = torch.zeros(2, 16)
    for pair in ((x, x), (x, y), (y, x), (y, y)):
        reached.clear()
        fill_from_two(*pair)
        repeat(fill_from_two, pair)
        if len(set(map(str, reached))) != 1:
            wrong.append(f"x is y: {pair[0] is pair[1]}: {reached}")
    return wrong


def unseen() -> list[str]:
    """Return who did not see a launch that a plan could have made."""
    args, options = (memory, 3, 3, 0.5, None), {"CONSTANT": 1, "num_warps": 4}
    seen: list[str] = []

    def both() -> None:
        launch(kernel, (1,), *args, **options)
        repeat(fill, (memory, None), 2, 0.5)

    both()
    both()
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(knobs.runtime, name)
        watch = lambda *args, name=name: seen.append(name)  # noqa: E731
        hook.add(watch)
        both()
        hook.remove(watch)
    real = JITFunction.run
    JITFunction.run = lambda self, *a, **k: seen.append("run") or real(self, *a, **k)
    both()
    JITFunction.run = real
    kernel.add_pre_run_hook(lambda *a, **k: seen.append("pre_run_hook"))
    both()
    kernel.pre_run_hooks.clear()
    before = len(seen)
    both()
    names = ("launch_enter_hook", "launch_exit_hook", "run", "pre_run_hook")
    counts = [f"{name}: {seen.count(name)} of 3" for name in names if seen.count(name) != 3]
    return counts + [f"{name} saw a later launch" for name in seen[before:]]


def main() -> None:
    """Print what differs as JSON."""
    kernel.device_caches[0]  # It sets the compiler, which is then replaced.
    kernel.compile = compiler
    wrong = compare_launches()
    kernels = len(kernel.device_caches[0][0])
    wrong += compare_series() + compare_equal_tensors() + unseen()
    print(json.dumps({"wrong": wrong[:5], "kernels": kernels}))


if __name__ == "__main__":
    main()
