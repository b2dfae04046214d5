"""The results of one benchmark on one CPU: the files bench/results/<cpu>/<benchmark>.json.

A record has "machine", "benchmark", "limits" (rates per second) and "rows". Everything that is
shown (the table of a run, the pictures, the tables in README and docs/) is made from these records.
"""

import json
import platform
import re
from datetime import date
from pathlib import Path

import torch
from harness import Case
from limits import Share
from timing import Timing

from gptfast.files import replacing
from gptfast.ops.backend import EXTENSION

RESULTS = Path(__file__).parent / "results"

Row = dict
"""One case of a record, as `row_of` makes it."""


def cpu_name() -> str:
    """Return the CPU's model name, with family and model number where the name has no number.

    A virtual machine may hide the matrix engine of such a CPU, so the name says whether it has one.
    """
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in path.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name", platform.machine())
    if not re.search(r"\d", name) and "cpu family" in fields:
        engine = ", AMX" if "amx_bf16" in fields.get("flags", "").split() else ""
        name = f"{name} (family {fields['cpu family']}, model {fields['model']}{engine})"
    return name


def machine() -> dict[str, object]:
    """Return what describes this machine; a figure without it means nothing."""
    return {
        "cpu": cpu_name(),
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "gptfast_isa": EXTENSION.build_info()["isa"] if EXTENSION else "reference (no extension)",
    }


def machine_line(record: dict) -> str:
    """Return the machine of a record in one line."""
    values = record["machine"]
    return (
        f"{values['cpu']}, {values['threads']} threads, torch {values['torch']} "
        f"({values['torch_isa']}), gptfast {values['gptfast_isa']}"
    )


def folder_name(cpu: str) -> str:
    """Return a CPU's name as a folder: "Intel(R) Xeon(R) CPU @ 2.20GHz" gives intel-xeon-..."""
    plain = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@", " ", cpu.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def row_of(case: Case, timing: Timing, share: Share) -> Row:
    """Return the row of a record for a case that was measured."""
    return {
        "op": case.op,
        "case": case.name,
        "shape": case.shape,
        "peer": case.peer_name,
        "bytes": case.n_bytes,
        "flops": case.flops,
        "target": case.target,
        "unit": case.unit,
        "tokens": case.tokens,
        **vars(timing),
        "disturbed": timing.disturbed,
        "limit": vars(share.limit) if share.limit else None,
        "share_of_limit": share.value,
        "no_share_because": share.reason,
    }


def publishable(record: dict) -> list[Row]:
    """Return the rows whose measurement was not disturbed by other processes."""
    return [row for row in record["rows"] if not row["disturbed"]]


def _label(op: str, case: str, shape: str, peer: str) -> str:
    return f"{op}: {case}, {shape}, against {peer}"


def row_label(row: Row) -> str:
    """Return what a row measures; no two rows of a record have the same label."""
    return _label(row["op"], row["case"], row["shape"], row["peer"])


def case_label(case: Case) -> str:
    """Return the label of the row that a case gives."""
    return _label(case.op, case.name, case.shape, case.peer_name)


def save(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(record, indent=1) + "\n")


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def format_cost(value: float, unit: str) -> str:
    """Return seconds or bytes (the `unit` of a case) with three digits and a prefix."""
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MB"
    name, scale = next((x for x in (("s", 1.0), ("ms", 1e-3)) if value >= x[1]), ("µs", 1e-6))
    return f"{value / scale:.3g} {name}"


def format_share(row: Row) -> str:
    """Return a share with its limit, such as "76% of fp32 GEMM", or nothing."""
    share = row["share_of_limit"]
    return "" if share is None else f"{share:.0%} of {row['limit']['name']}"


def format_rate(row: Row, side: str) -> str:
    """Return the cost of one side ("gptfast" or "peer"), in tokens/s if the row counts tokens."""
    cost = row[f"{side}_cost"]
    if row["tokens"]:
        return f"{row['tokens'] / cost:,.0f} tokens/s"
    return format_cost(cost, row["unit"])


def table(record: dict) -> str:
    """Return a Markdown table with a line for each row that was not disturbed."""
    columns = ("op", "case", "shape", "peer", "gptfast", "peer takes", "ratio", "target", "limit")
    lines = [columns]
    for row in publishable(record):
        target = ""
        if row["target"]:
            met = "met" if row["ratio"] >= row["target"] else "missed"
            target = f"{row['target']:.3g}x {met}"
        names = (row["op"], row["case"], row["shape"], row["peer"])
        ratio = f"{row['ratio']:.2f}x"
        costs = format_rate(row, "gptfast"), format_rate(row, "peer")
        lines.append((*names, *costs, ratio, target, format_share(row)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, tuple("-" * width for width in widths))
    cells = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
