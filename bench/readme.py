"""Put the figures of bench/run.py into README.md, between the markers of their table.

python bench/readme.py bench/results/cpu.json ...
python bench/readme.py bench/results/cpu-generate.json
"""

import json
import math
import sys
from pathlib import Path

from harness import format_cost

README = Path(__file__).parents[1] / "README.md"


def _line(result: dict) -> str:
    limit = result["fraction_of_limit"]
    cells = (
        result["op"],
        f"{result['case']}, {result['shape']}, against {result['peer']}",
        format_cost(result["peer_s"], result["unit"]),
        format_cost(result["ours_s"], result["unit"]),
        f"{result['ratio']:.2f}x{' (disturbed)' if result['disturbed'] else ''}",
        f"{result['target']:.3g}x" if result["target"] else "",
        f"{limit:.0%}" if result["unit"] == "s" and limit else "",
    )
    return f"| {' | '.join(cells)} |"


def _limits(records: list[dict]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in records[0]["machine"].items())
    gemm, copy, read = (
        max(record["limits"].get(name, 0.0) for record in records) / 1e9
        for name in ("flops_per_s", "bytes_per_s", "read_bytes_per_s")
    )
    limits = f"{machine}; fp32 GEMM {gemm:.0f} GFLOP/s, copy {copy:.0f} GB/s"
    return f"{limits}, read {read:.0f} GB/s." if read else f"{limits}."


def figures(records: list[dict]) -> str:
    """The machine, its limits and a table of all results."""
    lines = [
        _limits(records),
        "",
        "| operation | case | peer takes | gptfast | ratio | target | of the limit |",
        "|---|---|---|---|---|---|---|",
        *(_line(result) for record in records for result in record["results"]),
    ]
    return "\n".join(lines)


def _rate(result: dict, side: str) -> str:
    seconds = result[f"{side}_s"]
    if result["tokens"]:
        return f"{result['tokens'] / seconds:,.0f} tokens/s"
    return format_cost(seconds, "s")


def generation(records: list[dict]) -> str:
    """The same for generation, in tokens per second where it is tokens."""
    lines = [
        _limits(records),
        "",
        "| what | against | peer | gptfast | ratio | target | of memory's rate then |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in (result for record in records for result in record["results"]):
        ratio = f"{result['ratio']:.2f}x{' (disturbed)' if result['disturbed'] else ''}"
        target = f"{result['target']:.3g}x" if result["target"] else ""
        what = f"{result['op']}: {result['case']}, {result['shape']}"
        read = result["bytes"] / result["ours_s"]
        then = result.get("read_bytes_per_s", math.nan)  # not in older files
        rate = f"{read / then:.0%}" if result["op"] == "decode" and then == then else ""
        rates = (_rate(result, side) for side in ("peer", "ours"))
        cells = (what, result["peer"], *rates, ratio, target, rate)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    paths = [Path(path) for path in sys.argv[1:]]
    table = generation if paths[0].stem.endswith("generate") else figures
    begin, end = f"<!-- {table.__name__} -->", f"<!-- end of {table.__name__} -->"
    text = README.read_text("utf-8")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    filled = table([json.loads(path.read_text()) for path in paths])
    README.write_text(f"{before}{begin}\n{filled}\n{end}{after}", "utf-8")


if __name__ == "__main__":
    main()
