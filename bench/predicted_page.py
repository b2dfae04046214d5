"""The page of bench/predicted_step.py: bench/results/predicted_step.md."""

from collections.abc import Iterable

from cost_model import (
    BYTES_PER_S,
    FLOPS_PER_S,
    LAUNCH,
    PRODUCTS_PER_S,
    SMS,
    Call,
    Kernel,
    Workload,
    parts,
)
from instruction_counts import SAMPLED
from workloads import STEPS, B, T

HEADING = "What a step takes on an H100: predictions, from Triton {}"
TARGETS_MS = (29, 25)
INTRODUCTION = f"""\
`make audit` writes this page on a machine without a GPU, and tests/test_predicted_step.py compares
it. **Every time here is a prediction: nothing was measured.**

The training step of GPT-2 124M (B={B}, T={T}) and steps of generation ran at their real sizes on
tensors without contents. Each launch of ours was compiled for sm_90, and the emulator of PTX
(`make test-ptx`) executed some of its programs to count instructions:

- attention: all blocks of one head, for every head alike; exact
- kernels whose programs differ with the data, marked ~: {SAMPLED} programs at equal distances; an
  estimate (twice as many programs change those that take longest by less than 1%)
- all others: the first program, the last one and three in between, which issued the same
  instructions and stand for the rest; exact
- where a launch needs the results of another one (sampling of few rows), and where there are few
  programs: all of them
- rows of logits that are not padded: eight neighbours, as each eighth one is aligned alike; exact

Instructions are those of PTX, one for each warp; what the GPU executes (SASS) has some more and
some fewer. Bytes: each tensor once. A kernel's time is bound by the longest of

- memory: its bytes at {BYTES_PER_S / 1e12:.1f} TB/s
- tensor cores: the FLOPs of its tensor-core instructions at {FLOPS_PER_S / 1e12:.0f} TFLOP/s
- issue: its instructions at 4 a cycle on each of {SMS} multiprocessors at 1.7 GHz, or on as many as
  it has programs
- launch: {LAUNCH * 1e6:.0f} us

If these overlap perfectly, it takes the longest; if not at all, the sum of the first three. The
truth lies between, where nothing else binds: latency, the last wave of programs, the L2 cache's
bandwidth and bank conflicts are left out. cuBLAS's products are assumed to reach
{PRODUCTS_PER_S / 1e12:.0f} TFLOP/s. PyTorch's other operators are assumed to be one launch each
that moves its tensors once. The host's time is not in here: `bench/host_cost.py` measures it."""


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; head: the names of the columns between |."""
    names = [name.strip() for name in head.split("|")]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def number(x: float, unit: float = 1.0) -> str:
    """Return x / unit with about three digits."""
    x /= unit
    if x < 0.005:
        return "<0.01" if x else "0"
    return f"{x:.0f}" if x >= 99.5 else f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def kernel_rows(kernels: Iterable[Kernel]) -> Iterable[Iterable[object]]:
    """Yield the lines of our kernels, those that take longest in all first."""
    for k in sorted(kernels, key=lambda k: -k.calls * k.bounds.seconds):
        bound, counted = k.bounds, k.counted
        mark = "" if counted.exact else "~"
        yield (
            k.name.removesuffix("_kernel"),
            k.tile,
            k.calls,
            counted.programs,
            mark + number(counted.issued, 1e6),
            number(k.n_bytes, 1e6),
            number(counted.flops, 1e9),
            number(bound.memory, 1e-6),
            number(bound.tensor, 1e-6),
            mark + number(bound.issue, 1e-6),
            bound.binding,
            number(k.calls * bound.seconds, 1e-3),
        )


KERNELS = "kernel | tile | launches | programs | M instructions | MB | GFLOP | memory us "
KERNELS += "| tensor us | issue us | bound by | all launches, ms"
OPERATORS = "operator | tensors | calls | MB | GFLOP | us | all calls, ms"
CLASSES = ("tensor", "global_load", "global_store", "shared", "exchange", "special", "convert")
CLASSES += ("float", "float64", "integer", "move", "branch", "barrier", "parameter")
BY_CLASS = "kernel | grid | M instructions | " + " | ".join(CLASSES)


def class_rows(kernels: Iterable[Kernel]) -> Iterable[Iterable[object]]:
    """Yield each kernel's instructions by class, in percent."""
    for k in sorted(kernels, key=lambda k: -k.calls * k.bounds.seconds):
        issued, by_class = k.counted.issued, k.counted.instructions
        shares = (f"{100 * by_class.get(name, 0) / issued:.1f}" for name in CLASSES)
        name = k.name.removesuffix("_kernel")
        yield name, "x".join(map(str, k.grid)), number(issued, 1e6), *shares


def operator_rows(calls: Iterable[Call]) -> Iterable[Iterable[object]]:
    """Yield the lines of PyTorch's operators that take longer than a launch, and of all others."""
    few = [c for c in calls if c.bounds.seconds <= LAUNCH]
    for c in sorted(calls, key=lambda c: -c.calls * c.bounds.seconds):
        name, shapes, n_bytes, flops = c.operator
        if c.bounds.seconds > LAUNCH:
            shown = ", ".join("x".join(map(str, shape)) or "1" for shape in shapes)
            seconds = c.bounds.seconds
            cells = (name, shown, c.calls, number(n_bytes, 1e6), number(flops, 1e9))
            yield *cells, number(seconds, 1e-6), number(c.calls * seconds, 1e-3)
    n = sum(c.calls for c in few)
    yield "all others", "", n, "", "", number(LAUNCH, 1e-6), number(n * LAUNCH, 1e-3)


def step_flops() -> float:
    """Return the FLOPs of a training step, as MFU counts them."""
    from gptfast import GPTConfig
    from gptfast.training.flops import flops_per_token

    return flops_per_token(GPTConfig(), T) * B * T


def summary(workload: Workload) -> str:
    """Return the sum of a workload, for a training step beside the targets."""
    rows: list[tuple] = [
        (
            name if name != "together" else "**predicted, together**",
            p.launches,
            number(p.n_bytes, 1e9),
            number(p.flops, 1e12),
            number(p.seconds, 1e-3),
            number(p.apart, 1e-3),
        )
        for name, p in parts(workload).items()
    ]
    if workload.name.startswith("step"):
        total, flops = parts(workload)["together"], step_flops()
        share = [f"{flops / seconds / FLOPS_PER_S:.0%}" for seconds in (total.seconds, total.apart)]
        rows.append(("MFU, predicted", "", "", number(flops, 1e12), *share))
        for ms in TARGETS_MS:
            share_then = f"{flops / (ms * 1e-3) / FLOPS_PER_S:.0%}"
            rows.append((f"target: {ms} ms", "", "", "", ms, f"MFU {share_then}"))
    head = "part | launches | GB | TFLOP | ms, all overlaps | ms, nothing overlaps"
    return table(head, rows)


def page(workloads: list[Workload]) -> str:
    """Return the text of the page."""
    import triton

    out = [f"# {HEADING.format(triton.__version__)}", INTRODUCTION]
    for workload in workloads:
        title = STEPS.get(workload.name, workload.name[0].upper() + workload.name[1:])
        out += [f"## {title}", summary(workload)]
        out += ["Our kernels, predicted:", table(KERNELS, kernel_rows(workload.kernels))]
        if workload.operators:
            calls = workload.operators
            out += ["PyTorch's operators, predicted:", table(OPERATORS, operator_rows(calls))]
        classes = "kernel | grid | M instructions | " + " | ".join(CLASSES)
        out += [
            "Instructions by class, counted, in %:",
            table(classes, class_rows(workload.kernels)),
        ]
    return "\n\n".join(out) + "\n"
