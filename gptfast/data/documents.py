"""Text files and .jsonl files: found, read in pieces, and checked."""

import codecs
import glob
import json
import logging
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
# A NUL is a character like any other, but a text with a larger share of them is binary: in UTF-16
# without a byte-order mark every second byte of English is NUL, and one in some fifteen of Russian.
MAX_NUL_SHARE = 0.01
# Characters that are read at a time to see whether a file is empty, and files that are listed.
READ_CHARACTERS = 1 << 12
_MAX_LISTED_FILES = 20
_LOG = logging.getLogger(__name__)
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

    A file that is named twice, also through a link, counts once. Empty files that a directory has
    or a glob matches are left out, with a line in the log. Raises ValueError naming a path that is
    missing, matches nothing or has only empty files.
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
        return _without_empty(path, _text_files_below(path))
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise ValueError(f"cannot read {path}: it does not exist; give text files")
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    matches = sorted(match for match in matches if not match.is_dir())
    if not matches:
        raise ValueError(f"no file matches {path}; give text files")
    return _without_empty(path, matches)


def _without_empty(path: Path, files: list[Path]) -> list[Path]:
    """Return the files of a directory or a glob that are not empty, and log the others."""
    empty = [file for file in files if file.suffix.lower() != ".bin" and _is_empty(file)]
    if len(empty) == len(files):
        raise ValueError(
            f"{path} has only empty files, such as {files[0].name}; training needs text"
        )
    for file in empty[:_MAX_LISTED_FILES]:
        _LOG.warning("skipped %s: it is empty", file)
    if len(empty) > _MAX_LISTED_FILES:
        _LOG.warning("skipped %d more empty files", len(empty) - _MAX_LISTED_FILES)
    kept = set(files) - set(empty)
    return [file for file in files if file in kept]


def _is_empty(path: Path) -> bool:
    """Return whether a file has nothing but white space."""
    if not path.is_file():  # a pipe can be read only once
        return False
    # What is not UTF-8 becomes a character that is no space; the reader of the file refuses it.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        while text := file.read(READ_CHARACTERS):
            if not text.isspace():
                return False
    return True


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
    n_nuls, first_nul = 0, 0
    with path.open("rb") as file:
        while content := file.read(READ_BYTES):
            chunk = _decode(path, decoder, content, start)
            if found := content.count(0):
                first_nul = first_nul if n_nuls else start + content.index(0)
                n_nuls += found
            if not start:
                chunk = chunk.removeprefix(BYTE_ORDER_MARK)
            blank = blank and not chunk.strip()
            start += len(content)
            on_bytes(len(content))
            yield chunk
    _decode(path, decoder, b"", start)
    if blank:
        raise ValueError(f"{path} is empty; training needs text")
    if n_nuls > MAX_NUL_SHARE * start:
        raise ValueError(f"{path} {_binary(first_nul, n_nuls, start)}")


def _binary(first: int, n_nuls: int, n_bytes: int) -> str:
    """Return what is wrong with a text of n_bytes bytes that has more NULs than a text may have."""
    return (
        f"is binary: it has a NUL byte at {first}, and {n_nuls} in {n_bytes} bytes are more than "
        f"1 in {1 / MAX_NUL_SHARE:.0f}; give UTF-8 text"
    )


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
        texts.append(_field_text(f"{where}: field {name!r}", record[name]))
    return Record(texts[-1], prompt=texts[0] if prompted else None)


def _field_text(where: str, text: Any) -> str:
    """Return the value of a field. Raises ValueError unless it is a text as a file may have it."""
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a string, got {text!r:.40}")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{where} has half of a surrogate pair")
    if n_nuls := text.count("\0"):
        content = text.encode()
        if n_nuls > MAX_NUL_SHARE * len(content):
            raise ValueError(f"{where} {_binary(content.index(0), n_nuls, len(content))}")
    return text


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
