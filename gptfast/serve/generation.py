"""A request in the scheduler, and what it is told."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gptfast.engine.request import Request
from gptfast.generation.decoder import Job, SampledToken
from gptfast.generation.options import LogprobOptions
from gptfast.generation.stop import TextStream

Finish = Literal["stop", "length", "cancelled", "failed"]


@dataclass
class Update:
    """What became certain of a generation since its last update."""

    text: str = ""
    """Text in whole characters that holds no part of a stop string."""
    tokens: list[SampledToken] = field(default_factory=list)
    """New tokens that hold no part of a stop."""
    prompt: list[SampledToken] = field(default_factory=list)
    """The prompt's tokens from the second on, if they are scored; they come all at once."""
    finish: Finish | None = None
    """Why it ended; None as long as it goes on."""
    message: str = ""
    """What failed."""


@dataclass(eq=False)
class Generation:
    """A request in the scheduler.

    job: one prompt, which fits into block_size with its new tokens. notify: called with each
    update, by the engine's thread or by the one that cancels; it must return at once. scored: the
    log-probabilities of the prompt's own tokens that are asked for.
    """

    job: Job
    notify: Callable[[Update], None]
    scored: LogprobOptions = LogprobOptions()
    finish: Finish | None = None
    """Why it ended."""
    n_prompt: int = 0
    n_cached: int = 0
    """Tokens of the prompt that another request had computed."""
    n_new: int = 0
    """Tokens sampled so far, with those of the stop."""
    created: float = field(default_factory=time.monotonic)
    request: Request | None = None
    """What the engine has of it; None as long as it waits."""
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.n_prompt = len(self.job.prompts[0])
        self._text = TextStream(self.job.options.tokenizer, self.job.stops)
        self._tokens: list[SampledToken] = []
        self._sent = 0
        self.prompt: list[SampledToken] = []

    @property
    def is_scoring(self) -> bool:
        """Whether tokens of the prompt are still to be scored."""
        return self.scored.any and len(self.prompt) < self.n_prompt - 1

    def take(self, tokens: Sequence[SampledToken]) -> Update:
        """Take newly sampled tokens; return what became certain."""
        update, end = Update(), self._text
        for token in tokens:
            self.n_new += 1
            self._tokens.append(token)
            update.text += end.feed(token.id)
            if end.ended:
                update.finish = "stop"
                break
        if update.finish is None and self.n_new >= self.job.n:
            update.text += end.finish()
            update.finish = "length"
        if self.scored.any and not self.is_scoring:
            update.prompt, self.scored = self.prompt, LogprobOptions()
        update.tokens = self._tokens[self._sent : end.kept]
        self._sent = max(self._sent, end.kept)
        return update
