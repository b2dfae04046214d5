"""Whether a tokenizer's ids mean what a model's or a file's do."""

from typing import Any

from gptfast.tokenizer.bpe import Tokenizer, compatible, same_vocabulary, vocabulary
from gptfast.tokenizer.vocabulary import get_tokenizer


def fits(tokenizer: Tokenizer, recorded: str | None, own: str | None) -> bool | None:
    """Return whether a tokenizer's ids mean what those of a model do; None if it does not say.

    recorded: what `vocabulary` said of the model's tokenizer. own: the name of that tokenizer. A
    vocabulary that was grown from the model's, or that it was grown from, fits it.
    """
    if own is not None and own == tokenizer.name and recorded is None:
        return True
    if same_vocabulary(recorded, tokenizer):
        return True
    theirs: Any = _loaded(own)
    if theirs is None or same_vocabulary(recorded, theirs) is False:
        return None if recorded is None else False
    if hasattr(tokenizer, "tokens") and hasattr(theirs, "tokens"):
        return compatible(tokenizer, theirs)
    return vocabulary(tokenizer) == vocabulary(theirs)


def _loaded(name: str | None) -> Tokenizer | None:
    try:
        return None if name is None else get_tokenizer(name)
    except (OSError, ValueError):  # it is no longer there
        return None
