"""Train a tokenizer, write it and read it back; refuse pairs of files that do not fit."""

import builtins
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import python_generator
from tokenizers_of_others import EOT, TEXTS

from gptfast import get_tokenizer
from gptfast.cli.tokenizer import TrainTokenizer
from gptfast.data.embedded import embedded_text
from gptfast.tokenizer import vocabulary as tokenizer
from gptfast.tokenizer.train import reduce_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    texts = [*TEXTS, embedded_text()[:60_000]]
    return train_tokenizer(texts, 600, tmp_path_factory.mktemp("trained") / "new" / "folder")


def library_encoder(directory: Path) -> Callable[[str], list[int]]:
    """Return the tokenizers library's own encoder for the two files."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    merges = [tuple(line.split(" ")) for line in (directory / "vocab.bpe").read_text().split("\n")]
    vocab = json.loads((directory / "encoder.json").read_text())
    theirs = Tokenizer(models.BPE(vocab, merges[1:-1]))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return lambda text: theirs.encode(text).ids


def test_trained_sizes(trained: tokenizer.Tokenizer) -> None:
    directory = Path(trained.name)
    assert (trained.n_vocab, trained.eot) == (600, 599)
    assert trained.decode([599]) == EOT
    lines = (directory / "vocab.bpe").read_text().split("\n")
    assert (lines[0], len(lines), lines[-1]) == ("#version: 0.2", 1 + 600 - 257 + 1, "")
    assert lines[1] == "e r" or len(lines[1].split(" ")) == 2
    assert sorted(path.name for path in directory.iterdir()) == ["encoder.json", "vocab.bpe"]
    assert get_tokenizer(trained.name).encode("the cat") == trained.encode("the cat")
    # Some words of the texts are tokens now.
    assert len(trained.encode(" the")) == 1
    assert len(trained.encode(embedded_text()[:60_000])) < 60_000 / 2


def test_trained_ids_equal_the_librarys(trained: tokenizer.Tokenizer) -> None:
    encode = library_encoder(Path(trained.name))
    generator = python_generator(0)
    text = "".join(TEXTS) + embedded_text()
    for _ in range(300):
        start = generator.randrange(len(text))
        part = text[start : start + generator.randrange(200)]
        assert trained.encode(part) == encode(part)
    for part in ("   ", " \n \n", "1234567", "'s's", "a" * 300, "\u0301\u0300", "٣٤ ½²"):
        assert trained.encode(part) == encode(part)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_trained_round_trip(trained: tokenizer.Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def files(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in ("vocab.bpe", "encoder.json")]


def test_training_is_deterministic(tmp_path: Path) -> None:
    for name in "ab":
        train_tokenizer(iter(TEXTS), 400, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("texts", [[], [""], ["abcdefgh"], ["ab ab"]])
def test_a_short_text_gives_fewer_tokens(texts: list[str], tmp_path: Path) -> None:
    short = train_tokenizer(texts, 1000, tmp_path)
    assert short.n_vocab == (258 if texts == ["ab ab"] else 257)
    assert short.eot == short.n_vocab - 1
    assert short.decode(short.encode("ab é")) == "ab é"


def test_training_names_in_text_are_text(tmp_path: Path) -> None:
    trained = train_tokenizer([EOT * 20], 300, tmp_path)
    assert trained.eot not in trained.encode(EOT)
    assert trained.encode(EOT, {EOT}) == [trained.eot]


@pytest.mark.parametrize("size", [256, 65537, 0, -1, 1000.0, "1000", None])
def test_vocab_size_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"vocab_size must be .* 257 to 65536, got {size!r}"):
        train_tokenizer(["a"], size, tmp_path)
    assert not list(tmp_path.iterdir())


def failing() -> Iterator[str]:
    yield "a"
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("text", ValueError, r"texts must be an iterable of strings, got str; pass \[text\]"),
        (5, ValueError, "texts must be an iterable of strings, got int"),
        (["a", b"b"], ValueError, "text 1 must be a string, got bytes"),
        (["a", "\ud800"], ValueError, "text 1 has the lone surrogate"),
        (failing(), OSError, "the disk is gone"),
    ],
    ids=["str", "int", "bytes", "surrogate", "failing"],
)
def test_texts_refused(texts: Any, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        train_tokenizer(texts, 300, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_files_in_the_way(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} exists; name another directory or delete it"):
        train_tokenizer(["a"], 300, tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "mine")]


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install tokenizers"):
        train_tokenizer(["a"], 300, tmp_path)


def _swap_ids(vocab: dict[str, int], a: str, b: str) -> None:
    vocab[a], vocab[b] = vocab[b], vocab[a]


# name: (change of the lines of vocab.bpe, change of encoder.json's ids, the file at fault and why)
UNFIT: dict[str, tuple[Callable[[list[str]], Any], Callable[[dict[str, int]], Any], str]] = {
    "missing-part": (
        lambda m: 0,
        lambda v: v.update(zz=v.pop("e")),
        "vocab.bpe does not fit: .*does not merge two tokens of the vocabulary: it has no",
    ),
    "twice": (
        lambda m: 0,
        lambda v: v.update({EOT: 3}),
        "encoder.json does not fit: .*have the same id 3",
    ),
    "negative": (
        lambda m: 0,
        lambda v: v.update({EOT: -1}),
        "encoder.json does not fit: .*has id -1; ids are 0 to",
    ),
    "huge": (
        lambda m: 0,
        lambda v: v.update({EOT: 10**12}),
        "encoder.json does not fit: .*has id 1000000000000; ids are 0 to",
    ),
    "float": (
        lambda m: 0,
        lambda v: v.update({EOT: 5.0}),
        "encoder.json does not fit: .*not a JSON object of tokens and",
    ),
    "bool": (
        lambda m: 0,
        lambda v: v.update({"!": False}),
        "encoder.json does not fit: .*not a JSON object of tokens and",
    ),
    "three-parts": (
        lambda m: m.insert(1, "a b c"),
        lambda v: 0,
        "vocab.bpe does not fit: .*line 2, 'a b c', does not merge",
    ),
    "one-part": (
        lambda m: m.insert(1, "ab"),
        lambda v: 0,
        "vocab.bpe does not fit: .*line 2, 'ab', does not merge",
    ),
    "empty-line": (
        lambda m: m.insert(1, ""),
        lambda v: 0,
        "vocab.bpe does not fit: .*line 2, '', does not merge",
    ),
    "unknown-part": (
        lambda m: m.insert(1, "a zz"),
        lambda v: 0,
        "vocab.bpe does not fit: .*merge 1, 'a' with 'zz', does not merge",
    ),
    "unknown-token": (
        lambda m: m.insert(1, "Q Z"),
        lambda v: 0,
        "vocab.bpe does not fit: .*merge 1 makes 'QZ', which",
    ),
    "cut-off": (lambda m: m.__delitem__(slice(100, None)), lambda v: 0, "merges are incomplete"),
    "empty": (lambda m: m.clear(), lambda v: 0, "merges are incomplete"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_files_that_do_not_fit(name: str, trained: tokenizer.Tokenizer, tmp_path: Path) -> None:
    change_merges, change_ids, message = UNFIT[name]
    merges = (Path(trained.name) / "vocab.bpe").read_text().split("\n")
    vocab = json.loads((Path(trained.name) / "encoder.json").read_text())
    change_merges(merges)
    change_ids(vocab)
    (tmp_path / "vocab.bpe").write_text("\n".join(merges))
    (tmp_path / "encoder.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match=message) as caught:
        get_tokenizer(str(tmp_path))
    assert "GPT-2's" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[1]", b"{", b'{"a": 1, "a": 2}', b"[" * 100_000, b"null", b"9" * 5000],
    ids=["empty", "bytes", "list", "cut", "twice", "deep", "null", "long"],
)
def test_encoder_that_is_no_object(
    content: bytes, trained: tokenizer.Tokenizer, tmp_path: Path
) -> None:
    shutil.copy(Path(trained.name) / "vocab.bpe", tmp_path)
    (tmp_path / "encoder.json").write_bytes(content)
    with pytest.raises(ValueError, match="encoder.json does not fit: "):
        get_tokenizer(str(tmp_path))


def test_vocab_bpe_that_is_no_text(trained: tokenizer.Tokenizer, tmp_path: Path) -> None:
    shutil.copy(Path(trained.name) / "encoder.json", tmp_path)
    (tmp_path / "vocab.bpe").write_bytes(b"#version: 0.2\n\xff \xfe\n")
    with pytest.raises(ValueError, match="vocab.bpe does not fit: "):
        get_tokenizer(str(tmp_path))


def test_a_directorys_own_order_of_ids(trained: tokenizer.Tokenizer, tmp_path: Path) -> None:
    """Ids need not have OpenAI's order: end-of-text may come first."""
    vocab = json.loads((Path(trained.name) / "encoder.json").read_text())
    vocab = {token: 0 if token == EOT else i + 1 for token, i in vocab.items()}
    shutil.copy(Path(trained.name) / "vocab.bpe", tmp_path)
    (tmp_path / "encoder.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    other = get_tokenizer(str(tmp_path))
    assert (other.eot, other.n_vocab) == (0, 600)
    assert other.encode(TEXTS[2]) == [i + 1 for i in trained.encode(TEXTS[2])]


def test_no_text_is_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text to learn from; give files"):
        TrainTokenizer(data=(), out=str(tmp_path / "v")).run()
    assert not (tmp_path / "v").exists()


def test_content_not_place_tells_vocabularies_apart(tmp_path: Path) -> None:
    """Prepared data fits a copy of its vocabulary, but not another one in the same place."""
    from gptfast.data.prepare import prepare
    from gptfast.data.sources import load_data

    text = embedded_text()[:4000]
    (tmp_path / "a.txt").write_text(text, "utf-8")
    first = train_tokenizer([text], 300, tmp_path / "v")
    prepare([tmp_path / "a.txt"], tmp_path / "tokens", first, progress=False)
    shutil.copytree(tmp_path / "v", tmp_path / "copy")
    copy = get_tokenizer(str(tmp_path / "copy"))
    assert copy.name != first.name and copy.sha256 == first.sha256
    assert len(load_data([tmp_path / "tokens"], copy)) == 2
    shutil.rmtree(tmp_path / "v")
    other = train_tokenizer([text.upper()], 300, tmp_path / "v")
    assert (other.name, other.n_vocab) == (first.name, first.n_vocab)
    with pytest.raises(ValueError, match="was prepared with tokenizer"):
        load_data([tmp_path / "tokens"], other)


def test_a_reduced_vocabulary_splits_words_alike(tmp_path: Path) -> None:
    """A word is split as before unless one of its tokens occurs only once in the text."""
    gpt2, text = get_tokenizer("gpt2"), embedded_text()[:200_000]
    reduced = reduce_tokenizer(gpt2, text, tmp_path / "reduced")
    assert reduced.n_vocab < 6000 and reduced.eot == reduced.n_vocab - 1
    counts = Counter(gpt2.encode(text))
    same = 0
    for word in {f" {word}" for word in text.split()}:
        before, after = gpt2.encode(word), reduced.encode(word)
        assert reduced.decode(after) == word
        if all(counts[i] > 1 for i in before):
            assert [gpt2.decode([i]) for i in before] == [reduced.decode([i]) for i in after]
            same += 1
    assert same > 3000
    other = "naïve \u3000日本語 \x00 supercalifragilistic"
    assert reduced.decode(reduced.encode(other)) == other


def test_reducing_again_replaces_the_files(tmp_path: Path) -> None:
    gpt2 = get_tokenizer("gpt2")
    first = reduce_tokenizer(gpt2, "the cat, the cat", tmp_path)
    added = [first.decode([i]) for i in range(256, first.n_vocab)]
    assert added == ["at", " c", " cat", EOT]
    second = reduce_tokenizer(gpt2, "a b", tmp_path)
    assert (second.n_vocab, second.eot) == (257, 256)
