"""What every decoder returns for a token and for a row."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

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


def check_drawn(ids: Sequence[int]) -> None:
    if -1 in ids:
        raise ValueError("the model's logits had NaN, +inf or nothing but -inf; check its weights")
