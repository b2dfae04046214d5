"""The options of generation and their checks: one error with value and remedy."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from gptfast.checks import integer
from gptfast.config import GPTConfig
from gptfast.generation.stop import Ends, Stop, Stops
from gptfast.ops.sampling import per_row
from gptfast.tokenizer.bpe import Tokenizer

Number = float | Sequence[float] | Tensor
"""One number for all prompts, or one for each of B prompts as a sequence or a (B,) tensor."""

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
"""The parameters of `ops.sample` in their order, without the position."""
_INTEGERS = ("top_k", "seed")
MAX_BIAS = 1e4
"""The largest bias of a logit: far more than logits differ by, and nothing overflows."""
_NO_TOP_K = 2**62
"""More tokens than any vocabulary has: `ops.sample` takes it for no top-k."""
# Besides None: what beam search, which draws nothing, need not refuse.
_OFF = {"temperature": (1, 0), "top_k": (0,), "top_p": (1,), "min_p": (0,)}


@runtime_checkable
class Draft(Protocol):
    """An engine whose guesses another engine checks: a `gptfast.Engine`."""

    @property
    def config(self) -> GPTConfig: ...

    packed: Any
    """Its packed weights."""


@dataclass(frozen=True)
class Options:
    """How to continue prompts.

    Drawing, where each value is one number or one for each prompt:
        temperature, top_k, top_p, min_p, seed: as in `ops.sample`; temperature 0 is greedy, and
            top_k 0 is off. Without a seed it is 0, and a prompt that stands in a batch again takes
            the next one, so that the same prompt several times gives several texts.
        repetition_penalty: CTRL's (Keskar et al., 2019), applied before the temperature: the logits
            of tokens that the prompt or its continuation holds are divided by it if positive and
            multiplied by it if negative; 1 is off.
        logit_bias: numbers to add to the logits of ids, by id, after the penalty: one dictionary
            for all prompts. -100 all but forbids an id.
    Beam search:
        num_beams: above 1, search for the likeliest continuation instead of drawing (see
            `gptfast.generation.beam`), with temperature 0 or 1 and no truncation. The result is the
            hypothesis with the highest sum of log-probabilities / number of new tokens **
            length_penalty. The repetition penalty then applies to log-probabilities, and the seed
            has no effect.
        length_penalty: the exponent of that division; values above 0 favour long continuations.
    The end:
        eos_id: a continuation ends after this token and keeps it; a list of ids ends it after any.
        stop: a string, or a list of strings and lists of ids, looked for among the new tokens. A
            continuation ends before its stop: no token that holds a part of the stop is returned.
            If there are several stops, the one that is complete first counts.
        tokenizer: the tokenizer that turns ids into text; needed for stop strings. An id that it
            has no token for, as models have for padding, is never drawn.
    Guessing, with an engine and without beams, which makes generation faster where guesses are
    right and never changes the tokens:
        lookup: guess the tokens that followed an earlier occurrence of the last few tokens.
        draft: an engine of a smaller model with the same vocabulary, which guesses.

    A prompt gets the same ids alone, in a batch with any other prompts, streamed or not: with an
    engine always, and with a model as it is unless rounding, which depends on the shapes of matrix
    products, turns the choice between two tokens.
    """

    temperature: Number = 1.0
    top_k: Number | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    repetition_penalty: Number = 1.0
    logit_bias: Mapping[int, float] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    eos_id: Ends = None
    stop: Stop | None = None
    seed: Number | None = None
    tokenizer: Tokenizer | None = None
    lookup: bool = False
    draft: Draft | None = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Options":
        """Return the options of a dictionary. Raises TypeError for a key that is no option."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name in ("logprobs", "top_logprobs"):
                raise TypeError(f"{name} works with ids, not with text; use generate or stream")
            if name not in known:
                raise TypeError(f"there is no option {name!r}; there are {', '.join(known)}")
        return cls(**options)

    def stops(self, vocab_size: int) -> Stops:
        """Return what ends a continuation, checked."""
        if self.tokenizer is not None and not hasattr(self.tokenizer, "n_vocab"):
            raise ValueError(
                "tokenizer must have encode, decode and n_vocab, as what gptfast.get_tokenizer "
                f"returns, got {self.tokenizer!r}"
            )
        return Stops.parse(self.stop, self.eos_id, self.tokenizer, vocab_size)

    def sampling(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Return the parameters of `ops.sample` for each prompt, as (batch,) tensors."""
        values = {name: getattr(self, name) for name in SAMPLING}
        values["seed"] = 0 if self.seed is None else self.seed
        given = {name: _number(name, value, batch, device) for name, value in values.items()}
        given["top_k"] = _top_k(given["top_k"])
        return per_row(batch, device, **given)

    def with_seeds(self, prompts: Sequence[Sequence[int]]) -> Self:
        """Return these options with the seed of each prompt: as given, else counted up from 0.

        Without a seed, only equal prompts need different ones. A prompt and a seed that is given
        decide a text, whatever else is in the batch.
        """
        if self.seed is not None or self.num_beams != 1:
            return self
        repeats: Counter[tuple[int, ...]] = Counter()
        seeds = []
        for prompt in map(tuple, prompts):
            seeds.append(repeats[prompt])
            repeats[prompt] += 1
        return replace(self, seed=seeds)

    def penalty(self, batch: int, device: torch.device) -> Tensor | None:
        """Return the repetition penalty of each prompt, (batch,) fp32; None if all are 1."""
        penalty = _number("repetition_penalty", self.repetition_penalty, batch, device)
        if penalty is None:
            raise ValueError("repetition_penalty must be a finite number > 0, got None; 1 is off")
        if not isinstance(penalty, Tensor):
            # In float64 first: a number too large for float32 becomes infinite and is refused.
            try:
                penalty = torch.full((batch,), float(penalty), dtype=torch.float64, device=device)
            except OverflowError:
                raise ValueError(
                    f"repetition_penalty must be a finite number > 0, got {penalty}"
                ) from None
        if penalty.shape != (batch,) or penalty.device != device:
            raise ValueError(
                f"repetition_penalty must be a number or a tensor of shape ({batch},) on "
                f"{device}, got {tuple(penalty.shape)} on {penalty.device}"
            )
        penalty = penalty.float()
        bad = ~(penalty.isfinite() & (penalty > 0))
        if bad.any():
            raise ValueError(
                f"repetition_penalty must be a finite number > 0, got {penalty[bad][0].item()}"
            )
        return None if (penalty == 1).all() else penalty

    def bias(self, vocab_size: int, device: torch.device) -> Tensor | None:
        """Return what is added to each logit, (vocab_size,) fp32; None if nothing is.

        Raises ValueError for a bias that is no finite number, IndexError for an id outside the
        vocabulary.
        """
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must be a dictionary by id, got {self.logit_bias!r:.100}")
        if not self.logit_bias:
            return None
        bias = torch.zeros(vocab_size, dtype=torch.float32, device="cpu")
        for i, value in self.logit_bias.items():
            if not 0 <= integer("each id of logit_bias", i) < vocab_size:
                raise IndexError(
                    f"logit_bias has token id {i}, out of range for a vocabulary of {vocab_size}"
                )
            if not isinstance(value, Real) or not abs(value) <= MAX_BIAS:
                raise ValueError(
                    f"logit_bias of id {i} must be a number from -{MAX_BIAS:g} to {MAX_BIAS:g}, "
                    f"got {value!r:.100}"
                )
            bias[i] = float(value)
        return bias.to(device)

    def lacking(self, vocab_size: int, device: torch.device) -> Tensor | None:
        """Return (vocab_size,) bool, True for ids that the tokenizer lacks; None if it has all."""
        if self.tokenizer is None:
            return None
        tokens = getattr(self.tokenizer, "tokens", range(self.tokenizer.n_vocab))
        if len(tokens) == self.tokenizer.n_vocab >= vocab_size:
            return None
        missing = [i for i in range(vocab_size) if i not in tokens]
        if not missing or len(missing) == vocab_size:
            return None
        lacking = torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
        lacking[missing] = True
        return lacking.to(device)

    def check_beams(self, vocab_size: int) -> None:
        """Raise ValueError for beams out of range or together with options that exclude them."""
        n = integer("num_beams", self.num_beams, 1)
        if n > 1 and 2 * n > vocab_size:
            raise ValueError(
                f"num_beams must be from 1 to {max(1, vocab_size // 2)}, got {n}: beam search "
                f"keeps 2 * num_beams candidates, the vocabulary has {vocab_size} tokens"
            )
        if not isinstance(self.length_penalty, Real) or not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a finite number, got {self.length_penalty}")
        self._check_guesses(vocab_size)
        if n == 1:
            if self.length_penalty != 1:
                raise ValueError(
                    f"length_penalty={self.length_penalty} weighs the texts that beams find: leave "
                    "it out or take num_beams above 1"
                )
            return
        if self.logit_bias:
            raise ValueError("beam search has no logit_bias: leave it out or take num_beams=1")
        for name, off in _OFF.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and value in off):
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
        if not isinstance(self.draft, Draft):
            raise ValueError(f"draft must be a gptfast.Engine, got {type(self.draft).__name__}")
        theirs = self.draft.config.vocab_size
        if theirs != vocab_size:
            raise ValueError(
                f"draft has a vocabulary of {theirs} tokens, the model one of {vocab_size}"
            )

    def refuse_guesses(self) -> None:
        """Raise ValueError for lookup and draft, which a model without an engine cannot use."""
        if self.lookup or self.draft is not None:
            name = "lookup" if self.lookup else "draft"
            raise ValueError(f"{name} needs an engine: generate with gptfast.Engine(model)")


@dataclass(frozen=True)
class LogprobOptions:
    """The choice of log-probabilities to return with the new tokens.

    logprobs: that of each token: the log-softmax in fp32 of the model's own logits, before penalty,
    temperature and truncation. top: those of so many of the likeliest tokens at each position.
    """

    logprobs: bool = False
    top: int = 0

    @property
    def any(self) -> bool:
        """Whether any log-probability is asked for."""
        return self.logprobs or self.top > 0

    def check(self, vocab_size: int) -> None:
        """Raise ValueError for values of other types or out of range."""
        integer("top_logprobs", self.top, 0, vocab_size)
        if not isinstance(self.logprobs, bool):
            raise ValueError(f"logprobs must be True or False, got {self.logprobs!r}")

    def tensors(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the log-probabilities of ids (B,) from logits (B, V), on their device.

        They are those of ids (B,), then the largest (B, top) and their ids (B, top). The last two
        are left out if top is 0, all if nothing is asked for.
        """
        if not self.any:
            return ()
        logprobs = logits.float().log_softmax(-1)
        sampled = logprobs.gather(1, ids.clamp(min=0)[:, None])[:, 0]
        return (sampled, *logprobs.topk(self.top)) if self.top else (sampled,)


def _number(name: str, value: Any, batch: int, device: torch.device) -> Any:
    """Return a number, None or a tensor unchanged, and a sequence of numbers as a tensor."""
    if value is None or isinstance(value, Real | Tensor):
        return value
    try:
        if isinstance(value, str):
            raise ValueError
        # In float64 first: torch's default dtype could be too short for what was written.
        numbers = torch.tensor(value, dtype=torch.float64, device=device)
        if name not in _INTEGERS:
            return numbers
        integers = torch.tensor(value, dtype=torch.int64, device=device)
        return integers if torch.equal(integers.double(), numbers) else numbers
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"{name} must be a number, or one for each of {batch} rows, got {value!r}"
        ) from None


def _top_k(value: Any) -> Any:
    """Return a top_k, of which 0 is off, as `ops.sample` takes it."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else value.where(value != 0, _NO_TOP_K)
    number: Any = value  # a huge integer is no float
    if isinstance(value, Real) and not number >= 1:
        if value == 0:
            return None
        raise ValueError(f"top_k must be an integer >= 1, or 0 for off, got {value}")
    return value


def next_seed(seed: int, n: int = 1) -> int:
    """Return the seed n places after another, within int64."""
    return (seed + n + 2**63) % 2**64 - 2**63


def new_tokens(max_new_tokens: Any) -> int:
    """Return max_new_tokens as an int. Raises ValueError unless it is one in [0, 2**63)."""
    n = integer("max_new_tokens", max_new_tokens, 0)
    if n >= 2**63:
        raise ValueError(f"max_new_tokens must be below 2**63, got {n}")
    return n


def token_ids(idx: Tensor | Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """Return prompts as new lists of ids.

    Raises ValueError unless idx is a (B, T) integer tensor or a list of prompts with at least one
    integer each, IndexError for an id outside the vocabulary.
    """
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
            prompt[n] = integer(f"each id of prompt {row}", i)
            if not 0 <= prompt[n] < vocab_size:
                raise IndexError(
                    f"prompt {row} has token id {i}, out of range for a vocabulary of {vocab_size}"
                )
    return prompts


def _is_prompt(prompt: Any) -> bool:
    is_row = isinstance(prompt, Tensor) and prompt.dim() == 1
    return is_row or isinstance(prompt, Sequence) and not isinstance(prompt, str)
