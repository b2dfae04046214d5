"""A model that is served, with its tokenizer."""

import sys
from dataclasses import dataclass, field
from typing import Any

from gptfast.engine.engine import Engine
from gptfast.generation.decoder import BAD_LOGITS
from gptfast.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Model:
    """A model that is served. guesses: the options lookup and draft, if there is a guesser."""

    engine: Engine
    tokenizer: Tokenizer
    guesses: dict[str, Any] = field(default_factory=dict)
    longest: int = field(init=False)
    """Bytes of the longest token."""

    def __post_init__(self) -> None:
        tokens = getattr(self.tokenizer, "tokens", {})
        longest = max(map(len, tokens.values()), default=sys.maxsize)
        object.__setattr__(self, "longest", longest)

    def check(self) -> None:
        """Compute a token. Raises ValueError for weights that give no logits to sample from."""
        logits = self.engine.logits([0])
        if not logits.isfinite().any() or logits.isnan().any() or logits.isposinf().any():
            raise ValueError(BAD_LOGITS)
