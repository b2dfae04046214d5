"""Test prepare: pieces against whole texts, parts against split_tokens, layouts, refusals."""

import json
import os
import re
import resource
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gptfast.data.documents
import gptfast.data.prepare
import gptfast.data.tokenize
from gptfast import get_tokenizer
from gptfast.data.documents import find_files, read_documents, safe_pieces
from gptfast.data.embedded import embedded_text
from gptfast.data.prepare import prepare
from gptfast.data.sources import load_data
from gptfast.data.token_files import Documents, TokenFiles, index_path, open_tokens
from gptfast.data.tokens import as_tokens, split_tokens
from gptfast.tokenizer.bpe import Tokenizer

FILES = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BYTE = get_tokenizer("byte")
# Texts have words, runs of white space, apostrophes, numbers, marks, scripts without spaces.
WORDS = "a I'll 's ' don't 1 23 é 漢字 かな ع 😀 e\u0301 . ?! - <|endoftext|> xxxxxxxxxxxxx".split()
SPACES = [" ", " ", "  ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u2003", "\x1c", "\x85"]
TEXTS = st.lists(
    st.sampled_from(WORDS) | st.sampled_from(SPACES),
    max_size=40,
).map("".join)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return get_tokenizer("gpt2")


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptfast.data.documents, "READ_BYTES", 7)
    monkeypatch.setattr(gptfast.data.tokenize, "BATCH_CHARACTERS", 3)


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def part(out: Path, name: str) -> TokenFiles | Documents:
    return open_tokens(sorted(out.glob(f"{name}_*.bin")))


def tokens_of(out: Path, name: str) -> list[int]:
    source = part(out, name)
    return (source.span() if isinstance(source, Documents) else source).tensor().tolist()


@settings(max_examples=400, deadline=None)
@example(text="a b", size=1)
@example(text="don' t  x\n\ny 's", size=2)
@given(text=TEXTS, size=st.integers(1, 9))
def test_pieces_give_the_whole_texts_tokens(gpt2: Tokenizer, text: str, size: int) -> None:
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    pieces = list(safe_pieces(chunks))
    assert "".join(pieces) == text
    assert sum(map(gpt2.encode, pieces), []) == gpt2.encode(text)


def test_pieces_are_cut_wherever_possible() -> None:
    assert list(safe_pieces(["one two", " three\nfo", "ur  five"])) == [
        "one", " two three", "\nfour  five"
    ]  # fmt: skip
    # A piece is cut only once the character after the space is there.
    assert list(safe_pieces(["a", " ", "b", " c"])) == ["a", " b", " c"]
    assert list(safe_pieces(["漢字", "かな", "  \n"])) == ["漢字かな  \n"]


@FILES
@given(texts=st.lists(TEXTS.filter(str.strip), min_size=1, max_size=3), workers=st.integers(1, 3))
@pytest.mark.usefixtures("tiny_pieces")
def test_files_read_piecewise(
    gpt2: Tokenizer, texts: list[str], workers: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("text")
    for i, text in enumerate(texts):
        # Reading seven bytes at a time also cuts characters of several bytes.
        (folder / f"{i}.txt").write_bytes(text.encode())
    wanted = gpt2.encode(texts[0])
    for text in texts[1:]:
        wanted += [gpt2.eot, *gpt2.encode(text)]
    summary = prepare([folder], folder / "out", gpt2, split=(1.0,), workers=workers)
    assert tokens_of(folder / "out", "train") == wanted
    assert summary["documents"] == len(texts)
    assert summary["tokens"] == {"train": len(wanted)}


@FILES
@given(
    n=st.integers(30, 400),
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    shard_tokens=st.integers(20, 450),
)
def test_parts_are_those_of_the_text_itself(
    n: int, weights: list[int], shard_tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(embedded_text()[:n])
    split, out = [w / sum(weights) for w in weights], folder / "out"
    summary = prepare([folder / "a.txt"], out, BYTE, split=split, shard_tokens=shard_tokens)
    names = ["train", "val", "test"][: len(split)]
    parts = load_data([folder / "a.txt"], BYTE, split)
    assert [p.tolist() for p in parts] == [tokens_of(out, name) for name in names]
    assert [p.tensor().tolist() for p in load_data([out], BYTE, split)] == [
        p.tolist() for p in parts
    ]
    assert summary["tokens"] == {k: len(p) for k, p in zip(names, parts, strict=True)}
    shards = -(-np.array([len(p) for p in parts]) // shard_tokens)
    assert sorted(path.name for path in out.glob("*.bin")) == sorted(
        f"{name}_{i:06d}.bin" for name, k in zip(names, shards, strict=True) for i in range(k)
    )


def test_the_embedded_text_prepared(gpt2: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(embedded_text(), "utf-8")
    prepare([tmp_path / "a.txt"], tmp_path / "out", gpt2, shard_tokens=50_000, workers=2)
    wanted = split_tokens(as_tokens(embedded_text(), gpt2))
    for name, tokens in zip(("train", "val"), wanted, strict=True):
        assert tokens_of(tmp_path / "out", name) == tokens.tolist()


def test_layout_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh")
    (tmp_path / "b.md").write_text("ij")
    out = tmp_path / "new" / "out"
    summary = prepare([tmp_path / "?.*"], out, BYTE, split=(0.8, 0.2), shard_tokens=5)
    # The part has nine of eleven tokens; 256 is end-of-text.
    header = np.zeros(256, "<i4")
    contents = {"train_000000": b"abcde", "train_000001": b"fgh\0", "val_000000": b"ij"}
    for name, text in contents.items():
        tokens = np.frombuffer(text, np.uint8).astype("<u2")
        header[:3] = 20240520, 1, len(tokens)
        tokens[tokens == 0] = 256
        assert (out / f"{name}.bin").read_bytes() == header.tobytes() + tokens.tobytes()
    assert json.loads((out / "meta.json").read_text()) == {
        "format": 1,
        "tokenizer": "byte",
        "vocabulary": get_tokenizer("byte").sha256,
        "n_vocab": 257,
        "eot": 256,
        "documents": 2,
        "tokens": {"train": 9, "val": 2},
        "sources": [str(tmp_path / "a.txt"), str(tmp_path / "b.md")],
    }
    assert summary["files"] == sorted([out / "meta.json", *(out / f"{n}.bin" for n in contents)])
    assert os.listdir(out.parent) == ["out"]


def test_jsonl_texts(gpt2: Tokenizer, tmp_path: Path) -> None:
    texts = ["one", "", "two <|endoftext|> \u00fc", "three"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": text, "id": 3} for text in texts])
    path.write_text(path.read_text().replace("\n", "\r\n  \n", 2))
    summary = prepare([path], tmp_path / "out", gpt2, split=(1.0,), text_field="body")
    wanted = gpt2.encode("one") + [gpt2.eot, gpt2.eot] + gpt2.encode(texts[2])
    assert tokens_of(tmp_path / "out", "train") == wanted + [gpt2.eot, *gpt2.encode("three")]
    assert wanted.count(gpt2.eot) == 2
    assert summary["documents"] == 4


@FILES
@given(
    # With fewer documents, a part of a seventh can be empty.
    pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=8, max_size=20),
    weights=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    shard_tokens=st.integers(1, 200),
)
@pytest.mark.usefixtures("tiny_pieces")
def test_prompts_and_completions(
    gpt2: Tokenizer,
    pairs: list[tuple[str, str]],
    weights: list[int],
    shard_tokens: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    path = write_jsonl(folder / "a.jsonl", [{"p": p, "c": c} for p, c in pairs])
    fields = {"prompt_field": "p", "completion_field": "c"}
    split, out = [w / sum(weights) for w in weights], folder / "out"
    summary = prepare([path], out, gpt2, split=split, shard_tokens=shard_tokens, **fields)
    encoded = [(gpt2.encode(p), [*gpt2.encode(c), gpt2.eot]) for p, c in pairs]
    edges = [round(len(pairs) * sum(split[:i])) for i in range(len(split) + 1)]
    names = ["train", "val", "test"][: len(split)]
    in_memory = load_data([path], gpt2, split, **fields)
    prepared = load_data([out], gpt2, split)
    for i, name in enumerate(names):
        wanted = [(p + c, len(p)) for p, c in encoded[edges[i] : edges[i + 1]]]
        for source in (in_memory[i], prepared[i], part(out, name)):
            found = [source.document(k) for k in range(len(source))]
            assert [(tokens.tolist(), at) for tokens, at in found] == wanted
        assert summary["tokens"][name] == sum(len(tokens) for tokens, _ in wanted)
    assert summary["documents"] == len(pairs)
    assert {index_path(shard) for shard in out.glob("*.bin")} == set(out.glob("*.idx"))


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[Any]:
    """Check that prepare raises this error and leaves only the files that were there."""

    def check(error: type[BaseException], message: str, *paths: Path, **options: Any) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=message):
            prepare(paths, tmp_path / "out", options.pop("tokenizer", BYTE), **options)
        assert sorted(tmp_path.rglob("*")) == before

    yield check


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "is not JSON"),
        ("[1]", "is not a JSON object with a field 'text'"),
        ('{"body": "x"}', "has no field 'text', only body"),
        ("{}", "has no field 'text', only none"),
        ('{"prompt": "x"}', "has no field 'completion', only prompt"),
        ('{"text": 3}', "field 'text' must be a string, got 3"),
        ('{"prompt": null, "completion": ""}', "field 'prompt' must be a string, got None"),
        ('{"text": "\\ud800"}', "field 'text' has half of a surrogate pair"),
        ("[" * 100_000, "is not JSON"),
        ('{"prompt": "x", "completion": "y"}', "is a prompt and a completion, but the data"),
    ],
    ids="syntax list field empty completion number null surrogate deep mixed".split(),
)
def test_bad_lines(line: str, message: str, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    where = re.escape(str(tmp_path / "a.jsonl:3"))
    refused(ValueError, f"{where}:? {message}", tmp_path / "a.jsonl")


def test_text_after_prompts(tmp_path: Path, refused: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x", "completion": "y"}, {"text": "z"}])
    refused(ValueError, "a.jsonl:2 is plain text, but the data before it is a prompt and a", path)
    path.write_text(path.read_text().splitlines()[0])
    (tmp_path / "b.txt").write_text("text")
    refused(
        ValueError, "b.txt is plain text, but the data", tmp_path / "a.jsonl", tmp_path / "b.txt"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\n" * 5, "is empty"),
        ("a.txt", b"a text with a \0", "is binary: it has a NUL byte at 14"),
        ("a.txt", b"caf\xe9 au lait", "is not UTF-8 text .* at 3"),
        ("a.txt", "seven bytes and é".encode() + b"\xc3", "is not UTF-8 text .* at 18"),
        ("a.txt", b"123456\xe2\x82x", "is not UTF-8 text .* at 6"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.jsonl", b'{"text": "\xe9"}\n', ":1 is not UTF-8 text .* at 10"),
    ],
    ids="empty blank nul latin-1 cut cut-in-pieces jsonl-blank jsonl-latin-1".split(),
)
@pytest.mark.usefixtures("tiny_pieces")
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "good.txt").write_text("some text")
    (tmp_path / name).write_bytes(content)
    refused(ValueError, f"{name}:? ?{message}", tmp_path / "good.txt", tmp_path / name)


EMPTY = {
    "a.txt": b"",
    "b.md": b" \n\t",
    "c.TEXT": b"",
    "d/e.jsonl": b"\n",
    "f.txt": b"\xef\xbb\xbf\n",
}


def write_empty(directory: Path) -> list[Path]:
    """Write files without text below a directory; return them as `find_files` sorts them."""
    for name, content in EMPTY.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return sorted(directory / name for name in EMPTY)


@pytest.mark.parametrize("named_by", ["directory", "glob"])
def test_empty_files_are_skipped_by_name(
    named_by: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = write_empty(tmp_path / "data")
    (tmp_path / "data" / "d" / "text.txt").write_text("some text")
    (tmp_path / "data" / "z.jsonl").write_text('{"text": " "}')  # a document, if a short one
    path = tmp_path / "data" if named_by == "directory" else tmp_path / "data" / "**" / "*.*"
    summary = prepare([path], tmp_path / "out", BYTE, split=(1.0,))
    assert sorted(caplog.messages) == [f"skipped {file}: it is empty" for file in empty]
    assert all("\n" not in message for message in caplog.messages)
    wanted = [*BYTE.encode("some text"), BYTE.eot, *BYTE.encode(" ")]
    assert (summary["documents"], tokens_of(tmp_path / "out", "train")) == (2, wanted)
    assert load_data([path], BYTE, (1.0,))[0].tolist() == wanted  # what train and eval read
    sources = json.loads((tmp_path / "out" / "meta.json").read_text())["sources"]
    assert [Path(source).name for source in sources] == ["text.txt", "z.jsonl"]


def test_an_empty_file_is_named_once_and_many_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text.txt").write_text("some text")
    for i in range(25):
        (tmp_path / f"{i:02}.txt").touch()
    assert find_files([tmp_path]) == [tmp_path / "text.txt"]
    assert len(caplog.messages) == 21
    assert caplog.messages[-1] == "skipped 5 more empty files"


@pytest.mark.parametrize("named_by", ["directory", "glob"])
def test_nothing_but_empty_files(named_by: str, tmp_path: Path, refused: Any) -> None:
    write_empty(tmp_path / "data")
    (tmp_path / "text.txt").write_text("some text")
    path = tmp_path / "data" if named_by == "directory" else tmp_path / "data" / "*.txt"
    message = f"{re.escape(str(path))} has only empty files, such as a.txt"
    for paths in ([path], [tmp_path / "text.txt", path]):
        refused(ValueError, message, *paths)
        with pytest.raises(ValueError, match=message):
            load_data(paths, BYTE)


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file_named_by_itself(name: str, tmp_path: Path, refused: Any) -> None:
    """It is an error also beside its directory, in which it would be skipped."""
    write_empty(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    refused(ValueError, f"{name} is empty", tmp_path / "text.txt", tmp_path / name)
    refused(ValueError, f"{name} is empty", tmp_path, tmp_path / name)


def test_a_pipe_of_a_glob_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    writer = threading.Thread(target=(tmp_path / "a.txt").write_text, args=["some text"])
    writer.start()
    assert "".join(read_documents(find_files([tmp_path / "*.txt"]))) == "some text"
    writer.join()


NULS = {  # texts, and whether they are accepted
    "one in 100 kB": ("Some words here. " * 3000 + "\0" + "Some words here. " * 3000, True),
    "runs of them": ("\0\0\0 and \0" + "word " * 200, True),
    "one in a hundred": ("\0" + "x" * 99, True),
    "one in ninety-nine": ("x" * 98 + "\0", False),
    "one in a hundred bytes": ("\0" + "é" * 50, True),
    "short": ("a\0b", False),
    "alone": ("\0", False),
    "UTF-16 of English": ("Some words here. ".encode("utf-16-le").decode("latin-1") * 9, False),
    "UTF-16 of Russian": ("Вот слова и ещё. ".lower().encode("utf-16-be").decode() * 9, False),
    "UTF-32": ("Some words here. ".encode("utf-32-be").decode() * 9, False),
    "binary at the end": ("Some words here. " * 500 + "\0" * 500, False),
}


@pytest.mark.parametrize("kind", NULS)
@pytest.mark.usefixtures("tiny_pieces")
def test_nuls_are_treated_alike(kind: str, tmp_path: Path) -> None:
    """The same texts are accepted, with the same ids, and refused in the same words."""
    text, accepted = NULS[kind]
    (tmp_path / "a.txt").write_bytes(text.encode())
    write_jsonl(tmp_path / "b.jsonl", [{"text": "good"}, {"text": text}])
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": "good", "completion": text}])
    if accepted:
        assert "".join(read_documents([tmp_path / "a.txt"])) == text
        assert list(read_documents([tmp_path / "b.jsonl"])) == ["good", text]
        assert list(read_documents([tmp_path / "c.jsonl"])) == ["good", text]
        prepare([tmp_path / "a.txt"], tmp_path / "out", BYTE, split=(1.0,))
        assert tokens_of(tmp_path / "out", "train") == BYTE.encode(text)
        return
    wrong = f"is binary: it has a NUL byte at {text.encode().index(0)}, and {text.count(chr(0))} in"
    for name, where in (
        ("a.txt", "a.txt"),
        ("b.jsonl", "b.jsonl:2: field 'text'"),
        ("c.jsonl", "c.jsonl:1: field 'completion'"),
    ):
        with pytest.raises(ValueError, match=f"{where} {wrong}"):
            list(read_documents([tmp_path / name]))


def test_bad_arguments(tmp_path: Path, refused: Any) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some text")
    (tmp_path / "a.bin").write_bytes(b"\0\0")
    refused(ValueError, "no text to prepare")
    refused(ValueError, "a.bin is a token file already", text, tmp_path / "a.bin")
    refused(ValueError, "one to three shares", text, split=(0.25,) * 4)
    refused(ValueError, "sum to 1, got", text, split=(0.5, 0.4))
    refused(ValueError, "positive and sum to 1", text, split=())
    refused(
        ValueError, "the split of 9 tokens at ratio 1e-10 is empty", text, split=(1 - 1e-10, 1e-10)
    )
    refused(ValueError, "the split of 9 tokens at ratio 0.01 is empty", text, split=(0.99, 0.01))
    refused(ValueError, "workers must be an integer >= 1, got 0", text, workers=0)
    refused(ValueError, "shard_tokens must be an .* 1 to 2147483647, got 0", text, shard_tokens=0)
    refused(ValueError, "shard_tokens must be an .* got 2147483648", text, shard_tokens=2**31)

    class Large:
        name, n_vocab, eot = "large", 65537, 65536

    words = "up to 65,535, but large has 65,537 tokens; .*--tokenizer"
    refused(ValueError, words, text, tokenizer=Large())
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x", "completion": "y"}])
    refused(ValueError, "the split of 1 documents at ratio 0.1 is empty", pairs)


def test_an_out_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "empty").mkdir()
    prepare([tmp_path / "a.txt"], tmp_path / "empty", BYTE)
    assert tokens_of(tmp_path / "empty", "train") == list(b"some tex")
    for taken in ("empty", "a.txt"):
        with pytest.raises(ValueError, match=f"{taken} already exists; choose another"):
            prepare([tmp_path / "a.txt"], tmp_path / taken, BYTE)


def test_a_full_disk(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "a.txt").write_text("some text " * 20_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused(OSError, "^cannot write .*out: File too large; is there room", tmp_path / "a.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_out_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(OSError, match="^cannot write .*out: Not a directory"):
        prepare([tmp_path / "a.txt"], tmp_path / "a.txt" / "out", BYTE)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interruption_leaves_nothing(error: type, tmp_path: Path, refused: Any) -> None:
    class Interrupted:
        name, n_vocab, eot = "byte", 257, 256

        def encode(self, text: str) -> list[int]:
            raise error("now")

    (tmp_path / "a.txt").write_text("some text")
    threads = threading.active_count()
    refused(error, "now", tmp_path / "a.txt", tokenizer=Interrupted())
    assert threading.active_count() == threads


@pytest.mark.usefixtures("tiny_pieces")
def test_few_pieces_are_under_way_at_a_time(tmp_path: Path) -> None:
    started, most = [], 0

    class Slow:
        name, n_vocab, eot = "byte", 257, 256

        def encode(self, text: str) -> list[int]:
            started.append(text)
            return list(text.encode())

    (tmp_path / "a.txt").write_text("a word " * 300)
    consumed = 0
    files = [tmp_path / "a.txt"]
    for _ in gptfast.data.tokenize.tokenize(
        files, Slow(), gptfast.data.documents.Fields(), workers=2
    ):
        consumed += 1
        most = max(most, len(started) - consumed)
    assert consumed > 100
    assert most <= 5


@pytest.mark.usefixtures("tiny_pieces")
def test_read_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words in pieces")
    write_jsonl(tmp_path / "b.jsonl", [{"t": "one document of many words"}, {"t": ""}])
    files = find_files([tmp_path])
    pieces = ["some", " words", " in", " pieces", "one document of many words", ""]
    assert list(read_documents(files, text_field="t")) == pieces
    path = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}])
    assert list(read_documents([path])) == ["a", "b"]
    with pytest.raises(ValueError, match="b.jsonl:1 has no field 'text', only t"):
        list(read_documents(files))


def test_finds_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "b.txt a.md c.text d/e.jsonl d/f/g.txt h.py .i.txt .j/k.txt l.bin".split()
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    below = [tmp_path / name for name in "a.md b.txt c.text d/e.jsonl d/f/g.txt".split()]
    assert find_files([tmp_path]) == below
    assert find_files([tmp_path / "h.py", tmp_path / "d"]) == [tmp_path / "h.py", *below[3:]]
    assert find_files([tmp_path / "*.t*t"]) == [tmp_path / "b.txt", tmp_path / "c.text"]
    assert find_files([f"{tmp_path}/**/*.txt"]) == [tmp_path / "b.txt", tmp_path / "d/f/g.txt"]
    (tmp_path / "odd[1].txt").write_text("x")
    assert find_files([tmp_path / "odd[1].txt"]) == [tmp_path / "odd[1].txt"]
    monkeypatch.chdir(tmp_path)
    assert find_files(["d"]) == [Path("d/e.jsonl"), Path("d/f/g.txt")]


def test_nothing_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")
    for path, message in (
        (tmp_path, "has no .txt, .md, .text, .jsonl, .* files in it and no .*, only 1 .py; give"),
        (tmp_path / "*.txt", r"no file matches .*\*.txt"),
        (tmp_path / "none.txt", "cannot read .*none.txt: it does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            find_files([path])


def test_a_file_counts_once(tmp_path: Path) -> None:
    """A file counts once, even if named twice, through a link, or by a glob over a link loop."""
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "a.txt"
    file.write_text("words")
    (tmp_path / "d" / "loop").symlink_to("../d")
    (tmp_path / "link.txt").symlink_to(file)
    paths = [file, tmp_path / "d", tmp_path / "link.txt", tmp_path / "d" / "**" / "*.txt"]
    assert find_files(paths) == [file]


@pytest.mark.parametrize("kind", ["broken", "circle", "long", "empty"])
def test_a_path_that_leads_nowhere(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "link.txt"
    if kind == "broken":
        path.symlink_to("nowhere")
    if kind == "circle":
        path.symlink_to("link.txt")
    name = {"long": "x" * 300, "empty": ""}.get(kind, str(path))
    with pytest.raises(ValueError, match="cannot read .*give text files|an empty path names no"):
        find_files([name])


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text("words")
    (tmp_path / "B.JSONL").write_text('{"text": "more"}')
    files = find_files([tmp_path])
    assert [path.name for path in files] == ["A.TXT", "B.JSONL"]
    assert list(read_documents(files)) == ["words", "more"]


@pytest.mark.parametrize("train", [True, False], ids=["prepared", "others"])
def test_a_directory_of_tokens_is_no_text(train: bool, tmp_path: Path) -> None:
    (tmp_path / ("train_000000.bin" if train else "a.bin")).write_bytes(bytes(20))
    data = re.escape(str(tmp_path if train else tmp_path / "*.bin"))
    with pytest.raises(ValueError, match=f"has token files such as .* and no text; .*'{data}'"):
        prepare([tmp_path], tmp_path / "out", BYTE)


def test_files_of_killed_runs_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    ended = subprocess.Popen(["true"])
    ended.wait()
    others = f".out.tmp-{os.getppid()}", f".other.tmp-{ended.pid}", ".out.tmp-x"
    for name in (
        f".out.tmp-{ended.pid}",
        f".out.tmp-{os.getpid()}",
        ".out.tmp-" + "9" * 20,
        *others,
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_000000.bin").write_bytes(b"ab")
    prepare([tmp_path / "a.txt"], tmp_path / "out", BYTE)
    assert sorted(os.listdir(tmp_path)) == sorted(["a.txt", "out", *others])


@pytest.mark.usefixtures("tiny_pieces")
def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffsome \ufeffwords", "utf-8")
    (tmp_path / "b.jsonl").write_text('\ufeff{"text": "more"}\n', "utf-8")
    assert list(read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])) == [
        "some",
        " \ufeffwords",
        "more",
    ]
    (tmp_path / "a.txt").write_text("\ufeff\n", "utf-8")
    with pytest.raises(ValueError, match="a.txt is empty"):
        list(read_documents([tmp_path / "a.txt"]))


def test_a_broken_link_in_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match="cannot read .*nowhere: No such file.*give text files"):
        find_files([tmp_path])
