"""Vocabularies made for a text: learned from it, or GPT-2's reduced to it."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from gptfast import checks
from gptfast.files import new_files, write_files
from gptfast.tokenizer.bpe import BPETokenizer, Tokenizer
from gptfast.tokenizer.reader import BPE_HEADER, END_OF_TEXT
from gptfast.tokenizer.vocabulary import SHA256, get_tokenizer
from gptfast.tokenizer.words import BYTE_SYMBOLS, SPLIT, merged_pair

MIN_VOCABULARY = 257
"""The 256 bytes and end-of-text."""
MAX_VOCABULARY = 65536
"""The most tokens of which a token file can hold the ids."""
MIN_OCCURRENCES = 2
"""A token that stands in a text less often is left out of the vocabulary reduced to it."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, directory: str | os.PathLike
) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's split on texts, write its files and return it.

    directory: gets vocab.bpe and encoder.json.

    vocab_size: from 257 (the bytes and <|endoftext|>, which gets the last id) to 65536 (what a
    token file holds). Pairs seen once are not merged, so that a short text gives fewer tokens:
    n_vocab of the tokenizer returned says how many. The same texts give the same files.

    Needs the `tokenizers` library: ImportError without. Raises ValueError for a vocab_size out of
    range, a text that UTF-8 cannot hold, and a directory with one of the two files in it.
    """
    n = checks.integer("vocab_size", vocab_size, MIN_VOCABULARY, MAX_VOCABULARY)
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ValueError(
            f"texts must be an iterable of strings, got {type(texts).__name__}; pass [text]"
        )
    directory = Path(directory).resolve()
    for name in SHA256:
        if (directory / name).exists():
            raise ValueError(f"{directory / name} exists; name another directory or delete it")
    return _save(*_train(texts, n), directory)


def reduce_tokenizer(tokenizer: BPETokenizer, text: str, directory: str | os.PathLike) -> Tokenizer:
    """Reduce a byte-level BPE to what a text needs; write vocab.bpe and encoder.json.

    The new vocabulary has all bytes, the tokens that stand in the text twice or more, and the
    tokens that those are merged from. A small model then spends its parameters on these instead
    of on tokens it never sees. Files of an earlier vocabulary in the directory are replaced.
    """
    ranks = tokenizer.ranks()
    counts = Counter(tokenizer.encode(text))
    waiting = [tokenizer.decode_bytes([i]) for i, n in counts.items() if n >= MIN_OCCURRENCES]
    pairs: dict[bytes, tuple[bytes, bytes]] = {}
    while waiting:
        token = waiting.pop()
        if len(token) > 1 and token not in pairs:
            pairs[token] = merged_pair(token, ranks)
            waiting += pairs[token]
    merges = [
        ["".join(BYTE_SYMBOLS[b] for b in part) for part in pairs[token]]
        for token in sorted(pairs, key=ranks.__getitem__)
    ]
    tokens = [*BYTE_SYMBOLS, *map("".join, merges)]
    return _save({token: i for i, token in enumerate(tokens)}, merges, Path(directory).resolve())


def _save(vocab: dict[str, int], merges: list[list[str]], directory: Path) -> Tokenizer:
    """Write a vocabulary, end-of-text as its last token, and return its tokenizer."""
    vocab[END_OF_TEXT] = len(vocab)
    lines = [BPE_HEADER, *(" ".join(pair) for pair in merges)]
    files = {"vocab.bpe": "\n".join(lines) + "\n", "encoder.json": json.dumps(vocab)}
    with new_files(directory) as part:
        write_files(part, {}, files)
    return get_tokenizer(str(directory))


def _train(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], list[list[str]]]:
    """Return the ids by token, in the order of the ids, and the merges; without end-of-text."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError(
            "learning a vocabulary needs the tokenizers library: pip install tokenizers"
        ) from error

    def checked() -> Iterator[str]:
        for number, text in enumerate(texts):
            yield checks.text(f"text {number}", text)

    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=BYTE_SYMBOLS,
        show_progress=False,
    )
    bpe.train_from_iterator(checked(), trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = dict(sorted(trained["vocab"].items(), key=lambda item: item[1]))
    return vocab, trained["merges"]
