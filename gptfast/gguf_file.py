"""GGUF, llama.cpp's file: named values, and the places of tensors.

Nothing that a file says is trusted: each count and offset is compared with the file's size before
anything is made of it. Source: docs/gguf.md of https://github.com/ggml-org/ggml.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_BIG_ENDIAN = tuple(int.from_bytes(v.to_bytes(4, "big"), "little") for v in (1, *_VERSIONS))
# The types of values by their numbers, as struct and NumPy write them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS[12] = "d"
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_ALIGNMENTS = tuple(2**n for n in range(3, 17))
MAX_TEXTS = 10_000_000
"""The most texts in an array, which is the most tokens of a vocabulary."""


@dataclass(frozen=True)
class TensorPlace:
    """What a file's header says of a tensor. The bytes at `offset` are of ggml's type `kind`."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of a file: values by name (arrays of numbers as NumPy's), and the tensors."""

    values: dict[str, Any]
    tensors: dict[str, TensorPlace]


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file that begins as GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):  # no file, or a name that none can have
        return False


def read_gguf(path: Path) -> GGUFFile:
    """Return the header of a file that begins with MAGIC. Raises ValueError naming it, OSError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Header(data).read()
        except (ValueError, struct.error) as error:
            raise ValueError(f"{path} is a damaged GGUF: {error}") from None


class _Header:
    """Reads a header from beginning to end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, len(MAGIC)

    def read(self) -> GGUFFile:
        version = self._number("I")
        if version in _BIG_ENDIAN:
            raise ValueError("it is written for big-endian machines; make a little-endian one")
        if version not in _VERSIONS:
            raise ValueError(f"it has version {version}, and only 2 and 3 can be read")
        n_tensors, n_values = self._number("Q"), self._number("Q")
        values: dict[str, Any] = {}
        for _ in range(n_values):
            name = self._text()
            if name in values:
                raise ValueError(f"it has the value {name[:80]!r} twice")
            values[name] = self._value(name, self._number("I"))
        found: dict[str, TensorPlace] = {}
        for _ in range(n_tensors):
            name = self._text()
            if name in found:
                raise ValueError(f"it has the tensor {name[:80]!r} twice")
            found[name] = self._tensor(name)
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in _ALIGNMENTS:
            raise ValueError(f"its alignment is {alignment!r:.40}, not a power of 2 from 8")
        return GGUFFile(values, self._placed(found, alignment))

    def _placed(self, found: dict[str, TensorPlace], alignment: int) -> dict[str, TensorPlace]:
        """Return the tensors with offsets from the beginning of the file."""
        begin = -(-self._at // alignment) * alignment
        for name, tensor in found.items():
            if tensor.offset % alignment:
                raise ValueError(f"{name[:80]!r} does not begin at a multiple of {alignment}")
        return {n: TensorPlace(t.shape, t.kind, begin + t.offset) for n, t in found.items()}

    def _take(self, n: int) -> int:
        """Return where the next n bytes begin. Raises ValueError beyond the end of the file."""
        begin = self._at
        if n > len(self._data) - begin:
            raise ValueError(
                f"its header asks for {n:,} bytes at {begin:,}, and it has {len(self._data):,}"
            )
        self._at = begin + n
        return begin

    def _number(self, code: str) -> Any:
        begin = self._take(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self._data, begin)[0]

    def _text(self) -> str:
        n = self._number("Q")
        begin = self._take(n)
        return self._data[begin : begin + n].decode("utf-8")

    def _texts(self, n: int) -> list[str]:
        """Return n texts. A vocabulary has 100,000 of them, so this calls little."""
        data, at, size, length = self._data, self._at, len(self._data), struct.Struct("<Q")
        texts = []
        for _ in range(n):
            begin = at + 8
            at = begin + length.unpack_from(data, at)[0] if begin <= size else size + 1
            if at > size:
                raise ValueError(f"it ends in a text at {begin - 8:,}")
            texts.append(data[begin:at].decode("utf-8"))
        self._at = at
        return texts

    def _value(self, name: str, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(name, self._number("I"), self._number("Q"))
        if kind not in _NUMBERS:
            raise ValueError(f"the value {name[:80]!r} is of the unknown type {kind}")
        return self._number(_NUMBERS[kind])

    def _array(self, name: str, kind: int, n: int) -> Any:
        if kind == _STRING:
            if n > MAX_TEXTS:
                raise ValueError(f"{name[:80]!r} has {n:,} texts, of at most {MAX_TEXTS:,}")
            return self._texts(n)
        if kind not in _NUMBERS:
            raise ValueError(f"the value {name[:80]!r} is an array of the unknown type {kind}")
        dtype = np.dtype(f"<{_NUMBERS[kind]}" if kind != 7 else "u1")
        begin = self._take(n * dtype.itemsize)
        return np.frombuffer(self._data[begin : self._at], dtype)

    def _tensor(self, name: str) -> TensorPlace:
        n_dims = self._number("I")
        if n_dims > _MAX_DIMS:
            raise ValueError(f"{name[:80]!r} has {n_dims} dimensions, of at most {_MAX_DIMS}")
        # The innermost comes first.
        shape = tuple(self._number("Q") for _ in range(n_dims))[::-1]
        return TensorPlace(shape, self._number("I"), self._number("Q"))
