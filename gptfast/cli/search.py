"""`gptfast search`: train with several settings and compare them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from gptfast.cli.settings import apply, flat
from gptfast.cli.train import SMALL_RUN, Train, train_defaults
from gptfast.search.range_test import lr_range
from gptfast.search.report import run_search
from gptfast.search.space import log_fields, parse_grid, parse_random


@dataclass(frozen=True)
class Search:
    """Train with several settings, each in a process of its own, and compare them.

    Takes every flag of `gptfast train` for what the trials have in common. Called again after an
    interruption, it goes on where it stopped. --out gets trial-001/ and so on, results.md,
    results.json and a picture.

    gptfast search --lr-range 1e-5 1 --data book.txt --max-steps 200 --out runs/range

    gptfast search --grid lr=1e-3,3e-3,1e-2 n_layer=2,4 --data book.txt --max-steps 300 --out runs/s

    gptfast search --random lr=1e-4:1e-2:log dropout=0:0.3 --trials 8 --data book.txt --out runs/r
    """

    train: Train = Train()
    """What the trials have in common: the flags of `gptfast train`."""
    grid: tuple[str, ...] = ()
    """Fields and their values, every combination of which is tried: lr=1e-3,3e-3 n_layer=2,4."""
    random: tuple[str, ...] = ()
    """Fields and the ranges they are drawn from: lr=1e-4:1e-2:log dropout=0:0.3 batch_size=4:16."""
    trials: int = 8
    """How many to draw with --random."""
    lr_range: tuple[float, float] | None = None
    """A range test instead: the rate rises from the first to the second during one run, and the
    one at which the loss falls fastest is suggested."""
    jobs: int = 1
    """Trials at the same time."""
    no_default_shown: ClassVar = Train.no_default_shown

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> Self:
        """Return the command with these flags, over the settings that `train_defaults` finds.

        A search starts anew: --resume is ignored, as the search resumes by itself.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"train"}
        common = {name: x for name, x in given.items() if name not in (*own, "resume")}
        train = train_defaults(common)
        if train.train.min_lr == SMALL_RUN.min_lr:
            # The default run's end of the decay suits its own rate, not those that are searched.
            train = apply(train, {"min_lr": None}, "")
        train = dataclasses.replace(apply(train, common, ""), resume=False)
        return apply(cls(train=train), {k: v for k, v in given.items() if k in own}, "")

    def run(self) -> None:
        if sum(map(bool, (self.grid, self.random, self.lr_range))) != 1:
            raise ValueError("give one of --grid, --random and --lr-range")
        base = flat(self.train)
        out = base.pop("out")
        for name in ("resume", "config"):
            del base[name]
        if self.lr_range:
            lr_range(base, *self.lr_range, out)
            return
        if self.grid:
            trials = parse_grid(self.grid, allowed=base)
        else:
            seed = self.train.train.seed
            trials = parse_random(self.random, self.trials, seed, allowed=base)
        for trial in trials:
            self._check(trial)
        run_search(base, trials, out, jobs=self.jobs, log_fields=log_fields(self.random))

    def _check(self, trial: dict[str, Any]) -> None:
        # A bad value is refused before the first trial, not in its log.
        train = self.train
        if {"max_steps", "epochs"} & trial.keys():
            train = apply(train, {"max_steps": None, "epochs": None}, "--grid")
        apply(train, trial, "the search")
