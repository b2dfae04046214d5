"""Byte-pair encoding as GPT-2 has it, and a tokenizer of bytes."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gptfast import checks
from gptfast.tokenizer.added import AddedToken, AddedTokens, Borders
from gptfast.tokenizer.reader import BPE_HEADER, CONFIG, END_OF_TEXT, Description, read_merges
from gptfast.tokenizer.words import BYTE_SYMBOLS, TiktokenWords, merged_pair, token_bytes, words_of

if TYPE_CHECKING:
    import tiktoken


class Tokenizer(Protocol):
    """The interface of tokenizers: `eot` is the id of end-of-text, n_vocab the number of ids."""

    name: str
    n_vocab: int

    @property
    def eot(self) -> int:
        """The id of end-of-text. Raises ValueError if the vocabulary has none."""

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the ids of a text; a special token's name in it is plain text unless allowed."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids, from which `decode` makes text."""


def vocabulary(tokenizer: Tokenizer | None) -> str | None:
    """Return a text that identifies a tokenizer's ids: a digest of its tokens, or its name."""
    return getattr(tokenizer, "sha256", None) or getattr(tokenizer, "name", None)


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """Return the id of end-of-text, None if the vocabulary has none."""
    try:
        eot = tokenizer.eot
    except ValueError:
        return None
    # Characters have an id for it that is none of theirs.
    return eot if eot < tokenizer.n_vocab else None


def encode_opening(
    tokenizer: Tokenizer, text: str, allowed_special: Collection[str] = ()
) -> list[int]:
    """Return the ids of a text that goes on: with what its vocabulary puts before it, not after."""
    encode = getattr(tokenizer, "encode_opening", tokenizer.encode)
    return encode(text, allowed_special) if allowed_special else encode(text)


def encode_continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text that continues another: without what opens a text."""
    encode = getattr(tokenizer, "encode_continuation", tokenizer.encode)
    return encode(text)


def borders_of(tokenizer: Tokenizer) -> Borders:
    """Return where a long text may be cut into pieces that are encoded one by one."""
    return getattr(tokenizer, "borders", Borders())


def _digest(tokens: Mapping[int, bytes], eot: int | None, special: Collection[int]) -> str:
    """Return a SHA-256 of what ids mean: the bytes of each, and which of them are special."""
    n = max(tokens, default=-1) + 1
    digest = hashlib.sha256(f"{n} {eot}".encode())
    for i in sorted(tokens):
        if n > len(tokens):
            digest.update(f"{i} ".encode())
        digest.update(len(tokens[i]).to_bytes(4, "little") + tokens[i])
    if others := sorted({*special} - {eot}):
        digest.update(json.dumps(others).encode())
    return digest.hexdigest()


class BPETokenizer:
    """A byte-level BPE with GPT-2's split; `eot` is <|endoftext|>, whose id in GPT-2's is 50256.

    special_tokens: the ids of the tokens that `encode` finds in a text if they are allowed.
    """

    def __init__(self, name: str, description: Description) -> None:
        self.name = name
        self._description: Description | None = description
        self._merges: Path | None = None
        self._set(
            words_of(
                name,
                description.vocab,
                description.merges,
                unknown=description.unknown,
                fused=description.fused,
                whole_words=description.whole_words,
                eot={END_OF_TEXT: description.eot} if description.eot is not None else {},
            ),
            AddedTokens(description.added),
            description.eot,
        )
        self._prefix_space = description.add_prefix_space
        self._before, self._after = list(description.before), list(description.after)
        self.n_vocab = 1 + max([*description.vocab.values(), *description.added])

    @classmethod
    def from_tiktoken(
        cls, name: str, encoding: "tiktoken.Encoding", merges: Path | None = None
    ) -> "BPETokenizer":
        """Return the tokenizer of an encoding whose only special token is end-of-text.

        merges: the file of its merges, if there is one.
        """
        self = cls.__new__(cls)
        self.name, self.n_vocab, self._description = name, encoding.n_vocab, None
        self._merges = merges
        end = AddedToken(END_OF_TEXT, special=True)
        added = AddedTokens({encoding.eot_token: end})
        self._set(TiktokenWords(encoding), added, encoding.eot_token)
        self._prefix_space, self._before, self._after = False, [], []
        return self

    def _set(self, words: Any, added: AddedTokens, eot: int | None) -> None:
        self._words, self._added, self._eot = words, added, eot
        self.special_tokens = dict(added.special)

    @property
    def _encoding(self) -> "tiktoken.Encoding":
        return self._words.encoding

    @property
    def eot(self) -> int:
        if self._eot is None:
            raise ValueError(
                f"{self.name} names no end-of-text token: give it an eos_token in {CONFIG}"
            )
        return self._eot

    @property
    def bos(self) -> int | None:
        """The id of the token that begins a text, None if the vocabulary has none."""
        return self._eot if self._description is None else self._description.bos

    @cached_property
    def borders(self) -> Borders:
        """Where a long text may be cut into pieces that are encoded one by one."""
        always = [token for token in self._added.by_id.values() if not token.special]
        return Borders(always, prefix_space=self._prefix_space)

    @cached_property
    def tokens(self) -> dict[int, bytes]:
        """The bytes of each id that has a token."""
        tokens = dict(self._words.tokens)
        if self._description is not None and len(tokens) < len(self._description.vocab):
            vocab = self._description.vocab.items()
            tokens |= {i: token_bytes(token) for token, i in vocab if i not in tokens}
        # The symbol of a byte remains the byte, though it is somebody's token too.
        return tokens | {
            i: token.content.encode()
            for i, token in self._added.by_id.items()
            if not (i in tokens and token.content in BYTE_SYMBOLS)
        }

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all tokens' bytes in the order of their ids, in hexadecimal."""
        return _digest(self.tokens, self._eot, self.special_tokens.values())

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the ids of a text, as transformers' tokenizer with the same files.

        allowed_special: names of the special tokens to find in it, or "all"; others are plain text.
        """
        ids = self._ids(text, allowed_special)
        return [*self._before, *ids, *self._after] if self._before or self._after else ids

    def encode_opening(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the ids of a text that goes on: without what the vocabulary puts after a text."""
        return self._before + self._ids(text, allowed_special)

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text that continues another: without what opens a text."""
        return self._ids(text, (), opens=False)

    def _ids(self, text: str, allowed_special: Collection[str], *, opens: bool = True) -> list[int]:
        checks.text("the text", text)
        allowed = _special_names(allowed_special, self._added)
        if not allowed and not self._added.always and not self._prefix_space:
            return self._words.encode(text)
        ids: list[int] = []
        for n, piece in enumerate(self._added.split(text, allowed)):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            spaced = self._prefix_space and (opens or n) and not piece.startswith(" ")
            ids += self._words.encode(" " + piece if spaced else piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids. An id that no token has, as models have for padding, has none.

        Raises IndexError for a negative one.
        """
        checked = _checked_ids(ids)
        if self._description is None and max(checked, default=0) < self.n_vocab:
            return self._encoding.decode_bytes(checked)
        tokens = self.tokens
        return b"".join([tokens.get(i, b"") for i in checked])

    def ranks(self) -> dict[bytes, int]:
        """Return the id of every token but the special ones, in the order of the ids."""
        special = set(self._added.by_id)
        return {token: i for i, token in sorted(self.tokens.items()) if i not in special}

    def description(self) -> Description:
        """Return the vocabulary as its files describe it."""
        if self._description is not None:
            return self._description
        ranks = self.ranks()
        written = {token: "".join(BYTE_SYMBOLS[b] for b in token) for token in ranks}
        vocab = {written[token]: i for token, i in ranks.items()}
        if self._merges is not None and self._merges.is_file():
            merges = read_merges(self._merges)
        else:
            pairs = [merged_pair(token, ranks) for token in ranks if len(token) > 1]
            merges = [(written[a], written[b]) for a, b in pairs]
        end = {self.eot: AddedToken(END_OF_TEXT, special=True)}
        return Description(vocab, merges, end, self.eot, self.eot)

    def transformers_files(self) -> dict[str, str]:
        """Return the text, by file name, of the files that transformers' GPT2Tokenizer loads."""
        described = self.description()
        return dict(described.texts) if described.texts else _transformers_files(described)


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; `eot` is 256."""

    name, n_vocab, eot = "byte", 257, 256
    special_tokens: Mapping[str, int] = {END_OF_TEXT: 256}
    tokens: Mapping[int, bytes] = {b: bytes([b]) for b in range(256)} | {256: END_OF_TEXT.encode()}
    sha256 = _digest(tokens, 256, (256,))
    _added = AddedTokens({256: AddedToken(END_OF_TEXT, special=True)})

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the ids of a text; allowed_special as in BPETokenizer."""
        checks.text("the text", text)
        allowed = _special_names(allowed_special, self._added)
        ids: list[int] = []
        for piece in self._added.split(text, allowed):
            ids += [piece] if isinstance(piece, int) else piece.encode()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids; those from 256 on have none. IndexError for a negative one."""
        return bytes(i for i in _checked_ids(ids) if i < 256)

    def transformers_files(self) -> dict[str, str]:
        """Return the text, by file name, of files from which transformers makes the same ids."""
        return _transformers_files(self.description())

    def description(self) -> Description:
        """Return the bytes as a byte-level BPE without merges."""
        vocab = {symbol: b for b, symbol in enumerate(BYTE_SYMBOLS)}
        end = {self.eot: AddedToken(END_OF_TEXT, special=True)}
        return Description(vocab, [], end, self.eot, self.eot)


def _transformers_files(described: Description) -> dict[str, str]:
    """Return the text of the files that transformers' GPT2Tokenizer loads."""
    names = {i: token.content for i, token in described.added.items()}
    by_id = sorted({**described.vocab, **{name: i for i, name in names.items()}}.items(), key=_id)
    lines = [BPE_HEADER, *map(" ".join, described.merges)]
    end = names.get(described.eot) if described.eot is not None else None
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    config: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": described.add_prefix_space,
        **special,
    }
    if described.before or described.after:
        config |= {"add_bos_token": bool(described.before), "add_eos_token": bool(described.after)}
        config |= {"bos_token": names[described.before[0]]} if described.before else {}
    if len(names) > 1:
        config["added_tokens_decoder"] = {i: asdict(t) for i, t in described.added.items()}
    return {
        "vocab.json": json.dumps(dict(by_id)),
        "merges.txt": "\n".join(lines) + "\n",
        CONFIG: json.dumps(config, indent=2) + "\n",
    }


def _id(item: tuple[str, int]) -> int:
    return item[1]


def _special_names(allowed: Collection[str], added: AddedTokens) -> Collection[str]:
    """Return the allowed names. Raises ValueError for one that is no added token."""
    if not allowed and isinstance(allowed, tuple):  # the default
        return allowed
    special = added.special
    if isinstance(allowed, str) and allowed == "all":
        return special.keys()
    if isinstance(allowed, str) or not isinstance(allowed, Collection):
        example = next(iter(special), END_OF_TEXT)
        raise ValueError(
            f'allowed_special must be a collection of names such as {{{example!r}}}, or "all", '
            f"got {allowed!r}"
        )
    for name in allowed:
        if name not in special and name not in {token.content for token in added.by_id.values()}:
            known = ", ".join(special)
            only = (
                f"the only one is {known}" if len(special) == 1 else f"there are {known or 'none'}"
            )
            raise ValueError(f"there is no special token {name!r}; {only}")
    return set(allowed)


def _checked_ids(ids: Sequence[int]) -> list[int]:
    """Return ids as integers of Python. Raises IndexError for a negative one."""
    checked = list(map(int, ids))
    if checked and min(checked) < 0:
        raise IndexError(f"token id {min(checked)} is out of range: ids begin at 0")
    return checked


def compatible(a: Any, b: Any) -> bool:
    """Return whether two tokenizers mean the same by every id that both have.

    The ids of one must be among the other's: a vocabulary fits the one that it was grown from.
    """
    first, second = sorted((a.tokens, b.tokens), key=len)
    return all(second.get(i) == token for i, token in first.items())


def same_vocabulary(recorded: str | None, tokenizer: Tokenizer) -> bool | None:
    """Return whether `vocabulary` recorded this tokenizer; None if nothing is recorded."""
    if recorded is None:
        return None
    if recorded == ByteTokenizer.name:  # as it was recorded first
        recorded = ByteTokenizer.sha256
    return recorded == vocabulary(tokenizer)
