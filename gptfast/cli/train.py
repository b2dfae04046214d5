"""`gptfast train`: train a GPT on text or token files and write a run directory."""

import contextlib
import dataclasses
import io
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from gptfast.cli.conflicts import check_start, check_training
from gptfast.cli.data_flags import Reading
from gptfast.cli.precision import precision_advice
from gptfast.cli.ranges import MAX_THREADS, check_split, check_whole
from gptfast.cli.settings import apply, flat, read_toml
from gptfast.cli.threads import set_threads, thread_advice
from gptfast.cli.train_data import (
    absolute,
    batch_size_of,
    keep_characters,
    load_sources,
    make_loaders,
    refuse_streams,
    window,
    with_known_prompt,
)
from gptfast.cli.train_weights import load_adapted, load_base, load_weights
from gptfast.cli.vocabularies import check_init
from gptfast.config import FINETUNING_LR, GPTConfig, TrainConfig
from gptfast.data.embedded import embedded_text
from gptfast.data.loader import Examples
from gptfast.data.sources import prepared_tokenizer
from gptfast.data.token_files import Documents
from gptfast.data.tokens import Source, check_rows, fingerprint
from gptfast.files import LOCK_TIMEOUT_S, lock
from gptfast.lora import adapter_state
from gptfast.model import GPT, empty_model
from gptfast.ops.library import backend_of, operators
from gptfast.tokenizer.bpe import BPETokenizer, Tokenizer
from gptfast.tokenizer.train import reduce_tokenizer
from gptfast.tokenizer.vocabulary import get_tokenizer
from gptfast.training.interrupt import exit_code
from gptfast.training.launched import world_of
from gptfast.training.log import say
from gptfast.training.step import matmul_precision
from gptfast.training.trainer import SAMPLE_MIN_P, Trainer
from gptfast.training.world import World
from gptfast.weights.checkpoint import checkpoints, read_settings
from gptfast.weights.open import is_adapter, open_weights, tokenizer_of

# Learns from the embedded text in two to three minutes on two cores: docs/first_run.md.
SMALL_MODEL = GPTConfig(vocab_size=1, block_size=128, n_layer=4, n_head=4, n_embd=256)
SMALL_RUN = TrainConfig(out="runs/train", lr=2e-3, min_lr=1e-4, eval_interval=100, log_interval=20)


@dataclass(frozen=True)
class Train(Reading):
    """Train a GPT on text; print its losses and text samples, and save checkpoints.

    Without --data, the model learns from the English text that Python itself brings along. The run
    directory --out gets metrics.jsonl, samples.txt, loss.png, loss.pdf and checkpoints/. Ctrl-C, a
    SIGTERM or a closed terminal finishes the current step, saves a checkpoint and ends the run;
    --resume continues it. --dry-run shows what a run would take.

    gptfast train --data book.txt --out runs/book --max-steps 1000

    gptfast train --data book.txt --preset gpt2 --batch-size 4 --dry-run

    gptfast train --out runs/book --resume

    gptfast train --data dialogues.jsonl --out runs/tuned --init runs/book --lr 1e-4
    """

    model: GPTConfig = SMALL_MODEL
    """The shape of the model. The defaults make a small model that learns in minutes on a CPU.
    --preset gpt2 is the shape of GPT-2 with 124M parameters."""
    train: TrainConfig = SMALL_RUN
    """How the model is trained."""
    data: tuple[str, ...] = ()
    """The text to learn from: files of text or of records (.jsonl, .json, .csv, .parquet),
    directories or globs of them, hf:NAME:SPLIT:FIELD for a data set of the datasets library, - for
    standard input, .bin or .npy token files, or a directory that `gptfast prepare` wrote.
    docs/data.md has all kinds."""
    tokenizer: str | None = None
    """gpt2, byte, or a directory with a vocabulary's files (default: that of the prepared
    data, else that of --init, else gpt2; without --data, gpt2 reduced to the tokens of the text
    and saved in OUT/tokenizer)."""
    preset: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = None
    """The shape of one of OpenAI's models, with random weights and a context of 1,024 tokens. The
    flags of the model below overrule it. For their weights, give --init gpt2."""
    batch_size: int = 8
    """Number of windows (sequences of --max-length tokens) per batch."""
    max_length: int | None = None
    """Number of tokens per window (default: block_size)."""
    stride: int | None = None
    """Number of tokens between the starts of neighbouring windows (default: max_length)."""
    split: tuple[float, ...] = (0.9, 0.1)
    """Two or three shares of the data: training, validation and test. Data that `gptfast prepare`
    wrote is split already."""
    resume: bool = False
    """Continue the run in --out from its latest undamaged checkpoint, or start it if there is none.
    The settings are those of the run, except for the flags given here."""
    init: str | None = None
    """Start from the weights of this model, in any format that `gptfast convert` reads. Its shape
    and tokenizer become the defaults, and the default of --lr becomes 3e-4."""
    base: str | None = None
    """With --resume, for an adapter whose base has moved: where the base is now."""
    resize_vocab: bool = False
    """With --init: give the model the tokens that a grown vocabulary has more. Their rows are the
    mean of the old ones."""
    config: str | None = None
    """A TOML file of settings, named as the flags but with underscores, for example n_layer = 6.
    The value "none" leaves a setting unset. Flags overrule the file. Each checkpoint has the
    settings of its run in train.toml, which can be given here; examples/train.toml is another."""
    threads: int | None = None
    """Number of threads (default: $OMP_NUM_THREADS, else one per core)."""
    dry_run: bool = False
    """Show data, sizes, memory and time of the run, measured on a few steps, and write nothing."""
    # The default of 1 means the tokenizer's size, because a smaller vocab_size is raised to it.
    no_default_shown: ClassVar = ("vocab_size",)
    set_first: ClassVar = (
        *("data", "out", "init", "preset", "tokenizer", "n_layer", "n_head", "n_embd"),
        *("block_size", "batch_size", "max_steps", "lr", "lora_rank", "precision", "resume"),
    )

    def __post_init__(self) -> None:
        check_whole(self, "batch_size", "max_length", "stride")
        check_whole(self, "threads", most=MAX_THREADS)
        check_split(self.split, least=2)

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> "Train":
        """Return the command with these flags, and for the rest what `train_defaults` returns."""
        check_start(given)
        train = apply(train_defaults(given, cls()), given, "")
        check_training(given, train)
        return train

    def run(self) -> int:
        """Train, and return the exit code: that of a signal if one ended a run of one process."""
        world = world_of(self.train)
        set_threads(self.threads)
        # What is printed is the same everywhere: the first process prints it.
        printed = None if world.is_first else io.StringIO()
        with (
            world.ending_together(),
            contextlib.redirect_stdout(printed or sys.stdout),
            matmul_precision(self.train),
        ):
            return self._run(world)

    def _run(self, world: World) -> int:
        trainer, sources, T = self.trainer()
        self._introduce(trainer, sources, T)
        if self.dry_run:
            from gptfast.cli.plan import plan_run

            plan_run(trainer, resume=self.resume)
            return 0
        trainer.fit(resume=self.resume)
        if trainer.interrupt.requested:
            # torchrun takes any other code for a failure, and would start the run again.
            return exit_code(trainer.interrupt.requested) if world.size == 1 else 0
        out, prompt = str(trainer.run.out), trainer.config.sample_prompt
        # A prompt that begins with a dash would be read as a flag.
        flag = "--prompt=" if prompt.startswith("-") else "--prompt "
        words = f"{shlex.quote(out)} {flag}{shlex.quote(prompt)} --min-p {SAMPLE_MIN_P}"
        say(f"done: see {out}/loss.png; try\n  gptfast generate {words}")
        return 0

    def trainer(self) -> tuple[Trainer, list[Source], int]:
        """Return the trainer of this run, its data, and the number of tokens per window."""
        world = world_of(self.train)
        if world.size > 1:
            refuse_streams(self.data, "process")
        with world.in_turn("tokenizer"):  # it may be written to --out
            tokenizer = self._tokenizer()
        if self.init is not None and not self.continues():
            by = "--tokenizer" if self.tokenizer is not None else "the data"
            check_init(tokenizer, self.init, by, resized=self.resize_vocab)
        sources, T = load_sources(self, tokenizer), window(self)
        if self.init is not None:
            for source in sources:
                check_rows(source, self._rows(tokenizer.n_vocab), tokenizer, f"--init {self.init}")
        loaders = make_loaders(self, sources, tokenizer)
        trainer = Trainer(
            self._model(tokenizer.n_vocab, world),
            with_known_prompt(self.train, tokenizer),
            *loaders[:2],
            test_loader=loaders[2] if len(loaders) > 2 else None,
            tokenizer=tokenizer,
            settings=self._settings(),
            data_sha256=fingerprint(*sources),
        )
        if self._is_shared(world):
            self._load_init(trainer.model)
        return trainer, sources, T

    def tokenizer_name(self) -> str:
        """Return the name of the tokenizer: as given, or of the data, or of the --init weights."""
        if self.tokenizer is not None:
            return self.tokenizer
        if recorded := prepared_tokenizer(self.data):
            return recorded
        return (self.init is not None and tokenizer_of(self.init)) or "gpt2"

    def _tokenizer(self) -> Tokenizer:
        """Return the tokenizer; for the embedded text, GPT-2's reduced to what the text needs."""
        if self.data or self.tokenizer is not None or self.init is not None:
            return keep_characters(get_tokenizer(self.tokenizer_name()), self.train.out)
        directory = Path(self.train.out) / "tokenizer"
        if self.dry_run:
            return self._tokenizer_of_dry_run(directory)
        # A vocabulary that is there is never replaced: another process may start on it just now.
        with lock(Path(self.train.out), LOCK_TIMEOUT_S):
            if (directory / "vocab.bpe").is_file():
                return get_tokenizer(str(directory))
            whole = get_tokenizer("gpt2")
            if checkpoints(self.train.out):
                return whole
            # With all of GPT-2's tokens, a model this small spends most of its time on the head.
            assert isinstance(whole, BPETokenizer)
            return reduce_tokenizer(whole, embedded_text(), directory)

    def _tokenizer_of_dry_run(self, directory: Path) -> Tokenizer:
        """Return the tokenizer of the embedded text, and leave no files of it."""
        if (directory / "vocab.bpe").is_file():
            return get_tokenizer(str(directory))
        whole = get_tokenizer("gpt2")
        assert isinstance(whole, BPETokenizer)
        with tempfile.TemporaryDirectory() as elsewhere:
            return reduce_tokenizer(whole, embedded_text(), elsewhere)

    def _model(self, n_vocab: int, world: World) -> GPT:
        """Return the model to train, with random weights or those of --init.

        It is without values if the trainer cuts it into the parts of several processes. With
        --lora-rank it has its adapters.
        """
        config = dataclasses.replace(self.model, vocab_size=self._rows(n_vocab))
        if self._is_shared(world):
            return empty_model(config)
        torch.manual_seed(self.train.seed)
        has_base = self.train.lora_rank is not None and (self.init is not None or self.continues())
        model = empty_model(config) if has_base else GPT(config)
        self._load_init(model)
        return model

    def _is_shared(self, world: World) -> bool:
        """Return whether the processes share the weights."""
        return world.size > 1 and self.train.parallel in ("fsdp", "hsdp")

    def _load_init(self, model: GPT) -> None:
        """Copy the weights of --init, or those beside an adapter that goes on, into the model."""
        if self.continues():
            if self.train.lora_rank is not None:
                load_base(model, self.train.out, self.base, self.train)
        elif self.init is not None:
            if self.train.lora_rank is not None and is_adapter(self.init):
                raise ValueError(
                    f"--init {self.init} is an adapter itself: gptfast convert --merge "
                    f"{self.init} DIR makes a model of it, for --init DIR"
                )
            if self.train.lora_rank is not None:
                load_adapted(model, self.init, self.train)
            else:
                load_weights(model, self.init, resize_vocab=self.resize_vocab)

    def _rows(self, n_vocab: int) -> int:
        """Return for how many tokens the model has rows.

        The model to start from or to continue may have none for some tokens of its vocabulary.
        """
        if self.continues():
            n_vocab = (saved_settings(self.train.out) or {}).get("vocab_size", n_vocab)
        elif self.init is not None and not self.resize_vocab:
            n_vocab = self.model.vocab_size
        return max(self.model.vocab_size, n_vocab)

    def continues(self) -> bool:
        """Return whether there is a run to resume."""
        return self.resume and bool(checkpoints(self.train.out))

    def _settings(self) -> dict[str, Any]:
        """Return the settings that a checkpoint keeps besides the two configurations."""
        # No other path than that of the data: the run may move, and the data then stays.
        own = ("batch_size", "max_length", "stride", "split", *self.reading())
        origin = {} if self.init is None else {"started_from": Path(self.init).name}
        return {"data": absolute(self.data), **{name: flat(self)[name] for name in own}, **origin}

    def _introduce(self, trainer: Trainer, sources: list[Source], T: int) -> None:
        """Print the size of the data, the model and the run."""
        unit = "documents" if isinstance(sources[0], Documents) else "tokens"
        say(
            f"{sum(map(len, sources)):,} {unit}, {_size(trainer.model)}, "
            f"{trainer.total_steps} steps of "
            f"{batch_size_of(trainer.train_loader) * self.train.accumulation_steps} x {T} tokens "
            f"on {_places(trainer)}, "
            f"kernels: {backend_of(operators()[0], trainer.device.type)}"
        )
        if self.init is not None:
            rate = self.train.lr
            default = (
                ", the default with --init; --lr sets another" if rate == FINETUNING_LR else ""
            )
            say(f"fine-tuning {self.init} at a learning rate of {rate:g}{default}")
        if isinstance(examples := trainer.train_loader.dataset, Examples):
            for line in examples.notes():
                say(line)
        if (n := batch_size_of(trainer.train_loader)) < self.batch_size:
            say(f"the data fills no batch of {self.batch_size}: batches have {n}, all there is")
        alone_on_cpu = trainer.device.type == "cpu" and trainer.world.size == 1
        if alone_on_cpu and (advice := thread_advice()):
            say(advice)
        if trainer.device.type == "cpu" and trainer.world.is_first:
            tokens = batch_size_of(trainer.train_loader) * T
            if advice := precision_advice(trainer.model.config, tokens, self.train.precision):
                say(advice)


def _size(model: GPT) -> str:
    """Return how many parameters a model has, in words."""
    own = sum(x.numel() for x in adapter_state(model).values())
    n = sum(p.numel() for p in model.parameters()) - own
    return f"{n:,} parameters" + (f" and {own:,} of an adapter" if own else "")


def _places(trainer: Trainer) -> str:
    """Return where a run computes, in words."""
    if trainer.world.size == 1:
        return str(trainer.device)
    how = trainer.config.parallel or "ddp"
    return f"{trainer.world.size} processes ({how}, {trainer.device.type})"


def saved_settings(out: str) -> dict[str, Any] | None:
    """Return the settings of a run's newest undamaged checkpoint; None if there is none."""
    return next(filter(None, map(read_settings, reversed(checkpoints(out)))), None)


def train_defaults(given: Mapping[str, Any], command: Train) -> Train:
    """Return the settings of `gptfast train` before the flags are applied.

    given: the values of the flags by name. The settings come from these places, and each overrules
    the ones before: those of `command`, the shape of the --init model, the run that --resume
    continues, the file of --config.
    """
    file = read_toml(given["config"]) if given.get("config") is not None else {}
    layered = {**file, **given}
    init, saved = layered.get("init"), None
    if layered.get("resume"):
        saved = saved_settings(layered.get("out", command.train.out))
    if init not in (None, "none") and not saved:
        command = dataclasses.replace(command, model=open_weights(init).config)
        if "lr" not in layered:
            # The rate of the small model, which starts from random weights, wrecks a trained one.
            command = apply(command, {"lr": FINETUNING_LR, "min_lr": None}, "--init")
    preset = layered.get("preset")
    if isinstance(preset, str) and preset != "none" and not saved:
        # A vocab_size of 1 is raised to that of the tokenizer.
        command = dataclasses.replace(command, model=GPTConfig.preset(preset, vocab_size=1))
    if saved:
        source = layered.get("out", command.train.out)
        command = apply(command, {**saved, "out": source}, f"the settings of {source}")
    elif "lr" in layered:
        # The default min_lr suits the default lr only.
        command = apply(command, {"min_lr": None}, "--lr")
    # max_steps or epochs from a later place replaces either of them from an earlier one.
    one_of = ("max_steps", "epochs")
    for source in (file, given):
        if any(source.get(name) not in (None, "none") for name in one_of):
            command = apply(command, dict.fromkeys(one_of), "--resume")
    if any(given.get(name) for name in one_of):
        file = {name: value for name, value in file.items() if name not in one_of}
    return apply(command, file, given["config"]) if file else command
