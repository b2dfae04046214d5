"""The training loop: take the batches of a step, step, then log, evaluate, sample and save."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from gptfast.config import TrainConfig
from gptfast.data.loader import BatchOrder, describe_batch
from gptfast.evaluate.loss import perplexity
from gptfast.generate import generate_text
from gptfast.model import GPT, check_saveable
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.training.checkpoint import clean_up
from gptfast.training.environment import environment
from gptfast.training.evaluation import Evaluation, EvaluationInterrupted
from gptfast.training.feed import Feed, forever
from gptfast.training.flops import peak_flops, speed
from gptfast.training.followers import FollowedDirectory, QuietLog
from gptfast.training.interrupt import Interrupt
from gptfast.training.launched import world_of
from gptfast.training.log import RunLog, warn
from gptfast.training.metrics import MetricsRow, finite, json_numbers, read_metrics
from gptfast.training.plot import plot_losses
from gptfast.training.progress import Progress, RunCheckpoints, run_settings
from gptfast.training.run_directory import RunDirectory
from gptfast.training.schedule import check_schedule, learning_rate
from gptfast.training.step import Batch, RefusedStep, TrainStep, matmul_precision
from gptfast.weights.checkpoint import checkpoints

DEFAULT_EPOCHS = 5
"""Passes over the training data if neither max_steps nor epochs is given."""
SAMPLE_MIN_P = 0.2
"""Min-p of the text samples: high enough for readable text from a model that is still learning."""


def run_length(config: TrainConfig, batches: int) -> int:
    """Return the number of steps of a run over data of so many batches."""
    epochs = config.epochs or DEFAULT_EPOCHS
    return config.max_steps or max(1, epochs * batches // config.accumulation_steps)


class Trainer:
    """Trains a GPT and leaves checkpoints, metrics.jsonl, samples and a loss plot in config.out.

    model: one on the meta device gets what GPT(model.config) draws after torch.manual_seed(config.
    seed); processes that share the weights then never hold all of them.
    train_loader, val_loader, test_loader: from `create_dataloader`. The test loss is measured once,
    at the end. tokenizer: for the text samples; checkpoints hold its files. settings: others to
    keep in checkpoints, as values that TOML can hold. data_sha256: identifies the data; a run
    cannot be resumed with other data, batches or seed. on_row: called with each row as it is
    written to metrics.jsonl, of several processes in the first; what it raises ends the run.

    `fit` trains. Attributes to read: `progress` (such as the current step), `total_steps`, `step`
    (which takes the optimizer steps), `interrupt`, `history`. Raises ValueError for a loader or a
    run directory that cannot be used.
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
        on_row: Callable[[MetricsRow], Any] | None = None,
    ) -> None:
        check_saveable(model)  # now, not at the first checkpoint
        for loader in (train_loader, val_loader, test_loader):
            if loader is not None and not isinstance(loader.batch_sampler, BatchOrder):
                raise ValueError("the loaders must come from gptfast.create_dataloader")
        self.world = world_of(config)
        if config.lora_rank is not None and self.world.size > 1:
            raise ValueError("lora_rank trains in one process: start it without torchrun")
        self.log = RunLog() if self.world.is_first else QuietLog()
        self._feed: Feed | None = None
        self.device = self.world.device(config.device)
        self.model = model.to(self.device) if model.device.type != "meta" else model
        self.config, self.tokenizer = config, tokenizer
        self.train_loader, self.val_loader = train_loader, val_loader
        self.test_loader = test_loader
        self.total_steps = run_length(config, len(train_loader))
        check_schedule(config, self.total_steps)
        made_by = run_settings(model.config, config, tokenizer, data_sha256, settings or {})
        # Each machine may have the data at another place; data_sha256 says whether it is the same.
        self.world.compare({k: v for k, v in made_by.items() if k != "data"})
        self.step = self._make_step()
        self.progress = Progress()
        self.history: list[dict[str, Any]] = []
        directory = RunDirectory if self.world.is_first else FollowedDirectory
        self.run = directory(Path(config.out), tensorboard=config.tensorboard, on_row=on_row)
        self.checkpoints = RunCheckpoints(
            self.run.out, self.step, made_by, self.log.line, tokenizer, self.world
        )
        self.interrupt = Interrupt()
        self._evaluation = Evaluation(
            self.model, config, self.device, self.world, lambda: self.interrupt.agree()
        )

    def _make_step(self) -> TrainStep:
        """Return what takes the steps, alone or with other processes."""
        if self.world.size == 1:
            return TrainStep(self.model, self.config, self.device, self.log.line)
        from gptfast.training.sharded_step import parallel_step

        order: Any = self.train_loader.batch_sampler
        return parallel_step(
            self.model, self.config, self.device, self.log.line, self.world, order.batch_size
        )

    def fit(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Train to the last step and return the history, the rows of metrics.jsonl.

        resume: continue exactly from the latest undamaged checkpoint in config.out, or start if
        there is none. Raises ValueError for resume=False in a directory that has checkpoints.
        SIGINT, SIGTERM and SIGHUP end the run after the current step, with a checkpoint; a second
        SIGINT raises KeyboardInterrupt at once. Log lines that cannot be written do not end it. A
        loss or gradient norm that is not finite raises FloatingPointError after a checkpoint of the
        weights before that step.
        """
        precision, interrupts = matmul_precision(self.config), self.world.interrupt()
        with self.run.lock(), self.checkpoints.background, precision, interrupts as self.interrupt:
            self._open(resume or self.world.restarts > 0)
            peak = torch.tensor(self._peak_flops(), dtype=torch.float64, device=self.device)
            self._peak_of_all = float(self.world.sum(peak))
            self.model.train()
            bar = self.log.progress_bar(self.total_steps, self.progress.step)
            with bar, contextlib.closing(self.step):
                self._loop()
            self.world.wait_for_first("the last row")
            self.history = read_metrics(self.run.out)
            if self.world.is_first and any(finite(row, "val_loss") for row in self.history):
                plot_losses(self.history, self.run.out)
        return self.history

    def train_step(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Take one optimizer step at the scheduled learning rate; return what `TrainStep.run` does.

        Raises FloatingPointError for a step that the guard refuses, after saving a checkpoint.
        """
        self.checkpoints.background.check()
        progress = self.progress
        rate = learning_rate(progress.step, self.total_steps, self.config)
        try:
            row = self.step.run(batches, rate, self._feed.prepare if self._feed else None)
        except RefusedStep as refused:
            kept = f"the checkpoint of step {progress.step} is in {self.run.out}"
            try:
                self._save(waits=True)
            except OSError as error:
                kept = str(error)
            raise FloatingPointError(
                f"{refused} at step {progress.step + 1}, on {self._data_of(progress.step)}; lower "
                f"--lr or look at that data ({refused.remedy}). No weight was changed; {kept}"
            ) from None
        progress.step += 1
        progress.tokens += row.pop("targets")
        if "skipped" in row:
            data = self._data_of(progress.step - 1)
            self.log.line(f"step {progress.step} skipped: {row['skipped']}; {data}")
        return row

    def _open(self, resume: bool) -> None:
        """Prepare the run directory, and restore the run or seed a new one."""
        out = self.run.out
        if self.world.is_first:
            clean_up(out)
        self.world.wait_for_first("clean directory")
        if checkpoints(out) and not resume:
            raise ValueError(
                f"{out} already holds a run; continue it with --resume or choose another --out"
            )
        if restored := self.checkpoints.restore():
            self.progress = restored
        else:
            torch.manual_seed(self.config.seed)
        self.world.same_random_state(self.device)
        self.run.describe(environment(self.device))
        # The steps after the checkpoint are taken again, so their rows and samples go.
        self.run.rewind(self.progress.logged_step, ended=self._is_over())

    def _loop(self) -> None:
        """Train from the current step until the run is over or interrupted."""
        if self.progress.pending is not None:
            self._after_step(self.progress.pending)
        elif self._is_over():
            more = "max_steps or epochs" if self._has_all_steps() else "early_stopping"
            self.log.line(
                f"the run is complete at step {self.progress.step}; raise {more} for more"
            )
        with self._profiler() as profiled_step:
            start, tokens = time.perf_counter(), 0
            for batches in self._batches():
                try:
                    row = self.train_step(batches)
                except Exception:
                    # Ctrl-C in a terminal also ended the C++ compiler that torch.compile runs.
                    if self.config.compile and self.interrupt.requested:
                        break
                    raise
                self.log.advance()
                profiled_step()
                tokens += sum(x.numel() for x, _ in batches)  # masked targets cost as much time
                rate, T = tokens / (time.perf_counter() - start), batches[0][0].shape[1]
                row |= speed(rate, self.model.config, T, self._peak_of_all, self.device)
                if self._after_step(row):
                    # Tokens per second do not include evaluations and checkpoints.
                    start, tokens = time.perf_counter(), 0
        if self.interrupt.requested:
            self._save(waits=True)
            saves_all = self.config.save_optimizer
            saved = "all is saved; --resume continues" if saves_all else "the model is saved"
            self.log.line(
                f"{self.interrupt.requested}: stopped at step {self.progress.step}, {saved}"
            )

    def _batches(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step, from the current step to the last."""
        per_step = self.config.accumulation_steps
        order = self.train_loader.batch_sampler
        assert isinstance(order, BatchOrder)  # as __init__ has checked
        order.set_position(self.progress.step * per_step)
        feed = self._feed = Feed(forever(self.train_loader), per_step, self.device)
        try:
            while not self._is_over() and not self.interrupt.agree():
                yield feed.take()
        finally:
            self._feed = None  # and with it the loader's processes

    def _has_all_steps(self) -> bool:
        """Return whether the last step has been taken."""
        return self.progress.step >= self.total_steps

    def _is_over(self) -> bool:
        """Return whether the last step has been taken or early stopping ends the run."""
        patience = self.config.early_stopping
        return self._has_all_steps() or (
            patience is not None and self.progress.bad_evaluations >= patience
        )

    def _after_step(self, row: dict[str, Any]) -> bool:
        """Log, evaluate, sample and save if it is time to; return whether the row was written.

        An interrupted evaluation is saved as pending, and the resumed run repeats it.
        """
        progress = self.progress
        progress.pending = row = self._progress_row() | row
        evaluates = progress.step % self.config.eval_interval == 0 or self._is_over()
        due = evaluates or progress.step % self.config.log_interval == 0 or "skipped" in row
        if due:
            self._log_row(row)
        improved = False
        if evaluates:
            before = progress.best, progress.bad_evaluations
            try:
                improved = self._evaluate(row)
            except EvaluationInterrupted:
                progress.best, progress.bad_evaluations = before
                self._save()
                return False
        if self._is_over():
            row["final"] = True
        if due:
            self.run.write(json_numbers(row))
        if self._is_over() or self._ends_epoch():
            self._sample()
        progress.pending = None
        if self._saves_now(improved):
            self._save(waits=self.log.lost is not None)
        self._mention_lost_log()
        return due

    def _mention_lost_log(self) -> None:
        """Say on stderr that log lines can no longer be written, once what they told is saved."""
        if self.log.lost:
            warn(
                f"gptfast: the log lines cannot be written ({self.log.lost}). Step "
                f"{self.progress.step} is saved in {self.run.out}, and the run goes on without "
                "them; metrics.jsonl has its numbers, and Ctrl-C ends it"
            )
            self.log.lost = None

    def _saves_now(self, improved: bool) -> bool:
        """Return whether a checkpoint is due. improved: whether the model is the best so far."""
        step, config = self.progress.step, self.config
        every = config.checkpoint_interval or config.eval_interval
        scheduled = step > 0 and (self._is_over() or step % every == 0)
        new_best = improved and config.keep_best
        return bool(scheduled or new_best or self.interrupt.requested or self.log.lost)

    def _save(self, *, waits: bool = False) -> None:
        """Write metrics and samples to the disk, then a checkpoint. waits: with async_save too."""
        if not self.checkpoints.is_saved(self.progress):
            with self.world.writing(self.run.out):
                self.run.sync()
            self.checkpoints.save(self.progress)
        if waits:
            self.checkpoints.background.finish()

    def _progress_row(self) -> dict[str, Any]:
        """Return the step, epoch and tokens of the run so far."""
        batches = self.progress.step * self.config.accumulation_steps
        epoch = round(batches / len(self.train_loader), 6)
        return {"step": self.progress.step, "epoch": epoch, "tokens": self.progress.tokens}

    def _ends_epoch(self) -> bool:
        """Return whether the current step completed a pass over the training data."""
        step, per_step = self.progress.step, self.config.accumulation_steps
        before, now = (s * per_step // len(self.train_loader) for s in (step - 1, step))
        return step > 0 and now > before

    def _data_of(self, step: int) -> str:
        """Return a description of the batches that step `step` + 1 takes, for a message."""
        first = step * self.config.accumulation_steps
        batches = range(first, first + self.config.accumulation_steps)
        return "; ".join(describe_batch(self.train_loader, batch) for batch in batches)

    def _peak_flops(self) -> float:
        """Return the device's measured FLOP/s in the dtype of training."""
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        return peak_flops(self.device, dtype)

    def _evaluate(self, row: dict[str, Any]) -> bool:
        """Add the losses to the row of the step; return whether the model is the best so far."""
        # Every evaluation takes the same first batches, so that its training losses compare.
        n = self.config.eval_batches or len(self.val_loader)
        train_loss = self._loss_over(self.train_loader, n)
        val_loss = self._loss_over(self.val_loader, self.config.eval_batches)
        row |= {"train_loss": train_loss, "val_loss": val_loss}
        self.log.line(
            f"step {self.progress.step}/{self.total_steps} | training loss {train_loss:.3f} | "
            f"validation loss {val_loss:.3f} (perplexity {perplexity(val_loss):.1f})"
        )
        improved = self.progress.update_best(val_loss)
        if self._is_over() and self.test_loader is not None:
            row["test_loss"] = loss = self._loss_over(self.test_loader, None)
            self.log.line(f"test loss {loss:.3f} (perplexity {perplexity(loss):.1f})")
        return improved

    def _loss_over(self, loader: DataLoader, n: int | None) -> float:
        """Return the mean loss over the first n batches of a loader; None means all."""
        return self._evaluation.loss(loader, n)

    def _sample(self) -> None:
        """Write a text sample to the log and to samples.txt."""
        if self.tokenizer is None or not self.config.sample_tokens:
            return
        model = self.step.whole_model()
        if self.world.is_first and model is not None:
            self._write_sample(model, self.tokenizer)
        self.world.wait_for_first(f"sample of step {self.progress.step}")

    def _write_sample(self, model: GPT, tokenizer: Tokenizer) -> None:
        try:
            text = generate_text(
                model,
                tokenizer,
                self.config.sample_prompt,
                self.config.sample_tokens,
                min_p=SAMPLE_MIN_P,
                seed=self.config.seed,
            )
        except ValueError as error:  # logits that are not finite must not lose the checkpoint
            text = f"none: {error}"
        assert isinstance(text, str)
        line = " ".join(text.split())
        self.run.write_sample(self.progress.step, line)
        self.log.line(f"step {self.progress.step}/{self.total_steps} | sample: {line}")

    def _log_row(self, row: dict[str, Any]) -> None:
        """Print the numbers of an ordinary step."""
        if "loss" not in row or "grad_norm" not in row:
            return
        share = f" | MFU {row['mfu']:.0%}" if "mfu" in row else ""
        self.log.line(
            f"step {self.progress.step}/{self.total_steps} | loss {row['loss']:.3f} | "
            f"lr {row['lr']:.2e} | norm {row['grad_norm']:.2f} | "
            f"{row['tokens_per_second']:,.0f} tokens/s{share}"
        )

    def _profiler(self) -> contextlib.AbstractContextManager:
        """Return a context that yields the function to call after each step."""
        if self.config.profile and not self._is_over():
            return self.run.profiler(self.total_steps - self.progress.step)
        return contextlib.nullcontext(lambda: None)
