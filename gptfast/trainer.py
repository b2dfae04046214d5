"""The training loop: a batch goes in, the loss comes out, AdamW steps; now and then it looks up."""

import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from gptfast.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from gptfast.config import TrainConfig
from gptfast.evaluate import batch_loss, loader_loss, perplexity
from gptfast.generate import generate_text
from gptfast.model import GPT
from gptfast.optim import AdamW
from gptfast.plot import plot_losses
from gptfast.tokenizer import Tokenizer


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one, else the CPU.

    Raises ValueError for a device that this machine does not have.
    """
    # Not every accelerator: the reference's float64 sums rule out Apple's, for one.
    known = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if name == "auto":
        return torch.device(known[0])
    if name not in known:
        raise ValueError(f"device must be auto or one of {', '.join(known)}, got {name!r}")
    return torch.device(name)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up to config.lr, then a cosine down to min_lr at the last of `steps` steps."""
    warmup = config.warmup_steps if config.warmup_steps is not None else max(1, steps // 20)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    min_lr = config.min_lr if config.min_lr is not None else config.lr / 10
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return min_lr + (config.lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(model: GPT, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings, which decay; biases and norms, which do not."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


class Trainer:
    """Trains a GPT and leaves checkpoints, metrics.jsonl, samples and a loss plot in config.out.

    train_loader, val_loader: from `create_dataloader`. tokenizer: for the text samples and, by its
    name, for whoever loads the checkpoint. extra: JSON-able facts to save beside the configs.
    Raises ValueError where the run directory cannot be used.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        train_loader: DataLoader,
        val_loader: DataLoader,
        *,
        tokenizer: Tokenizer | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.device = choose_device(config.device)
        self.model, self.config = model.to(self.device), config
        self.train_loader, self.val_loader, self.tokenizer = train_loader, val_loader, tokenizer
        self.optimizer = AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            max_norm=config.max_norm,
        )
        self.steps = config.max_steps or (config.epochs or 5) * len(train_loader)
        self.step, self.tokens, self.history = 0, 0, []
        self.out = Path(config.out)
        self.saved = {
            "model": dataclasses.asdict(model.config),
            "train": dataclasses.asdict(config),
            "tokenizer": tokenizer.name if tokenizer else None,
            **(extra or {}),
        }
        # The same first batches at every evaluation, so that training losses compare.
        n = config.eval_batches or len(val_loader)
        train_loader.batch_sampler.set_position(0)
        self.train_sample = list(islice(train_loader, n))
        self.progress: tqdm | None = None
        if tokenizer and config.sample_tokens and not tokenizer.encode(config.sample_prompt):
            raise ValueError("sample_prompt is empty; give it some text or set sample_tokens to 0")

    def fit(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Train to the last step and return the history, the rows of metrics.jsonl.

        resume: continue from the latest checkpoint in config.out, as if never interrupted; without
        one, start. A fresh start in a directory that has checkpoints is a ValueError.
        """
        self._open_run(resume)
        if self.step == 0:
            torch.manual_seed(self.config.seed)
            self._evaluate(None)
        if self.step >= self.steps:
            self._say(f"the run is complete at step {self.step}; raise max_steps or epochs")
        self.model.train()
        self.progress = tqdm(
            total=self.steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True
        )
        with self.progress:
            self._loop()
        if self.history:
            plot_losses(self.history, self.out)
        return self.history

    def train_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimizer step on a batch, at the rate the schedule has for it; its loss, 0-d."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.config)
        loss = batch_loss(self.model, x, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.tokens += y.numel()
        return loss.detach()

    def _loop(self) -> None:
        config, per_epoch = self.config, len(self.train_loader)
        every = config.checkpoint_interval or config.eval_interval
        start, start_tokens = time.perf_counter(), self.tokens
        for x, y in self._batches():
            loss = self.train_step(x, y)
            self.progress.update()
            last = self.step == self.steps
            evaluates = last or self.step % config.eval_interval == 0
            row = None
            if evaluates or self.step % config.log_interval == 0:
                seconds = time.perf_counter() - start
                row = self._log(loss, (self.tokens - start_tokens) / seconds)
            if evaluates:
                self._evaluate(row)
            if row:
                self._write(row)
            if last or self.step % every == 0:
                self._save()
            if last or self.step % per_epoch == 0:
                self._sample()
            if row:
                # The clock of tokens per second leaves evaluation, samples and checkpoints out.
                start, start_tokens = time.perf_counter(), self.tokens

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.train_loader.batch_sampler.set_position(self.step)
        while self.step < self.steps:
            yield from islice(self.train_loader, self.steps - self.step)

    def _row(self) -> dict[str, Any]:
        epoch = self.step / len(self.train_loader)
        return {"step": self.step, "epoch": round(epoch, 6), "tokens": self.tokens}

    def _log(self, loss: Tensor, tokens_per_second: float) -> dict[str, Any]:
        row = self._row() | {
            "loss": loss.item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": self.optimizer.grad_norm.item(),
            "tokens_per_second": round(tokens_per_second, 1),
        }
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row[name]):
                raise FloatingPointError(
                    f"{name} is {row[name]} at step {self.step}; lower --lr, or look at the data. "
                    f"Checkpoints up to here are in {self.out}"
                )
        self._say(
            f"step {self.step}/{self.steps} | loss {row['loss']:.3f} | lr {row['lr']:.2e} | "
            f"norm {row['grad_norm']:.2f} | {row['tokens_per_second']:,.0f} tokens/s"
        )
        return row

    def _evaluate(self, row: dict[str, Any] | None) -> None:
        self.val_loader.batch_sampler.set_position(0)
        train_loss = loader_loss(self.model, self.train_sample)
        val_loss = loader_loss(self.model, self.val_loader, self.config.eval_batches)
        losses = {"train_loss": train_loss, "val_loss": val_loss}
        if row is None:
            self._write(self._row() | losses)
        else:
            row |= losses
        self._say(
            f"step {self.step}/{self.steps} | training loss {train_loss:.3f} | "
            f"validation loss {val_loss:.3f} (perplexity {perplexity(val_loss):.1f})"
        )

    def _sample(self) -> None:
        if self.tokenizer is None or not self.config.sample_tokens:
            return
        text = generate_text(
            self.model,
            self.tokenizer,
            self.config.sample_prompt,
            self.config.sample_tokens,
            top_p=0.5,
            seed=self.config.seed,
        )
        line = " ".join(text.split())
        with (self.out / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"step {self.step}: {line}\n")
        self._say(f"step {self.step}/{self.steps} | sample: {line}")

    def _save(self) -> None:
        progress = {"step": self.step, "tokens": self.tokens, "config": self.saved}
        save_checkpoint(self.out, self.model, self.optimizer, progress, self.config.keep)

    def _open_run(self, resume: bool) -> None:
        found = checkpoints(self.out)
        if found and not resume:
            raise ValueError(
                f"{self.out} already holds a run; continue it with --resume or choose another --out"
            )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "metrics.jsonl").open("a").close()
        except OSError as error:
            raise ValueError(f"cannot write to {self.out}: {error.strerror}") from None
        if found:
            self._restore(found[-1])
        else:
            for name in ("metrics.jsonl", "samples.txt"):
                (self.out / name).write_text("")

    def _restore(self, path: Path) -> None:
        state = load_checkpoint(path, self.model, self.optimizer)
        self._check_same_run(state["config"], path)
        self.step, self.tokens = state["step"], state["tokens"]
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        # What was written after the checkpoint happens again.
        self.history = [row for row in rows if row["step"] <= self.step]
        text = "".join(json.dumps(row) + "\n" for row in self.history)
        (self.out / "metrics.jsonl").write_text(text)
        samples = self.out / "samples.txt"
        lines = samples.read_text("utf-8").splitlines() if samples.exists() else []
        # One that was cut off in the middle is dropped.
        steps = [re.match(r"step (\d+): ", line) for line in lines]
        kept = [m.string for m in steps if m and int(m[1]) <= self.step]
        samples.write_text("".join(line + "\n" for line in kept), "utf-8")
        self._say(f"resumed from {path} at step {self.step}")

    def _check_same_run(self, saved: dict[str, Any], path: Path) -> None:
        """ValueError if the data or its order are not the checkpoint's: that is another run."""
        before, now = ({**c["train"], **c} for c in (saved, self.saved))
        for name in ("data_sha256", "tokenizer", "batch_size", "split", "seed"):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{path} was trained with {name} {before.get(name)}, not {now.get(name)}; "
                    "resume with the same, or start another run from its weights (--init)"
                )

    def _write(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _say(self, line: str) -> None:
        # On a terminal, above the bar; elsewhere a plain line.
        if self.progress is not None and not self.progress.disable:
            self.progress.write(line)
        else:
            print(line, file=sys.stdout, flush=True)
