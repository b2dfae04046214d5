"""The kinds of data files: each is read as the documents that it holds, or refused by its name."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gptfast.data.rows
from gptfast import create_dataloader, get_tokenizer
from gptfast.data.documents import read_documents, read_records
from gptfast.data.find import find_files
from gptfast.data.forms import ANSWER, QUESTION, Fields, Record
from gptfast.data.sources import load_data
from gptfast.data.token_files import Documents
from gptfast.data.tokens import as_tokens
from gptfast.generation.conversation import QUESTIONS

BYTE = get_tokenizer("byte")
FILES = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = ["one", 'two, "quoted"', "three\nlines\nhere", "", "fünf\t漢字", "[6]", "{7}"]
ROWS = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=3)
    return buffer.getvalue()


def arrow(rows: list[dict[str, Any]], opened: str) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    content, buffer = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with getattr(pyarrow.ipc, opened)(buffer, content.schema) as writer:
        writer.write_table(content, 2)
    return buffer.getvalue()


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": json_lines,
    "a.ndjson": json_lines,
    "A.JSONL": json_lines,
    "lines.json": json_lines,
    "array.json": lambda rows: json.dumps(rows).encode(),
    "indented.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "marked.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode(),
    "objects.json": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    "nested.json": lambda rows: json.dumps({"version": 1, "data": rows, "more": []}).encode(),
    "array.jsonl": lambda rows: json.dumps(rows, indent=2).encode(),
    "crlf.jsonl": lambda rows: json_lines(rows).replace(b"\n", b"\r\n"),
    "no-suffix": json_lines,
    "an-array": lambda rows: json.dumps(rows, indent=2).encode(),
    "a.csv": lambda rows: table(rows, ","),
    "marked.csv": lambda rows: b"\xef\xbb\xbf" + table(rows, ","),
    "a.tsv": lambda rows: table(rows, "\t"),
    "a.parquet": parquet,
    "file.arrow": lambda rows: arrow(rows, "new_file"),
    "stream.arrow": lambda rows: arrow(rows, "new_stream"),
    "a.feather": lambda rows: arrow(rows, "new_file"),
}


def zstd(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(content, codec="zstd", asbytes=True)


COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(path: Path, **fields: Any) -> list[Record]:
    names = {name.removesuffix("_field"): value for name, value in fields.items()}
    return list(read_records([path], Fields(**names), lambda n_bytes: None))


@pytest.mark.parametrize("size", [5, 1 << 20])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_its_documents(
    name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documents and their number are those of the rows, however the file is read."""
    monkeypatch.setattr(gptfast.data.rows, "READ_BYTES", size)
    path = write(tmp_path / name, KINDS[name](ROWS))
    assert [record.text for record in read(path)] == TEXTS
    assert all(record.first and record.prompt is None for record in read(path))
    assert [record.text for record in read(path, text_field="id")] == list("0123456")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_prompts(name: str, tmp_path: Path) -> None:
    rows = [{"p": f"{i}?", "c": f"{i}!", "extra": "x"} for i in range(5)]
    path = write(tmp_path / name, KINDS[name](rows))
    found = read(path, prompt_field="p", completion_field="c")
    assert [(r.prompt, r.text) for r in found] == [(f"{i}?", f"{i}!") for i in range(5)]


@pytest.mark.parametrize("named", [True, False], ids=["suffix", "bytes-alone"])
@pytest.mark.parametrize("suffix", [*COMPRESSIONS, ".zst"])
@pytest.mark.parametrize("inner", ["a.txt", "a.jsonl", "a.csv", "array.json"])
def test_compressed_files(inner: str, suffix: str, named: bool, tmp_path: Path) -> None:
    """What is compressed is seen by its first bytes; a text called so is a text."""
    content = b"plain text " * 999 if inner == "a.txt" else KINDS[inner](ROWS)
    packed = COMPRESSIONS[suffix](content) if suffix in COMPRESSIONS else zstd(content)
    plain = write(tmp_path / inner, content)
    path = write(tmp_path / f"packed-{inner}{suffix if named else ''}", packed)
    assert read(path) == read(plain)
    cut = write(tmp_path / f"cut-{inner}{suffix}", packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=f"cut-{inner}{suffix} is cut off or damaged|cut.*JSON"):
        read(cut)


def test_a_text_with_the_suffix_of_a_compression(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", b"BZh is how it begins")
    assert "".join(record.text for record in read(path)) == "BZh is how it begins"


@FILES
@given(rows=st.lists(st.fixed_dictionaries({"text": st.text(max_size=20)}), min_size=1, max_size=9))
def test_arrays_read_in_pieces(
    rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("json")
    before = gptfast.data.rows.READ_BYTES
    gptfast.data.rows.READ_BYTES = 3
    try:
        for indent in (None, 2):
            path = write(folder / "a.json", json.dumps(rows, indent=indent).encode())
            try:
                assert [r.text for r in read(path)] == [row["text"] for row in rows]
            except ValueError as error:  # NULs
                assert "is binary" in str(error)
    finally:
        gptfast.data.rows.READ_BYTES = before


SPANS = [{"text": "part of it"}]


@pytest.mark.parametrize(
    ("content", "fields", "texts", "said"),
    [
        ([{"text": "a", "spans": SPANS}], {}, ["a"], "text is read, not spans"),
        ([{"text": "a", "spans": SPANS}] * 2, {}, ["a", "a"], "text is read, not spans"),
        ([{"prompt": "p", "completion": "a", "x": SPANS}], {}, ["a"], "completion are read"),
        ([{"story": "a", "spans": SPANS}], {"text_field": "story"}, ["a"], "story is read"),
        ([{"version": 1, "data": SPANS}], {}, ["part of it"], "records in 'data' are read"),
    ],
)
def test_an_object_with_a_list(
    content: list[Any],
    fields: dict[str, str],
    texts: list[str],
    said: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A record may have a list of objects; only an object that is no record is a wrapper."""
    path = write(tmp_path / "a.json", "\n".join(map(json.dumps, content)).encode())
    assert [record.text for record in read(path, **fields)] == texts
    assert said in caplog.text


def test_objects_of_which_none_is_a_wrapper(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"title": "a", "spans": SPANS}).encode() * 2)
    with pytest.raises(ValueError, match="record 1 has no field 'text', only title, spans"):
        read(path)


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow", "a.feather"])
def test_arrow_files_that_are_cut_off(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, KINDS[name]([{"text": "word " * 500}] * 3))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="is damaged or no") as caught:
        read(path)
    assert "None" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text;label\na;1\n", "names one column, 'text;label': .* save it with commas"),
        ("a.csv", b"text\tlabel\na\t1\n", "names one column"),
        ("a.tsv", b"id,text,label\n1,a,1\n", "names one column, 'id,text,label'"),
        ("a.csv", b'"%s"\n"b"\n' % (b"a row " * 30), r"a row; name it with --text-field, or --pro"),
        ("a.json", b'[{"text": "a"}, {"text": ', "record 2 is not JSON"),
        ("a.json", b'[{"text": "a"}', "is cut off: its array has no end"),
        ("a.json", b'[{"text": "a"}] x', "something follows its array"),
        ("a.json", b'[{"text": "a"}, {text: 1}]' + b" " * 2**21, "record 2 is not JSON: Expecting"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b"[1, 2]", "record 1 is not a JSON object"),
        ("a.json", b'{"text": "caf\xe9"}', "a.json is not UTF-8 text .* at 13"),
        ("a.json", b" \n", "a.json is empty"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.json", b'{"name": "x", "version": 2}', "no field 'text', only name, version; name it"),
        ("a.jsonl", b'{\n "text": "a"\n}', "a.jsonl:1 is not JSON.* go into a .json file"),
        ("a.csv", b"a,b\n1,2\n", "a.csv:2 has no field 'text', only a, b; name it with --text-fie"),
        ("a.csv", b"a,text\n1,2\n3\n", "a.csv:3 has 1 values, but the first line names 2 columns"),
        ("a.csv", b"text,text\n1,2\n", "a.csv:1 names two columns alike"),
        ("a.csv", b'text\n"open\n', "a.csv:2 cannot be read: unexpected end of data"),
        ("a.csv", b"text\n\xff\n", "a.csv is not UTF-8 text"),
        ("a.csv", b"text\n", "a.csv is empty"),
        ("a.parquet", b"PAR1 not really", "a.parquet is damaged or no .parquet file"),
        ("a.arrow", b"ARROW1 not really", "a.arrow is damaged or no .arrow file"),
    ],
)
def test_damaged_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message) as caught:
        read(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_row_that_memory_would_not_hold(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptfast.data.rows, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(gptfast.data.rows, "READ_BYTES", 100)
    content = {".jsonl": json_lines, ".json": KINDS["array.json"], ".csv": KINDS["a.csv"]}[suffix]
    path = write(tmp_path / f"a{suffix}.gz", gzip.compress(content([{"text": "x" * 100_000}])))
    with pytest.raises(ValueError, match="longer than 1,000 bytes|field larger than field limit"):
        read(path)


REFUSED = {
    "a.html": "is markup; convert it to text first",
    "a.xml": "is markup",
    "a.pdf": "is a document with a layout; convert",
    "a.docx": "is a document",
    "a.EPUB": "is a document",
    "a.zip": "is an archive; unpack it",
    "a.tar.gz": "is an archive",
    "a.tgz": "is an archive",
    "a.txt.lz4": "is compressed in a way that is not read",
    "a.xlsx": "is a spreadsheet; save it as .csv",
    "a.sqlite": "is a database; export",
    "a.npz": "holds arrays or a model",
    "a.pkl": "holds arrays or a model",
    "a.safetensors": "holds arrays or a model",
    "a.mp3": "is no text",
    "a.parquet.gz": "is a compressed .parquet file; unpack it",
    "a.bin.gz": "is a compressed .bin file; unpack it",
}


@pytest.mark.parametrize("name", REFUSED)
def test_kinds_that_are_refused_by_name(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, b"whatever it holds")
    for paths in ([path], [tmp_path / "a.*"]):
        with pytest.raises(ValueError, match=f"{name} {REFUSED[name]}"):
            find_files(paths)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.md", "a.dump"])
@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"%PDF-1.7\n", "is a document with a layout"),
        (b"PK\x03\x04", "is an archive or an office document"),
        (b"PAR1", "is a Parquet file; name it .parquet"),
        (b"ARROW1\0\0", "is an Arrow file; name it .arrow"),
        (b"\x93NUMPY\1\0", "is a NumPy array; name it .npy"),
        ("words".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (b"\xfe\xff\0w", "is UTF-16 text; save it as UTF-8"),
    ],
)
def test_bytes_that_no_text_begins_with(
    start: bytes, message: str, name: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{name} {message}"):
        read(write(tmp_path / name, start + b"more" * 99))


def test_markup_without_a_name(tmp_path: Path) -> None:
    page = b"<!DOCTYPE html>\n<html><p>words</p></html>"
    with pytest.raises(ValueError, match="page is markup"):
        read(write(tmp_path / "page", page))
    found = read(write(tmp_path / "page.txt", page))
    assert "".join(record.text for record in found) == page.decode()


def test_json_under_the_name_of_a_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.txt", json_lines(ROWS))
    assert "".join(record.text for record in read(path)) == json_lines(ROWS).decode()
    assert caplog.messages == [f"{path} holds JSON, read as text as its name says"]


TABLES = {
    "text,label\nHi,1\nBye,0\n": ["Hi", "Bye"],
    "id\ttext\n1\tHi\n2\tBye\n": ["Hi", "Bye"],
    '\ufefflabel,text\r\n1,"Hi, you"\r\n0,"two\nlines"\r\n': ["Hi, you", "two\nlines"],
    "prompt,completion\nHi,Bye\n": ["Hi", "Bye"],
}


@pytest.mark.parametrize("content", TABLES)
@pytest.mark.parametrize("cut", [0, 2], ids=["at once", "in two"])
def test_a_table_without_a_name(content: str, cut: int, tmp_path: Path) -> None:
    """A pipe has no suffix: the names in its first line say that it is a table."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("wb", buffering=0) as file:
            file.write(content.encode()[:cut])
            file.write(content.encode()[cut:])

    thread = threading.Thread(target=write)
    thread.start()
    assert [*read_documents([pipe])] == TABLES[content]
    thread.join()


@pytest.mark.parametrize("name", ["data", "data.txt"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("id,quote\n1,Hi\n2,Bye\n", True),
        ("id;quote\n1;Hi\n2;Bye\n", True),
        ("Roses, red\nviolets, blue\nsugar, sweet\n", False),
        ("A text, with one comma\nand a line with none\n", False),
        ("One line, then nothing", False),
        ("text\nHi\nBye\n", False),
    ],
    ids="commas semicolons verse prose line column".split(),
)
def test_a_table_that_is_read_as_text(
    name: str, content: str, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    assert "".join(read_documents([tmp_path / name])) == content
    assert ("looks like a table with the columns id, quote" in caplog.text) == told


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for name in ("a.parquet", "a.arrow", "a.feather", "a.txt.zst"):
        path = write(tmp_path / name, b"content")
        with pytest.raises(
            ValueError, match=rf"{name} needs pyarrow .*: pip install 'gptfast-torch\["
        ):
            find_files([path])
    path = write(tmp_path / "a.txt", b"\x28\xb5\x2f\xfd compressed")
    with pytest.raises(ValueError, match="a.txt needs pyarrow"):
        read(path)


def test_a_directory_says_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = ["a.txt", "b.csv", "c.jsonl.gz", "d/e.json"]
    for name in (*kept, "f.pdf", "g.PDF", "h.py", "d/LICENSE", "meta.json", "d/x.bin", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b"x")
    assert find_files([tmp_path]) == [tmp_path / name for name in kept]
    (line,) = caplog.messages
    assert line.startswith(f"left out of {tmp_path}: 2 .pdf, ") and "; name a file to" in line
    for part in ("1 .py", "1 without a suffix", "1 .json", "1 .bin"):
        assert part in line


FORMS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "instruction": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "id": 1},
        [("Q: Add.\n1 2\nA:", " 3")],
    ),
    "no input": ({"instruction": "Hi", "output": "Ho"}, [("Q: Hi\nA:", " Ho")]),
    "null input": (
        {"instruction": "Hi", "input": None, "output": "Ho"},
        [("Q: Hi\nA:", " Ho")],
    ),
    "chat": (
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "Two?"},
                {"role": "assistant", "content": "2"},
            ]
        },
        [
            ("Be short.\nQ: One?\nA:", " 1"),
            ("Be short.\nQ: One?\nA: 1\nQ: Two?\nA:", " 2"),
        ],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        [("Q: Hi\nA:", " Ho")],
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("O", "ne")]},
                {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
            ]
        },
        [("Q: One\nA:", " 1")],
    ),
    "a text too": (
        {"instruction": "Hi", "input": "", "output": "Ho", "text": "### Instruction: Hi Ho"},
        [("Q: Hi\nA:", " Ho")],
    ),
    "a prompt too": (
        {
            "prompt": "Hi",
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho", "weight": 0},
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "Ho!", "weight": 1},
            ],
        },
        [("Q: Hi\nA: Ho\nQ: Hi?\nA:", " Ho!")],
    ),
    "two in a row": (
        {
            "messages": [
                {"role": "user", "content": "A"},
                {"role": "user", "content": "B"},
                {"role": "assistant", "content": "C"},
            ]
        },
        [("Q: A\nB\nA:", " C")],
    ),
}


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_chats_and_instructions(
    form: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row, wanted = FORMS[form]
    found = read(write(tmp_path / name, KINDS[name]([row] * 3)))
    assert [(record.prompt, record.text) for record in found] == wanted * 3
    (line,) = caplog.messages  # once, not for each record
    assert "read as prompts 'Q: …\\nA:'" in line and "--prompt-field" in line
    assert ("--prompt-field none reads text instead" in line) == ("text" in row)
    left = [name for name in ("id", "text", "prompt") if name in row]
    assert re.findall(r" \(not read: (.*?)\):", line) == left
    if "text" in row:
        assert read(tmp_path / name, prompt_field="none")[0].text == row["text"]


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_prompts_are_written_as_chat_writes_them() -> None:
    assert f"{QUESTION}{{prompt}}{ANSWER}" == QUESTIONS


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "has no reply of the assistant"),
        ([{"role": "user", "content": "a"}], "has no reply of the assistant"),
        ([{"role": "assistant", "content": "a"}], "a reply that follows no message of the user"),
        ([{"role": "tool", "content": "a"}], "has the role 'tool' where it cannot be read"),
        ([{"role": "user"}], "a message without a role and a text"),
        ([CHAT[0], {**CHAT[1], "weight": 0}], "has no reply of the assistant"),
        ([CHAT[0], {**CHAT[1], "weight": 0.5}], "has a reply of weight 0.5; give 0 or 1"),
        (["a"], "a message without a role and a text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "without a role and a text"),
    ],
)
def test_chats_that_cannot_be_read(messages: list[Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines([{"messages": messages}]))
    with pytest.raises(ValueError, match=f"a.jsonl:1: field 'messages' .*{message}"):
        read(path)
    write(path, json_lines([{"messages": messages, "text": "a"}]))
    with pytest.raises(ValueError, match=f"{message}.*; --prompt-field none reads text instead"):
        read(path)
    write(path, json_lines([{"prompt": messages, "completion": messages}]))
    with pytest.raises(ValueError, match="must be a string.*; a chat is one list in .*'messages'"):
        read(path)


def test_instructions_that_cannot_be_read(tmp_path: Path) -> None:
    row = {"instruction": "a", "output": ["b"], "text": "c"}
    path = write(tmp_path / "a.jsonl", json_lines([row]))
    with pytest.raises(ValueError, match="'output' must be a .*; --prompt-field none reads text"):
        read(path)


HINTS = {
    "content": ({"content": "a"}, "--text-field content"),
    "capital": ({"Text": "a"}, "--text-field Text"),
    "any single name": ({"whatever": "a"}, "--text-field whatever"),
    "response": ({"prompt": "a", "response": "b"}, "--completion-field response"),
    "question": ({"question": "a", "answer": "b"}, "--prompt-field question --completion-field an"),
    "input": ({"input": "a", "output": "b"}, "--prompt-field input --completion-field output"),
    "prompt and text": ({"prompt": "a", "text": "b"}, "--prompt-field none"),
    "strange": ({"a": 1, "b": 2}, "--text-field, or --prompt-field and --completion-field"),
}


@pytest.mark.parametrize("case", HINTS)
def test_a_wrong_field_names_the_flag(case: str, tmp_path: Path) -> None:
    row, hint = HINTS[case]
    with pytest.raises(ValueError, match=f"a.jsonl:1 has no field .*{hint}"):
        read(write(tmp_path / "a.jsonl", json_lines([row])))


def test_fields_that_were_named_are_not_guessed(tmp_path: Path) -> None:
    """A named field that is missing is an error, though there is another that could be read."""
    row = {"text": "t", "prompt": "p", "completion": "c", "mine": "m"}
    path = write(tmp_path / "a.jsonl", json_lines([row]))
    assert [(r.prompt, r.text) for r in read(path)] == [("p", "c")]
    assert [(r.prompt, r.text) for r in read(path, text_field="mine")] == [(None, "m")]
    assert [(r.prompt, r.text) for r in read(path, prompt_field="none")] == [(None, "t")]
    with pytest.raises(ValueError, match="has no field 'typo'"):
        read(path, prompt_field="typo")


def test_fields_that_are_not_read_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        caplog.clear()
        path = write(tmp_path / name, KINDS[name](ROWS))
        read(path)
        (line,) = caplog.messages
        assert "text is read, not id" in line and str(path) in line
    rows = [{"instruction": "a", "input": "important", "output": "b"}]
    path = write(tmp_path / "a.jsonl", json_lines(rows))
    caplog.clear()
    read(path, prompt_field="instruction", completion_field="output")
    assert "its 'input' is not read" in caplog.messages[-1]


EOT = "<|endoftext|>"
STORIES = f"Story A.\n{EOT}\nStory B.\n{EOT}\nStory C.\n"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_end_of_text_written_in_a_text(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is plain text with a counted warning, and the separator if that is asked for.

    Text from elsewhere must not end documents unless someone says so; what it does is said.
    """
    tokenizer = get_tokenizer("gpt2")
    content = STORIES.encode() if name == "a.txt" else KINDS[name]([{"text": STORIES}])
    path = write(tmp_path / name, content)
    (plain,) = load_data([path], tokenizer, (1.0,))
    assert plain.tolist() == tokenizer.encode(STORIES)
    assert caplog.messages == [
        f"the data has {EOT} written in it 2 times, which was read as plain text; with "
        "--split-on-eot it separates documents"
    ]
    caplog.clear()
    (split,) = load_data([path], tokenizer, (1.0,), split_on_eot=True)
    assert split.tolist() == tokenizer.encode(STORIES, allowed_special={EOT})
    assert split.tolist().count(tokenizer.eot) == 2
    assert len(list(read_documents([path], split_on_eot=True))) >= 3
    assert not caplog.messages


@pytest.mark.parametrize("size", [3, 1 << 20])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_separators_that_separate_nothing(
    name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End-of-text at the start or the end of a text, or twice in a row, makes no empty document."""
    monkeypatch.setattr(gptfast.data.documents, "READ_BYTES", size)
    eot = "<|endoftext|>"
    texts = [f"{eot}one two{eot}", f"three{eot}{eot}four five six{eot}"]
    whole = "".join(texts).encode() if name == "a.txt" else json_lines([{"text": t} for t in texts])
    path = write(tmp_path / name, whole)
    tokens = load_data([path], BYTE, (1.0,), split_on_eot=True)[0]
    documents = [b"one two", b"three", b"four five six"]
    assert bytes(i if i < 256 else 0 for i in tokens.tolist()) == b"\0".join(documents)
    with pytest.raises(ValueError, match="b.txt is empty"):
        read(write(tmp_path / "b.txt", (eot * 3).encode()), split_on_eot=True)


def test_end_of_text_after_a_completion(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": f"b{EOT}"}]
    path = write(tmp_path / "a.jsonl", json_lines(rows))
    (found,) = load_data([path], BYTE, (1.0,), split_on_eot=True)
    assert isinstance(found, Documents)
    assert found.span().tolist() == [97, 98, BYTE.eot]


def test_end_of_text_in_python(caplog: pytest.LogCaptureFixture) -> None:
    assert BYTE.eot not in as_tokens(STORIES, BYTE)
    assert "written in it 2 times" in caplog.text and "allowed_special" in caplog.text
    caplog.clear()
    loader = create_dataloader(STORIES, 1, 8, 8, False, tokenizer=BYTE, allowed_special={EOT})
    assert sum(int((x == BYTE.eot).sum()) for x, _ in loader) == 2
    assert not caplog.messages


PIPED = {
    "text": (b"some words " * 99, ["some words " * 99]),
    "gzip": (gzip.compress(b"some words"), ["some words"]),
    "lines": (json_lines(ROWS), TEXTS),
    "array": (json.dumps(ROWS).encode(), TEXTS),
    "compressed lines": (bz2.compress(json_lines(ROWS)), TEXTS),
}


@pytest.mark.parametrize("kind", PIPED)
@pytest.mark.parametrize("named", ["fifo", "fd", "-", "/dev/stdin"])
def test_pipes(named: str, kind: str, tmp_path: Path) -> None:
    """A named pipe, a process substitution and standard input; their bytes say what they hold."""
    content, wanted = PIPED[kind]
    standard = named in ("-", "/dev/stdin")
    kept = os.dup(0) if standard else None
    reading, writing = os.pipe()
    path = tmp_path / "pipe"
    if named == "fifo":
        os.mkfifo(path)
    target = str(path) if named == "fifo" else writing
    writer = threading.Thread(target=lambda: open(target, "wb").write(content))
    try:
        if standard:
            os.dup2(reading, 0)
        writer.start()
        name = {"fifo": str(path), "fd": f"/dev/fd/{reading}"}.get(named, named)
        found = [r for file in find_files([name]) for r in read(file)]
        writer.join()
    finally:
        os.close(reading)
        if kept is not None:
            os.dup2(kept, 0)
            os.close(kept)
    texts = (
        ["".join(r.text for r in found)] if kind in ("text", "gzip") else [r.text for r in found]
    )
    assert texts == wanted
