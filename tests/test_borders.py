"""Pieces of a file and added tokens; vocabularies without end-of-text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import SIZES, Capture, done, refused, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_of_others import added, base, whole, write

import gptfast.data.documents
from gptfast import get_tokenizer
from gptfast.data.documents import Fields, safe_pieces
from gptfast.data.tokenize import tokenize
from gptfast.tokenizer.bpe import BPETokenizer, borders_of

# Names with a space or a line break at every place, some within others.
NAMES = ["<x>", "the cat", " <y>", "\n<z>", "a b c", "b c", "<e> ", "<p>\n", "cat\nand a", "hat  x"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalized": {"normalized": True},
    "lstrip": {"lstrip": True},
    "rstrip": {"rstrip": True},
    "both": {"lstrip": True, "rstrip": True},
    "single": {"single_word": True},
    "special": {"special": True},
    "mixed": {"single_word": True, "rstrip": True, "normalized": True},
}
PARTS = [*NAMES, *(name.strip() for name in NAMES), "a", "b", "c", "x", "cat", " ", "\n", "  ", "é"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=30).map("".join)


def tokenizer_of(directory: Path, flags: dict[str, Any], **others: Any) -> BPETokenizer:
    vocab, merges = base(directory / "base")
    n = len(vocab)
    tokens = [added(n + i, name, **flags) for i, name in enumerate(NAMES)]
    write(directory, tokenizer_json=whole(vocab, merges, added_tokens=tokens, **others))
    found = get_tokenizer(str(directory))
    assert isinstance(found, BPETokenizer)
    return found


@pytest.fixture(scope="module")
def of_kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], BPETokenizer]:
    made: dict[tuple[str, bool], BPETokenizer] = {}

    def make(kind: str, space: bool) -> BPETokenizer:
        if (kind, space) not in made:
            directory = tmp_path_factory.mktemp(kind)
            made[kind, space] = tokenizer_of(directory, KINDS[kind], add_prefix_space=space)
        return made[kind, space]

    return make


@pytest.mark.parametrize("space", [False, True], ids=["", "prefix-space"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, size=st.integers(1, 12))
def test_pieces_have_the_ids_of_the_whole(
    of_kind: Callable[[str, bool], BPETokenizer], kind: str, space: bool, text: str, size: int
) -> None:
    tokenizer = of_kind(kind, space)
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    first, *others = safe_pieces(chunks, borders_of(tokenizer))
    assert first + "".join(others) == text
    ids = tokenizer.encode_opening(first)
    for piece in others:
        ids += tokenizer.encode_continuation(piece)
    assert ids == tokenizer.encode(text)


def test_a_long_text_is_still_cut(of_kind: Callable[[str, bool], BPETokenizer]) -> None:
    borders = borders_of(of_kind("both", True))
    pieces = list(safe_pieces(["the cat sat on a mat of b c "] * 200, borders))
    assert max(map(len, pieces)) < 200
    # Here every other space is in a token, and one place of a whole chunk remains.
    assert list(safe_pieces(["a b c", " a b c", " a b c"], borders))[0] == "a b c a b c a b c"
    plain = borders_of(of_kind("plain", False))
    assert list(safe_pieces(["a b c", " a b c", " a b c "], plain))[0] == "a b c"


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=TEXTS.filter(str.strip), size=st.integers(4, 9))
def test_a_file_in_pieces(
    of_kind: Callable[[str, bool], BPETokenizer],
    text: str,
    size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gptfast.data.documents, "READ_BYTES", size)
    monkeypatch.setattr(gptfast.data.tokenize, "BATCH_CHARACTERS", 5)
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokenizer = of_kind("both", False)
    parts = tokenize([tmp_path / "a.txt"], tokenizer, Fields(), 2)
    ids = [i for part in parts for i in part.tokens.tolist()]
    assert ids == tokenizer.encode(text)


# No end-of-text

TEXT = "the cat and the hat, the rat and the bat; 1234 12 1999 don't I'll they're\n" * 30


@pytest.fixture
def endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The directory, beside the working directory, of a vocabulary that names no end-of-text."""
    monkeypatch.chdir(tmp_path)
    vocab, merges = base(tmp_path / "base")
    write(tmp_path / "voc", tokenizer_json=whole(vocab, merges))
    Path("a.txt").write_text(TEXT)
    return "voc"


def test_one_text_needs_no_end_of_text(
    endless: str, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    assert "1 documents" in done(
        capsys, "prepare", "--data", "a.txt", "--out", "tokens", "--tokenizer", endless
    )
    assert "names no end-of-text (eos_token in tokenizer_config.json)" in caplog.text
    trained = [*SIZES, "--batch-size", 2, "--sample-tokens", 4, "--max-steps", 2, "--device", "cpu"]
    for data in (["--data", "tokens"], ["--data", "a.txt", "--tokenizer", endless]):
        out = f"run{len(data)}"
        done(capsys, "train", *data, *trained, "--out", out)
        text = done(capsys, "generate", out, "--prompt", "the ", "--max-new-tokens", 4, "--seed", 1)
        assert text.startswith("the ")
        assert "perplexity" in done(capsys, "eval", out, "--data", "a.txt")


@pytest.mark.parametrize("command", ["prepare", "train", "eval"])
@pytest.mark.parametrize("kind", ["documents", "prompts"])
def test_several_documents_need_one(
    endless: str, kind: str, command: str, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    records = {
        "documents": '{"text": "the cat"}\n' * 2,
        "prompts": '{"prompt": "the", "completion": " cat"}\n',
    }
    Path("a.jsonl").write_text(records[kind])
    own = ["--tokenizer", endless]
    arguments: dict[str, list[Any]] = {
        "prepare": ["prepare", "--out", "t", *own],
        "train": ["train", "--out", "r", *SIZES, *own],
        "eval": ["eval", "run"],
    }
    if command == "eval":
        done(capsys, "train", "--data", "a.txt", *own, *SIZES, "--max-steps", 1, "--out", "run")
    result = run(capsys, *arguments[command], "--data", "a.jsonl")
    refused(result, "has no end-of-text", "name its eos_token in tokenizer_config.json")
