"""`gptfast generate`: continue a prompt with a trained model."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from gptfast.cli.flags import UsageError
from gptfast.cli.model_flags import SETTINGS, GenerationFlags, check_settings
from gptfast.cli.terminal import is_terminal, print_note, printable, speed
from gptfast.generate import generate, generate_text, prompt_ids, stream_text
from gptfast.generation.decoder import Decoder
from gptfast.generation.options import next_seed
from gptfast.tokenizer.bpe import Tokenizer, end_of_text

SEPARATOR = "-" * 15
"""The line between two samples."""


@dataclass(frozen=True, kw_only=True)
class Generate(GenerationFlags):
    """Continue a prompt with a trained model. The text appears while it is generated.

    A prompt that begins with a dash is written --prompt=-x; --prompt - reads it from standard
    input, without its last line break. An empty prompt starts a new text.

    gptfast generate runs/book --prompt "Once upon" --temperature 0.8 --top-k 40 --seed 1

    gptfast generate runs/book --prompt "Once upon" --num-samples 4 --stop '\\n\\n'

    gptfast generate gpt2 --prompt "Once upon" --dtype int8

    gptfast generate gpt2 --prompt "Once upon" --dtype bf16 --device cuda

    gptfast generate runs/book --prompt - --num-beams 4 < prompt.txt
    """

    prompt: str
    """The text to continue; - reads it from standard input."""
    num_samples: int = 1
    """How many texts to write. Each has the seed after that of the one before."""
    num_beams: int = 1
    """Above 1, search for the most likely text with this many beams instead of sampling."""
    length_penalty: float = 1.0
    """With beams, a text's score is divided by its length to this power. Above 0 favours long
    texts."""
    stop: tuple[str, ...] = ()
    r"""End the text before the first of these strings. In them, \n is a line break, \t a tab and
    \\ a backslash."""
    allow_special: tuple[str, ...] = ()
    """Special tokens to recognise in the prompt, for example '<|endoftext|>'. Others are read as
    plain text."""
    logprobs: bool = False
    """Print each new token with its log-probability instead of the text."""
    set_first: ClassVar = (
        *("prompt", "max_new_tokens", "temperature", "top_k", "top_p", "seed"),
        *("num_samples", "stop", "dtype", "tokenizer", "device"),
    )

    def run(self) -> None:
        self._check_flags()
        prompt = _standard_input() if self.prompt == "-" else self.prompt
        model, tokenizer = self.load()
        options = self.options()
        options |= {"num_beams": self.num_beams, "length_penalty": self.length_penalty}
        options["stop"] = [unescaped(text) for text in self.stop] or None
        seed = options["seed"]
        for n in range(self.num_samples):
            if n:
                print(SEPARATOR)
            options["seed"] = next_seed(seed, n)
            pieces = self._pieces(model, tokenizer, prompt, options)
            # Generate the first piece before anything is printed, so that bad input prints nothing.
            first = next(pieces, "")
            if n == 0:
                self._announce_seed(seed)
            _print_pieces([first], pieces)
        if self.shows_speed and model.stats and self.num_beams == 1:
            print(speed(model.stats), file=sys.stderr)

    def _check_flags(self) -> None:
        """Raise UsageError for flags that contradict one another, before the model is loaded."""
        names = (*SETTINGS, "num_samples", "num_beams", "length_penalty", "lookup")
        settings = {name: getattr(self, name) for name in names}
        check_settings({**settings, "seed": self.seed or 0})
        if "" in self.stop:
            raise UsageError("--stop has an empty string, which ends any text: leave it out")
        if self.num_beams != 1 and self.stats == "on":
            raise UsageError("--stats on measures sampling: leave it out or take --num-beams 1")
        if self.num_samples > 1 and self.num_beams != 1:
            raise UsageError("beams find one text: leave out --num-samples or --num-beams")
        if self.num_samples > 1 and self.temperature == 0:
            raise UsageError(
                "--temperature 0 always writes the same text: leave out --num-samples, or take a "
                "temperature above 0"
            )

    def _announce_seed(self, seed: int) -> None:
        """Print the seed on stderr if it was drawn and decides the text."""
        draws = self.num_beams == 1 and self.temperature != 0 and self.max_new_tokens > 0
        if self.seed is None and draws:
            again = f" --num-samples {self.num_samples}" if self.num_samples > 1 else ""
            print_note(f"seed {seed}: --seed {seed}{again} writes this again")

    def _pieces(
        self, model: Decoder, tokenizer: Tokenizer, prompt: str, options: Mapping[str, Any]
    ) -> Iterator[str]:
        """Yield what is printed of a text: the prompt with its continuation, or its tokens."""
        n = self.max_new_tokens
        if self.logprobs:
            ids = prompt_ids(tokenizer, prompt, self.allow_special)
            yield from _logprob_lines(model, tokenizer, ids, n, options)
            return
        options = {**options, "allowed_special": self.allow_special}
        if self.num_beams != 1:
            text = generate_text(model, tokenizer, prompt, n, **options)
            assert isinstance(text, str)
            yield text
        else:
            pieces = stream_text(model, tokenizer, prompt, n, **options)
            yield prompt + next(pieces, "")
            yield from pieces
        yield "\n"


def _logprob_lines(
    model: Decoder, tokenizer: Tokenizer, ids: list[int], n: int, options: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a line for each of the n tokens that follow a prompt: log-probability and text."""
    ends = list(model.eos_ids) or end_of_text(tokenizer)
    options = {**options, "eos_id": ends, "tokenizer": tokenizer, "logprobs": True}
    generated: Any = generate(model, [ids], n, **options)
    rows, logprobs = generated
    for token, logprob in zip(rows[0][len(ids) :], logprobs[0], strict=True):
        text = tokenizer.decode([token]) if token < tokenizer.n_vocab else f"<{token}>"
        yield f"{logprob:10.4f}  {text!r}\n"


def _print_pieces(*pieces: Iterable[str]) -> None:
    """Print the pieces of a text as they come. Ctrl-C ends the line that they are on."""
    try:
        for piece in chain(*pieces):
            print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        if not is_terminal(sys.stdout):  # else `main` ends the line that shows ^C
            print(flush=True)
        raise


def unescaped(text: str) -> str:
    r"""Return a text of the command line in which \n, \t, \r and \\ are characters."""
    meaning = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda found: meaning[found[1]], text)


def _standard_input() -> str:
    """Return what standard input holds, without its last line break, as $(...) of a shell does."""
    if sys.stdin is None:
        raise ValueError("--prompt - reads standard input, which is closed")
    if is_terminal(sys.stdin):
        print_note("reading the prompt from the terminal; Ctrl-D on an empty line ends it")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: {error}") from None
    return re.sub(r"\r?\n\Z", "", text)
