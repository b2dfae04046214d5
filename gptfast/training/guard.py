"""The guard, which keeps steps with a bad loss or gradient norm from changing the weights.

A number is bad if it is not finite. With config.skip_zscore it is also bad if it is an outlier:
more than that many standard deviations above the mean of the steps before.
"""

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

from gptfast.config import TrainConfig

MAX_PAST_STEPS = 128
"""How many past steps a new one is compared with."""
MIN_PAST_STEPS = 16
"""How many past steps are needed to tell an outlier from ordinary variation."""
MAX_SKIPS_IN_A_ROW = 100
"""A run that skips this many steps in a row is stopped, because it will not recover."""


class Fault(NamedTuple):
    """Why a step must not change the weights."""

    reason: str
    finite: bool
    """Whether the number at fault is finite (an outlier) or not (NaN or infinity)."""


class Guard:
    """Compares the loss and gradient norm of a step with those of the steps before.

    `judge`, `limit` and `may_skip` change nothing; `record`, `record_skip` and `record_step` update
    the history.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.zscore, self.skips_nonfinite = config.skip_zscore, config.nonfinite == "skip"
        self.past: dict[str, deque[float]] = {
            name: deque(maxlen=MAX_PAST_STEPS) for name in ("loss", "grad_norm")
        }
        self.skipped, self.in_a_row = 0, 0

    def judge(self, name: str, value: float) -> Fault | None:
        """Return what is wrong with this value of "loss" or "grad_norm", or None."""
        if not math.isfinite(value):
            return Fault(f"{name} is {value}", finite=False)
        limit = self.limit(name)
        if value <= limit:
            return None
        return Fault(f"{name} {value:.4g} is an outlier, above {limit:.4g}", finite=True)

    def limit(self, name: str) -> float:
        """Return the value of "loss" or "grad_norm" above which the next step is an outlier.

        It is known before the step, so a GPU can judge its own numbers; infinity if there is none.
        """
        past = self.past[name]
        if self.zscore is None or len(past) < MIN_PAST_STEPS:
            return math.inf
        mean = statistics.fmean(past)
        deviation = math.sqrt(statistics.fmean((x - mean) ** 2 for x in past))
        return mean + self.zscore * deviation

    def record(self, name: str, value: float) -> None:
        """Add a finite value to the values that later steps are compared with.

        Outliers are added too, so that a lasting change soon stops being one.
        """
        if self.zscore is not None and math.isfinite(value):
            self.past[name].append(value)

    def may_skip(self, fault: Fault) -> bool:
        """Return whether the configuration allows a step with this fault to be skipped."""
        return fault.finite or self.skips_nonfinite

    @property
    def gives_up(self) -> bool:
        """Whether so many steps were skipped in a row that the run should stop."""
        return self.in_a_row >= MAX_SKIPS_IN_A_ROW

    def record_skip(self) -> None:
        """Count a step that was skipped."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1

    def record_step(self) -> None:
        """Note that a step has changed the weights."""
        self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as values that JSON can hold."""
        past = {name: list(values) for name, values in self.past.items()}
        return {"past": past, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        for name, values in state["past"].items():
            self.past[name].clear()
            self.past[name].extend(values)
