"""Token files written one after another, each up to a given number of tokens."""

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptfast.checks import integer
from gptfast.data.token_files import (
    MAX_FILE_TOKENS,
    as_uint16,
    file_header,
    index_path,
    read_index,
)
from gptfast.data.token_layout import HEADER_BYTES, token_layout


class ShardWriter:
    """Writes directory/<part>_000000.bin, … of at most shard_tokens tokens each, and sidecars.

    A document is never cut: one longer than shard_tokens gets a shard of its own. Files are not
    synced: `files.new_directory` does that for a whole directory.
    """

    def __init__(self, directory: Path, part: str, shard_tokens: int) -> None:
        self.directory, self.part = directory, part
        self.shard_tokens = integer("shard_tokens", shard_tokens, 1, MAX_FILE_TOKENS)
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
                pass  # a full disk, which is the error being raised already

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
        self._file.write(file_header(self._count))
        self._file.close()
        if self._index:
            sidecar = index_path(self.paths[-1])
            sidecar.write_bytes(np.array(self._index, "<i8").tobytes())
        self._file, self._count, self._index = None, 0, array("q")


def truncate_shards(paths: Sequence[Path], n_tokens: int) -> list[Path]:
    """Cut shards down to their first n_tokens, and return those that are left.

    In shards of documents, n_tokens must be the end of a document. Empty shards are removed.
    """
    kept = []
    for path in paths:
        count = token_layout(path).count
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
            documents = int((read_index(path, count)[:, 0] < local).sum())
            os.truncate(sidecar, 16 * documents)
        with path.open("r+b") as file:
            file.write(file_header(local))
            file.truncate(HEADER_BYTES + 2 * local)
    return kept
