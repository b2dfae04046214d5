"""Drawing tokens by the model itself, which defines what generation gives: one loop, `steps_of`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast import ops
from gptfast.model import GPT
from gptfast.options import Options
from gptfast.sequences import Sequences, evaluating
from gptfast.stop import Stops, id_stream

Top = list[tuple[int, float]]
"""The likeliest tokens of one place and their log-probabilities."""


class Told(NamedTuple):
    """What is to be told of each token: its log-probability, and so many of the likeliest."""

    logprobs: bool = False
    top: int = 0

    def __call__(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        """Of logits (B, V) and ids (B,) what was asked for: (B,), (B, top), (B, top)."""
        if not (self.logprobs or self.top):
            return ()
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs.gather(1, ids.clamp(min=0)[:, None])[:, 0]
        return (chosen, *logprobs.topk(self.top)) if self.top else (chosen,)


class Row(NamedTuple):
    """The new tokens of a row, what ends it included, and what was to be told of them."""

    ids: list[int]
    logprobs: list[float]
    top: list[Top]


def tops(values: Tensor, ids: Tensor) -> list[Top]:
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in pairs]


def steps_of(
    sequences: Sequences, n: int, options: Options, told: Told
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Draw up to n tokens: after each, the ids (B,) and what is to be told of them.

    Options are checked by the call. Between two tokens the caller and the model are in their own
    modes, whatever those are.
    """
    sampling, penalty = options.sampling(sequences.tokens), options.penalty(sequences.tokens)

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = sequences.logits()  # (B, V)
        scores = logits if penalty is None else sequences.penalised(logits.float(), penalty)
        ids = ops.sample(scores, position=sequences.length, **sampling)  # (B,)
        sequences.append(ids)
        return ids, told(logits, ids)

    def steps() -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        for _ in range(n):
            with torch.inference_mode(), evaluating(sequences.model):
                drawn = step()
            yield drawn

    return steps()


def check_drawn(ids: Sequence[int]) -> None:
    if -1 in ids:
        raise ValueError("the model's logits had NaN, +inf or nothing but -inf; check its weights")


def draw_rows(
    model: GPT, prompts: list[list[int]], n: int, options: Options, stops: Stops, told: Told
) -> list[Row]:
    """Rows of up to n tokens; those that end early go on until all have ended."""
    sequences = Sequences(model, prompts)
    ends = [id_stream(options.tokenizer, stops) for _ in prompts]
    done = torch.zeros_like(sequences.length, dtype=torch.bool)
    drawn, of_drawn = [], []
    for step, (ids, of_ids) in enumerate(steps_of(sequences, n, options, told)):
        drawn.append(ids)
        of_drawn.append(of_ids)
        if stops.texts or stops.ids:
            on_host = ids.tolist()
            check_drawn(on_host)
            for end, i in zip(ends, on_host, strict=True):
                if not end.ended:
                    end.feed(i)
            if all(end.ended for end in ends):
                break
        elif stops.eos_id is not None:
            done |= ids == stops.eos_id
            # Asking the device waits for it, so not at every token.
            if step % 8 == 7 and done.all():
                break
    rows = torch.stack(drawn, 1).tolist()
    for row in rows:
        check_drawn(row)
    columns = [torch.stack(column, 1) for column in zip(*of_drawn, strict=True)]  # (B, n, ...)
    if not columns:
        return [Row(row, [], []) for row in rows]
    logprobs, top = columns[0].tolist(), columns[1:]
    of_rows = [tops(*row) for row in zip(*top, strict=True)] if top else [[] for _ in rows]
    return [Row(*row) for row in zip(rows, logprobs, of_rows, strict=True)]
