"""Tokens in memory: the embedded text, conversion, splits and fingerprints."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast.data.forms import times
from gptfast.data.token_files import Documents, TokenFiles, split_edges
from gptfast.tokenizer.bpe import Tokenizer, encode_opening
from gptfast.tokenizer.reader import END_OF_TEXT
from gptfast.tokenizer.vocabulary import get_tokenizer

Tokens = Sequence[int] | np.ndarray | Tensor
Source = Tensor | TokenFiles | Documents
# A long source is identified by its length and this many samples of this many tokens.
_MAX_SAMPLES, _SAMPLE_TOKENS = 1024, 4096
# So many tokens of a text have ids from all over a vocabulary, the highest included.
_MIN_TOKENS_TO_JUDGE, _LOW_SHARE = 4096, 0.1
_LOG = logging.getLogger(__name__)


def split_tokens(tokens: Source, ratios: Sequence[float] = (0.9, 0.1)) -> list[Source]:
    """Return consecutive parts of a source, such as training, validation and test.

    The parts are slices. Documents stay whole and are counted; other sources are cut by tokens.
    ratios: positive, with a sum of 1. Raises ValueError for other ratios and for an empty part.
    """
    unit = "documents" if isinstance(tokens, Documents) else "tokens"
    edges = split_edges(len(tokens), ratios, unit)
    return [tokens[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def in_memory(tokens: Tensor | TokenFiles) -> Tensor:
    """Return tokens as a tensor (n,) int64, read if they are in files."""
    return tokens.tensor() if isinstance(tokens, TokenFiles) else tokens


def as_tokens(
    text_or_tokens: str | Tokens,
    tokenizer: Tokenizer | None = None,
    allowed_special: Collection[str] = (),
) -> Tensor:
    """Return (n,) int64 ids of a text or of a sequence of ids.

    tokenizer: for a text; None takes GPT-2's. allowed_special: names of special tokens, such as
    <|endoftext|>, that are tokens in the text; a line in the log counts those that are read as
    plain text. Raises ValueError for anything else, for more than one dimension, and for ids that
    are negative or no integers.
    """
    if isinstance(text_or_tokens, str):
        n_written = text_or_tokens.count(END_OF_TEXT)
        if n_written and END_OF_TEXT not in allowed_special:
            _LOG.warning(
                "the text has %s written in it %s, which was read as plain text; "
                "allowed_special={%r} makes it a token",
                *(END_OF_TEXT, times(n_written), END_OF_TEXT),
            )
        tokenizer = tokenizer or get_tokenizer("gpt2")
        text_or_tokens = encode_opening(tokenizer, text_or_tokens, allowed_special)
    tokens = text_or_tokens if isinstance(text_or_tokens, Tensor) else _as_tensor(text_or_tokens)
    if tokens.dim() != 1:
        raise ValueError(f"tokens must be one sequence (n,), got shape {tuple(tokens.shape)}")
    if tokens.numel() and (tokens.is_floating_point() or tokens.min() < 0):
        raise ValueError("tokens must be integers >= 0, got floating-point or negative ones")
    return tokens.to(torch.int64)


def _as_tensor(ids: Any) -> Tensor:
    """Return a sequence or an array of numbers as a tensor in the dtype that NumPy gives them."""
    try:
        if isinstance(ids, bytes | bytearray):
            raise TypeError
        array = np.asarray(ids)
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iub" else array)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"tokens must be a string or a sequence of ids, got {ids!r:.40}") from None


def samples(tokens: Tensor | TokenFiles) -> Iterator[np.ndarray]:
    """Yield all tokens of a short source, evenly spaced samples of a long one: (n,) int64 each."""
    n = len(tokens)
    starts: Sequence[int] = range(0, n, _SAMPLE_TOKENS)
    if len(starts) > _MAX_SAMPLES:
        starts = [i * (n - _SAMPLE_TOKENS) // (_MAX_SAMPLES - 1) for i in range(_MAX_SAMPLES)]
    for start in starts:
        yield in_memory(tokens[start : start + _SAMPLE_TOKENS]).numpy()


def fingerprint(*sources: Source) -> str:
    """Return a SHA-256, in hexadecimal, that identifies sources, in memory or in files.

    It covers each source's length and tokens; beyond 4,194,304 tokens, 1,024 evenly spaced samples
    of 4,096. For Documents it also covers where they and their completions start.
    """
    digest = hashlib.sha256()
    parts: list[Tensor | TokenFiles] = []
    for source in sources:
        if isinstance(source, Documents):
            origin = source.starts[0]
            index = (source.starts - origin, source.completions - origin)
            parts += [source.span(), *map(torch.from_numpy, index)]
        else:
            parts.append(source)
    for part in parts:
        digest.update(f"{len(part)};".encode())
        for sample in samples(part):
            digest.update(sample.astype("<i8").tobytes())
    return digest.hexdigest()


def check_rows(source: Source, vocab_size: int, tokenizer: Tokenizer, model: str) -> None:
    """Raise ValueError for a token, among samples, that a model has no row for."""
    tokens = source.span() if isinstance(source, Documents) else source
    highest = max((int(sample.max()) for sample in samples(tokens)), default=0)
    if highest >= vocab_size:
        text = tokenizer.decode([highest])
        raise ValueError(
            f"the data has token {highest}, {text!r}, but {model} has rows for {vocab_size} tokens "
            f"only, and {tokenizer.name} has {tokenizer.n_vocab}; use the model's own tokenizer, "
            "leave that token out, or give the model a row for it (--resize-vocab with --init)"
        )


def check_vocabulary(source: TokenFiles | Documents, tokenizer: Tokenizer) -> None:
    """Raise ValueError for files with a token that the tokenizer does not have, among samples.

    Logs what is odd about the files: integers of another type than uint16, and only low ids.
    """
    tokens = source.span() if isinstance(source, Documents) else source
    assert isinstance(tokens, TokenFiles)
    for dtype, path in tokens.unusual_types().items():
        _LOG.warning("%s: its tokens are read as %s, which its bytes are", path, dtype)
    found = [(int(sample.min()), int(sample.max())) for sample in samples(tokens)]
    lowest, highest = min(low for low, _ in found), max(high for _, high in found)
    if lowest < 0 or highest >= tokenizer.n_vocab:
        raise ValueError(
            f"{tokens.paths[0]} has token {lowest if lowest < 0 else highest}, out of range for "
            f"the {tokenizer.n_vocab} of tokenizer {tokenizer.name}; use the tokenizer that made "
            "the file (--tokenizer)"
        )
    if len(tokens) >= _MIN_TOKENS_TO_JUDGE and highest < tokenizer.n_vocab * _LOW_SHARE:
        _LOG.warning(
            "%s has no token above %d, but tokenizer %s has %d tokens; if another one made the "
            "file, name it (--tokenizer)",
            tokens.paths[0],
            highest,
            tokenizer.name,
            tokenizer.n_vocab,
        )
