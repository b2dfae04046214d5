"""Measure gptfast and its peers in one process: print tables, write JSON and pictures.

python bench/run.py [--quick] [--only attention,train | --generate | --serve] [--rows REGEX]
                    [--out DIR]
python bench/run.py --redraw

Each benchmark is written to <out>/<cpu>/<benchmark>.json with a picture beside it, so that another
CPU's results are kept.
"""

import argparse
import re
import sys
from importlib import import_module
from pathlib import Path

import peers
from harness import Case
from limits import LimitMeter, share_of_limit
from picture import draw
from record import (
    RESULTS,
    Row,
    case_label,
    folder_name,
    format_cost,
    load,
    machine,
    machine_line,
    row_of,
    save,
    table,
)
from timing import returned_costs, time_pair

QUICK = ("attention", "cross_entropy", "adamw", "sampling", "embedding", "train", "generate")
BENCHMARKS = (*QUICK, "weights", "drop_in", "distributed")
GENERATE = "engine"
"""The benchmark of --generate; it runs on demand only, since it needs `make bench-peers`."""
SERVE = "serve"
"""The benchmark of --serve, which needs them too."""
QUICK_OUT = Path(__file__).parents[1] / "build" / "bench"
"""Where --quick writes: its small shapes are not published."""
SECONDS_PER_CASE, QUIET_TIMEOUT_S = 3.0, 10.0
QUICK_SECONDS_PER_CASE, QUICK_QUIET_TIMEOUT_S = 1.0, 1.0


def _log(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def _measure_case(case: Case, meter: LimitMeter, quick: bool) -> Row:
    """Check and time one case; raise if the two sides differ."""
    _log(f"{case.op}: {case.name} {case.shape}, {case.peer_name}", end=" ")
    seconds, timeout_s = SECONDS_PER_CASE, QUIET_TIMEOUT_S
    if quick:
        seconds, timeout_s = QUICK_SECONDS_PER_CASE, QUICK_QUIET_TIMEOUT_S
    for dtype in {"fp32", case.products}:
        meter.measure_gemm(dtype)
    before = meter.memory_limit_of(case)
    pair = case.build()
    pair.check()
    timing = returned_costs(pair) if case.returns_cost else time_pair(pair, seconds, timeout_s)
    after = meter.memory_limit_of(case)
    memory = max(before, after, key=lambda x: x.per_s) if before and after else None
    gemm = meter.gemm_limit(case.products)
    row = row_of(case, timing, share_of_limit(case, timing.gptfast_cost, gemm, memory))
    costs = [format_cost(row[f"{side}_cost"], case.unit) for side in ("gptfast", "peer")]
    _log(f"{', '.join(costs)}, {timing.ratio:.2f}x, other load {timing.other_load:.1%}")
    return row


def measure(name: str, meter: LimitMeter, quick: bool, rows_like: str = "") -> dict:
    """Measure the cases of a benchmark and return its record. A peer that dies costs its rows.

    rows_like: a regular expression; cases in whose label it is not found are left out.
    """
    cases = import_module(f"bench_{name}").cases(quick)
    rows = []
    for case in cases:
        if rows_like and not re.search(rows_like, case_label(case)):
            continue
        try:
            rows.append(_measure_case(case, meter, quick))
        except peers.PeerDied as error:
            _log(f"no row: {error}")
    return {"machine": machine(), "benchmark": name, "limits": meter.summary(), "rows": rows}


def limits_line(limits: dict[str, float]) -> str:
    """Return the machine's limits in one line."""
    return "limits: " + ", ".join(
        f"{name} {rate / 1e9:.0f} {'GFLOP/s' if 'GEMM' in name else 'GB/s'}"
        for name, rate in limits.items()
    )


def report(path: Path, record: dict) -> None:
    """Write a record and its picture, and print its table."""
    save(path, record)
    draw(path.with_suffix(".png"), record)
    print(f"\n{machine_line(record)}\n{limits_line(record['limits'])}\n\n{table(record)}")
    disturbed = sum(row["disturbed"] for row in record["rows"])
    if disturbed:
        print(
            f"\n{disturbed} of {len(record['rows'])} rows are left out: other processes used the "
            "cores while they were measured. Run this again on a quiet machine."
        )
    print(f"\nwrote {path}", flush=True)


def redraw(out: Path) -> None:
    """Draw every picture under `out` anew from the JSON beside it."""
    for path in sorted(out.glob("*/*.json")):
        draw(path.with_suffix(".png"), load(path))
        print(f"drew {path.with_suffix('.png')}")


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the parsed arguments and the names of the benchmarks to run."""
    known = (*BENCHMARKS, GENERATE, SERVE)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller shapes, about two minutes")
    parser.add_argument("--only", default="", help=f"comma-separated, from {','.join(known)}")
    parser.add_argument(
        "--rows", default="", metavar="REGEX", help="only rows in whose label this is found"
    )
    parser.add_argument("--generate", action="store_true", help="the engine against other engines")
    parser.add_argument("--serve", action="store_true", help="the server with many clients")
    parser.add_argument(
        "--redraw", action="store_true", help="measure nothing, draw the pictures from their JSON"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where results go (default: bench/results; with --quick or --rows: build/bench)",
    )
    args = parser.parse_args()
    # A record of some rows must not take the place of a published one of all.
    args.out = args.out or (QUICK_OUT if args.quick or args.rows else RESULTS)
    if bool(args.generate) + bool(args.serve) + bool(args.only) > 1:
        parser.error("--generate, --serve and --only name different benchmarks; give one of them")
    names = args.only.split(",") if args.only else list(QUICK if args.quick else BENCHMARKS)
    if args.generate or args.serve:
        names = [GENERATE if args.generate else SERVE]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no benchmark named {unknown[0]!r}; choose from {', '.join(known)}")
    # Checked before anything is measured: most rows need no peer, and would run first.
    needs_peers = GENERATE in names or SERVE in names
    if needs_peers and not args.redraw and (missing := peers.missing(SERVE in names)):
        parser.error(f"not installed: {', '.join(missing)}; `make bench-peers` installs them")
    return args, names


def main() -> None:
    args, names = _arguments()
    if args.redraw:
        redraw(args.out)
        return
    meter, folder = LimitMeter(), args.out / folder_name(str(machine()["cpu"]))
    for name in names:
        report(folder / f"{name}.json", measure(name, meter, args.quick, args.rows))


if __name__ == "__main__":
    main()
