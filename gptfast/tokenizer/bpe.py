"""Byte-pair encoding as GPT-2 has it, and a tokenizer of bytes."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from gptfast import checks

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
BPE_HEADER = "#version: 0.2"
# GPT-2's split of text into words, from OpenAI's encoder.py.
SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# tiktoken keeps a state for each character of white space, and panics past a million of them.
# Unicode's White_Space, which its \s is; Python's has \x1c to \x1f as well.
_LONG_SPACE = re.compile(
    r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{500000,}"
)


class Tokenizer(Protocol):
    """The interface of tokenizers: `eot` is the id of end-of-text, n_vocab the number of ids."""

    name: str
    n_vocab: int
    eot: int

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the ids of a text; a special token's name in it is plain text unless allowed."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids, from which `decode` makes text."""


def vocabulary(tokenizer: Tokenizer | None) -> str | None:
    """Return a text that identifies a tokenizer's ids: a digest of its tokens, or its name."""
    return getattr(tokenizer, "sha256", None) or getattr(tokenizer, "name", None)


class BPETokenizer:
    """A byte-level BPE with GPT-2's split; `eot` is <|endoftext|>, whose id in GPT-2's is 50256."""

    def __init__(self, name: str, encoding: "tiktoken.Encoding") -> None:
        self.name, self._encoding = name, encoding
        self.n_vocab, self.eot = encoding.n_vocab, encoding.eot_token

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all tokens' bytes in the order of their ids, in hexadecimal."""
        digest = hashlib.sha256(f"{self.n_vocab} {self.eot}".encode())
        for i in range(self.n_vocab):
            token = self._encoding.decode_single_token_bytes(i)
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        checks.text("the text", text)
        return _with_special(text, allowed_special, self.eot, self._ordinary)

    def _ordinary(self, text: str) -> list[int]:
        ids, start = [], 0
        for run in _LONG_SPACE.finditer(text):
            # A single word, without its last character if another word follows: SPLIT's \s+(?!\S).
            end = run.end() - (run.end() < len(text))
            ids += self._encoding.encode_ordinary(text[start : run.start()])
            ids += self._encoding._encode_single_piece(text[run.start() : end])
            start = end
        return ids + self._encoding.encode_ordinary(text[start:])

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        _check_ids(ids, self.n_vocab)
        return self._encoding.decode_bytes(list(ids))

    def ranks(self) -> dict[bytes, int]:
        """Return the id of every token but end-of-text, in the order of the ids."""
        tokens = self._encoding.token_byte_values()
        ids = {token: self._encoding.encode_single_token(token) for token in tokens}
        return dict(sorted(ids.items(), key=lambda item: item[1]))

    def transformers_files(self) -> dict[str, str]:
        """Return the text, by file name, of the files that transformers' GPT2Tokenizer loads."""
        ranks = self.ranks()
        written = {token: "".join(BYTE_SYMBOLS[b] for b in token) for token in ranks}
        vocab = {END_OF_TEXT: self.eot} | {text: ranks[token] for token, text in written.items()}
        merges = [merged_pair(token, ranks) for token in ranks if len(token) > 1]
        lines = [BPE_HEADER, *(f"{written[a]} {written[b]}" for a, b in merges)]
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **special}
        return {
            "vocab.json": json.dumps(dict(sorted(vocab.items(), key=lambda item: item[1]))),
            "merges.txt": "\n".join(lines) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }


def merged_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens from which a token was merged.

    They are what remains after its bytes have been merged by all lower ranks, the lowest first.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks) + 1) for a, b in pairwise(parts)]
        i = min(range(len(pairs)), key=pairs.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; `eot` is 256."""

    name, n_vocab, eot = "byte", 257, 256

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        checks.text("the text", text)
        return _with_special(text, allowed_special, self.eot, lambda part: list(part.encode()))

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        _check_ids(ids, self.n_vocab)
        return bytes(i for i in ids if i < 256)


def _with_special(
    text: str, allowed: Collection[str], eot: int, ordinary: Callable[[str], list[int]]
) -> list[int]:
    """Return the ids of a text, in which end-of-text is a token if it is allowed."""
    parts = text.split(END_OF_TEXT) if _special_names(allowed) else [text]
    ids = ordinary(parts[0])
    for part in parts[1:]:
        ids += [eot, *ordinary(part)]
    return ids


def _special_names(allowed: Collection[str]) -> set[str]:
    """Return the set of allowed names; ValueError for one that is no special token."""
    if isinstance(allowed, str) or not isinstance(allowed, Collection):
        raise ValueError(
            f"allowed_special must be a collection of names such as {{{END_OF_TEXT!r}}}, "
            f"got {allowed!r}"
        )
    for name in allowed:
        if name != END_OF_TEXT:
            raise ValueError(f"there is no special token {name!r}; the only one is {END_OF_TEXT}")
    return set(allowed)


def _check_ids(ids: Sequence[int], n_vocab: int) -> None:
    for i in ids:
        if not 0 <= i < n_vocab:
            raise IndexError(f"token id {i} is out of range for a vocabulary of {n_vocab}")


def _printable_bytes() -> list[str]:
    """Return a printable character per byte: itself, or the next unused one from 256 on."""
    others = iter(range(256, 512))
    return [
        chr(b) if chr(b).isprintable() and chr(b) != " " else chr(next(others)) for b in range(256)
    ]


BYTE_SYMBOLS = _printable_bytes()
"""The printable character by which vocabulary files write each byte, 0 to 255."""
