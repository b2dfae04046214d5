"""TensorFlow's checkpoint format (TensorBundle), read in Python.

`<prefix>.index` is a LevelDB table from tensor name to a protocol buffer with dtype, shape, shard,
offset, size and CRC-32C; `<prefix>.data-0000i-of-0000n` are the shards, bytes one after the other.
A table is blocks of prefix-compressed entries, each block followed by its kind of compression (1
byte) and a masked CRC-32C (4); a footer of 48 bytes names the index of the blocks. Sources:
tensorflow/core/util/tensor_bundle, tensorflow/core/lib/io/format, both in TensorFlow's repository.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from gptfast.weights.lazy_tensor import CheckpointError, LazyTensor, MappedFiles, map_file

_MAGIC = 0xDB4775248B80FB57
_FOOTER, _TRAILER = 48, 5
# An index has some 30 bytes for each tensor; GPT-2 XL has 582 tensors.
_MAX_INDEX, _MAX_ENTRIES = 2**22, 20_000
_MAX_KEY, _MAX_DIMS = 1024, 254
# tensorflow/core/framework/types.proto
_DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}


class _Damaged(ValueError):
    """A fault of the index; the message goes behind the file's name."""


@dataclass
class _Entry:
    """BundleEntryProto."""

    dtype: int = 0
    shape: list[int] = field(default_factory=list)
    shard: int = 0
    offset: int = 0
    size: int = 0
    crc: int = 0
    sliced: bool = False


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at data[at:], which has seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Damaged("a number goes past its end")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at
    raise _Damaged("a number has more than ten bytes")


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and value of each field of a protocol buffer."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 2, 5):
            n, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if n > len(message) - at:
                raise _Damaged("a field goes past its end")
            content, at = message[at : at + n], at + n
            value = content if kind == 2 else int.from_bytes(content, "little")
        else:
            raise _Damaged(f"a field has the unknown kind {kind}")
        yield tag >> 3, value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise _Damaged("a number has the wrong type")
    return value


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise _Damaged("a message has the wrong type")
    return value


def _shape(message: bytes) -> list[int]:
    """Return the sizes in a TensorShapeProto: repeated Dim {size = 1} dim = 2."""
    sizes = []
    for number, dim in _fields(message):
        if number == 2:
            sizes.append(sum(_number(v) for n, v in _fields(_message(dim)) if n == 1))
        if len(sizes) > _MAX_DIMS:
            raise _Damaged(f"a tensor has more than {_MAX_DIMS} dimensions")
    return sizes


def _entry(message: bytes) -> _Entry:
    entry = _Entry()
    names = {1: "dtype", 3: "shard", 4: "offset", 5: "size", 6: "crc"}
    for number, value in _fields(message):
        if number in names:
            setattr(entry, names[number], _number(value))
        elif number == 2:
            entry.shape = _shape(_message(value))
        elif number == 7:
            entry.sliced = True
    return entry


def _crc_is(data: bytes | np.ndarray, masked: int) -> bool:
    # LevelDB masks checksums, because those of data that contain checksums are weak otherwise.
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF == masked


def _block(table: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries of the block that a handle (varints: offset, size) points to."""
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    end = offset + size
    if end + _TRAILER > len(table) - _FOOTER:
        raise _Damaged(f"a block of {size} bytes at {offset} goes past its end")
    kind, crc = struct.unpack_from("<BI", table, end)
    if not _crc_is(table[offset : end + 1], crc):
        raise _Damaged(f"the checksum of the block at {offset} is wrong")
    if kind != 0:
        raise _Damaged("its blocks are compressed, which TensorFlow's own writer never does")
    return _entries(table[offset:end])


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if len(block) < 4 or end < 0:
        raise _Damaged(f"a block of {len(block)} bytes has {restarts} restart points")
    key, at = b"", 0
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        n, at = _varint(block, at)
        if shared > len(key) or unshared + n > end - at:
            raise _Damaged("an entry goes past its block")
        if shared + unshared > _MAX_KEY:
            raise _Damaged(f"a name has {shared + unshared} bytes")
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + n]
        at += n


def _read_index(table: bytes) -> tuple[int, dict[str, _Entry]]:
    """Return the number of shards, and each tensor's entry by name."""
    if len(table) < _FOOTER or int.from_bytes(table[-8:], "little") != _MAGIC:
        raise _Damaged("it does not end with the footer of a table")
    footer = table[-_FOOTER:-8]
    _, at = _varint(footer, 0)  # the handle of the meta index, which nobody writes
    _, at = _varint(footer, at)
    shards: int | None = None
    entries: dict[str, _Entry] = {}
    left = len(table)
    for _, handle in _block(table, footer[at:]):
        left -= _varint(handle, _varint(handle, 0)[1])[0]
        if left < 0:  # one block a thousand times over, say
            raise _Damaged("its blocks overlap")
        for key, value in _block(table, handle):
            if len(entries) > _MAX_ENTRIES:
                raise _Damaged(f"it has more than {_MAX_ENTRIES} entries")
            if key:
                entries[key.decode("utf-8")] = _entry(value)
            else:
                shards = _shards(value)
    if shards is None:
        raise _Damaged("it has no header")
    return shards, entries


def _shards(header: bytes) -> int:
    """Return the shards in a BundleHeaderProto: num_shards = 1, endianness = 2 (0: little)."""
    fields = dict(_fields(header))
    if fields.get(2, 0) != 0:
        raise _Damaged("it was written on a big-endian machine")
    shards = _number(fields.get(1, 1))
    if not 1 <= shards <= 99999:
        raise _Damaged(f"it has {shards} shards")
    return shards


def read_bundle(prefix: Path) -> dict[str, LazyTensor]:
    """Return the floating-point tensors of `<prefix>.index` and its shards, by name.

    The checksums of the index are verified here, each tensor's when it is read. Raises
    CheckpointError.
    """
    index = prefix.with_name(f"{prefix.name}.index")
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise _Damaged(f"it has {index.stat().st_size} bytes")
        shards, entries = _read_index(index.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {index}: {error.strerror}") from None
    except (_Damaged, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from None
    used = {entry.shard for entry in entries.values()}
    names = {i: f"{prefix.name}.data-{i:05}-of-{shards:05}" for i in used}
    mapped = MappedFiles(lambda: {i: map_file(prefix.with_name(names[i])) for i in names})
    tensors = {}
    for name, entry in entries.items():
        if entry.dtype in _DTYPES:
            tensors[name] = _lazy(name, entry, mapped, prefix.with_name(names[entry.shard]))
    return tensors


def _lazy(name: str, entry: _Entry, mapped: MappedFiles, path: Path) -> LazyTensor:
    dtype, n = _DTYPES[entry.dtype], 1
    for size in entry.shape:
        n *= size
    if entry.sliced:
        raise CheckpointError(f"{path}: {name} is saved in slices; save it as one tensor")
    if n * dtype.itemsize != entry.size:
        raise CheckpointError(
            f"{path}: {name} of shape {tuple(entry.shape)} {dtype} cannot have {entry.size} bytes"
        )
    end = entry.offset + entry.size
    if end > len(mapped.tensors[entry.shard]):
        raise CheckpointError(f"{path} is truncated: {name} ends at byte {end}")

    aligned = entry.offset % dtype.itemsize == 0

    def read() -> Tensor:
        data = mapped.read(entry.shard, slice(entry.offset, end))
        array = data.numpy()
        array.flags.writeable = False
        if not _crc_is(array, entry.crc):
            raise CheckpointError(f"{path} is damaged: the checksum of {name} is wrong")
        return (data if aligned else data.clone()).view(dtype).view(entry.shape)

    return LazyTensor(tuple(entry.shape), dtype, read, fresh=not aligned)
