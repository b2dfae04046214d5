"""Put the figures of bench/run.py into README.md, between its two markers.

python bench/readme.py bench/results/cpu.json ...
"""

import json
import sys
from pathlib import Path

from harness import format_cost

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


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


def figures(paths: list[str]) -> str:
    """The machine, its limits and a table of all results in the files."""
    records = [json.loads(Path(path).read_text()) for path in paths]
    machine = ", ".join(f"{key} {value}" for key, value in records[0]["machine"].items())
    gemm = max(record["limits"]["flops_per_s"] for record in records) / 1e9
    copy = max(record["limits"]["bytes_per_s"] for record in records) / 1e9
    lines = [
        f"{machine}; fp32 GEMM {gemm:.0f} GFLOP/s, copy {copy:.0f} GB/s.",
        "",
        "| operation | case | peer takes | gptfast | ratio | target | of the limit |",
        "|---|---|---|---|---|---|---|",
        *(_line(result) for record in records for result in record["results"]),
    ]
    return "\n".join(lines)


def main() -> None:
    text = README.read_text("utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{figures(sys.argv[1:])}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
