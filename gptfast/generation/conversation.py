"""A conversation as one text, which a plain language model continues.

A template says how a turn is written: the text before the prompt and the text after it. The reply
follows immediately, as a completion follows its prompt in training. It ends at end-of-text, or
where the model begins to write the next prompt itself.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gptfast.files import replacing
from gptfast.generation.continuation import stream
from gptfast.generation.decoder import Decoder
from gptfast.generation.model_decoder import as_decoder
from gptfast.generation.stop import Stops, TextStream
from gptfast.model import GPT
from gptfast.tokenizer.bpe import (
    Tokenizer,
    encode_continuation,
    encode_opening,
    end_of_text,
)

PROMPT = "{prompt}"
QUESTIONS = f"Q: {PROMPT}\nA:"
"""The template by which GPT-2's authors asked it (Radford et al., 2019, sections 3.5 and 3.8)."""


@dataclass(frozen=True)
class Template:
    """How a turn is written. There are three kinds of template:

    with text before the prompt, turns are lines of one dialogue, and a reply ends before that text;
    with text only after it, turns are separate documents with end-of-text between them, as prompts
    with completions are in training; with neither, all turns are one running text.
    """

    before: str
    after: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the template of a text. Raises ValueError unless {prompt} is in it once."""
        before, found, after = text.partition(PROMPT)
        if not found or PROMPT in after:
            raise ValueError(f"--template must have {PROMPT} in it once, got {text!r:.100}")
        return cls(before, after)

    @property
    def running(self) -> bool:
        """Whether all turns are one running text."""
        return not self.before and not self.after

    @property
    def between(self) -> str:
        """The text that separates a reply from the next turn, if any does."""
        return "\n" if self.before and not self.before.startswith("\n") else ""

    @property
    def stop(self) -> str | None:
        """The stop string of a reply: the beginning of the next turn without its last spaces."""
        start = self.between + self.before
        return (start.rstrip() or start) if self.before else None

    def write(self, prompt: str) -> str:
        """Return a prompt with the text around it."""
        return self.before + prompt + self.after


@dataclass
class Turn:
    """A prompt and its reply."""

    prompt: str
    ids: list[int]
    """The prompt in its template."""
    text: str = ""
    """The reply so far."""
    reply: list[int] = field(default_factory=list)
    """The ids of the reply that stay in the context."""


class Conversation:
    """Turns of a conversation; the model's context is the latest of them."""

    def __init__(
        self, template: Template, tokenizer: Tokenizer, eos_ids: Sequence[int] = ()
    ) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.turns: list[Turn] = []
        self.forgotten = 0
        """The number of first turns that the model no longer sees."""
        ends = list(eos_ids) or end_of_text(tokenizer)
        self._stops = Stops.parse(template.stop, ends, tokenizer, tokenizer.n_vocab)

    def ask(self, prompt: str) -> None:
        """Begin a turn. Raises ValueError for text that UTF-8 cannot hold and for no text."""
        between = self.template.between if self.turns else ""
        encode = encode_continuation if self.turns else encode_opening
        ids = encode(self.tokenizer, between + self.template.write(prompt))
        if not ids and not self.turns:
            raise ValueError("there is nothing to continue yet")
        self.turns.append(Turn(prompt, ids))

    def begin(self, text: str) -> None:
        """Put a text before the first turn. Raises ValueError for text that UTF-8 cannot hold."""
        opening = text if self.template.between else text + "\n"
        self.turns.append(Turn("", encode_opening(self.tokenizer, opening)))

    def answer(self, text: str) -> None:
        """Give the last turn a reply that was written before."""
        turn = self.turns[-1]
        turn.text = text
        turn.reply = self._kept(encode_continuation(self.tokenizer, text))

    def take_back(self) -> str:
        """Undo the last turn; return its prompt. Raises ValueError if there is none."""
        if not self.turns:
            raise ValueError("there is no turn yet")
        turn = self.turns.pop()
        self.forgotten = min(self.forgotten, len(self.turns))
        return turn.prompt

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()
        self.forgotten = 0

    @property
    def ids(self) -> list[int]:
        """The ids that the model sees."""
        return [i for turn in self.turns[self.forgotten :] for i in (*turn.ids, *turn.reply)]

    def make_room(self, block_size: int, n: int) -> int:
        """Forget the oldest turns if n more tokens do not fit; return how many were forgotten.

        Half of the room is then cleared, for several new turns: the next turns keep their beginning
        in the cache, and nothing is computed again. Room is made for half of block_size at most,
        and the latest turn always stays.
        """
        before, most = self.forgotten, block_size - min(n, block_size // 2)
        if len(self.ids) > most:
            latest = len(self.turns[-1].ids)
            aim = most // 2 if latest <= most // 2 else most
            while self.forgotten < len(self.turns) - 1 and len(self.ids) > aim:
                self.forgotten += 1
        return self.forgotten - before

    def reply(
        self,
        model: GPT | Decoder,
        n: int,
        interrupted: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the model's reply to the last turn, up to n tokens, in pieces as it is written.

        The prompt is the whole context each time: an engine computes only its new part.
        interrupted() is asked after each token; the text written until then stays. If generation
        fails before the first token, the turn is taken back.
        """
        turn, text = self.turns[-1], TextStream(self.tokenizer, self._stops)
        new: list[int] = []
        try:
            # A generator: closing it lets an engine release the sequence.
            options = {"tokenizer": self.tokenizer, **options}
            with closing(stream(as_decoder(model), self.ids, n, **options)) as ids:  # type: ignore[type-var]
                for i in ids:
                    new.append(i)
                    if piece := text.feed(i):
                        turn.text += piece
                        yield piece
                    if text.ended or interrupted():
                        break
                else:
                    if piece := text.finish():
                        turn.text += piece
                        yield piece
        except Exception:
            if not new:
                self.take_back()
            raise
        finally:
            turn.reply = self._kept(new[: text.kept])

    def _kept(self, ids: list[int]) -> list[int]:
        """Return a reply as it stays in the context, with the token that ends it."""
        ended = bool(ids) and ids[-1] in self._stops.eos_ids
        body = ids[:-1] if ended else ids
        if self.template.before:
            return body  # one dialogue goes on: it has no end-of-text
        if self.template.running:
            return ids
        return [*body, ids[-1] if ended else self._stops.eos_ids[0]] if self._stops.eos_ids else ids

    def save(self, path: str) -> None:
        """Write all turns to a new file, as the model sees them.

        A .jsonl file gets prompts with completions, which `gptfast train` learns from. Raises
        ValueError for a file that exists or cannot be written.
        """
        turns = [(self.template.write(turn.prompt), turn.text) for turn in self.turns]
        if path.endswith(".jsonl"):
            records = ({"prompt": prompt, "completion": text} for prompt, text in turns)
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        else:
            between = self.template.between or ("" if self.template.running else "\n")
            content = between.join(prompt + text for prompt, text in turns) + "\n"
        try:
            file = Path(path).expanduser()
            if os.path.lexists(file):
                raise ValueError(f"{path} exists; name another or delete it")
            with replacing(file) as part:
                part.write(content)
        except OSError as error:
            raise ValueError(str(error)) from None
        except RuntimeError as error:  # ~ with no home directory
            raise ValueError(f"cannot write {path}: {error}") from None
