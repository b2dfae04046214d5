"""A prompt while the engine continues it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Request:
    """A prompt while the engine continues it."""

    index: int
    """Its place among the prompts of the call."""
    ids: list[int]
    """The prompt and all tokens sampled so far."""
    left: int
    """How many tokens are still to be sampled."""
    row: int = -1
    """Its row of the KV cache, -1 while it has none."""
    seen: Tensor | None = None
    """(V,) bool, True for tokens in ids; only with a repetition penalty."""
    n_guesses: int | None = None
    """How many tokens to guess next; None before the first guess."""
    done: bool = False
    """Whether to end it early; set by the receiver of its tokens."""
