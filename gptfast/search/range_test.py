"""The learning-rate range test (Smith, 2017): train while the rate rises, and suggest a rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from gptfast.search.plot import plot_range
from gptfast.search.report import aligned_table, trial_rows
from gptfast.search.trials import COMMAND, Settings, run_trials
from gptfast.training.log import say
from gptfast.training.metrics import finite


@dataclass(frozen=True)
class RangeTest:
    """A learning-rate range test. The lists have one entry per step, until the loss diverged."""

    lr: list[float]
    loss: list[float]
    smoothed: list[float]
    suggestion: float
    """The rate at which the smoothed loss fell most steeply over log lr."""
    tenth_of_minimum: float
    """A tenth of the rate at which the smoothed loss was lowest."""


def smooth(loss: Sequence[float]) -> list[float]:
    """Return the exponential moving average over about a twentieth of the points.

    It is corrected for its start at zero, as Adam's moments are.
    """
    beta = min(0.98, max(0.5, 1 - 20 / len(loss)))
    average, smoothed = 0.0, []
    for i, value in enumerate(loss, 1):
        average = beta * average + (1 - beta) * value
        smoothed.append(average / (1 - beta**i))
    return smoothed


def range_test(lr: Sequence[float], loss: Sequence[float]) -> RangeTest:
    """Return the range test of these rising rates and the loss at each, in nats per token.

    The test ends where the smoothed loss, after its lowest point, exceeds 1.25 times the loss of
    the first tenth. Raises ValueError if fewer than 10 steps are left or the loss never falls.
    """
    remedy = "use at least 10 steps that do not diverge: raise max_steps or lower the lowest rate"
    if len(loss) < 10:
        raise ValueError(
            f"a range test of {len(loss)} steps with a finite loss is too short; {remedy}"
        )
    smoothed = smooth(loss)
    lowest = int(np.argmin(smoothed))
    limit = 1.25 * float(np.median(loss[: max(3, len(loss) // 10)]))
    beyond = (i for i in range(lowest, len(loss)) if smoothed[i] > limit)
    end = next(beyond, len(loss))
    if end < 10:
        raise ValueError(f"the loss diverged after {end} steps; {remedy}")
    half = max(1, end // 20)
    if lowest < 2 * half:
        raise ValueError(
            f"the loss only rose from {lr[0]:.2g} on; lower the lowest rate or raise max_steps"
        )
    log_lr = np.log(lr[:end])
    # The slope of a line fitted to the neighbours: the difference of two points is mostly noise.
    slopes = [
        np.polyfit(log_lr[i - half : i + half + 1], smoothed[i - half : i + half + 1], 1)[0]
        for i in range(half, lowest - half + 1)
    ]
    steepest = half + int(np.argmin(slopes))
    return RangeTest(
        list(lr[:end]), list(loss[:end]), smoothed[:end], lr[steepest], lr[lowest] / 10
    )


def lr_range_steps(base: Settings) -> int | None:
    """Return the number of steps of a range test; None if the settings give epochs instead."""
    steps = base.get("max_steps")
    return 200 if steps is None and base.get("epochs") is None else steps


def lr_range(
    base: Settings,
    lr_min: float,
    lr_max: float,
    out: str | PathLike,
    *,
    command: Sequence[str] = COMMAND,
) -> RangeTest:
    """Train once while the rate rises exponentially from lr_min to lr_max, and suggest a rate.

    The run has the max_steps or epochs of `base`, or else 200 steps. If it diverges, the steps
    before count. Prints a table and draws OUT/lr_range.png. Raises ValueError as `range_test` and
    `run_trials` do, and RuntimeError if the run was interrupted or has no loss.
    """
    if not 0 < lr_min < lr_max < math.inf:
        raise ValueError(f"the rates must be 0 < LOW < HIGH, got {lr_min} and {lr_max}")
    out = Path(out)
    # Log every step, and switch off what interrupts training or hides a divergence.
    base = base | {
        "schedule": "exponential",
        "warmup_steps": 0,
        "decay_steps": None,
        "log_interval": 1,
        "eval_interval": 10**9,
        "eval_batches": 1,
        "sample_tokens": 0,
        "early_stopping": None,
        "skip_zscore": None,
        "nonfinite": "stop",
    }
    base["max_steps"] = lr_range_steps(base)
    result = run_trials(base, [{"lr": lr_max, "min_lr": lr_min}], out, command=command)[0]
    rows = [
        row for row in trial_rows(out / result.trial) if finite(row, "loss") and finite(row, "lr")
    ]
    if not rows or result.status == "interrupted":
        raise RuntimeError(f"{result.reason} ({out / result.trial / 'log.txt'})")
    test = range_test([row["lr"] for row in rows], [row["loss"] for row in rows])
    plot_range(test, out / "lr_range.png")
    shown = np.linspace(0, len(test.lr) - 1, 15).round().astype(int)
    table = [[f"{test.lr[i]:.2e}", f"{test.smoothed[i]:.4f}"] for i in dict.fromkeys(shown)]
    say(aligned_table([["lr", "smoothed loss"], *table]))
    say(
        f"suggested: {test.suggestion:.2g}, where the loss falls most steeply "
        f"(a tenth of the minimum's: {test.tenth_of_minimum:.2g}); see {out / 'lr_range.png'}"
    )
    return test
