"""Vocabularies where a command brings two together: a model's, --tokenizer's, the data's."""

import logging
from typing import Protocol

from gptfast.config import GPTConfig
from gptfast.tokenizer.bpe import ByteTokenizer, Tokenizer, end_of_text
from gptfast.tokenizer.compare import fits
from gptfast.tokenizer.vocabulary import get_tokenizer
from gptfast.weights.open import open_weights, tokenizer_of

GPT2_ROWS = range(50257, 50305)
"""The rows of models that have GPT-2's tokens, with or without padding to a multiple of 64."""
PADDING = 128
"""A model has up to so many rows more than its tokenizer has tokens, to fill its matrices."""
_LOGGER = logging.getLogger(__name__)


class Model(Protocol):
    """What `chosen_tokenizer` needs of a model: a GPT, an Engine or Weights have it."""

    @property
    def config(self) -> GPTConfig: ...
    @property
    def vocabulary(self) -> str | None: ...


def chosen_tokenizer(checkpoint: str, model: "Model", given: str | None) -> Tokenizer:
    """Return the tokenizer given by --tokenizer, or else the model's own.

    Raises ValueError for one whose ids mean something else to the model, and where nothing says
    which tokenizer the model has.
    """
    own = getattr(model, "tokenizer_name", None)
    tokenizer = get_tokenizer(given or own or _assumed(checkpoint, model.config.vocab_size))
    check(tokenizer, checkpoint, own, model.vocabulary, given=given is not None)
    if own is None and model.vocabulary is None and given is not None:
        say_unknown(checkpoint, model.config.vocab_size, tokenizer)
    ends, end = getattr(model, "eos_ids", ()), end_of_text(tokenizer)
    if ends and end is not None and end not in ends:
        _LOGGER.warning(
            f"{checkpoint} ends a text at id {', '.join(map(str, ends))}, as its config says, "
            f"though end-of-text of its tokenizer is {end}"
        )
    return tokenizer


def check(
    tokenizer: Tokenizer,
    checkpoint: str,
    own: str | None,
    recorded: str | None,
    *,
    given: bool,
) -> None:
    """Raise ValueError for a tokenizer whose ids mean something else to a model.

    own, recorded: the name of the model's tokenizer, and what identifies it. given: whether the
    tokenizer was chosen by --tokenizer.
    """
    if fits(tokenizer, recorded, own if given else None) is not False:
        return
    if not given:
        raise ValueError(
            f"{checkpoint} was trained with another vocabulary than {tokenizer.name} has now; give "
            "the one that it was trained with as --tokenizer"
        )
    remedy = f"leave --tokenizer out ({checkpoint} has {own})" if own else "give that one"
    raise ValueError(
        f"--tokenizer {tokenizer.name} has another vocabulary than the one that {checkpoint} was "
        f"trained with, so its ids would mean other text; {remedy}"
    )


def say_unknown(source: str, vocab_size: int, tokenizer: Tokenizer) -> None:
    """Print that nothing says whose tokens a model has, if the number of its rows does not fit."""
    if not tokenizer.n_vocab <= vocab_size < tokenizer.n_vocab + PADDING:
        _LOGGER.warning(
            f"{source} does not say which tokenizer it was trained with; taking {tokenizer.name}, "
            f"which has {tokenizer.n_vocab:,} tokens, for its {vocab_size:,} rows"
        )


def _assumed(checkpoint: str, vocab_size: int) -> str:
    """Return the tokenizer of a model that does not say which: GPT-2's if the rows fit."""
    if vocab_size < GPT2_ROWS.start:
        byte = ByteTokenizer.n_vocab
        raise ValueError(
            f"{checkpoint} does not say which tokenizer it was trained with, and its "
            f"{vocab_size:,} rows are too few for GPT-2's; give --tokenizer (byte has {byte})"
        )
    if vocab_size not in GPT2_ROWS:
        _LOGGER.warning(
            f"{checkpoint} does not say which tokenizer it was trained with; taking gpt2, "
            f"which has {GPT2_ROWS.start:,} tokens, for its {vocab_size:,} rows (see --tokenizer)"
        )
    return "gpt2"


def check_draft(name: str, draft: "Model", checkpoint: str, given: str | None) -> None:
    """Raise ValueError for a draft model of another vocabulary than the model's.

    given: the --tokenizer, which comes before the model's own.
    """
    own = given or tokenizer_of(checkpoint)
    if own is None:
        return
    if fits(get_tokenizer(own), draft.vocabulary, getattr(draft, "tokenizer_name", None)) is False:
        raise ValueError(
            f"--draft {name} has another vocabulary than {checkpoint}; name a draft model that was "
            "trained with the same"
        )


def check_init(tokenizer: Tokenizer, init: str, data: str, *, resized: bool) -> None:
    """Raise ValueError for weights to start from whose ids mean something else than the data's.

    data: what the tokenizer was chosen by, for the message. resized: whether the model gets a row
    for each token.
    """
    weights = open_weights(init)
    own = tokenizer_of(init)
    known = fits(tokenizer, weights.vocabulary, own)
    rows = weights.config.vocab_size
    if known is None:
        say_unknown(init, rows, tokenizer)
    elif known and tokenizer.n_vocab > rows and not resized:
        _LOGGER.warning(
            f"--init {init} has rows for {rows:,} of the {tokenizer.n_vocab:,} tokens of its "
            "tokenizer; text with the others will be refused (--resize-vocab adds their rows)"
        )
    if known is False:
        theirs = f"({own}) " if own else ""
        raise ValueError(
            f"--init {init} was trained with another vocabulary {theirs}than {tokenizer.name}, "
            f"which {data} chose, so its ids would mean other text; use the vocabulary of --init "
            "for the data, or start without --init"
        )
