"""A conversation as one text, which a plain language model continues.

A template says how a turn is written: what stands before the prompt and what after it; the reply
follows at once, as a completion follows its prompt in training. It ends at end-of-text, or where
the model goes on to write the next prompt itself.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gptfast.generate import stream
from gptfast.generation.stop import Stops, TextStream
from gptfast.model import GPT
from gptfast.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    from gptfast.engine import Engine

PROMPT = "{prompt}"
# How GPT-2 was asked by its authors (Radford et al., 2019, sections 3.5 and 3.8).
QUESTIONS = f"Q: {PROMPT}\nA:"


@dataclass(frozen=True)
class Template:
    """How a turn is written. Three kinds:

    with words before the prompt, turns are lines of one dialogue, and a reply ends before those
    words; with words after it only, turns are documents of their own, between which is end-of-text,
    as training has prompts with completions; with none at all they are one running text.
    """

    before: str
    after: str

    @classmethod
    def parse(cls, text: str) -> Self:
        before, found, after = text.partition(PROMPT)
        if not found or PROMPT in after:
            raise ValueError(f"--template must have {PROMPT} in it once, got {text!r:.100}")
        return cls(before, after)

    @property
    def running(self) -> bool:
        return not self.before and not self.after

    @property
    def between(self) -> str:
        """What separates a reply from the next turn, if words do."""
        return "\n" if self.before and not self.before.startswith("\n") else ""

    @property
    def stop(self) -> str | None:
        """With what the next turn begins. The model may leave out the space before the prompt."""
        start = self.between + self.before
        return (start.rstrip() or start) if self.before else None

    def write(self, prompt: str) -> str:
        return self.before + prompt + self.after


@dataclass
class Turn:
    prompt: str
    ids: list[int]
    """The prompt in its template."""
    text: str = ""
    reply: list[int] = field(default_factory=list)


class Conversation:
    """Turns, the latest of which are the model's context."""

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.turns: list[Turn] = []
        self.forgotten = 0
        """How many of the first turns the model no longer sees."""
        stop, eot = template.stop, tokenizer.eot
        self._stops = Stops.parse(stop, eot, tokenizer, tokenizer.n_vocab)

    def ask(self, prompt: str) -> None:
        """Begin a turn. ValueError for what UTF-8 cannot hold, and for nothing at all."""
        between = self.template.between if self.turns else ""
        ids = self.tokenizer.encode(between + self.template.write(prompt))
        if not ids and not self.turns:
            raise ValueError("there is nothing to continue yet")
        self.turns.append(Turn(prompt, ids))

    def take_back(self) -> str:
        """Undo the last turn; its prompt."""
        if not self.turns:
            raise ValueError("there is no turn yet")
        turn = self.turns.pop()
        self.forgotten = min(self.forgotten, len(self.turns))
        return turn.prompt

    def reset(self) -> None:
        self.turns.clear()
        self.forgotten = 0

    @property
    def ids(self) -> list[int]:
        """What the model sees."""
        return [i for turn in self.turns[self.forgotten :] for i in (*turn.ids, *turn.reply)]

    def make_room(self, block_size: int, n: int) -> int:
        """Forget the oldest turns until n more tokens fit, but never more than half of block_size,
        and not the latest turn; how many were forgotten."""
        before, most = self.forgotten, block_size - min(n, block_size // 2)
        while self.forgotten < len(self.turns) - 1 and len(self.ids) > most:
            self.forgotten += 1
        return self.forgotten - before

    def reply(
        self,
        model: "GPT | Engine",
        n: int,
        interrupted: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> Iterator[str]:
        """The model's reply to the last turn, of up to n tokens, in pieces as it is written.

        The whole context is the prompt each time: the engine computes only what is new in it.
        interrupted is asked after each token; what was written until then stays. Where it fails
        before the first one, the turn is taken back.
        """
        turn, text, new = self.turns[-1], TextStream(self.tokenizer, self._stops), []
        try:
            with closing(stream(model, self.ids, n, **options)) as ids:
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
        """A reply as it stays in the context, with what ends it."""
        eot = self.tokenizer.eot
        body = ids[:-1] if ids[-1:] == [eot] else ids
        if self.template.before:
            return body  # in one dialogue, nothing comes to its end
        return ids if self.template.running else [*body, eot]

    def save(self, path: str) -> None:
        """Write all turns: as the model sees them, or to .jsonl as prompts with completions, which
        `gptfast train` learns from. ValueError for a file that exists."""
        turns = [(self.template.write(turn.prompt), turn.text) for turn in self.turns]
        if path.endswith(".jsonl"):
            records = ({"prompt": prompt, "completion": text} for prompt, text in turns)
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        else:
            between = self.template.between or ("" if self.template.running else "\n")
            content = between.join(prompt + text for prompt, text in turns) + "\n"
        try:
            with Path(path).expanduser().open("x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            raise ValueError(f"{path} exists; name another or delete it") from None
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from None
        except RuntimeError as error:  # ~ of nobody
            raise ValueError(f"cannot write {path}: {error}") from None
