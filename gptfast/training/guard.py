"""Which steps may change the weights: the finite ones and, if asked, those that are no outliers."""

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

from gptfast.config import TrainConfig

WINDOW = 128
# Before that many steps their spread says little.
ENOUGH = 16
# A run that skips this many steps in a row will not recover by itself.
GIVE_UP = 100


class Fault(NamedTuple):
    """Why a step must not change the weights."""

    reason: str
    finite: bool


class Guard:
    """Judges losses and gradient norms, step by step, against those of the steps before."""

    def __init__(self, config: TrainConfig) -> None:
        self.zscore, self.skips_nonfinite = config.skip_zscore, config.nonfinite == "skip"
        self.past = {name: deque(maxlen=WINDOW) for name in ("loss", "grad_norm")}
        self.skipped, self.in_a_row = 0, 0

    def fault(self, name: str, value: float) -> Fault | None:
        """What is wrong with a step of this "loss" or "grad_norm"; None if nothing is.

        A finite value joins the window whatever the verdict, so that a lasting change is an outlier
        for a while only.
        """
        if not math.isfinite(value):
            return Fault(f"{name} is {value}", finite=False)
        if self.zscore is None:
            return None
        past, limit = self.past[name], math.inf
        if len(past) >= ENOUGH:
            mean = statistics.fmean(past)
            deviation = math.sqrt(statistics.fmean((x - mean) ** 2 for x in past))
            limit = mean + self.zscore * deviation
        past.append(value)
        if value <= limit:
            return None
        return Fault(f"{name} {value:.4g} is an outlier, above {limit:.4g}", finite=True)

    def skips(self, fault: Fault) -> bool:
        """Whether the run goes on without the step. Counts the steps that are passed over."""
        if not fault.finite and not self.skips_nonfinite:
            return False
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        return self.in_a_row < GIVE_UP

    def accept(self) -> None:
        """A step has changed the weights."""
        self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in JSON's types."""
        past = {name: list(values) for name, values in self.past.items()}
        return {"past": past, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        for name, values in state["past"].items():
            self.past[name].clear()
            self.past[name].extend(values)
