"""The rows of data files, one after another: JSON lines, JSON, CSV, Parquet and Arrow."""

import codecs
import csv
import io
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gptfast.data.kinds import TABLE_DELIMITERS

BYTE_ORDER_MARK = "\ufeff"  # put at the start of a UTF-8 file by some editors; no text
READ_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 28
"""A longer row is refused: a small compressed file could hold one that memory does not."""
ARROW_BATCH_ROWS = 1024
Row = tuple[str, Any]
"""Where a row is, for messages, and its value."""
_LOG = logging.getLogger(__name__)
_SPACE = re.compile(r"[ \t\r\n]*")
_SEPARATOR = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")


def rows(path: Path, kind: str, file: BinaryIO, own: Collection[str] = ()) -> Iterator[Row]:
    """Yield the rows of a stream of this kind: .jsonl, .json, .csv or .tsv.

    own: fields by which a JSON object is a row itself, whatever lists it has.
    Raises ValueError naming the file, and where it can the line, that is not of this kind.
    """
    if kind == ".jsonl":
        return _line_rows(path, file)
    if kind == ".json":
        return _json_rows(path, file, own)
    return _table_rows(path, file, TABLE_DELIMITERS[kind])


def text_of(path: str | Path, decoder: codecs.IncrementalDecoder, content: bytes, at: int) -> str:
    """Return the text of the bytes from position `at` on. Raises ValueError if it is not UTF-8."""
    waiting = len(decoder.getstate()[0])  # bytes of a character that the last read cut in two
    try:
        return decoder.decode(content, final=not content)
    except UnicodeDecodeError as error:
        where = at - waiting + error.start
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at {where}); save it as UTF-8"
        ) from None


def _line_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        where = f"{path}:{number}"
        if len(line) > MAX_ROW_BYTES:
            raise ValueError(f"{where} is longer than {MAX_ROW_BYTES:,} bytes; split it")
        if line.strip():
            yield where, _json(where, line)


def _json(where: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8").removeprefix(BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text ({error.reason} at {error.start}); save it as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not JSON: {error}; each line is one object (an array of objects, or "
            "objects of several lines, go into a .json file)"
        ) from None


def _json_rows(path: Path, file: BinaryIO, own: Collection[str]) -> Iterator[Row]:
    """Yield the elements of a JSON array, JSON objects that follow one another, or those in one."""
    text, number, in_array, ended = _JsonText(path, file), 0, False, False
    while text.skip(_SEPARATOR if number else _SPACE):
        if ended:
            raise ValueError(
                f"{path} is not JSON: something follows its array; put all records into it, or one "
                "on each line of a .jsonl file"
            )
        if not number and not in_array and text.take("["):
            in_array = True
        elif in_array and text.take("]"):
            ended = True
        else:
            number += 1
            where = f"{path}, record {number}"
            value = text.value(where)
            # One of several objects is a row, and so is one with a row's fields.
            alone = number == 1 and not in_array and not text.skip(_SEPARATOR)
            key = _list_of_rows(value, own) if alone else None
            if key is None:
                yield where, value
            else:
                _LOG.warning("%s is one object, of which the records in %r are read", path, key)
                yield from ((f"{where}, {key!r} {i}", row) for i, row in enumerate(value[key]))
    if in_array and not ended:
        raise ValueError(f"{path} is cut off: its array has no end; get it again")


def _list_of_rows(value: Any, own: Collection[str]) -> str | None:
    """Return the key of an object's list of rows, as in {"version": 1, "data": [...]}; or None."""
    if not isinstance(value, dict) or not value.keys().isdisjoint(own):
        return None
    lists = [
        key
        for key, rows in value.items()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    ]
    return lists[0] if len(lists) == 1 else None


class _JsonText:
    """The text of a JSON file, read as far as the next value needs."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._read = "", 0, 0
        self._ended = False

    def _more(self, n_bytes: int = 0) -> bool:
        """Read n_bytes more bytes, and at least READ_BYTES; return whether there were any."""
        while not self._ended:
            content = self._file.read(max(READ_BYTES, n_bytes))
            self._ended = not content
            more = text_of(self._path, self._decoder, content, self._read)
            if not self._read:
                more = more.removeprefix(BYTE_ORDER_MARK)
            self._read += len(content)
            self._text, self._at = self._text[self._at :] + more, 0
            if more:
                return True
        return False

    def skip(self, pattern: re.Pattern[str]) -> bool:
        """Pass what the pattern matches; return whether anything follows."""
        while True:
            found = pattern.match(self._text, self._at)
            end = found.end() if found else self._at
            # What is at the end of the text may go on in what is still to be read.
            if end < len(self._text) or not self._more():
                self._at = end
                return end < len(self._text)

    def take(self, character: str) -> bool:
        """Pass a character if it is the next one; return whether it was."""
        found = self._text.startswith(character, self._at)
        self._at += found
        return found

    def value(self, where: str) -> Any:
        """Return the next value and pass it. Raises ValueError if it is not JSON."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise ValueError(f"{where} is not JSON: {error}") from None
            except json.JSONDecodeError as error:
                held = len(self._text) - self._at
                # A value that is cut off is wrong at its end, or in the string that it ends in.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                if cut and held > MAX_ROW_BYTES:
                    raise ValueError(f"{where} is longer than {MAX_ROW_BYTES:,} bytes") from None
                # Twice as much each time: a long value is not read again and again.
                if not cut or not self._more(held):
                    raise ValueError(f"{where} is not JSON: {error.msg}") from None
            except ValueError as error:  # a number of 5,000 digits
                raise ValueError(f"{where} is not JSON: {error}") from None
            else:
                self._at = end
                return value


def _table_rows(path: Path, file: BinaryIO, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a table whose first line names its columns, by their names."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        columns: list[str] | None = None
        try:
            for values in reader:
                where = f"{path}:{reader.line_num}"
                if not values:  # an empty line
                    continue
                if columns is None:
                    columns = _columns(where, values, delimiter)
                    continue
                if len(values) != len(columns):
                    raise ValueError(
                        f"{where} has {len(values)} values, but the first line names "
                        f"{len(columns)} columns; a value with the separator in it needs quotes"
                    )
                yield where, dict(zip(columns, values, strict=True))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8"
            ) from None
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num} cannot be read: {error}") from None


_SIGNS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def _columns(where: str, values: list[str], delimiter: str) -> list[str]:
    """Return the names in the first line of a table. Raises ValueError for what names none."""
    columns = [name.strip() for name in values]
    if len(set(columns)) < len(columns):
        raise ValueError(f"{where} names two columns alike, {', '.join(columns)[:200]}: rename one")
    for other in {",", ";", "\t"} - {delimiter}:
        if len(columns) == 1 and re.fullmatch(rf"\w+(?:{other}\w+)+", columns[0]):
            raise ValueError(
                f"{where} names one column, {columns[0]!r:.80}: its columns have {_SIGNS[other]} "
                "between them; save it with commas as .csv, or with tabs as .tsv"
            )
    return columns


def arrow_rows(
    path: Path,
    kind: str,
    needed: Callable[[Collection[str]], list[str] | None],
    on_bytes: Callable[[int], Any],
) -> Iterator[Row]:
    """Yield the rows of a .parquet, .arrow or .feather file, a thousand at a time in memory.

    needed: returns the columns to read of those there are, None for all of them.
    """
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        with path.open("rb") as file:
            start = file.read(6)
        if kind == ".parquet":
            table = parquet.ParquetFile(path)
            columns = needed(table.schema_arrow.names)
            batches = table.iter_batches(batch_size=ARROW_BATCH_ROWS, columns=columns)
        elif start == b"ARROW1":
            opened = ipc.open_file(pyarrow.memory_map(str(path)))
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:  # a stream, as `datasets` keeps it
            batches = iter(ipc.open_stream(pyarrow.memory_map(str(path))))
        number = 0
        for batch in batches:
            for start_row in range(0, batch.num_rows, ARROW_BATCH_ROWS):
                for row in batch.slice(start_row, ARROW_BATCH_ROWS).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the disk, not of what the file holds
            raise
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is damaged or no {kind} file: {why}") from None
    on_bytes(path.stat().st_size)
