"""Beam search: the likeliest continuation per token among those that K beams find.

The rules are those of transformers 5 with early_stopping=False. At each step, each prompt's
candidates are the 2K continuations of its K running beams with the largest sums of
log-probabilities:
  a candidate that ends (end-of-text, a stop, the last step) is finished if it is among the first K,
    with score = sum / new tokens ** length_penalty; the K best finished ones are kept;
  the first K of the other candidates run on.
A prompt is done when it has K finished hypotheses and its best running beam, scored at its present
length, does not beat the worst of them, or when nothing runs on. Its result is the best finished
hypothesis.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast.generation.decoder import BAD_LOGITS, Continuation, Job
from gptfast.generation.sequences import Sequences
from gptfast.generation.stop import TextStream, id_stream


class Link(NamedTuple):
    """A token of a hypothesis, and the tokens before it."""

    id: int
    logprob: float
    before: "Link | None"


class Beam(NamedTuple):
    """A hypothesis."""

    total: float  # the sum of log-probabilities, penalised
    score: float  # total / new tokens ** length_penalty
    parent: int  # the prompt's beam, at the step before, that it continues
    end: Link | None
    stream: TextStream | None  # where there are stops to look for

    def continuation(self) -> Continuation:
        """Return its tokens and their log-probabilities."""
        ids: list[int] = []
        logprobs: list[float] = []
        link = self.end
        while link:
            ids.append(link.id)
            logprobs.append(link.logprob)
            link = link.before
        return Continuation(ids[::-1], logprobs[::-1])


@dataclass
class Hypotheses:
    """The hypotheses for one prompt, each kind sorted from the best down."""

    running: list[Beam]
    finished: list[Beam] = field(default_factory=list)
    done: bool = False

    def advance(self, candidates: list[Beam], K: int, eos_ids: Sequence[int], last: bool) -> None:
        """Sort 2K candidates, the best first, into finished and running ones."""
        running: list[Beam] = []
        for rank, beam in enumerate(candidates):
            stopped = beam.stream is not None and beam.stream.ended
            assert beam.end is not None
            if last or stopped or beam.end.id in eos_ids:
                if rank < K:
                    self.finished.append(beam)
            elif len(running) < K:
                running.append(beam)
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[:K]
        self.done = not running or (
            len(self.finished) == K and running[0].score <= self.finished[-1].score
        )
        # If too few run on, beams that can never win fill the prompt's other rows of the batch.
        spare = candidates[0]._replace(total=-math.inf)
        self.running = running + [spare] * (K - len(running))


def _candidates(
    hypotheses: Hypotheses, values: Sequence[Sequence[Any]], vocab_size: int
) -> list[Beam]:
    """Return continuations of the running beams from `_top`'s values for one prompt."""
    beams = []
    for total, score, logprob, index in zip(*values, strict=True):
        if math.isnan(total):
            raise ValueError(BAD_LOGITS)
        parent, i = divmod(index, vocab_size)
        before = hypotheses.running[parent]
        stream = before.stream and before.stream.fork()
        if stream:
            stream.feed(i)
        beams.append(Beam(total, score, parent, Link(i, logprob, before.end), stream))
    return beams


def _length(n: int, penalty: float) -> float:
    """Return n ** penalty, infinity if it overflows."""
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
    lacking: Tensor | None,
) -> list[list[list[Any]]]:
    """Return, for each prompt, the 2K best continuations of its running beams (B, beams).

    They are four lists: totals, scores, log-probabilities, and indices beam * V + token.
    """
    B = len(running)
    logprobs = sequences.logits().float().log_softmax(-1)  # (B * beams, V)
    penalised = logprobs
    if repetition_penalty is not None:
        repeated = repetition_penalty.repeat_interleave(running.shape[1])
        penalised = sequences.penalised(logprobs, repeated)
    if lacking is not None:
        penalised = penalised.masked_fill(lacking, -math.inf)
    totals = penalised.view(B, -1, logprobs.shape[1]) + running[:, :, None]  # (B, beams, V)
    total, index = totals.view(B, -1).topk(2 * K)  # (B, 2K)
    score = total / length
    logprob = logprobs.view(B, -1).gather(1, index)
    on_host = (x.tolist() for x in (total, score, logprob, index))
    return [list(row) for row in zip(*on_host, strict=True)]


def beam_search(sequences: Sequences, job: Job, vocab_size: int) -> list[Continuation]:
    """Return the best hypothesis for each prompt of a job, with what ends it, a stop too.

    Its log-probabilities are without the repetition penalty. The search waits for the device once
    per token.
    """
    B, options = len(sequences.tokens), job.options
    penalty = options.penalty(B, sequences.tokens.device)
    lacking = options.lacking(vocab_size, sequences.tokens.device)
    stream = None
    if job.stops.texts or job.stops.ids:
        stream = id_stream(options.tokenizer, job.stops)
    batch = [Hypotheses([Beam(0.0, 0.0, 0, None, stream)]) for _ in range(B)]
    for step in range(1, job.n + 1):
        totals = [[beam.total for beam in one.running] for one in batch]
        running = torch.tensor(totals, dtype=torch.float32)  # (B, beams)
        running = running.to(sequences.tokens.device)
        length = _length(step, float(options.length_penalty))
        best = _top(sequences, running, options.num_beams, length, penalty, lacking)
        for one, values in zip(batch, best, strict=True):
            if not one.done:
                candidates = _candidates(one, values, vocab_size)
                one.advance(candidates, options.num_beams, job.stops.eos_ids, last=step == job.n)
        if all(one.done for one in batch):
            break
        _follow(sequences, batch, running.shape[1])
    return [one.finished[0].continuation() for one in batch]


def _follow(sequences: Sequences, batch: Sequence[Hypotheses], beams: int) -> None:
    """Make the sequences follow the running beams; each prompt had `beams` sequences before."""
    device = sequences.tokens.device
    parents = [n * beams + beam.parent for n, one in enumerate(batch) for beam in one.running]
    if parents != list(range(len(batch) * beams)):
        sequences.select(torch.tensor(parents, dtype=torch.int64, device=device))
    ids = [beam.end.id for one in batch for beam in one.running if beam.end]
    sequences.append(torch.tensor(ids, dtype=torch.int64, device=device))
