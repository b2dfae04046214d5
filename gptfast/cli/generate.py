"""`gptfast generate`: continue a prompt with a trained model."""

import sys
from dataclasses import dataclass
from typing import Any

from gptfast.cli.model_flags import GenerationFlags
from gptfast.cli.terminal import printable, speed
from gptfast.generate import generate, generate_text, stream_text
from gptfast.generation.decoder import Decoder
from gptfast.tokenizer.bpe import Tokenizer, encode_opening, end_of_text


@dataclass(frozen=True, kw_only=True)
class Generate(GenerationFlags):
    """Continue a prompt with a trained model. The text appears while it is generated.

    gptfast generate runs/book --prompt "Once upon" --temperature 0.8 --top-k 40 --seed 1

    gptfast generate gpt2 --prompt "Once upon" --dtype int8

    gptfast generate gpt2 --prompt "Once upon" --dtype bf16 --device cuda

    gptfast generate runs/book --prompt "Once upon" --num-beams 4
    """

    prompt: str
    """The text to continue."""
    num_beams: int = 1
    """Above 1, search for the most likely text with this many beams instead of sampling."""
    length_penalty: float = 1.0
    """With beams, a text's score is divided by its length to this power. Above 0 favours long
    texts."""
    stop: tuple[str, ...] = ()
    """End the text before the first of these strings."""
    allow_special: tuple[str, ...] = ()
    """Special tokens to recognise in the prompt, for example '<|endoftext|>'. Others are read as
    plain text."""
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
        if self.shows_speed and model.stats and self.num_beams == 1:
            print(speed(model.stats), file=sys.stderr)

    def _print_text(self, model: Decoder, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
        """Print the prompt and its continuation, piece by piece unless beams search for it."""
        if self.num_beams != 1:
            text = generate_text(model, tokenizer, self.prompt, self.max_new_tokens, **options)
            assert isinstance(text, str)
            print(printable(text))
            return
        pieces = stream_text(model, tokenizer, self.prompt, self.max_new_tokens, **options)
        # Generate the first piece before printing the prompt, so that bad input prints nothing.
        first = next(pieces, "")
        print(printable(self.prompt + first), end="", flush=True)
        for piece in pieces:
            print(printable(piece), end="", flush=True)
        print()

    def _print_logprobs(
        self, model: Decoder, tokenizer: Tokenizer, options: dict[str, Any]
    ) -> None:
        """Print each new token on a line with its log-probability."""
        ids = encode_opening(tokenizer, self.prompt, self.allow_special)
        ends = list(model.eos_ids) or end_of_text(tokenizer)
        options |= {"eos_id": ends, "tokenizer": tokenizer, "logprobs": True}
        generated: Any = generate(model, [ids], self.max_new_tokens, **options)
        rows, logprobs = generated
        for token, logprob in zip(rows[0][len(ids) :], logprobs[0], strict=True):
            text = tokenizer.decode([token]) if token < tokenizer.n_vocab else f"<{token}>"
            print(f"{logprob:10.4f}  {text!r}")
