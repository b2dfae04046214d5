"""Run a search and report its trials as a table and a picture."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from gptfast.files import replace_link, replacing, write_json
from gptfast.search.plot import plot_search
from gptfast.search.trials import COMMAND, Result, Settings, run_trials, short
from gptfast.training.log import say
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
    """Return the text of a number in the table."""
    if value is None:
        return "-"
    if name.endswith("loss"):
        return f"{value:.4f}"
    if name == "seconds":
        return f"{value:.1f}"
    return f"{value:,.0f}" if name == "tokens_per_second" else short(value)


def _rows(results: Sequence[Result]) -> list[list[str]]:
    """Return the cells of the table, row by row: the column titles, then a row per result."""
    names = list(dict.fromkeys(name for result in results for name in result.settings))
    rows = [["trial", *names, *COLUMNS.values(), "status"]]
    for result in results:
        settings = [short(result.settings.get(name, "-")) for name in names]
        numbers = [_cell(name, getattr(result, name)) for name in COLUMNS]
        status = f"{result.status}: {result.reason}" if result.reason else result.status
        rows.append([result.trial, *settings, *numbers, status])
    return rows


def aligned_table(rows: list[list[str]]) -> str:
    """Return a table as text: the first and last columns aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _markdown(rows: list[list[str]]) -> str:
    """Return a table, titles first, as Markdown."""
    rule = ["---", *("---:" for _ in rows[0][2:]), "---"]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in [escaped[0], rule, *escaped[1:]])


def _order(result: Result) -> tuple[int, float]:
    """Return the sort key of a result: finished trials by their loss, then the others."""
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
    """Train every trial, which is `base` with its own settings; return the results, best first.

    Prints a table, and writes it to OUT/results.md and OUT/results.json, a picture to
    OUT/search.png and a link to the best trial to OUT/best. A second call with the same base and
    trials, or with more trials after them, runs those that are not done. log_fields: fields whose
    axis is logarithmic. Raises as `run_trials` does, and RuntimeError with the first reason if no
    trial is done.
    """
    out = Path(out)
    try:
        results = run_trials(base, trials, out, jobs=jobs, command=command)
    except KeyboardInterrupt:
        say(f"stopped; the same command continues {out}")
        raise
    if not any(result.status == "done" for result in results):
        first = results[0]
        log = out / first.trial / "log.txt"
        raise RuntimeError(
            f"all {len(results)} trials failed, {first.trial}: {first.reason} ({log})"
        )
    results = sorted(results, key=_order)
    rows = _rows(results)
    say(aligned_table(rows))
    with replacing(out / "results.md") as file:
        file.write(_markdown(rows))
    write_json(out / "results.json", [dataclasses.asdict(result) for result in results])
    replace_link(out / "best", results[0].trial)
    histories = [trial_rows(out / result.trial) for result in results]
    plot_search(results, histories, out / "search.png", log_fields=log_fields)
    say(f"best: {results[0].label} ({out / results[0].trial}); see {out / 'search.png'}")
    return results


def trial_rows(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a trial's metrics.jsonl; [] if it failed before it wrote one."""
    try:
        return read_metrics(directory)
    except ValueError:
        return []
