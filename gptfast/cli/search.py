"""`gptfast search` and `gptfast plot`: many runs, compared."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from gptfast.cli.settings import apply, flat
from gptfast.cli.train import SMALL_RUN, Train, train_defaults
from gptfast.search.range_test import lr_range
from gptfast.search.report import run_search
from gptfast.search.space import log_fields, parse_grid, parse_random
from gptfast.training.plot import plot_runs


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

    train: tyro.conf.OmitArgPrefixes[Train] = Train()
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


def search_defaults(argv: Sequence[str]) -> Search:
    """What `gptfast search` takes for what argv does not say: `train_defaults`, to begin anew."""
    command = train_defaults([arg for arg in argv if arg != "--resume"])
    # The default run's end of the decay suits its own rate, not those that are searched.
    min_lr = None if command.train.min_lr == SMALL_RUN.min_lr else command.train.min_lr
    train = dataclasses.replace(command.train, min_lr=min_lr)
    return Search(train=dataclasses.replace(command, train=train, resume=False))


@dataclass(frozen=True)
class Plot:
    """Draw the losses of several runs in one picture.

    gptfast plot runs/a runs/b --out comparison.png
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run directories, or their metrics.jsonl."""
    out: str = "runs.png"
    """The picture: .png, .pdf or .svg."""
    x: Literal["tokens", "step", "epoch"] = "tokens"
    """What the losses are drawn over."""

    def run(self) -> None:
        print(f"done: see {plot_runs(self.runs, self.out, x=self.x)}")
