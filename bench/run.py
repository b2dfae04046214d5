"""Measure gptfast and its peers in one process: print a table, write JSON and a picture.

python bench/run.py [--quick] [--only attention,train | --generate] [--out DIR]
"""

import argparse
import json
import platform
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import matplotlib
import peers
import torch
from harness import Case, LimitMeter, Limits, Timing, format_cost, measured_bytes, time_pair

from gptfast.ops.backend import EXTENSION

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - the backend is chosen before pyplot loads
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

QUICK = ("attention", "cross_entropy", "adamw", "sampling", "embedding", "train", "generate")
BENCHMARKS = (*QUICK, "weights", "drop_in")
GENERATE = "engine"
"""What --generate measures; only on demand, since it needs what `make bench-peers` installs."""


@dataclass(frozen=True)
class Row:
    case: Case
    timing: Timing
    read_bytes_per_s: float
    """What memory gave before and after: on a machine shared with others it changes in minutes."""


def machine() -> dict[str, object]:
    """What the figures are worth nothing without."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), model)
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "gptfast_isa": EXTENSION.build_info()["isa"] if EXTENSION else "reference (no extension)",
    }


def measure(names: list[str], quick: bool) -> tuple[list[Row], Limits]:
    """Check and time every case of the named benchmarks; raises where the two sides differ."""
    meter, rows = LimitMeter(), []
    budget = (1.0, 1.0) if quick else (3.0, 10.0)
    for name in names:
        for case in import_module(f"bench_{name}").cases(quick):
            label = f"{case.op}: {case.name} {case.shape}, {case.peer_name}"
            print(label, end=" ", file=sys.stderr, flush=True)
            meter.sample()
            before = meter.read_rate()
            pair = case.build()
            pair.check()
            timing = time_pair(pair, *budget) if case.unit == "s" else measured_bytes(pair)
            rows.append(Row(case, timing, (before + meter.read_rate()) / 2))
            costs = [format_cost(cost, case.unit) for cost in (timing.ours_s, timing.peer_s)]
            print(
                f"{', '.join(costs)}, {timing.ratio:.2f}x, others {timing.others:.1%}",
                file=sys.stderr,
                flush=True,
            )
    meter.sample()
    return rows, meter.limits()


def _verdict(row: Row) -> str:
    if not row.case.target:
        return ""
    return f"{row.case.target:g}x {'met' if row.timing.ratio >= row.case.target else 'missed'}"


def _of_limit(row: Row, limits: Limits) -> str:
    fraction = limits.floor(row.case) / row.timing.ours_s
    return f"{fraction:.0%}" if row.case.unit == "s" and fraction else ""


def table(rows: list[Row], limits: Limits) -> str:
    """A Markdown table, one line per case."""
    lines = [
        ("op", "case", "shape", "peer", "ours", "peer takes", "ratio", "target", "of the limit")
    ]
    for row in rows:
        case, timing = row.case, row.timing
        lines.append(
            (
                case.op,
                case.name,
                case.shape,
                case.peer_name,
                format_cost(timing.ours_s, case.unit),
                format_cost(timing.peer_s, case.unit),
                f"{timing.ratio:.2f}x{' (disturbed)' if timing.disturbed else ''}",
                _verdict(row),
                _of_limit(row, limits),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))
    cells = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def rates(rows: list[Row]) -> str:
    """Tokens/s of both sides, a line per case that writes tokens, and how fast ours reads."""
    lines = []
    for row in rows:
        case, timing = row.case, row.timing
        if not case.tokens:
            continue
        line = f"{case.name} {case.shape}: {case.tokens / timing.ours_s:.1f} tokens/s, "
        line += f"{case.peer_name} {case.tokens / timing.peer_s:.1f}"
        if case.n_bytes and case.reads_only:
            read = case.n_bytes / timing.ours_s
            line += f"; reads {read / 1e9:.1f} GB/s, {read / row.read_bytes_per_s:.0%} of what "
            line += f"memory gave then, {row.read_bytes_per_s / 1e9:.1f} GB/s"
        lines.append(line)
    return "\n".join(lines)


def write_json(path: Path, rows: list[Row], limits: Limits) -> None:
    results = [
        {
            "op": row.case.op,
            "case": row.case.name,
            "shape": row.case.shape,
            "peer": row.case.peer_name,
            "bytes": row.case.n_bytes,
            "flops": row.case.flops,
            "target": row.case.target,
            "unit": row.case.unit,
            "tokens": row.case.tokens,
            **vars(row.timing),
            "disturbed": row.timing.disturbed,
            "read_bytes_per_s": row.read_bytes_per_s,
            "fraction_of_limit": limits.floor(row.case) / row.timing.ours_s,
        }
        for row in rows
    ]
    record = {"machine": machine(), "limits": vars(limits), "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n")


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Bars of peer / ours, logarithmic, with the quartiles and a line where the two are equal."""
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
    ops = list(dict.fromkeys(row.case.op for row in rows))
    for y, row in enumerate(rows):
        ratio, (low, high) = row.timing.ratio, row.timing.ratio_quartiles
        alpha = 0.3 if row.timing.disturbed else 1.0
        axes.barh(y, ratio - 1, left=1, color=f"C{ops.index(row.case.op)}", alpha=alpha)
        axes.plot([low, high], [y, y], color="black", linewidth=1)
        text = f" {ratio:.2f}x{' disturbed' if row.timing.disturbed else ''}"
        axes.annotate(text, (max(high, 1.0), y), va="center", fontsize=8)
    labels = [f"{row.case.op}: {row.case.name} {row.case.shape}" for row in rows]
    if len(set(labels)) < len(labels):
        labels = [f"{x}, {row.case.peer_name}" for x, row in zip(labels, rows, strict=True)]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.01)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("times as fast as the peer")
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller shapes, under two minutes")
    parser.add_argument("--only", default="", help=f"some of {','.join((*BENCHMARKS, GENERATE))}")
    parser.add_argument("--generate", action="store_true", help="the engine against other engines")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(QUICK if args.quick else BENCHMARKS)
    if args.generate and args.only:
        parser.error("--generate and --only name different benchmarks; give one of them")
    if args.generate:
        names = [GENERATE]
    known = (*BENCHMARKS, GENERATE)
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"no benchmark named {unknown[0]!r}; choose from {', '.join(known)}")
    # Now, not behind the rows that need no peer.
    if GENERATE in names and (missing := peers.missing()):
        parser.error(f"not installed: {', '.join(missing)}; `make bench-peers` installs them")
    rows, limits = measure(names, args.quick)
    title = ", ".join(f"{key} {value}" for key, value in machine().items())
    print(title)
    print(
        f"limits: fp32 GEMM {limits.flops_per_s / 1e9:.0f} GFLOP/s, "
        f"copy {limits.bytes_per_s / 1e9:.1f} GB/s, read {limits.read_bytes_per_s / 1e9:.1f} GB/s\n"
    )
    print(table(rows, limits))
    if any(row.case.tokens for row in rows):
        print(f"\n{rates(rows)}")
    if any(row.timing.disturbed for row in rows):
        print(
            "\ndisturbed: other processes used the cores meanwhile; these rows are no measurement, "
            "repeat them on a quiet machine"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    parts = ["cpu", *(["quick"] if args.quick else []), *(names if args.only else [])]
    if args.generate:
        parts.append("generate")
    path = args.out / f"{'-'.join(parts)}.json"
    write_json(path, rows, limits)
    draw(path.with_suffix(".png"), rows, title)
    print(f"\nwrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
