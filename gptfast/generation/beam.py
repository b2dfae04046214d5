"""Beam search: of all continuations, the likeliest per token that a beam of width K comes upon.

The rules are those of transformers 5 with early_stopping=False. Per step and row, of all
continuations of the K running beams the best 2K by their sum of log-probabilities are candidates:
  one that ends (end-of-text, a stop, the last step) is finished if it is among the first K, at
    score = sum / new tokens ** length_penalty; of the finished ones, the K best are kept;
  the first K of the others run on.
A row is done with K finished, if the best running beam, scored at its present length, does not beat
the worst of them; or when nothing runs on. Its result is the best finished one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.generation.sequences import Sequences
from gptfast.generation.stop import Stops, TextStream, id_stream
from gptfast.tokenizer.bpe import Tokenizer


class Link(NamedTuple):
    """A token of a hypothesis, and the tokens before it."""

    id: int
    logprob: float
    before: "Link | None"


class Beam(NamedTuple):
    total: float  # the sum of log-probabilities, penalised
    score: float  # the same over new tokens ** length_penalty
    parent: int  # which of the row's beams, at the step before, it continues
    end: Link | None
    stream: TextStream | None  # where there are stops to look for

    def ids(self) -> tuple[list[int], list[float]]:
        """Its tokens and their log-probabilities."""
        ids, logprobs, link = [], [], self.end
        while link:
            ids.append(link.id)
            logprobs.append(link.logprob)
            link = link.before
        return ids[::-1], logprobs[::-1]


@dataclass
class Row:
    """The hypotheses about one prompt, both kinds from the best down."""

    running: list[Beam]
    finished: list[Beam] = field(default_factory=list)
    done: bool = False

    def advance(self, candidates: list[Beam], K: int, eos_id: int | None, last: bool) -> None:
        """candidates: 2K continuations of the running beams, from the best down."""
        running = []
        for rank, beam in enumerate(candidates):
            stopped = beam.stream is not None and beam.stream.ended
            if last or stopped or beam.end.id == eos_id:
                if rank < K:
                    self.finished.append(beam)
            elif len(running) < K:
                running.append(beam)
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[:K]
        self.done = not running or (
            len(self.finished) == K and running[0].score <= self.finished[-1].score
        )
        # Where too few run on, the row's other places in the batch hold what can never win.
        spare = candidates[0]._replace(total=-math.inf)
        self.running = running + [spare] * (K - len(running))


def _candidates(row: Row, values: Sequence[Sequence[float]], vocab_size: int) -> list[Beam]:
    """Continuations of a row's beams from (totals, scores, log-probabilities, indices)."""
    beams = []
    for total, score, logprob, index in zip(*values, strict=True):
        if math.isnan(total):
            raise ValueError(
                "the model's logits had NaN, +inf or nothing but -inf; check its weights"
            )
        parent, i = divmod(index, vocab_size)
        before = row.running[parent]
        stream = before.stream and before.stream.fork()
        if stream:
            stream.feed(i)
        beams.append(Beam(total, score, parent, Link(i, logprob, before.end), stream))
    return beams


def _length(n: int, penalty: float) -> float:
    try:
        return float(n) ** penalty
    except OverflowError:
        return math.inf


def _top(
    sequences: Sequences,
    running: Tensor,
    K: int,
    length: float,
    repetition_penalty: Tensor | None,
) -> list[list[list[float]]]:
    """Per row, the 2K best continuations: totals, scores, log-probabilities, flat indices."""
    B = len(running)
    logprobs = sequences.logits().float().log_softmax(-1)  # (B * beams, V)
    penalised = logprobs
    if repetition_penalty is not None:
        repeated = repetition_penalty.repeat_interleave(running.shape[1])
        penalised = sequences.penalised(logprobs, repeated)
    totals = penalised.view(B, -1, logprobs.shape[1]) + running[:, :, None]  # (B, beams, V)
    total, index = totals.view(B, -1).topk(2 * K)  # (B, 2K)
    score = total / length
    of_index = logprobs.view(B, -1).gather(1, index)
    on_host = (x.tolist() for x in (total, score, of_index, index))
    return [list(row) for row in zip(*on_host, strict=True)]


def beam_search(
    sequences: Sequences,
    n: int,
    *,
    vocab_size: int,
    num_beams: int,
    length_penalty: float,
    repetition_penalty: Tensor | None,
    stops: Stops,
    tokenizer: Tokenizer | None,
) -> list[tuple[list[int], list[float]]]:
    """Per sequence, the up to n new tokens of the best hypothesis and their log-probabilities.

    repetition_penalty: (B,), applied to log-probabilities; those returned are without it. What ends
    a hypothesis, a stop too, is part of it. Asks the device once per token.
    """
    K, stream = num_beams, None
    if stops.texts or stops.ids:
        stream = id_stream(tokenizer, stops)
    rows = [Row([Beam(0.0, 0.0, 0, None, stream)]) for _ in range(len(sequences.tokens))]
    for step in range(1, n + 1):
        running = torch.tensor([[beam.total for beam in row.running] for row in rows])
        running = running.to(sequences.tokens.device)  # (B, beams)
        length = _length(step, length_penalty)
        best = _top(sequences, running, K, length, repetition_penalty)
        for row, values in zip(rows, best, strict=True):
            if not row.done:
                candidates = _candidates(row, values, vocab_size)
                row.advance(candidates, K, stops.eos_id, last=step == n)
        if all(row.done for row in rows):
            break
        _follow(sequences, rows, running.shape[1])
    return [row.finished[0].ids() for row in rows]


def _follow(sequences: Sequences, rows: Sequence[Row], beams: int) -> None:
    """Bring tokens and cache to the running beams, of which each row had `beams` before."""
    device = sequences.tokens.device
    parents = [n * beams + beam.parent for n, row in enumerate(rows) for beam in row.running]
    if parents != list(range(len(rows) * beams)):
        sequences.select(torch.tensor(parents, device=device))
    ids = [beam.end.id for row in rows for beam in row.running]
    sequences.append(torch.tensor(ids, device=device))
