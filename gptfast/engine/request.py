"""A prompt on its way through the engine, and a token drawn for it."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from gptfast.generation.decoder import Top


class Drawn(NamedTuple):
    request: "Request"
    id: int
    logprob: float | None
    top: Top | None


@dataclass(eq=False)
class Request:
    """A prompt on its way. Who receives its tokens sets `done` when it is to end."""

    index: int
    ids: list[int]
    """The prompt and all that was drawn."""
    left: int
    """Tokens to draw yet."""
    row: int = -1
    seen: Tensor | None = None
    """(V,) bool, of the tokens in ids, where there is a repetition penalty."""
    most: int | None = None
    """Guesses to try next."""
    done: bool = False
