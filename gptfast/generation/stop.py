"""The end of a continuation, at end-of-text, a stop string or stop ids, and its text up to there.

Stops are found one symbol at a time by the automaton of Knuth, Morris and Pratt (1977), so the
result does not depend on how the text was cut into tokens. If two stops are found, the one that is
complete first counts; if the same character completes both, the one that began first counts.
"""

import codecs
import copy
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from gptfast import checks
from gptfast.tokenizer.bpe import Tokenizer, end_of_text

REPLACEMENT = "\ufffd"
"""The character that replaces bytes that are not UTF-8."""

Stop = str | Sequence[str | Sequence[int]]
Ends = int | Sequence[int] | None
"""The ids that end a continuation, which keeps them."""


class Matcher:
    """Finds a pattern in a stream of symbols; the state is how much of it the stream ends with."""

    def __init__(self, pattern: Sequence[Any]) -> None:
        self.pattern = pattern
        # The longest proper prefix that is also a suffix, of each prefix of the pattern.
        self._shorter = [0]
        state = 0
        for symbol in pattern[1:]:
            state = self.advance(state, symbol)
            self._shorter.append(state)

    def advance(self, state: int, symbol: Any) -> int:
        """Return the state after `symbol`; len(pattern) means that the pattern was found."""
        while state and (state == len(self.pattern) or self.pattern[state] != symbol):
            state = self._shorter[state - 1]
        return state + (self.pattern[state] == symbol)


@dataclass(frozen=True)
class Stops:
    """The stops of a continuation: ids that it keeps, and strings and id lists that it drops."""

    eos_ids: tuple[int, ...] = ()
    texts: tuple[Matcher, ...] = ()
    ids: tuple[Matcher, ...] = ()

    @classmethod
    def parse(
        cls, stop: Stop | None, eos_id: Ends, tokenizer: Tokenizer | None, vocab_size: int
    ) -> Self:
        """Return the stops that `generate`'s arguments describe.

        Raises ValueError for an argument of another form, IndexError for an id outside the
        vocabulary.
        """
        ends = eos_id if isinstance(eos_id, list | tuple) else [] if eos_id is None else [eos_id]
        eos_ids = tuple(checks.integer("eos_id", i, 0) for i in ends)
        if stop is not None and not isinstance(stop, Sequence):
            raise ValueError(f"stop must be a string or a list of strings and id lists, got {stop}")
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        texts = [one for one in stops if isinstance(one, str)]
        if texts and tokenizer is None:
            raise ValueError(
                f"stop has the string {texts[0]!r}: pass tokenizer=, which turns ids into text"
            )
        for text in texts:
            checks.text("a stop string", text)
        ids = [_id_list(one, vocab_size) for one in stops if not isinstance(one, str)]
        if "" in texts or [] in ids:
            raise ValueError(f"stop has an empty {'string' if '' in texts else 'id list'}")
        return cls(eos_ids, tuple(map(Matcher, texts)), tuple(map(Matcher, ids)))


def _id_list(one: Any, vocab_size: int) -> list[int]:
    if not isinstance(one, Sequence):
        raise ValueError(
            f"stop must be a string or a list of strings and id lists, got {one!r} in it; "
            "write one list of ids as stop=[[1, 2]]"
        )
    ids = [checks.integer("each token id in a stop list", i) for i in one]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise IndexError(
                f"stop has token id {i}, out of range for a vocabulary of {vocab_size}"
            )
    return ids


class TextStream:
    """Follows the new tokens of one prompt: their text as it becomes certain, and where it ends.

    Text is released in whole characters, once no stop can begin in it any more; bytes that are not
    UTF-8 become U+FFFD, as in `decode`. End-of-text, special tokens that end a text and ids beyond
    the tokenizer's have no text; without a tokenizer no id has any. All pieces together are the
    text before the stop.

    kept: how many of the tokens so far hold no part of a stop and cannot become part of one.
    ended: whether the continuation has ended; `kept` is then the number of tokens to return.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Stops) -> None:
        self.kept, self.ended = 0, False
        self._tokenizer, self._stops = tokenizer, stops
        self._silent: set[int | None] = set()
        if tokenizer is not None:
            special = getattr(tokenizer, "special_tokens", {}).values()
            self._silent = {end_of_text(tokenizer), *(i for i in stops.eos_ids if i in special)}
        self._pending = b""  # the beginning of a character
        # The text that was not released yet, and how many characters were released before it.
        self._held, self._released = "", 0
        # After each token: how many characters are complete, and how many have begun.
        self._whole, self._begun = [0], [0]
        self._text_states = [0] * len(stops.texts)
        self._id_states = [0] * len(stops.ids)

    def fork(self) -> Self:
        """Return an independent copy."""
        other = copy.copy(self)
        other._whole, other._begun = self._whole.copy(), self._begun.copy()
        other._text_states = self._text_states.copy()
        return other

    def read(self, ids: Sequence[int]) -> str:
        """Take all ids; return their text up to where they end, in one piece."""
        pieces = []
        for i in ids:
            if self.ended:
                break
            pieces.append(self.feed(i))
        return "".join(pieces) + self.finish()

    def feed(self, i: int) -> str:
        """Take one token; return the text that has become certain."""
        assert not self.ended
        self._pending += self._bytes(i)
        text, used = codecs.utf_8_decode(self._pending, "replace", False)
        self._pending = self._pending[used:]
        # The decoder waits for the other half of a surrogate, although no character can follow.
        if len(lost := self._pending.decode("utf-8", "replace")) > 1:
            text, self._pending = text + lost, b""
        start = self._find_text(text)
        self._whole.append(self._released + len(self._held))
        self._begun.append(self._whole[-1] + bool(self._pending))
        length = self._find_ids(i)
        if start is not None or length:
            return self._stop(start, length)
        return self.finish() if i in self._stops.eos_ids else self._release()

    def finish(self) -> str:
        """End, after the last token; return the text that was held back."""
        if self.ended:
            return ""
        start = None
        if self._pending:
            start = self._find_text(REPLACEMENT)
            self._whole[-1] = self._begun[-1]
        return self._stop(start, 0)

    def _bytes(self, i: int) -> bytes:
        tokenizer = self._tokenizer
        if tokenizer is None or i in self._silent or i >= tokenizer.n_vocab:
            return b""
        return tokenizer.decode_bytes([i])

    def _find_text(self, text: str) -> int | None:
        """Hold text; return the character at which the first complete stop string begins."""
        if not self._stops.texts:
            self._held += text
            return None
        for character in text:
            self._held += character
            found = 0
            for n, matcher in enumerate(self._stops.texts):
                state = self._text_states[n] = matcher.advance(self._text_states[n], character)
                if state == len(matcher.pattern):
                    found = max(found, state)
            if found:
                return self._released + len(self._held) - found
        return None

    def _find_ids(self, i: int) -> int:
        """Return the length of the longest stop id list that is complete with i, or 0."""
        matchers = self._stops.ids
        self._id_states = [
            matcher.advance(state, i)
            for matcher, state in zip(matchers, self._id_states, strict=True)
        ]
        found = [s for s, m in zip(self._id_states, matchers, strict=True) if s == len(m.pattern)]
        return max(found, default=0)

    def _tokens_before(self, character: int) -> int:
        """Return how many tokens hold no byte of the text from `character` on."""
        return bisect_right(self._begun, character) - 1

    def _stop(self, start: int | None, length: int) -> str:
        """End before the last `length` tokens and before the character `start`."""
        self.kept, self.ended = len(self._whole) - 1 - length, True
        text = self._held[: self._whole[self.kept] - self._released]
        text += REPLACEMENT * (self._begun[self.kept] - self._whole[self.kept])
        if start is not None:
            text = text[: start - self._released]
            self.kept = min(self.kept, self._tokens_before(start))
        return text

    def _release(self) -> str:
        """Release the text that no stop that has begun can hold a part of."""
        tokens = len(self._whole) - 1 - max(self._id_states, default=0)
        certain = self._released + len(self._held) - max(self._text_states, default=0)
        self.kept = min(tokens, self._tokens_before(certain)) if self._stops.texts else tokens
        n = min(certain, self._whole[tokens]) - self._released
        text, self._held = self._held[:n], self._held[n:]
        self._released += n
        return text


def id_stream(tokenizer: Tokenizer | None, stops: Stops) -> TextStream:
    """Return a stream for callers that want ids only; it decodes text only to find stop strings."""
    return TextStream(tokenizer if stops.texts else None, stops)
