"""How far a run has come, and the saving and restoring of it.

A checkpoint of step s is written only after everything that follows step s (its row of metrics,
evaluation and text sample) is on disk. So a run that resumes repeats what was lost and loses
nothing.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptfast.config import GPTConfig, TrainConfig, to_toml
from gptfast.tokenizer.bpe import Tokenizer, vocabulary
from gptfast.training.checkpoint import load_checkpoint, save_checkpoint, set_aside
from gptfast.training.step import TrainStep
from gptfast.weights.checkpoint import checkpoints
from gptfast.weights.stored import CheckpointError

BATCH_SETTINGS = ("batch_size", "max_length", "stride", "split", "seed", "accumulation_steps")
"""The settings that decide which tokens each step sees."""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    tokens: int = 0
    """Targets trained on."""
    pending: dict[str, Any] | None = field(default_factory=dict)
    """The row of a step that is not logged, evaluated and sampled yet; at first that of step 0."""
    best: dict[str, Any] | None = None
    """"step" and "val_loss" of the evaluation with the lowest validation loss."""
    bad_evaluations: int = 0
    """Evaluations in a row without a lower validation loss."""

    def update_best(self, val_loss: float) -> bool:
        """Note this step's validation loss and return whether it is the lowest; step 0 never is."""
        if self.step == 0:
            return False
        lowest = self.best["val_loss"] if self.best else math.inf
        improved = val_loss < lowest
        if improved:
            self.best = {"step": self.step, "val_loss": val_loss}
        self.bad_evaluations = 0 if improved else self.bad_evaluations + 1
        return improved

    @property
    def logged_step(self) -> int:
        """The last step of which everything is on disk; -1 if there is none."""
        return self.step if self.pending is None else self.step - 1


def run_settings(
    model: GPTConfig,
    train: TrainConfig,
    tokenizer: Tokenizer | None,
    data_sha256: str | None,
    others: dict[str, Any],
) -> dict[str, Any]:
    """Return everything that made a run, as state.json keeps it under "config"."""
    return {
        "model": asdict(model),
        "train": asdict(train),
        "tokenizer": tokenizer.name if tokenizer else None,
        "vocabulary": vocabulary(tokenizer),
        **others,
        "data_sha256": data_sha256,
    }


def settings_toml(settings: dict[str, Any]) -> str:
    """Return `run_settings` as a flat TOML file that `gptfast train --config` takes."""
    derived = ("model", "train", "vocabulary", "data_sha256")
    others = {name: value for name, value in settings.items() if name not in derived}
    return to_toml({**settings["model"], **settings["train"], **others})


class RunCheckpoints:
    """The checkpoints of one run: writes them and restores the newest that is whole."""

    def __init__(
        self, out: Path, step: TrainStep, settings: dict[str, Any], log: Callable[[str], None]
    ) -> None:
        self.out, self.train_step, self.settings, self.log = out, step, settings, log
        self._toml = settings_toml(settings)
        self._saved_step: int | None = None

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of the run's step, unless the last one was of this step."""
        if self._saved_step == progress.step:
            return
        step, config = self.train_step, self.train_step.config
        save_checkpoint(
            self.out,
            step.raw_model,
            step.optimizer if config.save_optimizer else None,
            {**asdict(progress), "guard": step.guard.state_dict(), "config": self.settings},
            config.keep,
            best=progress.best["step"] if progress.best and config.keep_best else None,
            texts={"train.toml": self._toml},
        )
        # A step that is still pending is saved again once it is not.
        self._saved_step = progress.step if progress.pending is None else None

    def restore(self) -> Progress | None:
        """Load the newest whole checkpoint and return its progress; None if there is none.

        Damaged ones that are newer are named in the log and set aside. Raises CheckpointError if
        none is whole, ValueError if the checkpoint is of other data or another order of batches.
        """
        damaged: dict[Path, CheckpointError] = {}
        for path in reversed(checkpoints(self.out)):
            try:
                state = load_checkpoint(path, self.train_step.raw_model, self.train_step.optimizer)
            except CheckpointError as error:
                self.log(f"{error}; falling back to the checkpoint before it")
                damaged[path] = error
                continue
            self._check_same_run(state["config"], path)
            progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
            self.train_step.guard.load_state_dict(state["guard"])
            self._saved_step = progress.step if progress.pending is None else None
            for other in damaged:
                set_aside(other)
            self.log(f"resumed from {path} at step {progress.step}")
            return progress
        if damaged:
            first = next(iter(damaged.values()))
            raise CheckpointError(f"no checkpoint in {self.out} is whole: {first}")
        return None

    def _check_same_run(self, saved: dict[str, Any], path: Path) -> None:
        """Raise ValueError if the data or its order are not those of the checkpoint."""
        # Through JSON, as the saved ones went: it knows no tuples.
        ours = json.loads(json.dumps(self.settings))
        before, now = ({**settings["train"], **settings} for settings in (saved, ours))
        for name in ("vocabulary", "data_sha256", *BATCH_SETTINGS):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{path} was trained with {name} {before.get(name)}, not {now.get(name)}; "
                    "resume with the same, or start another run from its weights (--init)"
                )
