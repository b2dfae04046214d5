"""Text files and files of records, read in pieces and checked."""

import codecs
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gptfast.data.find import find_files
from gptfast.data.forms import (
    MAX_NUL_SHARE,
    Fields,
    Notes,
    Record,
    binary,
    divided,
    records,
    say_fields,
)
from gptfast.data.hub import fields_of, hub_rows, is_hub
from gptfast.data.kinds import (
    ARROW_SUFFIXES,
    TEXT_SUFFIXES,
    columns_of,
    holds_json,
    kind_of,
    kind_of_content,
)
from gptfast.data.rows import BYTE_ORDER_MARK, Row, arrow_rows, rows, text_of
from gptfast.data.streams import open_bytes
from gptfast.tokenizer.added import Borders

__all__ = ["Fields", "Record", "find_files", "read_documents", "read_records", "safe_pieces"]

READ_BYTES = 1 << 20
PEEK_BYTES = 1 << 16
_TABLE = (
    "%s looks like a table with the columns %s, and is read as plain text; for its rows, save it "
    "with commas under a name that ends in .csv"
)
# Everything up to the last place where a text may be cut: no word of GPT-2's split (SPLIT in
# tokenizer/bpe.py) crosses from a non-space into a space, and only runs of spaces depend on what
# follows them.
ANYWHERE = Borders()
_UP_TO_SAFE_CUT = re.compile(r".*\S(?=[ \n]\S)", re.DOTALL)


def safe_pieces(chunks: Iterable[str], borders: Borders = ANYWHERE) -> Iterator[str]:
    """Yield one text in pieces whose tokens are those of the whole text.

    chunks: the text, cut anywhere. A piece ends only before a single space or line break between
    non-spaces, where the tokenizer's borders allow it, and grows until there is such a place.
    """
    # What must be known before and after a cut: a non-space; a space and a non-space.
    before, after = max(1, borders.before), max(2, borders.after)
    held: list[str] = []
    tail = ""
    for chunk in chunks:
        window = tail + chunk
        if cut := _last_cut(window, before if held else 1, len(window) - after, borders):
            yield "".join([*held, window[:cut]])
            held, window = [], window[cut:]
        # The characters around the places that are not judged yet come again.
        end = max(0, len(window) - (before + after - 1))
        held += [window[:end]] if end else []
        tail = window[end:]
    yield "".join([*held, tail])


def _last_cut(text: str, first: int, last: int, borders: Borders) -> int:
    """Return the last place of a text, from first to last, where it may be cut; 0 if none."""
    while last >= first and (found := _UP_TO_SAFE_CUT.match(text, 0, last + 2)):
        cut = found.end()
        if cut < first:
            break
        if borders.allow(text, cut):
            return cut
        last = cut - 1
    return 0


def _chunks(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yield a UTF-8 file's text as it is read. Raises ValueError for an empty or binary file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start, blank = 0, True
    n_nuls, first_nul = 0, 0
    while content := file.read(READ_BYTES):
        chunk = text_of(path, decoder, content, start)
        if found := content.count(0):
            first_nul = first_nul if n_nuls else start + content.index(0)
            n_nuls += found
        if not start:
            chunk = chunk.removeprefix(BYTE_ORDER_MARK)
        blank = blank and not chunk.strip()
        start += len(content)
        yield chunk
    text_of(path, decoder, b"", start)
    if blank:
        raise ValueError(f"{path} is empty; training needs text")
    if n_nuls > MAX_NUL_SHARE * start:
        raise ValueError(f"{path} {binary(first_nul, n_nuls, start)}")


def _text_records(
    path: Path, file: BinaryIO, fields: Fields, borders: Borders, notes: Notes
) -> Iterator[tuple[str, Record]]:
    opens, empty = True, True
    for piece in safe_pieces(_chunks(path, file), borders):
        # A piece ends between words, and end-of-text is written as one.
        for record in divided(piece, False, fields, notes):
            opens = opens or record.first
            if record.text:
                yield str(path), Record(record.text, opens)
                opens = empty = False
    if empty:  # it has end-of-text alone
        raise ValueError(f"{path} is empty; training needs text")


def _row_records(
    path: Path, found: Iterable[Row], fields: Fields, notes: Notes
) -> Iterator[tuple[str, Record]]:
    empty = True
    for where, row in found:
        empty = False
        for record in records(where, row, fields, notes):
            yield where, record
    if empty:
        raise ValueError(f"{path} is empty; training needs text")


def _records(
    path: Path, fields: Fields, borders: Borders, notes: Notes, on_bytes: Callable[[int], Any]
) -> Iterator[tuple[str, Record]]:
    """Yield where each record of a file is, and the record."""

    def needed(names: Collection[str]) -> list[str] | None:
        if fields.may_be_known(names):  # then the values say what is read
            return None
        read = fields.read_of(names)
        say_fields(str(path), names, read, notes)
        return read if set(read) < set(names) and "input" not in names else None

    if is_hub(path):
        fields = fields_of(path, fields)
        yield from _row_records(path, hub_rows(path, needed, on_bytes), fields, notes)
        return
    if (kind := kind_of(path)) in ARROW_SUFFIXES:
        found = arrow_rows(path, kind, needed, on_bytes)
        yield from _row_records(path, found, fields, notes)
        return
    with open_bytes(path, on_bytes) as file:
        start = file.peek(PEEK_BYTES)
        kind = kind_of_content(path, start, fields.of_tables)
        if kind not in TEXT_SUFFIXES:
            yield from _row_records(path, rows(path, kind, file, fields.of_rows), fields, notes)
            return
        if holds_json(start):
            notes.say("json", "%s holds JSON, read as text as its name says", path)
        elif columns := columns_of(start)[0]:
            shown = ", ".join(columns)[:200]
            notes.say("table", _TABLE, path, shown)
        yield from _text_records(path, file, fields, borders, notes)


def read_records(
    files: Sequence[Path],
    fields: Fields,
    on_bytes: Callable[[int], Any],
    borders: Borders = ANYWHERE,
) -> Iterator[Record]:
    """Yield the records of all files: plain text, or prompts with completions, but not both.

    borders: where the tokenizer allows that long texts are cut. on_bytes: called with the number of
    bytes after each read. Raises ValueError naming the file, and the line or record in it, that
    cannot be used.
    """
    prompted, notes = None, Notes()
    for path in files:
        try:
            for where, record in _records(path, fields, borders, notes, on_bytes):
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
    notes.finish()


def read_documents(
    files: Sequence[Path], *, text_field: str = "text", split_on_eot: bool = False
) -> Iterator[str]:
    """Yield the texts of files: long ones in pieces that cut no word, prompts before completions.

    text_field: the field of the text in records. split_on_eot: whether <|endoftext|> written in a
    text separates documents. Raises ValueError as `read_records` does.
    """
    fields = Fields(text_field, split_on_eot=split_on_eot)
    for record in read_records(files, fields, lambda n_bytes: None):
        if record.prompt is not None:
            yield record.prompt
        yield record.text
