"""Text as tokens: the embedded text, splits and fingerprints."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gptfast.data.token_files import Documents, TokenFiles, split_edges
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.tokenizer.vocabulary import get_tokenizer

Tokens = Sequence[int] | np.ndarray | Tensor
Source = Tensor | TokenFiles | Documents
# A long source is known by its length and this many of its stretches.
SAMPLES, SAMPLE_LENGTH = 1024, 4096


def embedded_text() -> str:
    """About half a megabyte of English that every CPython carries: the prose of `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def split_tokens(tokens: Source, ratios: Sequence[float] = (0.9, 0.1)) -> list[Source]:
    """Cut a source into consecutive parts, e.g. training, validation and test: slices of it.

    Documents are kept whole and counted; anything else is cut by tokens. ratios are positive and
    sum to 1. Raises ValueError for ratios that do not, or an empty part.
    """
    unit = "documents" if isinstance(tokens, Documents) else "tokens"
    edges = split_edges(len(tokens), ratios, unit)
    return [tokens[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def _in_memory(tokens: Tensor | TokenFiles) -> Tensor:
    return tokens.tensor() if isinstance(tokens, TokenFiles) else tokens


def as_tokens(text_or_tokens: str | Tokens, tokenizer: Tokenizer | None = None) -> Tensor:
    """(n,) int64 ids of a text (by `tokenizer`, GPT-2's if None) or of a sequence of ids."""
    if isinstance(text_or_tokens, str):
        text_or_tokens = (tokenizer or get_tokenizer("gpt2")).encode(text_or_tokens)
    if isinstance(text_or_tokens, np.ndarray):
        text_or_tokens = text_or_tokens.astype(np.int64)
    try:
        if isinstance(text_or_tokens, bytes | bytearray):
            raise TypeError
        tokens = torch.as_tensor(text_or_tokens)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"tokens must be a string or a sequence of ids, got {text_or_tokens!r:.40}"
        ) from None
    if tokens.dim() != 1:
        raise ValueError(f"tokens must be one sequence (n,), got shape {tuple(tokens.shape)}")
    if tokens.numel() and (tokens.is_floating_point() or tokens.min() < 0):
        raise ValueError("tokens must be integers >= 0, got floating-point or negative ones")
    return tokens.to(torch.int64)


def samples(tokens: Tensor | TokenFiles) -> Iterator[np.ndarray]:
    """All of a short source, evenly spaced stretches of a long one: (n,) int64 each."""
    n = len(tokens)
    starts = range(0, n, SAMPLE_LENGTH)
    if len(starts) > SAMPLES:
        starts = [i * (n - SAMPLE_LENGTH) // (SAMPLES - 1) for i in range(SAMPLES)]
    for start in starts:
        yield _in_memory(tokens[start : start + SAMPLE_LENGTH]).numpy()


def fingerprint(*sources: Source) -> str:
    """SHA-256 (hex) that tells sources apart, wherever their tokens lie; quick for huge ones.

    Of each, the length and all tokens, or, past 4,194,304 of them, the length and 1,024 evenly
    spaced stretches of 4,096; of Documents, where they and their completions start as well.
    """
    digest, parts = hashlib.sha256(), []
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


def _check_vocabulary(source: TokenFiles | Documents, tokenizer: Tokenizer) -> None:
    tokens = source.span() if isinstance(source, Documents) else source
    highest = max(int(sample.max()) for sample in samples(tokens))
    if highest >= tokenizer.n_vocab:
        raise ValueError(
            f"{tokens.paths[0]} has token {highest}, out of range for the {tokenizer.n_vocab} of "
            f"tokenizer {tokenizer.name}; name the tokenizer that it was made with"
        )
