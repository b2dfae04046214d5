"""The `gptfast` command: train, generate, info. Flags come from the dataclasses' fields."""

import contextlib
import dataclasses
import hashlib
import io
import json
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

import gptfast
from gptfast.checkpoint import find_checkpoint, load_model, load_weights
from gptfast.config import GPTConfig, TrainConfig
from gptfast.data import as_tokens, create_dataloader, embedded_text, read_text, split_tokens
from gptfast.evaluate import loader_loss, perplexity
from gptfast.generate import generate_text
from gptfast.model import GPT
from gptfast.ops.library import EXTENSION, MISSING, backend_of, operators
from gptfast.tokenizer import get_tokenizer
from gptfast.trainer import Trainer, choose_device

# Learns English from the embedded text in two or three minutes on two cores.
SMALL_MODEL = GPTConfig(vocab_size=1, block_size=128, n_layer=4, n_head=4, n_embd=128)
SMALL_RUN = TrainConfig(out="runs/train", lr=5e-3, min_lr=1e-4, eval_interval=61, log_interval=20)


@dataclass(frozen=True)
class Train:
    """Train a GPT on text, watch its loss and its samples, and keep checkpoints that generate.

    Without --data it learns from the prose that CPython itself carries. The run directory gets
    metrics.jsonl, samples.txt, loss.png, loss.pdf and checkpoints/.
    """

    model: tyro.conf.OmitArgPrefixes[GPTConfig] = SMALL_MODEL
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = SMALL_RUN
    data: tuple[str, ...] = ()
    """UTF-8 text files to train on."""
    tokenizer: str = "gpt2"
    """gpt2, byte, or a directory with GPT-2's vocab.bpe and encoder.json."""
    batch_size: int = 8
    """Windows of block_size tokens per step."""
    split: tuple[float, ...] = (0.9, 0.1)
    """Shares of the tokens for training, validation and, if there is a third, test."""
    resume: bool = False
    """Continue the run in --out from its latest checkpoint."""
    init: str | None = None
    """Start from the weights of this checkpoint or model directory."""

    def run(self) -> None:
        tokenizer = get_tokenizer(self.tokenizer)
        tokens = as_tokens(read_text(self.data) if self.data else embedded_text(), tokenizer)
        if len(self.split) not in (2, 3):
            raise ValueError(f"--split takes two or three shares, got {self.split}")
        parts = split_tokens(tokens, self.split)
        T, seed = self.model.block_size, self.train.seed
        train_loader = create_dataloader(parts[0], self.batch_size, T, T, seed=seed)
        held_back = [
            create_dataloader(part, self.batch_size, T, T, shuffle=False, drop_last=False)
            for part in parts[1:]
        ]
        torch.manual_seed(seed)
        vocab_size = max(self.model.vocab_size, tokenizer.n_vocab)
        model = GPT(dataclasses.replace(self.model, vocab_size=vocab_size))
        if self.init:
            load_weights(model, self.init)
        extra = {
            "data": list(self.data),
            "data_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "batch_size": self.batch_size,
            "split": list(self.split),
        }
        trainer = Trainer(
            model, self.train, train_loader, held_back[0], tokenizer=tokenizer, extra=extra
        )
        n_params = sum(p.numel() for p in model.parameters())
        print(
            f"{len(tokens):,} tokens, {n_params:,} parameters, {trainer.steps} steps of "
            f"{self.batch_size} x {T} tokens on {trainer.device}, kernels: "
            f"{backend_of(operators()[0], trainer.device.type)}"
        )
        trainer.fit(resume=self.resume)
        if len(held_back) == 2:
            loss = loader_loss(model, held_back[1])
            print(f"test loss {loss:.3f} (perplexity {perplexity(loss):.1f})")
        print(f"done: see {trainer.out}/loss.png; try")
        print(f'  gptfast generate {trainer.out} --prompt "{self.train.sample_prompt}"')


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model."""

    checkpoint: tyro.conf.Positional[str]
    """A run directory, a checkpoint in it, or a directory save_pretrained wrote."""
    prompt: str
    """The text to continue."""
    max_new_tokens: int = 100
    """How many tokens to add at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the smallest set of tokens with this probability."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the likeliest."""
    seed: int = 0
    """Fixes the draw."""
    tokenizer: str | None = None
    """gpt2, byte or a directory (default: the checkpoint's own)."""
    device: str = "auto"
    """cpu, cuda or auto."""

    def run(self) -> None:
        model = load_model(self.checkpoint).to(choose_device(self.device))
        tokenizer = get_tokenizer(self.tokenizer or _tokenizer_of(self.checkpoint))
        if tokenizer.n_vocab > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}"
            )
        sampling = {
            name: getattr(self, name) for name in ("top_k", "top_p", "min_p", "temperature")
        }
        print(
            generate_text(
                model, tokenizer, self.prompt, self.max_new_tokens, seed=self.seed, **sampling
            )
        )


def _tokenizer_of(checkpoint: str) -> str:
    state = find_checkpoint(checkpoint) / "state.json"
    if not state.is_file():
        return "gpt2"
    return json.loads(state.read_text())["config"]["tokenizer"] or "gpt2"


@dataclass(frozen=True)
class Info:
    """Show version, instruction-set level, threads, GPU, and the backend of each operation."""

    def run(self) -> None:
        print(f"gptfast {gptfast.__version__}, torch {torch.__version__}, {platform.platform()}")
        if EXTENSION is None:
            print(f"C++ kernels: none ({MISSING}); the CPU runs the PyTorch reference")
        else:
            build = EXTENSION.build_info()
            print(
                f"C++ kernels: level {build['isa']} of {', '.join(build['isa_supported'])}; "
                f"g++ {build['compiler']}, OpenMP {'on' if build['openmp'] else 'OFF: serial'}"
            )
            if len(build["openmp_runtimes"]) > 1:
                print(f"warning: several OpenMP runtimes: {', '.join(build['openmp_runtimes'])}")
        print(f"threads: {torch.get_num_threads()}")
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        print(f"GPU: {gpu}")
        print(f"{'operation':<32}{'cpu':<12}cuda")
        for op in operators():
            name = op.name().removeprefix("gptfast::")
            print(f"{name:<32}{backend_of(op, 'cpu'):<12}{backend_of(op, 'cuda')}")


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def _parse(argv: Sequence[str] | None) -> Train | Generate | Info:
    """The command argv asks for; what tyro reports in a box becomes a one-line ValueError."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Command, args=argv, prog="gptfast")
    except SystemExit as error:
        if not error.code:  # --help
            raise
    plain = re.sub(r"\x1b\[[\d;]*m", "", box.getvalue())  # without colours
    # A title, the message, a rule, help texts.
    body = re.split(r"^[ │]*[─-]+[ │]*$", plain.partition("\n")[2].lstrip(" -\n"), flags=re.M)[0]
    message = " ".join(line.strip("│ ") for line in body.splitlines()).split()
    if message[:2] == ["Error", "parsing"] and message[2].startswith("__tyro"):
        message = message[3:]
    raise ValueError(f"{' '.join(message)} (see gptfast --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; an error the user can act on is one line on stderr and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A sample may hold what the terminal cannot show; that must not end a training run.
        sys.stdout.reconfigure(errors="replace")
    try:
        _parse(argv).run()
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("gptfast: interrupted", file=sys.stderr)
        return 130
    except (ValueError, LookupError, OSError, RuntimeError, ArithmeticError) as error:
        message = str(error).strip().splitlines()
        print(f"gptfast: {message[0] if message else type(error).__name__}", file=sys.stderr)
        return 1
    return 0
