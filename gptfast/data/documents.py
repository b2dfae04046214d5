"""Text files and .jsonl files: found, read in pieces, and checked."""

import codecs
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (".txt", ".md", ".text", ".jsonl")
BYTE_ORDER_MARK = "\ufeff"  # put at the start of a UTF-8 file by some editors; no text
READ_BYTES = 1 << 20
# Everything up to the last place where a text may be cut: no word of GPT-2's split (SPLIT in
# tokenizer/bpe.py) crosses from a non-space into a space, and only runs of spaces depend on what
# follows them.
_UP_TO_SAFE_CUT = re.compile(r".*\S(?=[ \n]\S)", re.DOTALL)


@dataclass(frozen=True)
class Fields:
    """The names of the fields of a .jsonl record that have its text, or prompt and completion."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"


@dataclass(frozen=True, slots=True)
class Record:
    """A document, a piece of one, or a prompt with its completion as the text."""

    text: str
    first: bool = True  # False for a further piece of the same document
    prompt: str | None = None


def _text_files_below(directory: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}")

    found = []
    for folder, folders, files in os.walk(directory, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in files
            if name.lower().endswith(TEXT_SUFFIXES) and not name.startswith(".")
        ]
    if not found:
        if tokens := sorted(directory.glob("[!.]*.bin")):
            data = directory if any("train" in p.name for p in tokens) else directory / "*.bin"
            raise ValueError(
                f"{directory} has token files such as {tokens[0].name} and no text; train on "
                f"them as they are (--data '{data}')"
            )
        raise ValueError(
            f"{directory} has no {', '.join(TEXT_SUFFIXES)} files in it and no *train*.bin; give "
            "a directory with text or token files"
        )
    return sorted(found)


def find_files(paths: Sequence[str | PathLike]) -> list[Path]:
    """Return the files that paths name: files, text files below directories, matches of globs.

    A file that is named twice, also through a link, counts once. Raises ValueError naming a path
    that is missing or matches nothing.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not str(path):
            raise ValueError("an empty path names no data; give files, directories or globs")
        try:
            for file in _files_of(Path(path)):
                found.setdefault(file.resolve(strict=True), file)
        except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
            why = getattr(error, "strerror", None) or error
            where = getattr(error, "filename", None) or path
            raise ValueError(f"cannot read {where}: {why}; give text files") from None
    return list(found.values())


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return _text_files_below(path)
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise ValueError(f"cannot read {path}: it does not exist; give text files")
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    matches = sorted(match for match in matches if not match.is_dir())
    if not matches:
        raise ValueError(f"no file matches {path}; give text files")
    return matches


def safe_pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Yield one text in pieces whose tokens are those of the whole text.

    chunks: the text, cut anywhere. A piece ends only before a single space or line break between
    non-spaces, and grows until there is one.
    """
    held: list[str] = []
    tail = ""
    for chunk in chunks:
        window = tail + chunk
        if found := _UP_TO_SAFE_CUT.match(window):
            yield "".join([*held, window[: found.end()]])
            held, window = [], window[found.end() :]
        # The pattern needs the characters around a cut: the last two are matched again.
        held.append(window[:-2])
        tail = window[-2:]
    yield "".join([*held, tail])


def _chunks(path: Path, on_bytes: Callable[[int], Any]) -> Iterator[str]:
    """Yield a UTF-8 file's text as it is read. Raises ValueError for an empty or binary file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start, blank = 0, True
    with path.open("rb") as file:
        while content := file.read(READ_BYTES):
            chunk = _decode(path, decoder, content, start)
            if b"\0" in content:
                at = start + content.index(0)
                raise ValueError(f"{path} is binary: it has a NUL byte at {at}")
            if not start:
                chunk = chunk.removeprefix(BYTE_ORDER_MARK)
            blank = blank and not chunk.strip()
            start += len(content)
            on_bytes(len(content))
            yield chunk
    _decode(path, decoder, b"", start)
    if blank:
        raise ValueError(f"{path} is empty; training needs text")


def _decode(path: Path, decoder: codecs.IncrementalDecoder, content: bytes, start: int) -> str:
    waiting = len(decoder.getstate()[0])  # bytes of a character that the last read cut in two
    try:
        return decoder.decode(content, final=not content)
    except UnicodeDecodeError as error:
        at = start - waiting + error.start
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at {at})") from None


def _text_records(path: Path, on_bytes: Callable[[int], Any]) -> Iterator[tuple[str, Record]]:
    first = True
    for piece in safe_pieces(_chunks(path, on_bytes)):
        yield str(path), Record(piece, first)
        first = False


def _jsonl_records(
    path: Path, fields: Fields, on_bytes: Callable[[int], Any]
) -> Iterator[tuple[str, Record]]:
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            on_bytes(len(line))
            if line.strip():
                empty = False
                where = f"{path}:{number}"
                yield where, _jsonl_record(where, line, fields)
    if empty:
        raise ValueError(f"{path} is empty; training needs text")


def _jsonl_record(where: str, line: bytes, fields: Fields) -> Record:
    try:
        record = json.loads(line.decode("utf-8").removeprefix(BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error.reason} at {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a JSON object with a field {fields.text!r}")
    prompted = fields.prompt in record
    texts = []
    for name in (fields.prompt, fields.completion) if prompted else (fields.text,):
        if name not in record:
            raise ValueError(f"{where} has no field {name!r}, only {', '.join(record) or 'none'}")
        text = record[name]
        if not isinstance(text, str):
            raise ValueError(f"{where}: field {name!r} must be a string, got {text!r:.40}")
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{where}: field {name!r} has half of a surrogate pair")
        texts.append(text)
    return Record(texts[-1], prompt=texts[0] if prompted else None)


def read_records(
    files: Sequence[Path], fields: Fields, on_bytes: Callable[[int], Any]
) -> Iterator[Record]:
    """Yield the records of all files: plain text, or prompts with completions, but not both.

    on_bytes: called with the number of bytes after each read. Raises ValueError naming the file,
    and in .jsonl the line, that cannot be used.
    """
    prompted = None
    for path in files:
        records = (
            _jsonl_records(path, fields, on_bytes)
            if path.suffix.lower() == ".jsonl"
            else _text_records(path, on_bytes)
        )
        try:
            for where, record in records:
                if prompted is None:
                    prompted = record.prompt is not None
                elif prompted != (record.prompt is not None):
                    kinds = ("plain text", "a prompt and a completion")
                    raise ValueError(
                        f"{where} is {kinds[not prompted]}, but the data before it is "
                        f"{kinds[prompted]}; give one kind at a time"
                    )
                yield record
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}; give text files") from None


def read_documents(files: Sequence[Path], *, text_field: str = "text") -> Iterator[str]:
    """Yield the texts of files: long ones in pieces that cut no word, prompts before completions.

    text_field: the key of the text in .jsonl. Raises ValueError as `read_records` does.
    """
    for record in read_records(files, Fields(text_field), lambda n_bytes: None):
        if record.prompt is not None:
            yield record.prompt
        yield record.text
