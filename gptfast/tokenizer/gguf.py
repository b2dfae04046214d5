"""A vocabulary among the values of a GGUF file, as llama.cpp's tokenizer "gpt2" reads it.

That is GPT-2's byte-level BPE. A token has a type: llama.cpp finds user-defined ones in any text,
control ones where they are allowed. Source: src/llama-vocab.cpp of llama.cpp.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptfast.gguf_file import read_gguf
from gptfast.tokenizer.added import AddedToken
from gptfast.tokenizer.bpe import BPETokenizer, ByteTokenizer, Tokenizer
from gptfast.tokenizer.characters import CharacterTokenizer
from gptfast.tokenizer.reader import (
    END_OF_TEXT,
    Description,
    check_ids,
    check_merges,
    say_unreachable,
)

_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
# Ours: the kind "byte", and the tokenizer's end-of-text where the model ends a text at another id.
_OURS, _OUR_END = "gptfast.tokenizer", "gptfast.end_of_text_id"
_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_MERGES = "tokenizer.ggml.merges"
_BOS, _EOS, _EOT = (f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot"))
_ADD_BOS, _ADD_EOS = (f"tokenizer.ggml.add_{name}_token" for name in ("bos", "eos"))
_NO_VOCABULARY = ("no_vocab", "none")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Splits of text with GPT-2's pattern, by llama.cpp's names.
_GPT2_SPLITS = ("gpt-2", "phi-2")
# The format has no empty arrays, and llama.cpp wants merges: this one never happens.
_NO_MERGES = f"{END_OF_TEXT} {END_OF_TEXT}"
_REMEDY = "name a directory instead, for transformers' form, which keeps it"


def has_vocabulary(values: dict[str, Any]) -> bool:
    """Return whether a file's values hold a vocabulary, of whatever kind."""
    kind = values.get(_MODEL, _NO_VOCABULARY[0])
    return not isinstance(kind, str) or kind not in _NO_VOCABULARY


def end_values(values: dict[str, Any]) -> list[Any]:
    """Return what a file's values say ends a text: ids, if the file is right."""
    found = [values[name] for name in (_EOS, _EOT) if name in values]
    plain = ["an array" if isinstance(i, list | np.ndarray) else i for i in found]
    return list(dict.fromkeys(plain))


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a GGUF file, named after it.

    Raises ValueError naming the file for one that is not GPT-2's byte-level BPE; OSError.
    """
    name, values = str(path.resolve()), read_gguf(path).values
    try:
        return _tokenizer(name, values)
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{path} has a vocabulary that does not fit: {error}; name the tokenizer that the "
            "model was trained with (--tokenizer)"
        ) from None


def _tokenizer(name: str, values: dict[str, Any]) -> Tokenizer:
    kind, split = values.get(_MODEL), values.get(_PRE, _GPT2_SPLITS[0])
    known = isinstance(kind, str) and isinstance(split, str)
    if not known or kind != "gpt2" or split not in _GPT2_SPLITS:
        raise ValueError(
            f"it is {kind!r:.40} with the split {split!r:.40}, and gptfast has GPT-2's byte-level "
            "BPE ('gpt2', 'gpt-2')"
        )
    description = _description(values)
    if values.get(_OURS) == ByteTokenizer.name:
        tokenizer = ByteTokenizer()
        ours = tokenizer.description()
        if (description.vocab, description.merges, description.eot) != (ours.vocab, [], ours.eot):
            raise ValueError("it says that it is of bytes, and its tokens are others")
        return tokenizer
    say_unreachable(Path(name), description)
    return BPETokenizer(name, description)


def _description(values: dict[str, Any]) -> Description:
    """Return a vocabulary as the values describe it. Raises ValueError."""
    tokens = _texts(values, _TOKENS)
    lines = _texts(values, _MERGES) if _MERGES in values else []
    given = values.get(_TYPES, np.full(len(tokens), _NORMAL))
    if not isinstance(given, np.ndarray) or given.dtype.kind not in "iu":
        raise ValueError(f"{_TYPES} is no array of integers")
    types = given.tolist()
    if len(types) != len(tokens):
        raise ValueError(f"it has {len(types):,} types for {len(tokens):,} tokens")
    if other := set(types) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}:
        raise ValueError(f"a token has the type {min(other)}, which no byte-level BPE has")
    end_name = _OUR_END if _OUR_END in values else _EOS
    end, begin = (_id(values, name, len(tokens)) for name in (end_name, _BOS))
    if end is None and END_OF_TEXT in tokens:
        end = tokens.index(END_OF_TEXT)
    special = {i for i, kind in enumerate(types) if kind == _CONTROL} | {end, begin} - {None}
    added = {
        i: AddedToken(token, special=i in special, normalized=False)
        for i, token in enumerate(tokens)
        if token and (i in special or types[i] == _USER_DEFINED)
    }
    if len({token.content for token in added.values()}) < len(added):
        raise ValueError("two added tokens have one name")
    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if types[i] == _NORMAL and i not in added:
            if token in vocab:
                raise ValueError(f"tokens {vocab[token]} and {i} are both {token[:40]!r}")
            vocab[token] = i
    merges = [_pair(line) for line in lines if line != _NO_MERGES]
    check_merges(merges, check_ids(vocab))
    before = (begin,) if values.get(_ADD_BOS) is True and begin is not None else ()
    after = (end,) if values.get(_ADD_EOS) is True and end is not None else ()
    return Description(vocab, merges, added, end, begin, before=before, after=after)


def _texts(values: dict[str, Any], name: str) -> list[str]:
    found = values.get(name)
    if not isinstance(found, list):
        raise ValueError(f"it has no texts {name}")
    return found


def _id(values: dict[str, Any], name: str, n: int) -> int | None:
    """Return an id that the values name, None if they do not."""
    i = values.get(name)
    if i is None:
        return None
    if type(i) is not int or not 0 <= i < n:
        raise ValueError(f"{name} is {i!r:.40}, which is no id of its {n:,} tokens")
    return i


def _pair(line: str) -> tuple[str, str]:
    first, space, second = line.partition(" ")
    if not first or not second or " " in second:
        raise ValueError(f"{line[:80]!r} does not merge two tokens")
    return first, second


def gguf_values(tokenizer: Tokenizer, n_rows: int, eos_ids: Sequence[int] = ()) -> dict[str, Any]:
    """Return the values that make llama.cpp's tokenizer give the same ids.

    n_rows: the rows of the model, of which those without a token get an unused one. eos_ids: the
    ids that end a text, up to two; without any it is the tokenizer's end-of-text.
    Raises ValueError, which names it, for what llama.cpp's tokenizer does not do.
    """
    described = _expressible(tokenizer, n_rows)
    assert described.eot is not None
    tokens, types = [f"[PAD{i}]" for i in range(n_rows)], [_UNUSED] * n_rows
    for token, i in described.vocab.items():
        tokens[i], types[i] = token, _NORMAL
    for i, added in described.added.items():
        tokens[i], types[i] = added.content, _CONTROL if added.special else _USER_DEFINED
    ends = list(eos_ids) or [described.eot]
    values = {
        _MODEL: "gpt2",
        _PRE: _GPT2_SPLITS[0],
        _TOKENS: tokens,
        _TYPES: types,
        _MERGES: [" ".join(pair) for pair in described.merges] or [_NO_MERGES],
        # Without them, llama.cpp takes id 11.
        _BOS: described.eot if described.bos is None else described.bos,
        _EOS: ends[0],
        _ADD_BOS: bool(described.before),
        _ADD_EOS: bool(described.after),
    }
    if len(ends) > 1:
        values[_EOT] = ends[1]
    if ends[0] != described.eot:
        values[_OUR_END] = described.eot
    if isinstance(tokenizer, ByteTokenizer):
        values[_OURS] = tokenizer.name
    return values


def no_vocabulary_values() -> dict[str, Any]:
    """Return the values of a file without a vocabulary, of which llama.cpp takes and gives ids."""
    return {_MODEL: _NO_VOCABULARY[0]}


def _expressible(tokenizer: Tokenizer, n_rows: int) -> Description:
    """Return a tokenizer's description. Raises ValueError for one that GGUF cannot express."""

    def refuse(what: str) -> ValueError:
        return ValueError(f"GGUF cannot express the tokenizer {tokenizer.name}: {what}; {_REMEDY}")

    if isinstance(tokenizer, CharacterTokenizer):
        raise refuse(
            "it has no end-of-text, for which llama.cpp would take id 11, one of its characters"
        )
    if not isinstance(tokenizer, BPETokenizer | ByteTokenizer):
        raise refuse("it is no byte-level BPE")
    described = tokenizer.description()
    if described.eot is None:
        raise refuse("it has no end-of-text, for which llama.cpp would take id 11")
    if tokenizer.n_vocab > n_rows:
        raise refuse(f"it has {tokenizer.n_vocab:,} tokens for the {n_rows:,} rows of the model")
    if described.add_prefix_space:
        raise refuse("it puts a space before a text (add_prefix_space)")
    for name in ("unknown", "fused", "whole_words"):
        if getattr(described, name) not in (None, False):
            raise refuse(f"it has {name} tokens, which GPT-2's has not")
    if described.before not in ((), (described.bos,)) or described.after not in (
        (),
        (described.eot,),
    ):
        raise refuse("it puts others than its begin and end around a text")
    for token in described.added.values():
        flags = [name for name in ("lstrip", "rstrip", "single_word") if getattr(token, name)]
        if flags:
            raise refuse(f"its token {token.content[:40]!r} has {flags[0]}")
    if any(" " in part for pair in described.merges for part in pair):
        raise refuse("a merge has a space in it")
    return described
