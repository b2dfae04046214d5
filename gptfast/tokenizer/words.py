"""Words to ids: byte pairs merged in the order of a vocabulary's merges.

tiktoken merges any two tokens whose bytes together are a token, and takes a whole word that is one.
Other libraries merge the pairs that are listed and no others. The two are the same where every
token is the result of one listed pair and of no other (`is_canonical`): then tiktoken does the
work. For any other list, `ListedMerges` does it in Python.
"""

import functools
import hashlib
import heapq
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import tiktoken

# GPT-2's split of text into words, from OpenAI's encoder.py.
SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Unicode's White_Space, which tiktoken's \s is; Python's has \x1c to \x1f as well.
SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"
# tiktoken keeps a state for each character of white space, and panics past a million of them.
LONG_SPACE = re.compile(f"[{SPACE}]{{500000,}}")
# The SHA-256 of GPT-2's merges, one a line, which are canonical.
_GPT2_MERGES = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"
_MAX_CACHED_WORDS = 1 << 16

Pair = tuple[str, str]


def _printable_bytes() -> list[str]:
    """Return a printable character per byte: itself, or the next unused one from 256 on."""
    others = iter(range(256, 512))
    return [
        chr(b) if chr(b).isprintable() and chr(b) != " " else chr(next(others)) for b in range(256)
    ]


BYTE_SYMBOLS = _printable_bytes()
"""The printable character by which vocabulary files write each byte, 0 to 255."""
# From symbols to the characters of latin-1; those of latin-1 that are no symbols leave it.
_BYTES = dict.fromkeys(range(256), 0x10000) | {ord(c): b for b, c in enumerate(BYTE_SYMBOLS)}


def token_bytes(token: str) -> bytes:
    """Return the bytes of a token that a vocabulary file writes with BYTE_SYMBOLS.

    A token with other characters stands for itself.
    """
    try:
        return token.translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        pass  # it has a character that stands for no byte
    try:
        return token.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"token {token!r:.80} is no text that UTF-8 can hold") from None


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


def is_gpt2(merges: Sequence[Pair]) -> bool:
    """Return whether these are GPT-2's merges, in their order."""
    text = "\n".join(map(" ".join, merges))
    return hashlib.sha256(text.encode()).hexdigest() == _GPT2_MERGES


def is_canonical(merges: Sequence[Pair], tokens: Mapping[str, bytes]) -> bool:
    """Return whether every merge makes a new token, which no other pair of tokens makes.

    tokens: the bytes of each token; all bytes are among them.
    """
    if is_gpt2(merges):
        return True
    ranks = {bytes([b]): b for b in range(256)}
    for a, b in merges:
        made = tokens[a + b]
        if made in ranks:
            return False
        ranks[made] = len(ranks)
    return all(merged_pair(tokens[a + b], ranks) == (tokens[a], tokens[b]) for a, b in merges)


class Words(Protocol):
    """The ids of a text without added tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    @property
    def tokens(self) -> dict[int, bytes]:
        """The bytes of each token by its id."""


class TiktokenWords:
    """Byte pairs merged by tiktoken. ids: the id of each of its ranks, None if they are equal."""

    def __init__(self, encoding: "tiktoken.Encoding", ids: Sequence[int] | None = None) -> None:
        self.encoding, self._ids = encoding, ids

    @cached_property
    def tokens(self) -> dict[int, bytes]:
        encoding, ids = self.encoding, self._ids
        tokens = encoding.token_byte_values()
        ranks = {encoding.encode_single_token(token): token for token in tokens}
        return {rank if ids is None else ids[rank]: token for rank, token in ranks.items()}

    def encode(self, text: str) -> list[int]:
        ranks = self._ranks(text)
        return ranks if self._ids is None else [self._ids[i] for i in ranks]

    def _ranks(self, text: str) -> list[int]:
        ranks, start = [], 0
        for run in LONG_SPACE.finditer(text):
            # A single word, without its last character if another word follows: SPLIT's \s+(?!\S).
            end = run.end() - (run.end() < len(text))
            ranks += self.encoding.encode_ordinary(text[start : run.start()])
            ranks += self.encoding._encode_single_piece(text[run.start() : end])
            start = end
        return ranks + self.encoding.encode_ordinary(text[start:])


@functools.cache
def _probe(pattern: str) -> "tiktoken.Encoding":
    import tiktoken

    ranks = {bytes([b]): b for b in range(256)}
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def is_of(character: str, pattern: str) -> bool:
    """Return whether a character matches a pattern of tiktoken's.

    Python's libraries know other versions of Unicode.
    """
    return bool(_probe(pattern).encode_ordinary(character))


class _Classes(dict[int, int]):
    """Maps each character to one of its class for SPLIT; white space and ASCII stay as they are."""

    def __init__(self) -> None:
        super().__init__({i: i for i in range(128)})

    def __missing__(self, character: int) -> int:
        text = chr(character)
        found = ord(OTHER)
        if is_of(text, r"\s"):
            found = character
        elif is_of(text, r"\p{L}"):
            found = ord(LETTER)
        elif is_of(text, r"\p{N}"):
            found = ord(NUMBER)
        self[character] = found
        return found


LETTER, NUMBER, OTHER = "é²§"
_SPLIT_OF_CLASSES = re.compile(
    f"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z{LETTER}]+| ?[0-9{NUMBER}]+"
    f"| ?[^{SPACE}A-Za-z{LETTER}0-9{NUMBER}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
)


class ListedMerges:
    """Byte pairs merged as the tokenizers library does it: pairs that are listed, and no others.

    vocab: ids by token, written with BYTE_SYMBOLS. A byte that is no token has the id of `unknown`,
    one for all in a row with `fused`, and none without it. whole_words: a word that is a token is
    not merged. The first pair of a list has the lowest rank; a pair that is listed twice has the
    second one's.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[Pair],
        *,
        unknown: int | None = None,
        fused: bool = False,
        whole_words: bool = False,
    ) -> None:
        self._vocab, self._whole_words = vocab, whole_words
        self._unknown, self._fused = unknown, fused
        self._merges = {
            (vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(merges)
        }
        self._classes = _Classes()
        self._cache: dict[str, list[int]] = {}

    @cached_property
    def tokens(self) -> dict[int, bytes]:
        return {i: token_bytes(token) for token, i in self._vocab.items()}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for match in _SPLIT_OF_CLASSES.finditer(text.translate(self._classes)):
            word = text[match.start() : match.end()]
            known = self._cache.get(word)
            if known is None:
                known = self._word("".join(BYTE_SYMBOLS[b] for b in word.encode("utf-8")))
                if len(self._cache) >= _MAX_CACHED_WORDS:
                    self._cache.clear()
                self._cache[word] = known
            ids += known
        return ids

    def _word(self, word: str) -> list[int]:
        if self._whole_words and word in self._vocab:
            return [self._vocab[word]]
        ids: list[int] = []
        after_unknown = False
        for character in word:
            i = self._vocab.get(character, self._unknown)
            unknown = character not in self._vocab
            if i is not None and not (unknown and after_unknown and self._fused):
                ids.append(i)
            after_unknown = unknown
        return self._merge(ids)

    def _merge(self, ids: list[int]) -> list[int]:
        """Return the ids after all merges: the lowest rank first, the first of equal ones."""
        end = len(ids)
        following, before = list(range(1, end + 1)), list(range(-1, end - 1))
        waiting: list[tuple[int, int, int, int]] = []  # rank, place, the pair

        def wait(at: int) -> None:
            if at >= 0 and following[at] < end:
                pair = ids[at], ids[following[at]]
                if pair in self._merges:
                    heapq.heappush(waiting, (self._merges[pair][0], at, *pair))

        for at in range(end):
            wait(at)
        while waiting:
            _, at, *pair = heapq.heappop(waiting)
            other = following[at] if ids[at] >= 0 else end
            if other >= end or [ids[at], ids[other]] != pair:
                continue  # one of them has been merged since
            ids[at], ids[other] = self._merges[ids[at], ids[other]][1], -1
            following[at] = following[other]
            if following[at] < end:
                before[following[at]] = at
            wait(before[at])
            wait(at)
        return [i for i in ids if i >= 0]


def words_of(
    name: str,
    vocab: Mapping[str, int],
    merges: Sequence[Pair],
    *,
    unknown: int | None = None,
    fused: bool = False,
    whole_words: bool = False,
    eot: Mapping[str, int] | None = None,
) -> Words:
    """Return the encoder of words for a vocabulary, tiktoken's where it gives the same ids.

    vocab and merges: written with BYTE_SYMBOLS; the parts of each merge and what it makes are in
    vocab. eot: the name and id of end-of-text.
    """
    in_order = [*BYTE_SYMBOLS, *(a + b for a, b in merges)]
    tokens = {token: token_bytes(token) for token in in_order if token in vocab}
    complete = all(part in tokens for part in (*BYTE_SYMBOLS, *chain.from_iterable(merges)))
    others = whole_words and len(vocab) > len(tokens)
    if not complete or others or not is_canonical(merges, tokens):
        options: dict[str, Any] = dict(unknown=unknown, fused=fused, whole_words=whole_words)
        return ListedMerges(vocab, merges, **options)
    import tiktoken

    ids = [vocab[token] for token in in_order]
    merged = ids[256:]
    ascending = all(a < b for a, b in pairwise(merged))
    ranks = {tokens[token]: ids[n] if ascending else n for n, token in enumerate(in_order)}
    encoding = tiktoken.Encoding(
        name,
        pat_str=SPLIT,
        mergeable_ranks=ranks,
        special_tokens=dict(eot or {}) if ascending else {},
    )
    return TiktokenWords(encoding, None if ascending else ids)
