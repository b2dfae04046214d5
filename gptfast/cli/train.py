"""`gptfast train`: text or token files in, a run directory out."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Self

import torch

from gptfast.cli.settings import apply, flat, read_toml
from gptfast.config import GPTConfig, TrainConfig
from gptfast.data.loader import create_dataloader
from gptfast.data.sources import load_data, prepared_tokenizer
from gptfast.data.token_files import Documents
from gptfast.data.tokens import Source, fingerprint
from gptfast.model import GPT
from gptfast.ops.library import backend_of, operators
from gptfast.tokenizer.vocabulary import get_tokenizer
from gptfast.training.trainer import Trainer
from gptfast.weights.checkpoint import checkpoints, read_settings
from gptfast.weights.open import open_weights, tokenizer_of

# Learns English from the embedded text in two or three minutes on two cores.
SMALL_MODEL = GPTConfig(vocab_size=1, block_size=128, n_layer=4, n_head=4, n_embd=128)
SMALL_RUN = TrainConfig(out="runs/train", lr=5e-3, min_lr=1e-4, eval_interval=61, log_interval=20)


@dataclass(frozen=True)
class Train:
    """Train a GPT on text, watch its loss and its samples, and keep checkpoints that generate.

    Without --data it learns from the prose that CPython itself carries. The run directory gets
    metrics.jsonl, samples.txt, loss.png, loss.pdf and checkpoints/. Ctrl-C finishes the step, saves
    and ends the run; --resume continues it.

    gptfast train --data book.txt --out runs/book --max-steps 1000

    gptfast train --out runs/book --resume

    gptfast train --data dialogues.jsonl --out runs/tuned --init runs/book --lr 1e-4
    """

    model: GPTConfig = SMALL_MODEL
    """The shape of the model. The defaults are a small one that learns in minutes on a CPU; GPT-2's
    own 124M has --n-layer 12 --n-head 12 --n-embd 768 --block-size 1024."""
    train: TrainConfig = SMALL_RUN
    """How it is trained."""
    data: tuple[str, ...] = ()
    """UTF-8 text files, .jsonl files, directories or globs of them, .bin token files, or a
    directory that `gptfast prepare` wrote."""
    tokenizer: str | None = None
    """gpt2, byte, or a directory with vocab.bpe and encoder.json (default: that of the prepared
    data, else that of --init, else gpt2)."""
    batch_size: int = 8
    """Windows per batch."""
    max_length: int | None = None
    """Tokens per window (default block_size)."""
    stride: int | None = None
    """Tokens from one window to the next (default max_length)."""
    split: tuple[float, ...] = (0.9, 0.1)
    """Shares of the data for training, validation and, if there is a third, test. Prepared data
    brings its own."""
    resume: bool = False
    """Continue the run in --out from its latest whole checkpoint, with its settings but for those
    given here; start it if there is none."""
    init: str | None = None
    """Start from these weights, in any form that `gptfast convert` reads; their architecture and
    tokenizer are the default."""
    config: str | None = None
    """A TOML file of these settings, by name with underscores (n_layer = 6; "none" for what is not
    set). Flags overrule it. The resolved one of a run is train.toml in each checkpoint."""
    # The tokenizer's size is the default; 1 only stands for "no more than that".
    no_default_shown: ClassVar = ("vocab_size",)

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> Self:
        """Return the command with these flags, over the settings that `train_defaults` finds."""
        return apply(train_defaults(given), given, "")

    def run(self) -> None:
        if len(self.split) not in (2, 3):
            raise ValueError(f"--split takes two or three shares, got {self.split}")
        tokenizer = get_tokenizer(self.tokenizer_name())
        sources = load_data(self.data, tokenizer, self.split)
        T = self.model.block_size if self.max_length is None else self.max_length
        if T > self.model.block_size:
            raise ValueError(
                f"max_length must be at most block_size={self.model.block_size}, got {T}"
            )
        loaders = [
            create_dataloader(
                source,
                self.batch_size,
                T,
                T if self.stride is None else self.stride,
                shuffle=training,
                drop_last=training,
                seed=self.train.seed if training else 0,
                tokenizer=tokenizer,
            )
            for source, training in zip(sources, (True, False, False), strict=False)
        ]
        trainer = Trainer(
            self._model(tokenizer.n_vocab),
            self.train,
            *loaders[:2],
            test_loader=loaders[2] if len(loaders) > 2 else None,
            tokenizer=tokenizer,
            settings=self._settings(),
            data_sha256=fingerprint(*sources),
        )
        self._introduce(trainer, sources, T)
        if left_out := getattr(loaders[0].dataset, "left_out", 0):
            print(f"{left_out:,} examples are left out: no completion in their first {T} tokens")
        trainer.fit(resume=self.resume)
        if trainer.interrupt.requested:
            return
        print(f"done: see {trainer.run.out}/loss.png; try")
        print(f'  gptfast generate {trainer.run.out} --prompt "{self.train.sample_prompt}"')

    def tokenizer_name(self) -> str:
        """The tokenizer asked for, or that of the data or of the weights to start from."""
        if self.tokenizer is not None:
            return self.tokenizer
        if recorded := prepared_tokenizer(self.data):
            return recorded
        return (self.init is not None and tokenizer_of(self.init)) or "gpt2"

    def _model(self, n_vocab: int) -> GPT:
        torch.manual_seed(self.train.seed)
        vocab_size = max(self.model.vocab_size, n_vocab)
        model = GPT(dataclasses.replace(self.model, vocab_size=vocab_size))
        if self.init is not None and not (self.resume and checkpoints(self.train.out)):
            load_weights(model, self.init)
        return model

    def _settings(self) -> dict[str, Any]:
        own = ("data", "batch_size", "max_length", "stride", "split", "init")
        return {name: flat(self)[name] for name in own}

    def _introduce(self, trainer: Trainer, sources: list[Source], T: int) -> None:
        unit = "documents" if isinstance(sources[0], Documents) else "tokens"
        n_params = sum(p.numel() for p in trainer.model.parameters())
        print(
            f"{sum(map(len, sources)):,} {unit}, {n_params:,} parameters, "
            f"{trainer.total_steps} steps of "
            f"{self.batch_size * self.train.accumulation_steps} x {T} tokens on {trainer.device}, "
            f"kernels: {backend_of(operators()[0], trainer.device.type)}"
        )


def train_defaults(given: Mapping[str, Any]) -> Train:
    """Return what `gptfast train` takes for what the flags do not say.

    given: the flags by name. In this order, the later overruling: the small default run; the
    architecture of --init; the settings of the run that --resume continues; the file of --config.
    """
    command = Train()
    file = read_toml(given["config"]) if given.get("config") else {}
    layered = {**file, **given}
    init, saved = layered.get("init"), None
    if layered.get("resume"):
        newest_first = reversed(checkpoints(layered.get("out", command.train.out)))
        saved = next(filter(None, map(read_settings, newest_first)), None)
    if init not in (None, "none") and not saved:
        command = dataclasses.replace(command, model=open_weights(init).config)
    if saved:
        source = layered.get("out", command.train.out)
        command = apply(command, {**saved, "out": source}, f"the settings of {source}")
    elif "lr" in layered and "min_lr" not in layered:
        # The default run's end of the decay suits its own rate.
        command = apply(command, {"min_lr": None}, "--lr")
    # One of the two, given closer to the user, takes the place of the other.
    one_of = ("max_steps", "epochs")
    for source in (file, given):
        if any(source.get(name) not in (None, "none") for name in one_of):
            command = apply(command, dict.fromkeys(one_of), "--resume")
    if any(given.get(name) for name in one_of):
        file = {name: value for name, value in file.items() if name not in one_of}
    return apply(command, file, given["config"]) if file else command


def load_weights(model: GPT, path: str | PathLike) -> None:
    """Copy the weights of `open_weights` into `model`; ValueError if they do not fit."""
    open_weights(path).copy_to(model)
