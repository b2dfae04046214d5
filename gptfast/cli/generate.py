"""`gptfast generate`: what a trained model writes."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptfast.cli.model_flags import GenerationFlags
from gptfast.cli.terminal import printable, speed
from gptfast.generate import generate, generate_text, stream_text
from gptfast.model import GPT
from gptfast.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    from gptfast.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Generate(GenerationFlags):
    """Continue a prompt with a trained model; the text appears as it is written.

    gptfast generate runs/book --prompt "Once upon" --temperature 0.8 --top-k 40 --seed 1

    gptfast generate gpt2 --prompt "Once upon" --dtype int8

    gptfast generate runs/book --prompt "Once upon" --num-beams 4
    """

    prompt: str
    """The text to continue."""
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

    def run(self) -> None:
        model, tokenizer = self.load()
        options = self.options()
        options |= {"num_beams": self.num_beams, "length_penalty": self.length_penalty}
        options["stop"] = self.stop or None
        if self.logprobs:
            self._print_logprobs(model, tokenizer, options)
        else:
            self._print_text(model, tokenizer, options | {"allowed_special": self.allow_special})
        if self.shows_speed(model) and self.num_beams == 1:
            print(speed(model), file=sys.stderr)

    def _print_text(
        self, model: "GPT | Engine", tokenizer: Tokenizer, options: dict[str, Any]
    ) -> None:
        if self.num_beams != 1:
            text = generate_text(model, tokenizer, self.prompt, self.max_new_tokens, **options)
            print(printable(text))
            return
        pieces = stream_text(model, tokenizer, self.prompt, self.max_new_tokens, **options)
        # The first piece before the prompt is shown: bad input prints nothing.
        first = next(pieces, "")
        print(printable(self.prompt + first), end="", flush=True)
        for piece in pieces:
            print(printable(piece), end="", flush=True)
        print()

    def _print_logprobs(
        self, model: "GPT | Engine", tokenizer: Tokenizer, options: dict[str, Any]
    ) -> None:
        ids = tokenizer.encode(self.prompt, allowed_special=self.allow_special)
        options |= {"eos_id": tokenizer.eot, "tokenizer": tokenizer, "logprobs": True}
        rows, logprobs = generate(model, [ids], self.max_new_tokens, **options)
        for token, logprob in zip(rows[0][len(ids) :], logprobs[0], strict=True):
            text = tokenizer.decode([token]) if token < tokenizer.n_vocab else f"<{token}>"
            print(f"{logprob:10.4f}  {text!r}")
