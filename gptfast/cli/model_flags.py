"""What `gptfast generate` and `gptfast chat` have in common: the model, how it draws, its speed."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from gptfast.cli.flags import Positional
from gptfast.cli.terminal import is_terminal
from gptfast.device import choose_device
from gptfast.model import GPT
from gptfast.ops.backend import EXTENSION
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.tokenizer.vocabulary import get_tokenizer

if TYPE_CHECKING:
    from gptfast.engine import Engine

Dtype = Literal["fp32", "bf16", "int8"]
ON_CPU = "the engine, which on the command line runs on the CPU"


def load(
    checkpoint: str,
    tokenizer: str | None,
    device: str,
    dtype: str | None = None,
    *,
    engine: bool = True,
) -> "tuple[GPT | Engine, Tokenizer]":
    """The model, and the tokenizer asked for, or else the model's own.

    On the CPU it is an engine, but for where the C++ extension is missing, and with engine=False
    where neither dtype nor a packed checkpoint asks for one.
    """
    model = _load(checkpoint, device, dtype, engine)
    loaded = get_tokenizer(tokenizer or model.tokenizer_name or "gpt2")
    if loaded.n_vocab > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {loaded.n_vocab} tokens, the model {model.config.vocab_size}"
        )
    return model, loaded


def _load(checkpoint: str, device: str, dtype: str | None, engine: bool) -> "GPT | Engine":
    from gptfast.engine import Engine, is_packed

    packed = is_packed(checkpoint)
    on = torch.device("cpu") if packed and device == "auto" else choose_device(device)
    if on.type != "cpu" and (packed or dtype):
        what = (
            f"{checkpoint} is packed for the CPU" if packed else f"--dtype {dtype} needs {ON_CPU}"
        )
        raise ValueError(f"{what}: use --device cpu")
    if packed or dtype or engine and on.type == "cpu" and EXTENSION is not None:
        return Engine(checkpoint, dtype)
    from gptfast.model import load_model

    return load_model(checkpoint).to(on)


@dataclass(frozen=True, kw_only=True)
class GenerationFlags:
    """A model and how it writes."""

    checkpoint: Positional[str]
    """A run, a checkpoint in it, a model in any form that `gptfast convert` reads or writes, or
    gpt2."""
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
    repetition_penalty: float = 1.0
    """Above 1, makes tokens that are there already less likely (1.2, say)."""
    seed: int = 0
    """Fixes the draw."""
    dtype: Dtype | None = None
    """Weights as fp32, bf16 or int8, on the CPU (default: a packed model's own, else fp32)."""
    lookup: bool = False
    """Guess what comes next by what followed the same words before: the same text, sooner where
    it repeats itself."""
    draft: str | None = None
    """Let this smaller model with the same vocabulary guess: the same text, sooner where it is
    right."""
    stats: Literal["auto", "on", "off"] = "auto"
    """A line on stderr with tokens and gigabytes a second; auto is where that is a terminal."""
    tokenizer: str | None = None
    """gpt2, byte or a directory (default: the checkpoint's own)."""
    device: str = "auto"
    """cpu, cuda or auto."""

    def load(self) -> "tuple[GPT | Engine, Tokenizer]":
        model, tokenizer = load(self.checkpoint, self.tokenizer, self.device, self.dtype)
        asked = {"--lookup": self.lookup, "--draft": self.draft, "--stats on": self.stats == "on"}
        if isinstance(model, GPT) and any(asked.values()):
            name = next(name for name, given in asked.items() if given)
            raise ValueError(f"{name} needs {ON_CPU}, and the C++ extension")
        return model, tokenizer

    def options(self) -> dict[str, Any]:
        """What `gptfast.generate` takes of it."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        options = {name: getattr(self, name) for name in names}
        if self.lookup:
            options["lookup"] = True
        if self.draft is not None:
            options["draft"] = self._draft(self.draft)
        return options

    def _draft(self, checkpoint: str) -> "Engine":
        from gptfast.engine import Engine, is_packed

        return Engine(checkpoint, None if is_packed(checkpoint) else self.dtype)

    def shows_speed(self, model: "GPT | Engine") -> bool:
        wanted = self.stats == "on" or self.stats == "auto" and is_terminal(sys.stderr)
        return wanted and not isinstance(model, GPT)
