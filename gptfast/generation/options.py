"""What generation takes, checked: one ValueError or IndexError that names value and remedy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast.checks import _integer
from gptfast.generation.stop import Stop, Stops
from gptfast.ops.sampling import per_row
from gptfast.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    from gptfast.engine import Engine

Number = float | Sequence[float] | Tensor
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
"""`ops.sample`'s parameters in their order, but for the position."""


@dataclass(frozen=True)
class Options:
    """How to go on: `generate` says what each option means."""

    temperature: Number = 1.0
    top_k: Number | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    repetition_penalty: Number = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    eos_id: int | None = None
    stop: Stop | None = None
    seed: Number = 0
    tokenizer: Tokenizer | None = None
    lookup: bool = False
    draft: "Engine | None" = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Options":
        """TypeError naming what is no option."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name in ("logprobs", "top_logprobs"):
                raise TypeError(f"{name} are of ids, not of text; use generate or stream")
            if name not in known:
                raise TypeError(f"there is no option {name!r}; there are {', '.join(known)}")
        return cls(**options)

    def stops(self, vocab_size: int) -> Stops:
        return Stops.parse(self.stop, self.eos_id, self.tokenizer, vocab_size)

    def sampling(self, like: Tensor) -> dict[str, Tensor]:
        """`ops.sample`'s parameters, one per row of `like`."""
        given = {name: _number(name, getattr(self, name), like) for name in SAMPLING}
        return per_row(like, **given)

    def penalty(self, like: Tensor) -> Tensor | None:
        """The repetition penalty of each row of `like`, fp32; None if there is none."""
        penalty = _number("repetition_penalty", self.repetition_penalty, like)
        if penalty is None:
            raise ValueError("repetition_penalty must be a finite number > 0, got None; 1 is off")
        if not isinstance(penalty, Tensor):
            # In float64 first: what float32 cannot hold becomes infinite there, and is refused.
            try:
                penalty = like.new_full((len(like),), float(penalty), dtype=torch.float64)
            except OverflowError:
                raise ValueError(
                    f"repetition_penalty must be a finite number > 0, got {penalty}"
                ) from None
        if penalty.shape != (len(like),) or penalty.device != like.device:
            raise ValueError(
                f"repetition_penalty must be a number or a tensor of shape ({len(like)},) on "
                f"{like.device}, got {tuple(penalty.shape)} on {penalty.device}"
            )
        penalty = penalty.float()
        bad = ~(penalty.isfinite() & (penalty > 0))
        if bad.any():
            raise ValueError(
                f"repetition_penalty must be a finite number > 0, got {penalty[bad][0].item()}"
            )
        return None if (penalty == 1).all() else penalty

    def check_beams(self, vocab_size: int) -> None:
        """ValueError for what beam search cannot be asked."""
        n = _integer("num_beams", self.num_beams)
        if n < 1 or n > 1 and 2 * n > vocab_size:
            raise ValueError(
                f"num_beams must be from 1 to {max(1, vocab_size // 2)}, got {n}: beam search "
                f"keeps 2 * num_beams candidates, the vocabulary has {vocab_size} tokens"
            )
        if not isinstance(self.length_penalty, Real) or not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a finite number, got {self.length_penalty}")
        self._check_guesses(vocab_size)
        if n == 1:
            return
        for name, off in (("temperature", 1.0), ("top_k", None), ("top_p", None), ("min_p", None)):
            value = getattr(self, name)
            if value is not off and not (isinstance(value, Real) and value == off):
                raise ValueError(
                    f"beam search draws nothing: leave out {name}={value} or take num_beams=1"
                )

    def _check_guesses(self, vocab_size: int) -> None:
        if not isinstance(self.lookup, bool):
            raise ValueError(f"lookup must be True or False, got {self.lookup!r}")
        asked = [name for name in ("lookup", "draft") if getattr(self, name) not in (False, None)]
        if asked and self.num_beams != 1:
            asked.append(f"num_beams={self.num_beams}")
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} do not go together; leave one out")
        if self.draft is None:
            return
        if not hasattr(self.draft, "packed"):
            raise ValueError(f"draft must be a gptfast.Engine, got {type(self.draft).__name__}")
        theirs = self.draft.config.vocab_size
        if theirs != vocab_size:
            raise ValueError(
                f"draft has a vocabulary of {theirs} tokens, the model one of {vocab_size}"
            )


def _number(name: str, value: Any, like: Tensor) -> Any:
    """A number, None or a tensor as it is; a sequence of numbers as a tensor beside `like`."""
    if value is None or isinstance(value, Real | Tensor):
        return value
    try:
        if isinstance(value, str):
            raise ValueError
        return torch.tensor(value, device=like.device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"{name} must be a number, or one for each of {len(like)} rows, got {value!r}"
        ) from None


def new_tokens(max_new_tokens: Any) -> int:
    """max_new_tokens as an int in [0, 2**63)."""
    n = _integer("max_new_tokens", max_new_tokens)
    if n < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {n}")
    if n >= 2**63:
        raise ValueError(f"max_new_tokens must be below 2**63, got {n}")
    return n


def check_logprobs(logprobs: Any, top_logprobs: Any, vocab_size: int) -> None:
    n = _integer("top_logprobs", top_logprobs)
    if not 0 <= n <= vocab_size:
        raise ValueError(f"top_logprobs must be from 0 to {vocab_size}, got {top_logprobs}")
    if not isinstance(logprobs, bool):
        raise ValueError(f"logprobs must be True or False, got {logprobs!r}")


def token_ids(idx: Tensor | Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """Prompts as lists of their own, each with at least one id of the vocabulary."""
    if isinstance(idx, Tensor) and (idx.dim() != 2 or idx.is_floating_point()):
        raise ValueError(
            "idx must be (B, T) of integers or a list of prompts, "
            f"got shape {tuple(idx.shape)} {idx.dtype}"
        )
    is_list = isinstance(idx, Sequence) and not isinstance(idx, str)
    if not isinstance(idx, Tensor) and not (is_list and all(_is_prompt(p) for p in idx)):
        raise ValueError(
            "idx must be (B, T) or a list of prompts, each a list of token ids; "
            "text goes through generate_text"
        )
    prompts = [p.tolist() if isinstance(p, Tensor) else list(p) for p in idx]
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; start it with at least one token")
        for n, i in enumerate(prompt):
            prompt[n] = _integer(f"each id of prompt {row}", i)
            if not 0 <= prompt[n] < vocab_size:
                raise IndexError(
                    f"prompt {row} has token id {i}, out of range for a vocabulary of {vocab_size}"
                )
    return prompts


def _is_prompt(prompt: Any) -> bool:
    one_row = isinstance(prompt, Tensor) and prompt.dim() == 1
    return one_row or isinstance(prompt, Sequence) and not isinstance(prompt, str)
