"""`gptfast search`: train with several settings and compare them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from gptfast.cli.conflicts import check_search, check_training
from gptfast.cli.hints import similar_key
from gptfast.cli.plan import plan_search, trial_settings
from gptfast.cli.ranges import check_whole
from gptfast.cli.settings import apply, flat
from gptfast.cli.train import SMALL_RUN, Train, train_defaults
from gptfast.cli.train_data import absolute, check_data
from gptfast.search.range_test import lr_range, lr_range_steps
from gptfast.search.report import run_search
from gptfast.search.space import log_fields, parse_grid, parse_random
from gptfast.training.launched import processes_asked_for


@dataclass(frozen=True)
class Search:
    """Train with several settings, each in a process of its own, and compare the results.

    The flags of `gptfast train` set what all trials have in common. The same command continues a
    search that was interrupted. The directory --out gets a run directory per trial (trial-001/ and
    so on), results.md, results.json and a picture, search.png.

    gptfast search --lr-range 1e-5 1 --data book.txt --max-steps 200 --out runs/range

    gptfast search --grid lr=1e-3,3e-3,1e-2 n_layer=2,4 --data book.txt --max-steps 300 --out runs/s

    gptfast search --random lr=1e-4:1e-2:log dropout=0:0.3 --trials 8 --data book.txt --out runs/r
    """

    common: Train = Train(train=dataclasses.replace(SMALL_RUN, out="runs/search"))
    """The settings that all trials have in common."""
    grid: tuple[str, ...] = ()
    """Try every combination of these values, for example lr=1e-3,3e-3 n_layer=2,4."""
    random: tuple[str, ...] = ()
    """Draw each setting from a range LOW:HIGH, or LOW:HIGH:log for a logarithmic one, for example
    lr=1e-4:1e-2:log dropout=0:0.3 batch_size=4:16."""
    trials: int = 8
    """Number of trials with --random."""
    lr_range: tuple[float, float] | None = None
    """Run a learning-rate range test: the rate rises from the first to the second value during one
    run. The command then suggests the rate at which the loss fell fastest."""
    jobs: int = 1
    """Number of trials that run at the same time."""
    no_default_shown: ClassVar = Train.no_default_shown
    not_in_help: ClassVar = ("resume",)
    set_first: ClassVar = (
        *("grid", "random", "trials", "lr_range", "jobs"),
        *("data", "out", "init", "batch_size", "max_steps"),
    )

    def __post_init__(self) -> None:
        check_whole(self, "trials", "jobs")

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> Self:
        """Return the command with these flags, and for the rest what `train_defaults` returns.

        Raises ValueError for resume, because a search always continues what it finds in --out.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"common"}
        common = {name: x for name, x in given.items() if name not in own}
        train = train_defaults(common, cls().common)
        if train.resume or "resume" in given:
            raise ValueError(
                "search takes no resume: the same command continues a search. Leave resume out, or "
                "give another --out to start anew"
            )
        if train.train.min_lr == SMALL_RUN.min_lr:
            # The default min_lr suits the default lr, not the rates that a search tries.
            train = apply(train, {"min_lr": None}, "")
        train = apply(train, common, "")
        check_search(given)
        check_training(common, train)
        return apply(cls(common=train), {k: v for k, v in given.items() if k in own}, "")

    def run(self) -> None:
        if processes_asked_for() > 1:
            raise ValueError(
                "gptfast search tries one run after the other in one process: start it without "
                "torchrun (--jobs runs several at a time)"
            )
        base = flat(self.common)
        out = base.pop("out")
        for name in ("resume", "config", "dry_run", "preset"):
            del base[name]
        base["data"] = absolute(self.common.data)
        for spec in (*self.grid, *self.random):
            self._check_name(spec.partition("=")[0].strip(), base)
        if self.lr_range:
            check_data([self.common])
            if self.common.dry_run:
                steps = lr_range_steps(base)
                plan_search(self.common, [{} if steps is None else {"max_steps": steps}], 1)
            else:
                lr_range(base, *self.lr_range, out)
            return
        if self.grid:
            trials = parse_grid(self.grid, allowed=base)
        else:
            seed = self.common.train.seed
            trials = parse_random(self.random, self.trials, seed, allowed=base)
        check_data([self._checked(trial) for trial in trials])
        if self.common.dry_run:
            plan_search(self.common, trials, self.jobs)
            return
        run_search(base, trials, out, jobs=self.jobs, log_fields=log_fields(self.random))

    def _check_name(self, name: str, known: Mapping[str, Any]) -> None:
        """Raise ValueError with a hint for a setting that is called so elsewhere."""
        near = similar_key(name, known)
        if name and name.replace("-", "_") not in known and near:
            raise ValueError(f"there is no field {name!r}; did you mean {' or '.join(near)}?")

    def _checked(self, trial: dict[str, Any]) -> Train:
        """Return a trial's run. Raises ValueError for a bad value now, not in a trial's log."""
        train = trial_settings(self.common, trial)
        check_training({}, train)
        return train
