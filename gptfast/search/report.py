"""A search run and its table of trials."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from gptfast.files import write_json
from gptfast.search.plot import plot_search
from gptfast.search.trials import COMMAND, Result, Settings, run_trials, short
from gptfast.training.metrics import read_metrics

COLUMNS = {
    "val_loss": "best val loss",
    "best_step": "at step",
    "last_val_loss": "last val loss",
    "train_loss": "train loss",
    "tokens_per_second": "tokens/s",
    "seconds": "seconds",
}


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("loss"):
        return f"{value:.4f}"
    if name == "seconds":
        return f"{value:.1f}"
    return f"{value:,.0f}" if name == "tokens_per_second" else short(value)


def _rows(results: Sequence[Result]) -> list[list[str]]:
    """The table's cells, its head first; the best trial first, those that failed last."""
    names = list(dict.fromkeys(name for result in results for name in result.settings))
    rows = [["trial", *names, *COLUMNS.values(), "status"]]
    for result in results:
        settings = [short(result.settings.get(name, "-")) for name in names]
        numbers = [_cell(name, getattr(result, name)) for name in COLUMNS]
        status = f"{result.status}: {result.reason}" if result.reason else result.status
        rows.append([result.trial, *settings, *numbers, status])
    return rows


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _markdown(rows: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in rows[0][2:]), "---"]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in [escaped[0], rule, *escaped[1:]])


def _order(result: Result) -> tuple[int, float]:
    rank = ("done", "interrupted", "failed").index(result.status)
    return rank, math.inf if result.val_loss is None else result.val_loss


def run_search(
    base: Settings,
    trials: Sequence[Settings],
    out: str | PathLike,
    *,
    jobs: int = 1,
    command: Sequence[str] = COMMAND,
    log_fields: Collection[str] = (),
) -> list[Result]:
    """Train every trial, base with its settings, and return the results, best first.

    Prints a table and leaves it in OUT/results.md and OUT/results.json, a picture in
    OUT/search.png. Called again with the same base and trials, or with more behind them, it goes on
    with those that are not done. log_fields: fields whose axis is logarithmic. Raises as
    `run_trials`, and RuntimeError with the first reason if no trial got to its end.
    """
    out = Path(out)
    try:
        results = run_trials(base, trials, out, jobs=jobs, command=command)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {out}")
        raise
    if not any(result.status == "done" for result in results):
        first = results[0]
        log = out / first.trial / "log.txt"
        raise RuntimeError(
            f"all {len(results)} trials failed, {first.trial}: {first.reason} ({log})"
        )
    results = sorted(results, key=_order)
    rows = _rows(results)
    print(_aligned(rows))
    (out / "results.md").write_text(_markdown(rows), "utf-8")
    write_json(out / "results.json", [dataclasses.asdict(result) for result in results])
    histories = [_history(out / result.trial) for result in results]
    plot_search(results, histories, out / "search.png", log_fields=log_fields)
    print(f"best: {results[0].label} ({out / results[0].trial}); see {out / 'search.png'}")
    return results


def _history(directory: Path) -> list[dict[str, Any]]:
    """The rows of a trial, which has none if it failed before its first."""
    try:
        return read_metrics(directory)
    except ValueError:
        return []
