"""A vocabulary learned from a user's own text."""

import json
import operator
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from gptfast.checks import check_text
from gptfast.files import _write
from gptfast.tokenizer.bpe import _CHARACTERS, BPE_HEADER, END_OF_TEXT, SPLIT, Tokenizer
from gptfast.tokenizer.vocabulary import SHA256, get_tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, directory: str | os.PathLike
) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's split on texts; write vocab.bpe and encoder.json.

    vocab_size: from 257 (the bytes and <|endoftext|>, which gets the last id) to 65536 (what a
    token file holds). Pairs seen once are not merged, so a short text gives fewer tokens: see
    n_vocab of the tokenizer returned. The same texts give the same files.

    Needs the `tokenizers` library: ImportError without. Raises ValueError for a vocab_size out of
    range, a text that UTF-8 cannot hold, and a directory with one of the two files in it.
    """
    try:
        n = operator.index(vocab_size)
    except TypeError:
        n = 0
    if not 257 <= n <= 65536:
        raise ValueError(f"vocab_size must be an integer from 257 to 65536, got {vocab_size!r}")
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ValueError(
            f"texts must be an iterable of strings, got {type(texts).__name__}; pass [text]"
        )
    directory = Path(directory).resolve()
    for name in SHA256:
        if (directory / name).exists():
            raise ValueError(f"{directory / name} exists; name another directory or delete it")
    vocab, merges = _train(texts, n)
    vocab[END_OF_TEXT] = len(vocab)
    directory.mkdir(parents=True, exist_ok=True)
    lines = [BPE_HEADER, *(" ".join(pair) for pair in merges)]
    files = {"vocab.bpe": "\n".join(lines) + "\n", "encoder.json": json.dumps(vocab)}
    _write(directory, files)
    return get_tokenizer(str(directory))


def _train(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], list[list[str]]]:
    """Ids by token, in the order of the ids, and the merges; without end-of-text."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError(
            "train_tokenizer needs the tokenizers library: pip install gptfast[tokenizers]"
        ) from error

    def checked() -> Iterator[str]:
        for number, text in enumerate(texts):
            check_text(text, f"text {number}")
            yield text

    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=_CHARACTERS,
        show_progress=False,
    )
    bpe.train_from_iterator(checked(), trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = dict(sorted(trained["vocab"].items(), key=lambda item: item[1]))
    return vocab, trained["merges"]
