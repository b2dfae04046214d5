"""The training loop: a batch goes in, the loss comes out, AdamW steps; now and then it looks up.

Everything that happens after step s (its row of metrics, evaluation, sample, checkpoint) is on disk
before the checkpoint of step s is; so a run that goes on from there repeats and loses nothing.
"""

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from gptfast.config import TrainConfig, to_toml
from gptfast.data.loader import BatchOrder, describe_batch, from_start
from gptfast.device import choose_device, measured_peak, peak_memory
from gptfast.evaluate.loss import loader_loss, perplexity
from gptfast.generate import generate_text
from gptfast.model import GPT
from gptfast.tokenizer.bpe import Tokenizer, vocabulary
from gptfast.training.checkpoint import clean_up, load_checkpoint, save_checkpoint, set_aside
from gptfast.training.flops import mfu
from gptfast.training.interrupt import Interrupt
from gptfast.training.metrics import finite, read_metrics
from gptfast.training.plot import plot_losses
from gptfast.training.run_directory import RunDirectory
from gptfast.training.schedule import learning_rate
from gptfast.training.step import Batch, RefusedStep, TrainStep, autocast
from gptfast.weights.checkpoint import checkpoints
from gptfast.weights.stored import CheckpointError

_peak = functools.cache(measured_peak)


class _Interrupted(Exception):
    """An evaluation was broken off because the run is to stop."""


class Trainer:
    """Trains a GPT and leaves checkpoints, metrics.jsonl, samples and a loss plot in config.out.

    train_loader, val_loader, test_loader: from `create_dataloader`; the test loss, if asked for, is
    measured once at the end. tokenizer: for the text samples and, by its name, for whoever loads
    the checkpoint. settings: what else made the run, in TOML's types: kept beside the configs.
    data_sha256: the data's identity; a run is not resumed with other data, batches or seed.
    Raises ValueError where a loader or the run directory cannot be used.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        train_loader: DataLoader,
        val_loader: DataLoader,
        *,
        test_loader: DataLoader | None = None,
        tokenizer: Tokenizer | None = None,
        settings: dict[str, Any] | None = None,
        data_sha256: str | None = None,
    ) -> None:
        for loader in (train_loader, val_loader, test_loader):
            if loader is not None and not isinstance(loader.batch_sampler, BatchOrder):
                raise ValueError("the loaders must come from gptfast.create_dataloader")
        self.device = choose_device(config.device)
        self.model, self.config, self.tokenizer = model.to(self.device), config, tokenizer
        self.train_loader, self.val_loader = train_loader, val_loader
        self.test_loader = test_loader
        self.take_step = TrainStep(model, config, self.device)
        self.optimizer, self.guard = self.take_step.optimizer, self.take_step.guard
        passes = config.epochs or 5
        per_run = passes * len(train_loader) // config.accumulation_steps
        self.steps = config.max_steps or max(1, per_run)
        self.step, self.tokens, self.history = 0, 0, []
        self.best: dict[str, Any] | None = None
        self.bad_evaluations = 0
        # The row of a step whose look-up is not done: of step 0 to begin with.
        self.pending: dict[str, Any] | None = {}
        # The step whose checkpoint, with nothing pending, is on disk.
        self.saved_step: int | None = None
        self.out = Path(config.out)
        self.run = RunDirectory(self.out, tensorboard=config.tensorboard)
        self.saved = {
            "model": dataclasses.asdict(model.config),
            "train": dataclasses.asdict(config),
            "tokenizer": tokenizer.name if tokenizer else None,
            "vocabulary": vocabulary(tokenizer),
            **(settings or {}),
            "data_sha256": data_sha256,
        }
        facts = ("model", "train", "vocabulary", "data_sha256")
        own = {name: value for name, value in self.saved.items() if name not in facts}
        self.toml = to_toml({**self.saved["model"], **self.saved["train"], **own})
        self.progress: tqdm | None = None
        self.interrupt = Interrupt()
        if tokenizer and config.sample_tokens and not tokenizer.encode(config.sample_prompt):
            raise ValueError("sample_prompt is empty; give it some text or set sample_tokens to 0")

    def fit(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Train to the last step and return the history, the rows of metrics.jsonl.

        resume: continue from the latest whole checkpoint in config.out, as if never interrupted;
        without one, start. A fresh start in a directory that has checkpoints is a ValueError.
        SIGINT and SIGTERM end the run after the current step, with a checkpoint; a second SIGINT
        raises KeyboardInterrupt at once. A loss or gradient norm that is not finite raises
        FloatingPointError after a checkpoint of the weights before that step.
        """
        with self.run.lock(), Interrupt() as self.interrupt:
            self._open(resume)
            dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
            self.peak = _peak(self.device, dtype)
            self.model.train()
            self.progress = tqdm(
                total=self.steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True
            )
            with self.progress:
                self._loop()
            self.history = read_metrics(self.out)
            if any(finite(row, "val_loss") for row in self.history):
                plot_losses(self.history, self.out)
        return self.history

    def train_step(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """One optimizer step at the schedule's rate; what `TrainStep` returns, less its targets.

        Raises FloatingPointError, after a checkpoint, for a step that must not be taken.
        """
        try:
            row = self.take_step(batches, learning_rate(self.step, self.steps, self.config))
        except RefusedStep as refused:
            kept = f"the checkpoint of step {self.step} is in {self.out}"
            try:
                self._save()
            except OSError as error:
                kept = str(error)
            raise FloatingPointError(
                f"{refused} at step {self.step + 1}, on {self._data_of(self.step)}; lower --lr or "
                f"look at that data ({refused.remedy}). No weight was changed; {kept}"
            ) from None
        self.step += 1
        self.tokens += row.pop("targets")
        if "skipped" in row:
            self._say(f"step {self.step} skipped: {row['skipped']}; {self._data_of(self.step - 1)}")
        return row

    def _data_of(self, step: int) -> str:
        first = step * self.config.accumulation_steps
        batches = range(first, first + self.config.accumulation_steps)
        return "; ".join(describe_batch(self.train_loader, batch) for batch in batches)

    def _loop(self) -> None:
        if self.pending is not None:
            self._look_up(self.pending)
        elif self._is_over():
            more = "max_steps or epochs" if self.step >= self.steps else "early_stopping"
            self._say(f"the run is complete at step {self.step}; raise {more} for more")
        profiled = contextlib.nullcontext(lambda: None)
        if self.config.profile and not self._is_over():
            profiled = self.run.profiler(self.steps - self.step)
        start, tokens = time.perf_counter(), 0
        with profiled as step_done:
            for batches in self._batches():
                try:
                    row = self.train_step(batches)
                except Exception:
                    # Ctrl-C in a terminal ends the C++ compiler of torch.compile too.
                    if self.config.compile and self.interrupt.requested:
                        break
                    raise
                self.progress.update()
                step_done()
                # All that is computed, not the targets only.
                tokens += sum(x.numel() for x, _ in batches)
                row |= self._speed(tokens / (time.perf_counter() - start), batches[0][0].shape[1])
                if self._look_up(row):
                    # The clock of tokens per second leaves evaluation and checkpoints out.
                    start, tokens = time.perf_counter(), 0
        if self.interrupt.requested:
            self._save()
            saved = "all is saved; --resume continues"
            if not self.config.save_optimizer:
                saved = "the model is saved"
            self._say(f"{self.interrupt.requested}: stopped at step {self.step}, {saved}")

    def _batches(self) -> Iterator[list[Batch]]:
        per_step = self.config.accumulation_steps
        self.train_loader.batch_sampler.set_position(self.step * per_step)
        stream = _forever(self.train_loader)
        while not self._is_over() and not self.interrupt.requested:
            yield list(islice(stream, per_step))

    def _is_over(self) -> bool:
        patience = self.config.early_stopping
        return self.step >= self.steps or (
            patience is not None and self.bad_evaluations >= patience
        )

    def _look_up(self, row: dict[str, Any]) -> bool:
        """All that follows a step: log, evaluate, sample, save. Whether its row was written."""
        config = self.config
        self.pending = row = self._place() | row
        evaluates = self.step % config.eval_interval == 0 or self._is_over()
        due = evaluates or self.step % config.log_interval == 0 or "skipped" in row
        if due:
            self._report(row)
        improved = False
        if evaluates:
            before = self.best, self.bad_evaluations
            try:
                improved = self._evaluate(row)
            except _Interrupted:
                self.best, self.bad_evaluations = before
                self._save()
                return False
        ends = self._is_over()
        if ends:
            row["final"] = True
        if due:
            # JSON has neither NaN nor infinity.
            odd = [name for name, x in row.items() if x in (math.inf, -math.inf) or x != x]
            self.run.write({name: x for name, x in row.items() if name not in odd})
        if ends or self._ends_epoch():
            self._sample()
        self.pending = None
        every = config.checkpoint_interval or config.eval_interval
        scheduled = self.step > 0 and (ends or self.step % every == 0)
        if scheduled or (improved and config.keep_best) or self.interrupt.requested:
            self._save()
        return due

    def _place(self) -> dict[str, Any]:
        epoch = self.step * self.config.accumulation_steps / len(self.train_loader)
        return {"step": self.step, "epoch": round(epoch, 6), "tokens": self.tokens}

    def _ends_epoch(self) -> bool:
        per_step, per_epoch = self.config.accumulation_steps, len(self.train_loader)
        before, now = (step * per_step // per_epoch for step in (self.step - 1, self.step))
        return self.step > 0 and now > before

    def _speed(self, tokens_per_second: float, T: int) -> dict[str, float]:
        share = mfu(tokens_per_second, self.model.config, T, self.peak)
        return {
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": round(share, 4),
            "memory_mb": round(peak_memory(self.device) / 2**20),
        }

    def _evaluate(self, row: dict[str, Any]) -> bool:
        """Add the losses to the row of this step; whether the model is the best so far."""
        # The same first batches at every evaluation, so that training losses compare.
        n = self.config.eval_batches or len(self.val_loader)
        train_loss = self._loss_over(self.train_loader, n)
        val_loss = self._loss_over(self.val_loader, self.config.eval_batches)
        row |= {"train_loss": train_loss, "val_loss": val_loss}
        self._say(
            f"step {self.step}/{self.steps} | training loss {train_loss:.3f} | "
            f"validation loss {val_loss:.3f} (perplexity {perplexity(val_loss):.1f})"
        )
        improved = self._judge(val_loss)
        if self._is_over() and self.test_loader is not None:
            row["test_loss"] = loss = self._loss_over(self.test_loader, None)
            self._say(f"test loss {loss:.3f} (perplexity {perplexity(loss):.1f})")
        return improved

    def _loss_over(self, loader: DataLoader, n: int | None) -> float:
        with autocast(self.device, self.config):
            return loader_loss(self.model, self._until_interrupted(from_start(loader)), n)

    def _until_interrupted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.interrupt.requested:
                raise _Interrupted
            yield batch

    def _judge(self, val_loss: float) -> bool:
        """Note whether the model is the best so far; step 0 does not count."""
        if self.step == 0:
            return False
        lowest = self.best["val_loss"] if self.best else math.inf
        improved = val_loss < lowest
        if improved:
            self.best = {"step": self.step, "val_loss": val_loss}
        self.bad_evaluations = 0 if improved else self.bad_evaluations + 1
        return improved

    def _report(self, row: dict[str, Any]) -> None:
        if "loss" in row and "grad_norm" in row:
            self._say(
                f"step {self.step}/{self.steps} | loss {row['loss']:.3f} | lr {row['lr']:.2e} | "
                f"norm {row['grad_norm']:.2f} | {row['tokens_per_second']:,.0f} tokens/s | "
                f"MFU {row['mfu']:.0%}"
            )

    def _sample(self) -> None:
        if self.tokenizer is None or not self.config.sample_tokens:
            return
        try:
            text = generate_text(
                self.model,
                self.tokenizer,
                self.config.sample_prompt,
                self.config.sample_tokens,
                top_p=0.5,
                seed=self.config.seed,
            )
        except ValueError as error:  # weights that overflow: no reason to lose the checkpoint
            text = f"none: {error}"
        line = " ".join(text.split())
        self.run.write_sample(self.step, line)
        self._say(f"step {self.step}/{self.steps} | sample: {line}")

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        progress = {
            "step": self.step,
            "tokens": self.tokens,
            "pending": self.pending,
            "best": self.best,
            "bad_evaluations": self.bad_evaluations,
            "guard": self.guard.state_dict(),
            "config": self.saved,
        }
        self.run.sync()
        save_checkpoint(
            self.out,
            self.model,
            self.optimizer if self.config.save_optimizer else None,
            progress,
            self.config.keep,
            best=self.best["step"] if self.best and self.config.keep_best else None,
            texts={"train.toml": self.toml},
        )
        self.saved_step = self.step if self.pending is None else None

    def _open(self, resume: bool) -> None:
        clean_up(self.out)
        if checkpoints(self.out) and not resume:
            raise ValueError(
                f"{self.out} already holds a run; continue it with --resume or choose another --out"
            )
        if not self._restore():
            torch.manual_seed(self.config.seed)
        # What was written after the checkpoint happens again.
        done = self.step if self.pending is None else self.step - 1
        self.run.rewind(done, ended=self._is_over())

    def _restore(self) -> bool:
        """Load the newest whole checkpoint, saying which are not; False if there is none."""
        damaged: dict[Path, CheckpointError] = {}
        for path in reversed(checkpoints(self.out)):
            try:
                state = load_checkpoint(path, self.model, self.optimizer)
            except CheckpointError as error:
                self._say(f"{error}; falling back to the checkpoint before it")
                damaged[path] = error
                continue
            self._check_same_run(state["config"], path)
            self.step, self.tokens, self.pending = state["step"], state["tokens"], state["pending"]
            self.best, self.bad_evaluations = state["best"], state["bad_evaluations"]
            self.guard.load_state_dict(state["guard"])
            self.saved_step = self.step if self.pending is None else None
            for other in damaged:
                set_aside(other)
            self._say(f"resumed from {path} at step {self.step}")
            return True
        if damaged:
            first = next(iter(damaged.values()))
            raise CheckpointError(f"no checkpoint in {self.out} is whole: {first}")
        return False

    def _check_same_run(self, saved: dict[str, Any], path: Path) -> None:
        """ValueError if the data or its order are not the checkpoint's: that is another run."""
        # Through JSON, as the saved ones went: it knows no tuples.
        before, now = ({**c["train"], **c} for c in (saved, json.loads(json.dumps(self.saved))))
        batches = ("batch_size", "max_length", "stride", "split", "seed", "accumulation_steps")
        for name in ("vocabulary", "data_sha256", *batches):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{path} was trained with {name} {before.get(name)}, not {now.get(name)}; "
                    "resume with the same, or start another run from its weights (--init)"
                )

    def _say(self, line: str) -> None:
        # On a terminal, above the bar; elsewhere a plain line.
        if self.progress is not None and not self.progress.disable:
            self.progress.write(line)
        else:
            print(line, file=sys.stdout, flush=True)


def _forever(loader: DataLoader) -> Iterator[Batch]:
    while True:
        yield from loader
