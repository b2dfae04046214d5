"""Data files as streams of bytes: plain or compressed, from a disk, a pipe or standard input."""

import bz2
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptfast.data.kinds import need_pyarrow

STDIN = Path("/dev/stdin")
BUFFER_BYTES = 1 << 20
_MAGIC = {
    b"\x1f\x8b\x08": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class _Counted(io.RawIOBase):
    """A raw stream that says how many bytes were read of it."""

    def __init__(self, raw: io.FileIO, on_bytes: Callable[[int], Any]) -> None:
        self._raw, self._on_bytes = raw, on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        # A pipe gives what it has just now, but the first bytes say what kind of data they are: a
        # buffer that is not full is the last one.
        view, n = memoryview(buffer).cast("B"), 0
        while n < len(view) and (got := self._raw.readinto(view[n:])):
            n += got
        self._on_bytes(n)
        return n

    def close(self) -> None:
        self._raw.close()
        super().close()


def is_stream(path: Path) -> bool:
    """Return whether a path names a pipe or a device, which can be read only once."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def open_bytes(path: Path, on_bytes: Callable[[int], Any]) -> "Iterator[io.BufferedReader[Any]]":
    """Open a file as a stream, decompressed if its first bytes say that it is compressed.

    on_bytes: called with the number of bytes after each read of the file itself.
    Raises ValueError naming the file if what is compressed is damaged; OSError.
    """
    # Standard input may be a socket, which has no file that can be opened.
    source: Any = os.dup(0) if path == STDIN else path
    with io.BufferedReader(_Counted(io.FileIO(source), on_bytes), BUFFER_BYTES) as stored:
        try:
            content = _decompressed(path, stored)
            yield stored if content is stored else io.BufferedReader(content, BUFFER_BYTES)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is cut off or damaged: {error}; get it again") from None
        except OSError as error:
            if error.errno is None:  # from bz2 and pyarrow
                raise ValueError(f"{path} is cut off or damaged: {error}; get it again") from None
            raise


def _decompressed(path: Path, stored: "io.BufferedReader[Any]") -> Any:
    start = stored.peek(8)
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    if kind == "gzip":
        return gzip.GzipFile(fileobj=stored)
    if kind == "bz2":
        # No text begins with a block's magic as well, which is pi.
        return bz2.BZ2File(stored) if start[4:8] == b"1AY&" else stored
    if kind == "xz":
        return lzma.LZMAFile(stored)
    if kind == "zstd":
        need_pyarrow(path)
        import pyarrow

        return pyarrow.CompressedInputStream(stored, "zstd")
    return stored
