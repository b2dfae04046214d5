"""The kinds of data files, by their names and by their first bytes: what is read, what is not."""

import csv
import importlib.util
import re
from collections.abc import Collection
from pathlib import Path

from gptfast.installed import DISTRIBUTION

PEEKED_BYTES = 1 << 14
"""The bytes of a text that say whether it is a table."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
TEXT_SUFFIXES = (".txt", ".md", ".text")
LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}
ARROW_SUFFIXES = (".parquet", ".arrow", ".feather")
READ_SUFFIXES = (*TEXT_SUFFIXES, *LINES_SUFFIXES, ".json", *TABLE_DELIMITERS, *ARROW_SUFFIXES)
"""The kinds that are read as documents, compressed or not; a directory gives these files."""
TOKEN_SUFFIXES = (".bin", ".npy")
# Files that describe a data set, a model or a project, and hold no documents.
DESCRIPTIONS = frozenset(
    ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "meta.json")
    + ("config.json", "package.json", "package-lock.json", "tsconfig.json")
    # A vocabulary, as `gptfast prepare` puts it beside its tokens.
    + ("tokenizer.json", "vocab.json", "merges.txt", "encoder.json", "characters.json")
    + ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
)

_REFUSED = {
    "is an archive; unpack it and give the files in it": (
        ".zip .tar .tgz .tbz2 .txz .7z .rar .whl .jar"
    ),
    "is compressed in a way that is not read; unpack it, or compress it as .gz": (
        ".lz4 .lzma .br .z .lzo .sz"
    ),
    "is markup; convert it to text first, with pandoc for example, or name it .txt to train on "
    "the markup itself": ".html .htm .xhtml .xml .ipynb",
    "is a document with a layout; convert it to text first, with pandoc or pdftotext for "
    "example": ".pdf .docx .doc .odt .rtf .epub .mobi .pptx .ppt .djvu .ps",
    "is a spreadsheet; save it as .csv": ".xlsx .xls .ods .numbers",
    "is a database; export its texts as .jsonl, .csv or .parquet": (
        ".db .sqlite .sqlite3 .tfrecord .tfrecords .avro .orc .lance .mdb .rdb"
    ),
    "holds arrays or a model, no text; give text, or tokens as .bin or .npy": (
        ".npz .pkl .pickle .pt .pth .ckpt .safetensors .gguf .h5 .hdf5 .mat .msgpack .onnx .joblib"
    ),
    "is no text; give text": (
        ".png .jpg .jpeg .gif .webp .svgz .bmp .tiff .mp3 .wav .flac .ogg .mp4 .mkv .avi .mov .exe "
        ".so .dll .pyc .o .a .iso .dmg"
    ),
}
_WHY = {suffix: why for why, suffixes in _REFUSED.items() for suffix in suffixes.split()}
# What files begin with, whatever they are called.
_MAGIC = {
    b"%PDF-": _WHY[".pdf"],
    b"{\\rtf": _WHY[".rtf"],
    b"PK\x03\x04": "is an archive or an office document; unpack it, or convert it to text",
    b"PAR1": "is a Parquet file; name it .parquet",
    b"ARROW1": "is an Arrow file; name it .arrow",
    b"\x93NUMPY": "is a NumPy array; name it .npy if it holds tokens",
    b"SQLite format 3\0": _WHY[".db"],
    b"\x89HDF": _WHY[".h5"],
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
}
_MARKUP = re.compile(rb"\s*<(!doctype html|html|\?xml)\b", re.IGNORECASE)
# The start of an object with a key, or of an array of such objects, which no prose has.
_JSON = re.compile(rb'\s*(\[)?\s*\{\s*("(?:[^"\\\n]|\\.)*"\s*:|\}\s*$)')


def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds, in small letters, without its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def check_kind(path: Path) -> None:
    """Raise ValueError for a file whose name says that it cannot be read, naming the remedy."""
    kind, last = kind_of(path), path.suffix.lower()
    if why := _WHY.get(kind):
        raise ValueError(f"{path} {why}")
    if kind in ARROW_SUFFIXES or last in (".zst", ".zstd"):
        need_pyarrow(path)
    if kind in (*ARROW_SUFFIXES, *TOKEN_SUFFIXES) and last in COMPRESSED:
        raise ValueError(f"{path} is a compressed {kind} file; unpack it first")


def need_pyarrow(path: Path) -> None:
    """Raise ValueError if pyarrow, with which a file is read, is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path} needs pyarrow to be read: pip install '{DISTRIBUTION}[data]'")


def kind_of_content(path: Path, start: bytes, fields: Collection[str] = ()) -> str:
    """Return a file's kind: by its name, or where that says nothing, by its first bytes.

    fields: columns by which the first line of a table is known. Raises ValueError for bytes that
    no text begins with.
    """
    for magic, why in _MAGIC.items():
        if start.startswith(magic):
            raise ValueError(f"{path} {why}")
    kind = kind_of(path)
    if kind in LINES_SUFFIXES:
        # A whole array in a file of this name is common enough.
        return ".json" if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" else ".jsonl"
    if kind in READ_SUFFIXES:
        return kind
    if _MARKUP.match(start):
        raise ValueError(f"{path} {_WHY['.html']}")
    if holds_json(start):
        return ".json"
    columns, delimiter = columns_of(start)
    if len(columns) > 1 and not set(fields).isdisjoint(columns):
        return next(kind for kind, sign in TABLE_DELIMITERS.items() if sign == delimiter)
    return ".txt"


def columns_of(start: bytes) -> tuple[list[str], str]:
    """Return the columns of a table that a text seems to be, and what stands between them.

    They are [] for other texts. All of its first lines have as many values as the first one, whose
    values are names: no space follows a comma there, as in prose.
    """
    lines = start[:PEEKED_BYTES].decode("utf-8-sig", errors="replace").splitlines(keepends=True)
    for delimiter in (*TABLE_DELIMITERS.values(), ";"):
        try:
            read = [row for row in csv.reader(lines, delimiter=delimiter) if row]
        except csv.Error:
            continue
        # The last line may be cut off.
        sizes = {len(row) for row in (read[:-1] if len(read) > 2 else read)}
        names = read[0] if read else []
        if len(read) > 1 and sizes == {len(names)} and len(names) > 1:
            if all(re.fullmatch(r"\w[\w .-]{0,59}", name) for name in names):
                return names, delimiter
    return [], ""


def holds_json(start: bytes) -> bool:
    """Return whether a text begins as JSON objects or an array of them do."""
    return bool(_JSON.match(start.removeprefix(b"\xef\xbb\xbf")))
