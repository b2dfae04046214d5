"""The files of torch.save: a pickle that names tensors, and their bytes, which are mapped.

Two layouts: a zip file (data.pkl, data/0, data/1, ...), and before torch 1.6 five pickles with the
bytes behind them. The pickles are read as data (inert.py), so nothing in a file runs.
"""

import io
import mmap
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gptfast.checks import one_line
from gptfast.inert import PLAIN_CALLS, Inert, kind_of, mapping_of, read_pickle
from gptfast.weights.lazy_tensor import CheckpointError, LazyTensor, MappedFiles, map_file

REMEDY = "save it again as torch.save(model.state_dict(), FILE)"
# The keys under which the weights stand beside an optimizer's state, most usual first.
_STATE_KEYS = (
    *("model", "model_state_dict", "state_dict", "module", "model_state", "model_dict"),
    *("net", "network", "weights", "params"),
)
_STORAGES = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16},
    **{"BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16},
    **{"Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool, "Untyped": torch.uint8},
}
_DTYPES = {str(dtype): dtype for dtype in _STORAGES.values()}
# Sparse and quantised tensors, those of FSDP and of torchao.
_TENSOR_OBJECTS = ("torch._utils._rebuild", "torch.distributed.", "torch.nested.", "torchao.")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DIMS = 16


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    n_bytes: int


@dataclass(frozen=True)
class _Stored:
    """A tensor as a pickle describes it; offset and strides count elements."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Archive:
    """A file's content, and where the bytes of each of its storages begin."""

    path: Path
    content: Any
    place: Callable[[_Storage], int]


def _storage(identifier: Any) -> _Storage:
    """Return the storage that a persistent identifier names."""
    kind, storage_type, key, _location, numel, *view = identifier
    dtype = _STORAGES[storage_type.name.rpartition(".")[2].removesuffix("Storage")]
    if kind != "storage" or type(numel) is not int or numel < 0 or any(view):
        raise ValueError("a storage is described in an unknown way")
    return _Storage(str(key), dtype, numel * dtype.itemsize)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Stored:
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor has no storage")
    numbers = (offset, *size, *stride)
    valid = all(type(n) is int and 0 <= n < 2**62 for n in numbers)
    if not valid or not len(size) == len(stride) <= _MAX_DIMS:
        raise ValueError("a tensor has a size or stride that no tensor has")
    return _Stored(storage, storage.dtype, offset, tuple(size), tuple(stride))


def _typed_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """Return a tensor whose dtype comes after `requires_grad` and `backward_hooks`."""
    dtype, plain = _DTYPES[rest[2].name], _tensor(storage, offset, size, stride)
    return _Stored(plain.storage, dtype, plain.offset, plain.size, plain.stride)


def _subclass(function: Any, *rest: Any) -> Any:
    """Return a tensor with attributes, or an Inert for a tensor of another class."""
    if function.name in _CALLS and len(rest) > 1:
        return _CALLS[function.name](*rest[1])
    return Inert(function.name)


_CALLS: dict[str, Callable[..., Any]] = {
    **PLAIN_CALLS,
    "torch.device": lambda *_: "device",
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _subclass,
}


def _open_zip(path: Path) -> _Archive:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        roots = [name[:-8] for name in records if f"/{name}".endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError(f"{path} is a zip file, but torch.save did not write it")
        root = roots[0]
        if f"{root}constants.pkl" in records:
            raise CheckpointError(f"{path} is TorchScript: load it in torch and {REMEDY}")
        if any(record.compress_type for record in records.values()):
            raise CheckpointError(f"{path} was not read: it is compressed; {REMEDY}")
        order = f"{root}byteorder"
        if order in records and archive.read(order) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine; {REMEDY}")
        pickle = io.BytesIO(archive.read(f"{root}data.pkl"))

    def place(storage: _Storage) -> int:
        record = records[f"{root}data/{storage.key}"]
        if record.file_size < storage.n_bytes:
            raise CheckpointError(f"{path} is damaged: data/{storage.key} is too short")
        with path.open("rb") as file:
            file.seek(record.header_offset)
            header = file.read(30)
        name, extra = struct.unpack("<HH", header[26:])  # PK\3\4 ..., then the bytes
        return int(record.header_offset + 30 + name + extra)

    return _Archive(path, read_pickle(pickle, _CALLS, _storage), place)


def _open_legacy(path: Path) -> _Archive:
    storages: dict[str, _Storage] = {}

    def persistent(identifier: Any) -> _Storage:
        storage = _storage(identifier)
        return storages.setdefault(storage.key, storage)

    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        stream = cast(io.BytesIO, file)
        if read_pickle(stream, _CALLS, persistent) != _LEGACY_MAGIC:
            raise CheckpointError(f"{path} is a pickle, but not one of torch.save; {REMEDY}")
        _, system = (read_pickle(stream, _CALLS, persistent) for _ in range(2))
        if not system.get("little_endian", True):
            raise CheckpointError(f"{path} was written on a big-endian machine; {REMEDY}")
        content = read_pickle(stream, _CALLS, persistent)
        places = {}
        for key in read_pickle(stream, _CALLS, persistent):
            (numel,) = struct.unpack("<q", file.read(8))
            places[key], n_bytes = file.tell(), numel * storages[key].dtype.itemsize
            if numel < 0 or n_bytes < storages[key].n_bytes:
                raise CheckpointError(f"{path} is damaged: storage {key!r} is too short")
            file.seek(n_bytes, io.SEEK_CUR)
    return _Archive(path, content, lambda storage: places[storage.key])


def _archive(path: Path) -> _Archive:
    """Return what torch.save wrote to a file. Raises CheckpointError."""
    try:
        if zipfile.is_zipfile(path):
            return _open_zip(path)
        return _open_legacy(path)
    except CheckpointError:
        raise
    # Whatever a damaged or hostile pickle makes the machine, struct, zipfile and mmap raise.
    except Exception as error:
        reason = f"{one_line(error):.200}"
        if "it asks for" in reason:
            raise CheckpointError(
                f"{path} was not read: {reason}, which no model needs; if it is your own, {REMEDY}"
            ) from None
        if isinstance(error, KeyError):
            reason = f"there is no {reason}"
        raise CheckpointError(
            f"{path} is damaged, or torch.save did not write it ({reason}); {REMEDY}"
        ) from None


def _module_tensors(module: Inert, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield the parameters and buffers of an nn.Module that was saved whole, by name."""
    if id(module) in seen or prefix.count(".") > _MAX_DIMS:
        return
    seen.add(id(module))
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (mapping_of(module.attributes.get(kind)) or {}).items():
            yield f"{prefix}{name}", tensor
    for name, child in (mapping_of(module.attributes.get("_modules")) or {}).items():
        if isinstance(child, Inert):
            yield from _module_tensors(child, f"{prefix}{name}.", seen)


def _state(value: Any, depth: int, seen: set[int]) -> dict[str, Any]:
    """Return the named tensors in a value: under a usual key, its own, or the only ones in it."""
    mapping = mapping_of(value)
    if mapping is None or id(mapping) in seen or depth == 0:
        return {}
    seen.add(id(mapping))
    if isinstance(value, Inert) and "_modules" in mapping:
        return dict(_module_tensors(value, "", set()))
    for key in _STATE_KEYS:
        if found := _state(mapping.get(key), depth - 1, seen):
            return found
    own = {name: x for name, x in mapping.items() if isinstance(name, str) and _is_tensor(x)}
    if any("." in name for name in own):
        return own
    others = {
        key: found
        for key, x in mapping.items()
        if isinstance(key, str) and "optim" not in key and (found := _state(x, depth - 1, seen))
    }
    if len(others) > 1:
        raise CheckpointError(f"it has named tensors under {', '.join(sorted(others))}; {REMEDY}")
    return next(iter(others.values()), own)


def _is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor, or an object of torch's that stands for one."""
    return isinstance(value, _Stored) or (
        isinstance(value, Inert) and value.name.startswith(_TENSOR_OBJECTS)
    )


def _lazy(
    archive: _Archive, name: str, tensor: Any, mapped: MappedFiles, places: dict[str, int]
) -> LazyTensor:
    """Return a tensor of the file; CheckpointError unless it is dense and all its bytes exist."""
    if not isinstance(tensor, _Stored):
        raise CheckpointError(
            f"{archive.path} holds a tensor that is not dense, {name}: {tensor.name}; {REMEDY}"
        )
    storage, dtype, shape = tensor.storage, tensor.dtype, tensor.size
    n_bytes = prod(shape) * dtype.itemsize
    span = sum((n - 1) * step for n, step in zip(shape, tensor.stride, strict=True)) + 1
    if n_bytes and (
        n_bytes > storage.n_bytes or (tensor.offset + span) * dtype.itemsize > storage.n_bytes
    ):
        raise CheckpointError(f"{archive.path} holds a tensor that is not dense, {name}: {shape}")
    if n_bytes == 0:
        return LazyTensor(shape, dtype, lambda: torch.empty(shape, dtype=dtype), fresh=True)
    start = places.get(storage.key)
    if start is None:
        start = places[storage.key] = archive.place(storage)
    begin = start + tensor.offset * dtype.itemsize
    end = begin + span * dtype.itemsize
    if end > len(mapped.tensors[archive.path]):
        raise CheckpointError(f"{archive.path} is truncated: {name} ends at byte {end:,}")

    aligned = begin % dtype.itemsize == 0

    def read() -> Tensor:
        data = mapped.read(archive.path, slice(begin, end))
        data = data if aligned else data.clone()
        return data.view(dtype).as_strided(shape, tensor.stride)

    laid_out = torch.empty_strided(shape, tensor.stride, dtype=dtype, device="meta")
    copied = not aligned and laid_out.is_contiguous()
    place = (archive.path, begin, tensor.stride)
    return LazyTensor(shape, dtype, read, fresh=copied, place=place)


def read_pickles(*paths: Path) -> tuple[dict[str, LazyTensor], Any]:
    """Return the named tensors of files that torch.save wrote, and all content of the first.

    In the content, objects are `Inert`. Raises CheckpointError.
    """
    mapped = MappedFiles(lambda: {path: map_file(path) for path in paths})
    tensors: dict[str, LazyTensor] = {}
    content = None
    for path in paths:
        archive = _archive(path)
        content = archive.content if content is None else content
        try:
            state = _state(archive.content, 4, set())
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if not state:
            stored = isinstance(archive.content, _Stored)
            kind = "a tensor" if stored else kind_of(archive.content)
            raise CheckpointError(f"{path} holds no named tensors, but {kind}; {REMEDY}")
        places: dict[str, int] = {}
        try:
            own = {
                name: _lazy(archive, name, tensor, mapped, places)
                for name, tensor in state.items()
                if _is_tensor(tensor)
            }
        except (KeyError, OSError, struct.error) as error:
            raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
        # A tied head may share the embedding's bytes, hence twice the size of the file.
        total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in own.values())
        if total > 2 * path.stat().st_size:
            raise CheckpointError(f"{path} is damaged: its tensors need more bytes than it has")
        tensors |= own
    return tensors, content
