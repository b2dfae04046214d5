"""Compare the end and the text of a continuation with plain searches of the whole text."""

import os
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptfast.generation.stop import Matcher, Stops, TextStream


class Pieces:
    """A tokenizer whose tokens may hold parts of characters; 30 is end-of-text."""

    name = "pieces"
    tokens = [
        *(b"a", b"b", b"ab", b"aab", b"ba", b"c", b"", b"abcab", b"\xe2", b"\x82", b"\xac"),
        *(b"\xe2\x82", b"\x82\xac", b"\xe2\x82\xaca", b"b\xe2", b"\xf0\x9f", b"\x98\x80"),
        *(b"\xf0", b"\xff", b"\xc0", b"\xed\xa0", b"\xf4\x90", b"\xe0\x80", b"a\xc3", b"\xa9b"),
        *("é".encode(), "€€".encode(), "😀".encode(), "\ufffd".encode(), b" "),
    ]
    n_vocab, eot = len(tokens) + 1, len(tokens)

    def encode(self, text: str, allowed_special: Sequence[str] = ()) -> list[int]:
        raise NotImplementedError

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[i] for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes([i for i in ids if i < self.eot]).decode("utf-8", "replace")


PIECES = Pieces()
# Some ids are beyond the tokenizer's, because a model may have more.
ids_lists = st.lists(st.integers(0, PIECES.n_vocab + 2), max_size=30)
stop_texts = st.lists(st.text("abc€é😀\ufffd ", min_size=1, max_size=4), max_size=3)
stop_ids = st.lists(st.lists(st.integers(0, PIECES.n_vocab), min_size=1, max_size=3), max_size=2)


def whole_characters(ids: Sequence[int]) -> str:
    """Return the text that stays the same whatever comes next."""
    data = PIECES.decode_bytes([i for i in ids if i < PIECES.eot])
    nexts = (b"", b"\x80" * 3, b"\x90" * 3, b"\xbf" * 3)
    return os.path.commonprefix([(data + more).decode("utf-8", "replace") for more in nexts])


def first_text_stop(text: str, texts: Sequence[str]) -> int | None:
    """Return where the stop begins that is complete first; the longest one if several are."""
    for end in range(len(text) + 1):
        found = [len(one) for one in texts if text[:end].endswith(one)]
        if found:
            return end - max(found)
    return None


def plain_end(
    ids: Sequence[int], eos: int | None, texts: Sequence[str], lists: Sequence[Sequence[int]]
) -> tuple[int, str]:
    """Return the number of kept ids and their text by searching everything after each token."""
    for n in range(1, len(ids) + 1):
        seen = ids[:n]
        start = first_text_stop(whole_characters(seen), texts)
        length = max((len(one) for one in lists if seen[-len(one) :] == one), default=0)
        if start is not None or length:
            kept, text = n - length, PIECES.decode(seen[: n - length])
            return cut(ids, kept, text, start)
        if seen[-1] == eos:
            break
    else:
        seen = ids
    text = PIECES.decode(seen)
    return cut(ids, len(seen), text, first_text_stop(text, texts))


def cut(ids: Sequence[int], kept: int, text: str, start: int | None) -> tuple[int, str]:
    if start is None:
        return kept, text
    while len(PIECES.decode(ids[:kept])) > start:
        kept -= 1
    return kept, text[:start]


def stops(eos: int | None, texts: Sequence[str], lists: Sequence[Sequence[int]]) -> Stops:
    return Stops.parse([*texts, *lists], eos, PIECES, PIECES.n_vocab + 3)


@settings(max_examples=700, deadline=None)
@given(
    ids=ids_lists,
    eos=st.none() | st.integers(0, PIECES.n_vocab),
    texts=stop_texts,
    lists=stop_ids,
)
@example(ids=[0, 2, 0, 2, 5], eos=None, texts=["aabaabc"], lists=[])
@example(ids=[8, 9, 10], eos=None, texts=["€"], lists=[])
@example(ids=[14, 12, 0], eos=None, texts=["€a"], lists=[[12, 1]])
@example(ids=[7], eos=None, texts=["abc", "b"], lists=[])
@example(ids=[0, 8], eos=None, texts=["\ufffd"], lists=[])
def test_equals_a_search_of_everything(
    ids: list[int], eos: int | None, texts: list[str], lists: list[list[int]]
) -> None:
    kept, text = plain_end(ids, eos, texts, lists)
    stream = TextStream(PIECES, stops(eos, texts, lists))
    pieces, counts = [], []
    for i in ids:
        pieces.append(stream.feed(i))
        counts.append(stream.kept)
        # Text that was returned is never taken back.
        assert text.startswith("".join(pieces))
        if stream.ended:
            break
    pieces.append(stream.finish())
    assert (stream.kept, "".join(pieces)) == (kept, text)
    assert counts == sorted(counts) and all(count <= kept for count in counts)
    assert stream.finish() == ""
    again = TextStream(PIECES, stops(eos, texts, lists))
    assert (again.read(ids), again.kept) == (text, kept)


@settings(max_examples=300, deadline=None)
@given(ids=ids_lists)
def test_without_stops_every_whole_character_is_returned(ids: list[int]) -> None:
    stream, text = TextStream(PIECES, Stops()), ""
    for n, i in enumerate(ids, 1):
        text += stream.feed(i)
        assert text == whole_characters(ids[:n])
        assert stream.kept == n
    assert text + stream.finish() == PIECES.decode(ids)


@settings(max_examples=300, deadline=None)
@given(ids=ids_lists, texts=st.lists(st.text("abc€", min_size=1, max_size=4), min_size=1))
def test_nothing_is_held_back_without_need(ids: list[int], texts: list[str]) -> None:
    """Only text that may be the beginning of a stop string is held back."""
    stream, text = TextStream(PIECES, stops(None, texts, [])), ""
    for n, i in enumerate(ids, 1):
        text += stream.feed(i)
        if stream.ended:
            break
        held = whole_characters(ids[:n]).removeprefix(text)
        assert not held or any(one.startswith(held) for one in texts)


@settings(max_examples=200, deadline=None)
@given(ids=ids_lists, texts=stop_texts, lists=stop_ids, at=st.integers(0, 10))
def test_a_fork_is_independent(
    ids: list[int], texts: list[str], lists: list[list[int]], at: int
) -> None:
    stream = TextStream(PIECES, stops(None, texts, lists))
    text = ""
    for i in ids[:at]:
        text += stream.feed(i)
        if stream.ended:
            return
    fork = stream.fork()
    fork.read([0, 8, 2, 14, 5])
    wanted = TextStream(PIECES, stops(None, texts, lists))
    assert text + stream.read(ids[at:]) == wanted.read(ids)
    assert stream.kept == wanted.kept


@settings(max_examples=500, deadline=None)
@given(pattern=st.text("ab", min_size=1, max_size=6), text=st.text("ab", max_size=30))
def test_matcher_state_is_the_longest_prefix_at_the_end(pattern: str, text: str) -> None:
    matcher, state = Matcher(pattern), 0
    for n, character in enumerate(text, 1):
        state = matcher.advance(state, character)
        ends = (k for k in range(len(pattern), -1, -1) if text[:n].endswith(pattern[:k]))
        assert state == next(ends)


@pytest.mark.parametrize(
    ("stop", "eos_id", "message"),
    [
        ("", None, "stop has an empty string"),
        (["a", ""], None, "stop has an empty string"),
        ([[]], None, "stop has an empty id list"),
        ([1, 2], None, r"got 1 in it; write one list of ids as stop=\[\[1, 2\]\]"),
        (5, None, "stop must be a string or a list .*, got 5"),
        ({"a"}, None, "stop must be a string or a list"),
        (b"ab", None, "got 97 in it"),
        ([[1.5]], None, "each token id in a stop list must be an integer, got 1.5"),
        ([None], None, "got None in it"),
        ("\ud800", None, r"a stop string has the lone surrogate '\\ud800' at character 0"),
        (None, "x", "eos_id must be an integer >= 0, got 'x'"),
        (None, 1.5, "eos_id must be an integer >= 0, got 1.5"),
        (None, -1, "eos_id must be an integer >= 0, got -1"),
    ],
)
def test_stops_refused(stop: object, eos_id: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stops.parse(stop, eos_id, PIECES, PIECES.n_vocab)


def test_stop_string_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="stop has the string 'a': pass tokenizer="):
        Stops.parse(["a"], None, None, 10)


@pytest.mark.parametrize("bad", [-1, 10])
def test_stop_ids_out_of_range(bad: int) -> None:
    with pytest.raises(IndexError, match=f"stop has token id {bad}, out of range"):
        Stops.parse([[1, bad]], None, None, 10)
