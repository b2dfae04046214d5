"""The progress of a run: how far it has come, saved in checkpoints and restored from them.

Before the checkpoint of a step is written, the step's metrics, evaluation and text sample are on
disk. A resumed run therefore repeats the steps after the checkpoint and loses nothing.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gptfast.config import GPTConfig, TrainConfig, to_toml
from gptfast.tokenizer.bpe import Tokenizer, same_vocabulary, vocabulary
from gptfast.training.background import Background
from gptfast.training.checkpoint import (
    Snapshot,
    load_checkpoint,
    set_aside,
    write_checkpoint,
)
from gptfast.training.kept_base import keep_base
from gptfast.training.step import TrainStep
from gptfast.training.world import ONE, World
from gptfast.weights.checkpoint import checkpoints
from gptfast.weights.lazy_tensor import CheckpointError
from gptfast.weights.pretrained import Ends, joined_ends, tokenizer_texts
from gptfast.weights.text import ends_in

BATCH_SETTINGS = ("batch_size", "max_length", "stride", "split", "seed", "accumulation_steps")
"""The settings that decide which tokens each step sees."""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Number of optimizer steps taken, including skipped ones."""
    tokens: int = 0
    """Number of targets that the model was trained on."""
    pending: dict[str, Any] | None = field(default_factory=dict)
    """The metrics of the last step if its log line, evaluation or sample is still to come."""
    best: dict[str, Any] | None = None
    """"step" and "val_loss" of the evaluation with the lowest validation loss so far."""
    bad_evaluations: int = 0
    """Number of evaluations since the lowest validation loss."""

    def update_best(self, val_loss: float) -> bool:
        """Record a validation loss and return whether it is the lowest. Step 0 does not count."""
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
        """The last step whose metrics, evaluation and sample are on disk; -1 if there is none."""
        return self.step if self.pending is None else self.step - 1


def run_settings(
    model: GPTConfig,
    train: TrainConfig,
    tokenizer: Tokenizer | None,
    data_sha256: str | None,
    others: dict[str, Any],
) -> dict[str, Any]:
    """Return all settings of a run, which state.json keeps under "config"."""
    training = asdict(train)
    # The run is where it is found, also after it was moved, and any number of processes may go on.
    for name in ("out", "parallel", "replicas", "dist_timeout"):
        del training[name]
    return {
        "model": asdict(model),
        "train": training,
        "tokenizer": tokenizer.name if tokenizer else None,
        "vocabulary": vocabulary(tokenizer),
        **others,
        "data_sha256": data_sha256,
    }


def settings_toml(settings: dict[str, Any]) -> str:
    """Return the settings of `run_settings` as a TOML file for `gptfast train --config`."""
    derived = ("model", "train", "vocabulary", "data_sha256", "started_from")
    others = {name: value for name, value in settings.items() if name not in derived}
    toml = to_toml({**settings["model"], **settings["train"], **others})
    if origin := settings.get("started_from"):
        note = f"started from the weights of {origin!r}: give them as --init to repeat the run"
        return f"# This run {note}.\n{toml}"
    return toml


class RunCheckpoints:
    """Writes the checkpoints of one run and restores the newest undamaged one."""

    def __init__(
        self,
        out: Path,
        step: TrainStep,
        settings: dict[str, Any],
        log: Callable[[str], None],
        tokenizer: Tokenizer | None = None,
        world: World = ONE,
    ) -> None:
        self._tokenizer, self._world = tokenizer, world
        self.out, self.train_step, self.settings, self.log = out, step, settings, log
        self._toml = settings_toml(settings)
        self._saved_step: int | None = None
        # After an error, several processes cannot count on one another to end their work.
        self.background = Background(waits=world.size == 1)

    @cached_property
    def _text(self) -> tuple[dict[str, str], Ends]:
        """The files of the vocabulary, and the ends of a text in it."""
        return tokenizer_texts(self._tokenizer)

    def is_saved(self, progress: Progress) -> bool:
        """Return whether the last checkpoint is of the current step, with nothing pending."""
        return self._saved_step == progress.step

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of the current step, unless `is_saved`.

        With config.async_save, return when the state is copied; `background` then writes it.
        """
        if self.is_saved(progress):
            return
        step, shards = self.train_step, self.train_step.shards
        in_background = step.config.async_save
        if in_background:
            self.background.finish()  # two copies would be held at once
        if self._world.is_first or shards is not None:
            optimizer = step.optimizer if step.config.save_optimizer else None
            snapshot = Snapshot.of(step.raw_model, optimizer)
            if in_background:
                snapshot = snapshot.copied()
            if self._world.is_first:
                write = self._writer(progress, snapshot)
            else:
                write = partial(shards.follow, self.out / "checkpoints", snapshot)
            if in_background:
                self.background.start(write)
            else:
                write()
        if not in_background:
            done = "half" if progress.pending is not None else "all"
            self._world.wait_for_first(f"checkpoint of {done} of step {progress.step}")
        # A pending step is saved again once it is complete.
        self._saved_step = progress.step if progress.pending is None else None

    def _writer(self, progress: Progress, snapshot: Snapshot) -> Callable[[], None]:
        """Return a function that writes the checkpoint as it is now, whenever it is called."""
        step, config = self.train_step, self.train_step.config
        vocabulary_files, ends = self._text
        n_vocab = self._tokenizer.n_vocab if self._tokenizer else step.raw_model.config.vocab_size
        ends = joined_ends(ends, step.raw_model.eos_ids, n_vocab)
        values = {**asdict(progress), "guard": step.guard.state_dict(), "config": self.settings}
        values = json.loads(json.dumps(values))  # the run goes on and changes them
        best = progress.best["step"] if progress.best and config.keep_best else None
        texts = {"train.toml": self._toml, **vocabulary_files}

        def write() -> None:
            with self._world.writing(self.out):
                write_checkpoint(
                    self.out,
                    snapshot,
                    values,
                    config.keep,
                    best=best,
                    texts=texts,
                    ends=ends,
                    shards=step.shards,
                )

        return write

    def restore(self) -> Progress | None:
        """Load the newest undamaged checkpoint; return its progress, or None if there is none.

        Newer, damaged checkpoints are reported in the log and renamed. The base of an adapter that
        would not stay where it is is kept in the run. Raises CheckpointError if
        all are damaged, and ValueError if the checkpoint is of other data or batches.
        """
        if kept := keep_base(self.train_step.raw_model, self.out):
            self.log(kept)
        damaged: dict[Path, CheckpointError] = {}
        for path in reversed(checkpoints(self.out)):
            model = self.train_step.raw_model
            try:
                state = load_checkpoint(path, model, self.train_step.optimizer)
            except CheckpointError as error:
                self.log(f"{error}; falling back to the checkpoint before it")
                damaged[path] = error
                continue
            self._check_same_run(state["config"], path)
            if origin := state["config"].get("started_from"):
                self.settings["started_from"] = origin
                self._toml = settings_toml(self.settings)
            model.eos_ids = ends_in(path, model.config.vocab_size)
            progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
            self.train_step.guard.load_state_dict(state["guard"])
            self._saved_step = progress.step if progress.pending is None else None
            self._world.compare({"checkpoint to resume": path.name})  # all have read it
            for other in damaged if self._world.is_first else ():
                set_aside(other)
            self.log(f"resumed from {path} at step {progress.step}")
            return progress
        if damaged:
            first = next(iter(damaged.values()))
            raise CheckpointError(f"every checkpoint in {self.out} is damaged: {first}")
        self._world.compare({"checkpoint to resume": "none"})
        return None

    def _check_same_run(self, saved: dict[str, Any], path: Path) -> None:
        """Raise ValueError if the data or the order of the batches are not the checkpoint's."""
        # JSON turned the tuples of the saved settings into lists.
        ours = json.loads(json.dumps(self.settings))
        before, now = ({**settings["train"], **settings} for settings in (saved, ours))
        for name in ("vocabulary", "data_sha256", *BATCH_SETTINGS):
            if name == "vocabulary" and self._tokenizer is not None:
                same = same_vocabulary(before.get(name), self._tokenizer)
                if same or before.get(name) == now.get(name):
                    continue
                raise ValueError(
                    f"{path} was trained with another vocabulary than {self._tokenizer.name}; give "
                    "the same (--tokenizer), or start another run from its weights (--init)"
                )
            if name == "data_sha256" and before.get(name) != now.get(name):
                raise ValueError(
                    f"{path} was trained on other data than is there now; name the same data "
                    "(--data), or start another run from its weights (--init)"
                )
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{path} was trained with {name} {before.get(name)}, not {now.get(name)}; "
                    "resume with the same, or start another run from its weights (--init)"
                )
