"""Smith's learning-rate range test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from gptfast.search.plot import plot_range
from gptfast.search.report import _aligned, _history
from gptfast.search.trials import COMMAND, Settings, run_trials
from gptfast.training.metrics import finite


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
