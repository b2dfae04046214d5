"""Added tokens: names that are found in a text before the rest of it is split into words.

Their rules are those of the tokenizers library: tokens that are not `normalized` are found first;
at each place the longest name counts.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from gptfast.tokenizer.words import SPACE, is_of

MAX_IDS = 10_000_000
_LOGGER = logging.getLogger(__name__)
_SPACE_BEFORE = re.compile(f"[{SPACE}]*\\Z")
_SPACE_AFTER = re.compile(f"[{SPACE}]*")


@dataclass(frozen=True)
class AddedToken:
    """A token by its name, which stands in a text as it is.

    special: it is plain text unless it is allowed. single_word: only between characters of no word.
    lstrip, rstrip: it takes the white space on this side. normalized: found after all others.
    """

    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True

    @classmethod
    def parse(cls, value: Any, *, special: bool | None = None) -> Self:
        """Return the token that a string or an object of JSON describes.

        special: overrules what it says, if not None. Raises ValueError for any other value.
        """
        if isinstance(value, str):
            value = {"content": value, "special": True}
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise ValueError(f"{value!r:.80} does not describe an added token")
        given = {f.name: value[f.name] for f in fields(cls) if value.get(f.name) is not None}
        for name, flag in given.items():
            if name != "content" and not isinstance(flag, bool):
                raise ValueError(f"{name} of token {value['content']!r:.80} is {flag!r:.20}")
        if special is not None:
            given["special"] = special
        given.setdefault("normalized", not given.get("special", False))
        return cls(**given)


class AddedTokens:
    """The added tokens of a vocabulary, by their ids."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self.by_id = dict(tokens)
        self._of_name = {token.content: (i, token) for i, token in tokens.items()}
        self.special = {token.content: i for i, token in tokens.items() if token.special}
        # Whether some are found in any text.
        self.always = len(self.special) < len(tokens)
        by_pass = [
            [token.content for token in tokens.values() if token.normalized == normalized]
            for normalized in (False, True)
        ]
        self._patterns = [
            re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
            for names in by_pass
            if names
        ]

    def split(self, text: str, allowed: Collection[str]) -> list[str | int]:
        """Return a text in pieces: ids of added tokens, and the text between them.

        allowed: names of the special tokens to find; others are text.
        """
        pieces: list[str | int] = [text] if text else []
        if not allowed and not self.always:
            return pieces
        for pattern in self._patterns:
            found: list[str | int] = []
            for piece in pieces:
                if isinstance(piece, str):
                    found += self._find(piece, pattern, allowed)
                else:
                    found.append(piece)
            pieces = found
        return pieces

    def _find(
        self, text: str, pattern: re.Pattern, allowed: Collection[str]
    ) -> Iterator[str | int]:
        done = 0
        for match in pattern.finditer(text):
            i, token = self._of_name[match[0]]
            start, end = match.span()
            if token.special and token.content not in allowed:
                continue
            if token.single_word and _inside_word(text, start, end):
                continue
            if token.lstrip:
                before = _SPACE_BEFORE.search(text, done, start)
                start = before.start() if before else start
            if token.rstrip:
                after = _SPACE_AFTER.match(text, end)
                end = after.end() if after else end
            if done < start:
                yield text[done:start]
            yield i
            done = end
        if done != len(text):
            yield text[done:]


class Borders:
    """Where a text may be cut so that the ids of its pieces are those of the whole.

    It may be cut only before a space or a line break between non-spaces, where no word of GPT-2's
    split crosses, but not everywhere: an added token may have the space in its name, or take it.
    """

    def __init__(self, tokens: Iterable[AddedToken] = (), *, prefix_space: bool = False) -> None:
        """tokens: those found in any text. prefix_space: whether text gets a space before it."""
        # before, after: how many characters on either side of a cut decide about it.
        # No cut is allowed between what ends as the first and what begins as the second of a pair.
        self._around: list[tuple[str, str]] = []
        for token in tokens:
            name = token.content
            starts = [k for k in range(1, len(name)) if name[k] in " \n"]
            self._around += [(name[:k], name[k:]) for k in starts]
            if token.rstrip or prefix_space:
                self._around.append((name, ""))
            if token.single_word and name[0] in " \n":
                self._around.append(("", name))
        self.before = max((len(before) for before, _ in self._around), default=0)
        self.after = max((len(after) for _, after in self._around), default=0)

    def allow(self, text: str, at: int) -> bool:
        """Return whether a text may be cut at a place that is before a space or line break."""
        return not any(
            text.endswith(before, 0, at) and text.startswith(after, at)
            for before, after in self._around
        )


def _inside_word(text: str, start: int, end: int) -> bool:
    """Return whether a character of a word stands beside text[start:end]."""
    before, after = text[start - 1 : start], text[end : end + 1]
    return any(one and is_of(one, r"\w") for one in (before, after))


def parse_id(text: str) -> int:
    """Return the id that a key of a JSON object is. Raises ValueError for another key."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{text!r:.40} is no id")
    return int(text)


class AddedIds:
    """Gives ids to added tokens as the tokenizers library does."""

    def __init__(self, vocab: Mapping[str, int], directory: str) -> None:
        self._vocab, self._directory = vocab, directory
        self._taken = set(vocab.values())
        self.tokens: dict[int, AddedToken] = {}
        self.by_name: dict[str, int] = {}
        self._next = len(vocab)

    def add(self, token: AddedToken, listed: int | None = None) -> None:
        """Add a token; one that is known gets these flags. listed: the id that a file gives it."""
        if not token.content:
            return
        i = self.by_name.get(token.content, self._vocab.get(token.content))
        if i is None:
            i = self._next
            if i in self._taken or i >= MAX_IDS:
                raise ValueError(f"token {token.content[:80]!r} gets id {i}, which another has")
        if listed not in (None, i) and token.content not in self.by_name:
            _LOGGER.warning(
                "%s gives %r id %s; taking %d, its place in the vocabulary, as transformers does",
                self._directory,
                token.content,
                listed,
                i,
            )
        self.tokens[i], self.by_name[token.content] = token, i
        self._next = max(self._next, i + 1)
