"""The interface between generation and what computes it: a model or an engine.

`gptfast.generation.continuation` checks what was asked for, makes a `Job` of it and gives it to a
`Decoder`: `ModelDecoder` for a GPT as it is, `gptfast.Engine` for packed weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.generation.options import LogprobOptions, Options
from gptfast.generation.sequences import Sequences
from gptfast.generation.stop import Stops

TopLogprobs = list[tuple[int, float]]
"""The likeliest tokens at one position with their log-probabilities, the likeliest first."""

BAD_LOGITS = "the model's logits had NaN, +inf or nothing but -inf; check its weights"


class SampledToken(NamedTuple):
    """A token as it was sampled. logprob and top_logprobs are None where nobody asked for them."""

    id: int
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None


@dataclass
class Continuation:
    """The new tokens of one prompt, including those that end it, and their log-probabilities."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)

    def append(self, token: SampledToken) -> None:
        """Add a token and the log-probabilities that it carries."""
        self.ids.append(token.id)
        if token.logprob is not None:
            self.logprobs.append(token.logprob)
        if token.top_logprobs is not None:
            self.top_logprobs.append(token.top_logprobs)


@dataclass(frozen=True)
class Job:
    """Prompts to continue by up to n tokens each, and how. `checked_job` makes one from user input.

    prompts: at least one token id each.
    """

    prompts: Sequence[list[int]]
    n: int
    options: Options
    stops: Stops = Stops()
    logprobs: LogprobOptions = LogprobOptions()


@dataclass
class Stats:
    """The work of an engine since it was made, or since its `stats` were replaced."""

    prompt_tokens: int = 0
    """Prompt tokens that were computed; those shared with another sequence are not."""
    prompt_seconds: float = 0.0
    """Time for them."""
    new_tokens: int = 0
    """Tokens of decode steps; the first new token comes from the prefill and is not counted."""
    steps: int = 0
    """Decode steps: passes over the weights."""
    seconds: float = 0.0
    """Time for them."""
    bytes_read: int = 0
    """Bytes of weights that they read."""
    guessed: int = 0
    """Tokens that were guessed."""
    accepted: int = 0
    """Guesses that were right."""


class Decoder(ABC):
    """A model that generates."""

    can_guess: bool
    """Whether it checks guessed tokens, so that the options lookup and draft mean something."""
    stats: Stats | None = None
    """Its work so far; None if it is not measured."""

    @property
    @abstractmethod
    def config(self) -> GPTConfig:
        """The shape of the model."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that samples tokens and computes losses."""

    @property
    def dtype(self) -> str | None:
        """The data type of packed weights; None for a model as it is."""
        return None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text, as far as the model's files name any."""
        return ()

    @abstractmethod
    def decode(self, job: Job) -> list[Continuation]:
        """Sample the continuations of a job's prompts, without beams.

        A continuation holds what ends it and may hold tokens after that.
        """

    @abstractmethod
    def decode_stream(self, job: Job) -> Iterator[SampledToken]:
        """Sample the continuation of a job's only prompt token by token, up to n tokens.

        Stops are the caller's to look for. The job is checked before the first token is asked for.
        """

    @abstractmethod
    def sequences(self, prompts: Sequence[Sequence[int]]) -> AbstractContextManager[Sequences]:
        """Return the prompts as sequences that a beam search extends inside a `with` block."""

    @abstractmethod
    def token_losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of every target y (B, T) after x (B, T), both int64 on any device.

        The result (B, T) is fp32 in nats, 0 where the target is -100.
        """

    def mean_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss, in nats, over the targets y (B, T) that are not -100."""
        losses = self.token_losses(x, y)
        return losses.sum() / (y != -100).sum().to(losses.device)


def top_logprobs(values: Tensor, ids: Tensor) -> list[TopLogprobs]:
    """Return one list of (id, log-probability) pairs per row of values and ids, both (N, k)."""
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in pairs]


def check_sampled(ids: Sequence[int]) -> None:
    """Raise ValueError if a sampled id is -1, by which `ops.sample` reports bad logits."""
    if -1 in ids:
        raise ValueError(BAD_LOGITS)
