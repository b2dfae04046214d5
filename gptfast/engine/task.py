"""The options of requests, and how they turn logits into tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptfast.engine.gpu_rows import rows_of
from gptfast.engine.request import Request
from gptfast.engine.rows import BaseRows, sample
from gptfast.engine.speculate import MAX_GUESSES, DraftModel, Guesser, PromptLookup
from gptfast.generation.decoder import (
    BAD_LOGITS,
    Job,
    SampledToken,
    check_sampled,
    top_logprobs,
)
from gptfast.generation.options import SAMPLING, LogprobOptions, Options
from gptfast.generation.sequences import penalised

Sampled = tuple[Request, SampledToken]


@dataclass
class Part:
    """Tokens of a row, a part of a prompt, after which nothing is sampled.

    following: the token that follows each of them, if those are scored. asked: which of their
    log-probabilities are asked for. scored: these tokens with them, after the step.
    """

    row: int
    tokens: list[int]
    following: list[int] = field(default_factory=list)
    asked: LogprobOptions = LogprobOptions()
    scored: list[SampledToken] = field(default_factory=list)

    @property
    def n_wanted(self) -> int:
        """How many of its logits are needed."""
        return len(self.tokens) if self.asked.any else 0

    def score(self, logits: Tensor) -> None:
        """Take its logits (n_wanted, V)."""
        ids = torch.tensor(self.following, dtype=torch.int64, device="cpu")
        self.scored = described_tokens(logits, ids, self.asked)
        # Nothing is sampled here, which would find bad logits. Those of a good model are finite.
        if not all(math.isfinite(token.logprob or 0.0) for token in self.scored):
            raise ValueError(BAD_LOGITS)


class Task:
    """The options of the requests that are computed together, by index, and their guesser.

    They are those of one call, or of the requests of a server, which come and go (`set`).
    """

    def __init__(self, job: Job, device: torch.device, vocab_size: int) -> None:
        options, batch = job.options, len(job.prompts)
        self._device, self._vocab_size = device, vocab_size
        sampling = options.sampling(batch, device)
        self._sampling = [sampling[name] for name in SAMPLING]
        # Only those of requests that have one.
        self._penalty: dict[int, Tensor] = {}
        self._bias: dict[int, Tensor] = {}
        self._set_adjustments(range(batch), options)
        self._lacking = options.lacking(vocab_size, device)
        self._logprobs = [job.logprobs] * batch
        # The sampling parameters of the last step, and the prompts that they are of: the GPU's rows
        # recognise the same object and then do not read it again.
        self._index: list[int] = []
        self._chosen: list[Tensor] = []
        self.guesser: Guesser | None = None
        if options.draft is not None:
            draft = rows_of(options.draft.packed, 1)
            if draft.device != device:
                raise ValueError(
                    f"draft is on {draft.device}, but the model is on {device}; make both engines "
                    "from models on one device"
                )
            self.guesser = DraftModel(draft, self._sampling)
        elif options.lookup:
            self.guesser = PromptLookup()

    def set(self, index: int, job: Job) -> None:
        """Give the request at an index the options of a job with one prompt.

        The tokenizer and the guesser stay those of the task.
        """
        sampling = job.options.sampling(1, self._device)
        for mine, name in zip(self._sampling, SAMPLING, strict=True):
            mine[index] = sampling[name][0]
        self._set_adjustments([index], job.options)
        self._logprobs[index] = job.logprobs
        self._index = []  # the parameters of the last step may be old

    def _set_adjustments(self, indices: Sequence[int], options: Options) -> None:
        """Set the penalties and biases of the requests at these indices."""
        penalty = options.penalty(len(indices), self._device)
        bias = options.bias(self._vocab_size, self._device)
        for place, index in enumerate(indices):
            self._penalty.pop(index, None)
            self._bias.pop(index, None)
            if penalty is not None and penalty[place] != 1:
                self._penalty[index] = penalty[place]
            if bias is not None:
                self._bias[index] = bias

    def guess(self, live: Sequence[Request], rows: BaseRows) -> list[list[int]]:
        """Return the guessed next tokens of each request, none without a guesser."""
        if self.guesser is None:
            return [[] for _ in live]
        first = self.guesser.FIRST_GUESSES
        limits = []
        for request in live:
            # The last token is sampled without a guess, and all tokens must fit into block_size.
            room = rows.block_size - len(rows.ids[request.row]) - 1
            limits.append(max(0, min(request.n_guesses or first, request.left - 1, room)))
        return self.guesser.guess(live, limits)

    def step(
        self,
        rows: BaseRows,
        requests: Sequence[Request],
        tokens: Sequence[list[int]],
        guesses: Sequence[list[int]],
        parts: Sequence[Part] = (),
    ) -> list[Sampled]:
        """Append tokens, which end with the guesses, to the requests' rows; return the new tokens.

        Each request gets a token sampled after its last known token, and one after each guess as
        long as guesses are right. parts: tokens of unfinished prompts for rows of their own.
        """
        held = [len(rows.ids[request.row]) for request in requests]
        logits, ids = self._sample(rows, requests, tokens, guesses, parts)
        on_host = ids.tolist()
        check_sampled(on_host)
        described = self._described(logits, ids, on_host)
        sampled: list[Sampled] = []
        at = 0
        for request, guess, n_held in zip(requests, guesses, held, strict=True):
            n = self._accept(rows, request, guess, n_held, on_host[at : at + len(guess) + 1])
            sampled += [(request, token) for token in described[at : at + n]]
            at += len(guess) + 1
        return sampled

    def _described(self, logits: Tensor, ids: Tensor, on_host: list[int]) -> list[SampledToken]:
        """Return the sampled ids (M,) with the log-probabilities that their requests ask for."""
        asked = [self._logprobs[index] for index in self._index]
        tokens = list(map(SampledToken, on_host))
        for options in {*asked}:
            if options.any:
                places = [place for place, one in enumerate(asked) if one == options]
                all_of_them = len(places) == len(asked)
                chosen = (logits, ids) if all_of_them else (logits[places], ids[places])
                described = described_tokens(*chosen, options)
                for place, token in zip(places, described, strict=True):
                    tokens[place] = token
        return tokens

    def _sample(
        self,
        rows: BaseRows,
        requests: Sequence[Request],
        tokens: Sequence[list[int]],
        guesses: Sequence[list[int]],
        parts: Sequence[Part],
    ) -> tuple[Tensor, Tensor]:
        """Return logits (M, V) and sampled ids (M,) after each request's last token and guesses.

        The parts are scored.
        """
        index: list[int] = []
        positions: list[int] = []
        for request, guess in zip(requests, guesses, strict=True):
            index += [request.index] * (len(guess) + 1)
            positions += range(len(request.ids), len(request.ids) + len(guess) + 1)
        if index != self._index:
            self._index, self._chosen = index, [one[index] for one in self._sampling]
        row = [*(request.row for request in requests), *(part.row for part in parts)]
        all_tokens = [*tokens, *(part.tokens for part in parts)]
        wanted = [len(guess) + 1 for guess in guesses] + [part.n_wanted for part in parts]
        is_adjusted = any(i in self._penalty or i in self._bias for i in index)
        if index and not is_adjusted and not any(part.n_wanted for part in parts):
            return rows.forward(row, all_tokens, wanted, self._chosen, positions, self._lacking)
        logits, nothing = rows.forward(row, all_tokens, wanted)
        start = len(index)
        for part in parts:
            if part.n_wanted:
                part.score(logits[start : start + part.n_wanted])
            start += part.n_wanted
        logits = logits[: len(index)]
        if not index:
            return logits, nothing
        scores = self._adjusted(logits, requests, guesses) if is_adjusted else logits
        return logits, sample(scores, self._chosen, positions, self._lacking)

    def _accept(
        self, rows: BaseRows, request: Request, guess: list[int], n_held: int, ids: list[int]
    ) -> int:
        """Return how many sampled ids stand: those up to the first that differs from its guess.

        They are added to the request, and wrong guesses are taken out of its row, which held n_held
        tokens before the step.
        """
        n = 0
        while n < len(guess) and guess[n] == ids[n]:
            n += 1
        new = ids[: n + 1]
        request.ids += new
        request.left -= len(new)
        if request.seen is not None:
            request.seen[new] = True
        if guess and self.guesser:
            rows.truncate(request.row, n_held + n + 1)
            if n == len(guess):
                request.n_guesses = min(2 * max(n, self.guesser.FIRST_GUESSES // 2), MAX_GUESSES)
            else:
                request.n_guesses = max(self.guesser.MIN_GUESSES, n + 1)
        return len(new)

    def _adjusted(
        self, logits: Tensor, requests: Sequence[Request], guesses: Sequence[list[int]]
    ) -> Tensor:
        """Return logits (M, V) with penalties and then biases, where a request has any."""
        scores, start = logits.clone(), 0
        for request, guess in zip(requests, guesses, strict=True):
            end = start + len(guess) + 1
            if request.index in self._penalty:
                self._penalise(scores[start:end], request, guess)
            if request.index in self._bias:
                scores[start:end] += self._bias[request.index]
            start = end
        return scores

    def _penalise(self, scores: Tensor, request: Request, guess: Sequence[int]) -> None:
        """Penalise, in scores (len(guess) + 1, V), the tokens that precede each row."""
        if request.seen is None:
            request.seen = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            request.seen[request.ids] = True
        seen, penalty = request.seen.clone(), self._penalty[request.index]
        for row, i in enumerate((None, *guess)):
            if i is not None:
                seen[i] = True
            scores[row] = torch.where(seen, penalised(scores[row], penalty), scores[row])


def described_tokens(logits: Tensor, ids: Tensor, asked: LogprobOptions) -> list[SampledToken]:
    """Return ids (M,) as tokens with the log-probabilities asked for, from logits (M, V)."""
    tensors = asked.tensors(logits, ids.to(logits.device))
    logprobs = tensors[0].tolist()
    tops = top_logprobs(*tensors[1:]) if asked.top else [None] * len(logprobs)
    return list(map(SampledToken, ids.tolist(), logprobs, tops))
