"""`gptfast generate`: what a trained model writes."""

from dataclasses import dataclass
from typing import Any

import tyro

from gptfast.generate import generate, generate_text, stream_text
from gptfast.model import GPT
from gptfast.tokenizer import Tokenizer, get_tokenizer
from gptfast.trainer import choose_device
from gptfast.weights.load import load_model


def load(checkpoint: str, tokenizer: str | None, device: str) -> tuple[GPT, Tokenizer]:
    """The model on its device, and the tokenizer asked for, or else its own."""
    model = load_model(checkpoint).to(choose_device(device))
    loaded = get_tokenizer(tokenizer or model.tokenizer_name or "gpt2")
    if loaded.n_vocab > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {loaded.n_vocab} tokens, the model {model.config.vocab_size}"
        )
    return model, loaded


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model; the text appears as it is written.

    gptfast generate runs/book --prompt "Once upon" --temperature 0.8 --top-k 40 --seed 1

    gptfast generate runs/book --prompt "Once upon" --num-beams 4
    """

    checkpoint: tyro.conf.Positional[str]
    """A run, a checkpoint in it, a model in any form that `gptfast convert` reads, or gpt2."""
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
    repetition_penalty: float = 1.0
    """Above 1, makes tokens that are there already less likely (1.2, say)."""
    num_beams: int = 1
    """Above 1, search for the likeliest text with this many beams instead of sampling."""
    length_penalty: float = 1.0
    """With beams: a score is divided by its length to this power; above 0 favours long texts."""
    stop: tuple[str, ...] = ()
    """End before the first of these strings."""
    allow_special: tuple[str, ...] = ()
    """Special tokens that the prompt may name, '<|endoftext|>' say; others are plain text."""
    logprobs: bool = False
    """Print each new token with its log-probability instead of the text."""
    seed: int = 0
    """Fixes the draw."""
    tokenizer: str | None = None
    """gpt2, byte or a directory (default: the checkpoint's own)."""
    device: str = "auto"
    """cpu, cuda or auto."""

    def run(self) -> None:
        model, tokenizer = load(self.checkpoint, self.tokenizer, self.device)
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        names += ("num_beams", "length_penalty", "seed")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        options["stop"] = self.stop or None
        if self.logprobs:
            return self._print_logprobs(model, tokenizer, options)
        options["allowed_special"] = self.allow_special
        if self.num_beams != 1:
            print(generate_text(model, tokenizer, self.prompt, self.max_new_tokens, **options))
            return None
        pieces = stream_text(model, tokenizer, self.prompt, self.max_new_tokens, **options)
        # The first piece before the prompt is shown: bad input prints nothing.
        first = next(pieces, "")
        print(self.prompt + first, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()

    def _print_logprobs(self, model: GPT, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
        ids = tokenizer.encode(self.prompt, allowed_special=self.allow_special)
        options |= {"eos_id": tokenizer.eot, "tokenizer": tokenizer, "logprobs": True}
        rows, logprobs = generate(model, [ids], self.max_new_tokens, **options)
        for token, logprob in zip(rows[0][len(ids) :], logprobs[0], strict=True):
            text = tokenizer.decode([token]) if token < tokenizer.n_vocab else f"<{token}>"
            print(f"{logprob:10.4f}  {text!r}")
