"""Fill the figures of the pages from the JSON of bench/results, and from scaling.py.

python bench/publish.py [--check]

A page marks each place with `<!-- figures: NAME -->` and `<!-- end of figures: NAME -->`; what
stands between the two is replaced. NAME is one of TABLES, each with a column for every CPU in
bench/results, or "targets", "summary", "machines" or "shortfalls", or "scaling", which is
predicted. Rows that other processes disturbed are not shown. --check changes nothing and fails if a
page is out of date.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import scaling
from record import RESULTS, Row, format_cost, format_rate, format_share, load, publishable
from targets import LEVELS, TARGETS, Key, cell

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "distributed.md")
MARKED = re.compile(r"<!-- figures: (\w+) -->\n.*?<!-- end of figures: \1 -->", re.DOTALL)
TABLES = {
    "operations": ("attention", "cross_entropy", "adamw", "sampling", "embedding"),
    "training": ("train",),
    "generation": ("engine", "generate"),
    "serving": ("serve",),
    "weights": ("weights",),
    "drop_in": ("drop_in",),
}
"""The benchmarks of each table."""
EVERY = tuple(name for names in TABLES.values() for name in names)

Results = dict[str, dict[str, dict]]
"""The records by CPU and benchmark."""

# The README's name of a peer whose own name alone says too little.
PEER_NAMES = {"topk of k": "topk, softmax and draw among the k"}
SUMMARY: dict[str, Key] = {
    "attention, forward and backward": (
        "attention",
        "fwd+bwd fp32",
        "(4, 12, 1024, 64)",
        "SDPA",
    ),
    "head and loss, forward and backward": (
        "linear_cross_entropy",
        "fwd+bwd fp32",
        "(2048, 768)x(50257, 768)",
        "linear + cross_entropy",
    ),
    "top-k sampling, 64 rows": (
        "sampling",
        "top_k=50",
        "(64, 50257)",
        "topk of k",
    ),
    "training step, B=2 T=1024": (
        "train",
        "step GPT-2 124M fp32",
        "B=2 T=1024",
        "plain PyTorch",
    ),
    "step of transformers' model after `accelerate`": (
        "drop_in",
        "accelerate(model), AdamW, GPT-2 124M",
        "B=4 T=256",
        "transformers",
    ),
    "generation in int8, one row": (
        "decode",
        "128 tokens int8",
        "GPT-2 124M B=1",
        "llama.cpp Q8_0",
    ),
}
"""The figures of README, by what they are called there."""


def read_results(folder: Path) -> Results:
    """Return every record of bench/results except the curves, which are a picture only."""
    results: Results = {}
    for path in sorted(folder.glob("*/*.json")):
        record = load(path)
        if "rows" in record:
            results.setdefault(record["machine"]["cpu"], {})[record["benchmark"]] = record
    return results


def _rows(records: dict[str, dict], benchmarks: tuple[str, ...]) -> dict[Key, Row]:
    """Return the publishable rows of one CPU by what they measure."""
    return {
        (row["op"], row["case"], row["shape"], row["peer"]): row
        for name in benchmarks
        if name in records
        for row in publishable(records[name])
    }


def _markdown(lines: list[tuple[str, ...]]) -> str:
    """Return a Markdown table whose first line is the heading."""
    lines = [lines[0], ("---",) * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row | None) -> str:
    """Return a row's ratio, both costs and its share of the limit."""
    if row is None:
        return "not measured"
    costs = f"{format_rate(row, 'gptfast')}, peer {format_rate(row, 'peer')}"
    share = format_share(row)
    return f"**{row['ratio']:.2f}x**<br>{costs}{f'<br>{share}' if share else ''}"


def table(results: Results, benchmarks: tuple[str, ...]) -> str:
    """Return a table with a line for each case and a column for each CPU that has one."""
    columns = {cpu: _rows(records, benchmarks) for cpu, records in results.items()}
    columns = {cpu: rows for cpu, rows in columns.items() if rows}
    if not columns:
        return "Not measured with this version."
    keys = dict.fromkeys(key for rows in columns.values() for key in rows)
    lines = [("operation", "case", "peer", *columns)]
    for key in keys:
        op, case, shape, peer = key
        cells = (_cell(rows.get(key)) for rows in columns.values())
        lines.append((op, f"{case}, {shape}", peer, *cells))
    return _markdown(lines)


def targets(results: Results) -> str:
    """Return a table of the targets that depend on the CPU, and what each CPU reached of them."""
    columns = {cpu: _rows(records, EVERY) for cpu, records in results.items()}
    levels = {
        cpu: {record["machine"]["gptfast_isa"] for record in records.values()}
        for cpu, records in results.items()
    }
    # A column for the CPUs with AMX as long as none of them was measured.
    missing = [
        name for name, known in LEVELS.items() if not any(levels[c] & {*known} for c in results)
    ]
    lines = [
        ("what", "against", "at least", "needs", *columns, *(f"CPUs with {n}" for n in missing))
    ]
    for target in TARGETS:
        cells = [cell(target, rows.get(target.key), levels[cpu]) for cpu, rows in columns.items()]
        cells += ["not measured" if target.needs == name else "" for name in missing]
        lines.append((target.what, target.against, f"{target.ratio:.3g}x", target.needs, *cells))
    return _markdown(lines)


def summary(results: Results) -> str:
    """Return README's figures, a column for each CPU, and a line about each machine."""
    columns = {cpu: _rows(records, EVERY) for cpu, records in results.items()}
    columns = {
        cpu: rows for cpu, rows in columns.items() if any(key in rows for key in SUMMARY.values())
    }
    lines = [("GPT-2 124M", "against", *columns)]
    for name, key in SUMMARY.items():
        if not any(key in rows for rows in columns.values()):
            raise ValueError(
                f"{' '.join(key)} is not measured; run bench/run.py on a quiet machine"
            )
        cells = []
        for rows in columns.values():
            row = rows.get(key)
            cells.append("not measured" if row is None else _figure(row))
        lines.append((name, PEER_NAMES.get(key[3], key[3]), *cells))
    text = [_markdown(lines), "", *(f"{cpu}: {_machine(results[cpu])}." for cpu in columns)]
    return "\n".join(text)


def _figure(row: Row) -> str:
    return f"**{row['ratio']:.2f}x** ({format_rate(row, 'gptfast')})"


def _machine(records: dict[str, dict]) -> str:
    """Return threads, versions and instruction sets of one CPU's records."""
    machines = [record["machine"] for record in records.values()]
    levels = dict.fromkeys(machine["gptfast_isa"] for machine in machines)
    first = machines[0]
    return (
        f"{first['threads']} threads, torch {first['torch']} ({first['torch_isa']}), "
        f"gptfast {' and '.join(levels)}"
    )


def machines(results: Results) -> str:
    """Return a table of the CPUs with their measured limits, the best of all runs."""
    names = ("fp32 GEMM", "bf16 GEMM", "copy", "read")
    lines = [("CPU", "measured on", "software", *names)]
    for cpu, records in results.items():
        cells = []
        for name in names:
            rates = [r["limits"][name] for r in records.values() if name in r["limits"]]
            unit = "GFLOP/s" if "GEMM" in name else "GB/s"
            cells.append(f"{max(rates) / 1e9:.0f} {unit}" if rates else "not measured")
        dates = sorted({record["machine"]["date"] for record in records.values()})
        lines.append((cpu, " and ".join(dates), _machine(records), *cells))
    return _markdown(lines)


def shortfalls(results: Results) -> str:
    """Return the cases that miss their target; without a target, those where the peer needs less
    even at the upper quartile of the ratio."""
    lines = [("CPU", "operation", "case", "peer", "gptfast", "peer takes", "ratio", "target")]
    for cpu, records in results.items():
        for record in records.values():
            for row in publishable(record):
                ratio = row["ratio"] if row["target"] else row["ratio_quartiles"][1]
                if ratio >= (row["target"] or 1.0):
                    continue
                target = f"{row['target']:.3g}x" if row["target"] else ""
                case = f"{row['case']}, {row['shape']}"
                costs = (format_cost(row[f"{x}_cost"], row["unit"]) for x in ("gptfast", "peer"))
                names = (cpu, row["op"], case, row["peer"])
                lines.append((*names, *costs, f"{row['ratio']:.2f}x", target))
    return _markdown(lines)


def figures(name: str, results: Results) -> str:
    """Return what stands between the markers called `name`."""
    others: dict[str, Callable[[Results], str]] = {
        "targets": targets,
        "summary": summary,
        "machines": machines,
        "shortfalls": shortfalls,
        "scaling": lambda _: scaling.page(),
    }
    if name in TABLES:
        return table(results, TABLES[name])
    if name not in others:
        raise ValueError(f"no figures named {name!r}; choose from {', '.join((*TABLES, *others))}")
    return others[name](results)


def filled(text: str, results: Results) -> str:
    """Return a page with everything between its markers made anew."""

    def replace(match: re.Match) -> str:
        name = match[1]
        return (
            f"<!-- figures: {name} -->\n\n{figures(name, results)}\n\n"
            f"<!-- end of figures: {name} -->"
        )

    return MARKED.sub(replace, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date")
    args = parser.parse_args()
    results = read_results(RESULTS)
    for page in PAGES:
        if not page.exists():
            continue
        text = page.read_text("utf-8")
        new = filled(text, results)
        if args.check and new != text:
            sys.exit(f"{page.name} is out of date; run `python bench/publish.py`")
        page.write_text(new, "utf-8")
        print(f"{page.name}: {len(MARKED.findall(new))} places filled")


if __name__ == "__main__":
    main()
