"""Text files to documents: find the files, read them piecewise, and say what is wrong with them."""

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
BOM = "\ufeff"  # some editors' mark at the start of a UTF-8 file: no text
PIECE = 1 << 20  # bytes read at a time, characters tokenised at a time
# The last place before which a text may be cut: no word of GPT-2's pattern (tokenizer.SPLIT)
# crosses from a non-space into a space, and only runs of spaces look at what follows them.
_SAFE = re.compile(r".*\S(?=[ \n]\S)", re.DOTALL)


@dataclass(frozen=True)
class Fields:
    """Which fields of a .jsonl record hold its text, or its prompt and completion."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"


@dataclass(frozen=True, slots=True)
class Record:
    """A document, a piece of one, or a prompt with its completion, which is then the text."""

    text: str
    first: bool = True  # False: it goes on where its document's previous piece ended
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
                f"{directory} holds tokens already, {tokens[0].name} for one, and no text; train "
                f"on them as they are (--data '{data}')"
            )
        raise ValueError(
            f"{directory} has no {', '.join(TEXT_SUFFIXES)} files in it and no *train*.bin"
        )
    return sorted(found)


def find_files(paths: Sequence[str | PathLike]) -> list[Path]:
    """The files that paths name: files themselves, text files below directories, globs with **.

    A file named twice, be it through a link, counts once. Raises ValueError naming what is missing
    or matches nothing.
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
        raise ValueError(f"no file matches {path}")
    return matches


def safe_pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The chunks of one text cut elsewhere, so that the pieces' tokens are the whole text's.

    A piece ends only before a single space or line break between non-spaces; until there is one,
    it grows.
    """
    held, tail = [], ""
    for chunk in chunks:
        window = tail + chunk
        if found := _SAFE.match(window):
            yield "".join([*held, window[: found.end()]])
            held, window = [], window[found.end() :]
        # A cut is seen by the characters around it: two stay in view.
        held.append(window[:-2])
        tail = window[-2:]
    yield "".join([*held, tail])


def _chunks(path: Path, read: Callable[[int], Any]) -> Iterator[str]:
    """A UTF-8 file's text, PIECE bytes at a time. ValueError for an empty or binary file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start, blank = 0, True
    with path.open("rb") as file:
        while content := file.read(PIECE):
            chunk = _decode(path, decoder, content, start)
            if b"\0" in content:
                at = start + content.index(0)
                raise ValueError(f"{path} is binary: it has a NUL byte at {at}")
            if not start:
                chunk = chunk.removeprefix(BOM)
            blank = blank and not chunk.strip()
            start += len(content)
            read(len(content))
            yield chunk
    _decode(path, decoder, b"", start)
    if blank:
        raise ValueError(f"{path} is empty; training needs text")


def _decode(path: Path, decoder: codecs.IncrementalDecoder, content: bytes, start: int) -> str:
    waiting = len(decoder.getstate()[0])  # bytes of a character that the last read cut
    try:
        return decoder.decode(content, final=not content)
    except UnicodeDecodeError as error:
        at = start - waiting + error.start
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at {at})") from None


def _text_records(path: Path, read: Callable[[int], Any]) -> Iterator[tuple[str, Record]]:
    first = True
    for piece in safe_pieces(_chunks(path, read)):
        yield str(path), Record(piece, first)
        first = False


def _jsonl_records(
    path: Path, fields: Fields, read: Callable[[int], Any]
) -> Iterator[tuple[str, Record]]:
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            read(len(line))
            if line.strip():
                empty = False
                where = f"{path}:{number}"
                yield where, _jsonl_record(where, line, fields)
    if empty:
        raise ValueError(f"{path} is empty; training needs text")


def _jsonl_record(where: str, line: bytes, fields: Fields) -> Record:
    try:
        record = json.loads(line.decode("utf-8").removeprefix(BOM))
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


def records(files: Sequence[Path], fields: Fields, read: Callable[[int], Any]) -> Iterator[Record]:
    """All files' records, prompts with completions or plain text, but not both."""
    prompted = None
    for path in files:
        records = (
            _jsonl_records(path, fields, read)
            if path.suffix.lower() == ".jsonl"
            else _text_records(path, read)
        )
        try:
            for where, record in records:
                if prompted is None:
                    prompted = record.prompt is not None
                elif prompted != (record.prompt is not None):
                    kinds = ("plain text", "a prompt and a completion")
                    raise ValueError(
                        f"{where} is {kinds[not prompted]}, those before it {kinds[prompted]}; "
                        "give one kind at a time"
                    )
                yield record
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}; give text files") from None


def read_documents(files: Sequence[Path], *, text_field: str = "text") -> Iterator[str]:
    """The texts of files, long ones in pieces that no word crosses; prompts, then completions.

    Raises ValueError as `prepare` does.
    """
    for record in records(files, Fields(text_field), lambda n_bytes: None):
        if record.prompt is not None:
            yield record.prompt
        yield record.text
