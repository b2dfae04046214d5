"""A grid or random search over config fields, and a learning-rate range test (Smith, 2017).

Both run trials (`gptfast.trials`) in subprocesses and end with a table and a picture.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from gptfast.plot import finite, plot_range, plot_search, read_metrics
from gptfast.trials import COMMAND, Result, Settings, run_trials, short, write_json


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None


def _parse_value(text: str, spec: str) -> Any:
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    number = _number(text)
    if number is not None and math.isnan(number):
        raise ValueError(f"{spec}: no setting can be nan")
    if number is not None or not text.startswith('"'):
        return text if number is None else number
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{spec}: {text} is no string; close its quotes") from None


def _parse_specs(specs: Sequence[str], allowed: Collection[str] | None) -> dict[str, str]:
    """NAME=REST of each spec, the name checked and with underscores."""
    if not specs:
        raise ValueError("no field to vary; give NAME=VALUE,VALUE")
    fields: dict[str, str] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        name = name.strip().replace("-", "_")
        if not (equals and name and rest.strip()):
            raise ValueError(f"{spec!r} is not of the form NAME=VALUES, for example lr=1e-4,1e-3")
        if name in fields:
            raise ValueError(f"{name} is given twice; give each field once")
        if allowed is not None and name not in allowed:
            close = difflib.get_close_matches(name, allowed)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"there is no field {name!r}{hint}")
        fields[name] = rest
    return fields


def _parse_list(name: str, rest: str) -> list[Any]:
    values: list[Any] = []
    for text in rest.split(","):
        if not text.strip():
            raise ValueError(f"{name}={rest} has an empty value; write {name}=VALUE,VALUE")
        value = _parse_value(text, f"{name}={rest}")
        if value in values:
            raise ValueError(f"{name}={rest} lists {text.strip()} twice")
        values.append(value)
    return values


def parse_grid(specs: Sequence[str], *, allowed: Collection[str] | None = None) -> list[Settings]:
    """["lr=1e-4,1e-3", "n_layer=2,4"] -> the four settings, the last field varying fastest.

    Values are numbers, true, false or strings. allowed: the names of fields there are. Raises
    ValueError for a malformed spec, an unknown field, and a field or value given twice.
    """
    fields = {name: _parse_list(name, rest) for name, rest in _parse_specs(specs, allowed).items()}
    return [dict(zip(fields, values, strict=True)) for values in product(*fields.values())]


@dataclass(frozen=True)
class _Range:
    low: float
    high: float
    log: bool

    def draw(self, u: float) -> float | int:
        """The value at u in [0, 1)."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        # Each integer gets the numbers that round to it.
        low, high = (self.low - 0.5, self.high + 0.5) if whole else (self.low, self.high)
        value = low * (high / low) ** u if self.log else low + (high - low) * u
        # Four digits are exact enough, and a trial's settings can be typed.
        value = round(value) if whole else float(f"{value:.4g}")
        return min(max(value, self.low), self.high)


def _parse_range(name: str, rest: str) -> _Range:
    spec = f"{name}={rest}"
    low, high, *scale = (part.strip() for part in rest.split(":"))
    if scale not in ([], ["log"], ["linear"]):
        raise ValueError(f"{spec} is not of the form {name}=LOW:HIGH or {name}=LOW:HIGH:log")
    bounds = [_parse_value(bound, spec) for bound in (low, high)]
    for bound in bounds:
        if isinstance(bound, bool | str) or not math.isfinite(bound):
            raise ValueError(f"{spec}: a range goes from one number to another, got {bound!r}")
    if not bounds[0] < bounds[1]:
        raise ValueError(f"{spec} is an empty range: {low} is not below {high}")
    if scale == ["log"] and bounds[0] <= 0:
        raise ValueError(f"{spec}: a logarithmic range must start above 0, got {low}")
    return _Range(*bounds, log=scale == ["log"])


def parse_random(
    specs: Sequence[str], trials: int, seed: int = 0, *, allowed: Collection[str] | None = None
) -> list[Settings]:
    """["lr=1e-4:1e-2:log", "n_layer=2:6", "dropout=0,0.1"] -> `trials` different settings.

    LOW:HIGH is drawn uniformly, log-uniformly with :log, as integers where both bounds are written
    as integers; a list is drawn from. The first settings do not depend on how many are asked for.
    Raises ValueError as `parse_grid`, for an empty range, and where there are too few settings.
    """
    if trials < 1:
        raise ValueError(f"trials must be >= 1, got {trials}")
    fields = {
        name: _parse_range(name, rest) if ":" in rest else _parse_list(name, rest)
        for name, rest in _parse_specs(specs, allowed).items()
    }
    generator = random.Random(seed)
    drawn: list[Settings] = []
    misses = 0
    while len(drawn) < trials:
        settings = {}
        for name, field in fields.items():
            u = generator.random()
            settings[name] = (
                field.draw(u) if isinstance(field, _Range) else field[int(u * len(field))]
            )
        misses = 0 if settings not in drawn else misses + 1
        if not misses:
            drawn.append(settings)
        elif misses == 1000:
            raise ValueError(
                f"found only {len(drawn)} different settings, not {trials}; lower trials"
            )
    return drawn


def log_fields(specs: Sequence[str]) -> list[str]:
    """The fields that `parse_random` draws logarithmically, for the picture's axes."""
    fields = _parse_specs(specs, None) if specs else {}
    return [name for name, rest in fields.items() if rest.rpartition(":")[2].strip() == "log"]


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


@dataclass(frozen=True)
class RangeTest:
    """A learning-rate range test up to where the loss diverged, one entry per step."""

    lr: list[float]
    loss: list[float]
    smoothed: list[float]
    suggestion: float
    """The rate at which the smoothed loss fell most steeply over log lr."""
    tenth_of_minimum: float
    """A tenth of the rate at which the smoothed loss was lowest."""


def smooth(loss: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the points, its bias corrected."""
    beta = min(0.98, max(0.5, 1 - 20 / len(loss)))
    average, smoothed = 0.0, []
    for i, value in enumerate(loss, 1):
        average = beta * average + (1 - beta) * value
        smoothed.append(average / (1 - beta**i))
    return smoothed


def range_test(lr: Sequence[float], loss: Sequence[float]) -> RangeTest:
    """Read a range test: lr rising, loss at each rate, in nats per token.

    Points after the lowest smoothed loss are cut where it exceeds 1.25 times the loss of the first
    tenth. Raises ValueError if fewer than 10 are left or the loss never falls.
    """
    few = "use at least 10 steps that do not diverge: raise max_steps or lower the lowest rate"
    if len(loss) < 10:
        raise ValueError(
            f"a range test of {len(loss)} steps with a finite loss says nothing; {few}"
        )
    smoothed = smooth(loss)
    lowest = int(np.argmin(smoothed))
    limit = 1.25 * float(np.median(loss[: max(3, len(loss) // 10)]))
    beyond = (i for i in range(lowest, len(loss)) if smoothed[i] > limit)
    end = next(beyond, len(loss))
    if end < 10:
        raise ValueError(f"the loss diverged after {end} steps; {few}")
    half = max(1, end // 20)
    if lowest < 2 * half:
        raise ValueError(
            f"the loss only rose from {lr[0]:.2g} on; lower the lowest rate or raise max_steps"
        )
    log_lr = np.log(lr[:end])
    # The slope of a line through the neighbours: the difference of two is mostly noise.
    slopes = [
        np.polyfit(log_lr[i - half : i + half + 1], smoothed[i - half : i + half + 1], 1)[0]
        for i in range(half, lowest - half + 1)
    ]
    steepest = half + int(np.argmin(slopes))
    return RangeTest(
        list(lr[:end]), list(loss[:end]), smoothed[:end], lr[steepest], lr[lowest] / 10
    )


def lr_range(
    base: Settings,
    lr_min: float,
    lr_max: float,
    out: str | PathLike,
    *,
    command: Sequence[str] = COMMAND,
) -> RangeTest:
    """Train once while the rate rises exponentially from lr_min to lr_max, and suggest a rate.

    The run takes base's max_steps or epochs, else 200 steps; one that diverges counts as far as it
    went. Prints a table and draws OUT/lr_range.png. Raises ValueError as `range_test` and
    `run_trials`, RuntimeError if the run was stopped or has no loss at all.
    """
    if not 0 < lr_min < lr_max < math.inf:
        raise ValueError(f"the rates must be 0 < LOW < HIGH, got {lr_min} and {lr_max}")
    out = Path(out)
    # Nothing that looks up from training, and nothing that hides divergence.
    base = base | {
        "schedule": "exponential",
        "warmup_steps": 0,
        "log_interval": 1,
        "eval_interval": 10**9,
        "eval_batches": 1,
        "sample_tokens": 0,
        "early_stopping": None,
        "skip_zscore": None,
        "nonfinite": "stop",
    }
    if base.get("max_steps") is None and base.get("epochs") is None:
        base["max_steps"] = 200
    result = run_trials(base, [{"lr": lr_max, "min_lr": lr_min}], out, command=command)[0]
    rows = [
        row for row in _history(out / result.trial) if finite(row, "loss") and finite(row, "lr")
    ]
    if not rows or result.status == "interrupted":
        raise RuntimeError(f"{result.reason} ({out / result.trial / 'log.txt'})")
    test = range_test([row["lr"] for row in rows], [row["loss"] for row in rows])
    plot_range(test, out / "lr_range.png")
    shown = np.linspace(0, len(test.lr) - 1, 15).round().astype(int)
    table = [[f"{test.lr[i]:.2e}", f"{test.smoothed[i]:.4f}"] for i in dict.fromkeys(shown)]
    print(_aligned([["lr", "smoothed loss"], *table]))
    print(
        f"suggested: {test.suggestion:.2g}, where the loss falls most steeply "
        f"(a tenth of the minimum's: {test.tenth_of_minimum:.2g}); see {out / 'lr_range.png'}"
    )
    return test
