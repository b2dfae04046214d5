"""Token files written one after another, each up to a given number of tokens."""

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptfast.data.token_files import (
    HEADER_BYTES,
    MAX_FILE_TOKENS,
    _count,
    _header,
    _read_index,
    as_uint16,
    index_path,
)
from gptfast.files import fsync


class ShardWriter:
    """Writes directory/<part>_000000.bin, … of at most shard_tokens tokens each, and sidecars.

    A document is never cut: one longer than shard_tokens gets a longer shard to itself.
    """

    def __init__(self, directory: Path, part: str, shard_tokens: int) -> None:
        if not 1 <= shard_tokens <= MAX_FILE_TOKENS:
            raise ValueError(f"shard_tokens must be 1 to {MAX_FILE_TOKENS}, got {shard_tokens}")
        self.directory, self.part, self.shard_tokens = directory, part, shard_tokens
        self.paths: list[Path] = []
        self.tokens = 0
        self._file: BinaryIO | None = None
        self._count = 0
        self._index = array("q")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass  # the disk is full: that is the error under way

    def write(self, tokens: np.ndarray) -> None:
        """Append (n,) ids, starting a new shard wherever one is full."""
        while len(tokens):
            if self._count == self.shard_tokens:
                self._finish()
            room = self.shard_tokens - self._count
            self._append(tokens[:room])
            tokens = tokens[room:]

    def write_document(self, tokens: np.ndarray, completion: int) -> None:
        """Append one document's ids, whose completion starts at tokens[completion]."""
        if self._count and self._count + len(tokens) > self.shard_tokens:
            self._finish()
        self._index.extend((self._count, self._count + completion))
        self._append(tokens)

    def _append(self, tokens: np.ndarray) -> None:
        if self._file is None:
            path = self.directory / f"{self.part}_{len(self.paths):06d}.bin"
            self._file = path.open("wb")
            self.paths.append(path)
            self._file.write(bytes(HEADER_BYTES))
        self._file.write(as_uint16(tokens).tobytes())
        self._count += len(tokens)
        self.tokens += len(tokens)

    def _finish(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(_header(self._count))
        self._file.close()
        fsync(self.paths[-1])
        if self._index:
            sidecar = index_path(self.paths[-1])
            sidecar.write_bytes(np.array(self._index, "<i8").tobytes())
            fsync(sidecar)
        self._file, self._count, self._index = None, 0, array("q")


def truncate_shards(paths: Sequence[Path], n_tokens: int) -> list[Path]:
    """Keep the first n_tokens of shards, which must be an edge of documents if they have them.

    Shards left with nothing are removed. Returns the others.
    """
    kept = []
    for path in paths:
        _, count = _count(path)
        local, n_tokens = min(count, n_tokens), max(0, n_tokens - count)
        sidecar = index_path(path)
        if not local:
            path.unlink()
            sidecar.unlink(missing_ok=True)
            continue
        kept.append(path)
        if local == count:
            continue
        if sidecar.is_file():
            rows = int((_read_index(path, count)[:, 0] < local).sum())
            os.truncate(sidecar, 16 * rows)
            fsync(sidecar)
        with path.open("r+b") as file:
            file.write(_header(local))
            file.truncate(HEADER_BYTES + 2 * local)
        fsync(path)
    return kept
