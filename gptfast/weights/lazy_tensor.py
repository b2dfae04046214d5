"""Tensors in files: names, shapes and dtypes are known at once, values are read when asked for.

Files are mapped into memory and tensors copied out one at a time, so that loading a model takes
little more memory than the model itself. Pickles are read by torch's restricted reader, which takes
tensors and plain containers and executes nothing.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptfast.checks import one_line

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A mapping is made anew after this many bytes were read from it, which frees its resident pages.
_MAX_RESIDENT_BYTES = 2**24


class CheckpointError(ValueError):
    """Files that are damaged or incomplete, or that hold no GPT-2 and no run of gptfast."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, whose values are read when they are asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Return the values: a view of the mapped file or, if not `mapped`, memory of their own."""
    mapped: bool = True

    def numel(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    def t(self) -> "LazyTensor":
        """Return the transpose of a matrix."""
        return LazyTensor(self.shape[::-1], self.dtype, lambda: self.read().t(), self.mapped)

    def load(self) -> Tensor:
        """Return the values as contiguous memory of their own."""
        values = self.read()
        if not self.mapped:
            return values.contiguous()
        return torch.empty(self.shape, dtype=self.dtype).copy_(values)


class MappedFiles:
    """Named tensors in mapped files, which are mapped anew before many pages are resident."""

    def __init__(self, open: Callable[[], Mapping[Any, Tensor]]) -> None:
        self._open, self._resident_bytes = open, 0
        self.tensors: Mapping[Any, Tensor] = open()

    def read(self, name: Any, part: slice = slice(None)) -> Tensor:
        """Return a tensor, or a part of a vector. Views returned before stay valid."""
        if self._resident_bytes > _MAX_RESIDENT_BYTES:
            self.tensors, self._resident_bytes = {}, 0
            self.tensors = self._open()
        tensor = self.tensors[name][part] if part != slice(None) else self.tensors[name]
        # The kernel maps what lies around too, up to a large page.
        self._resident_bytes += tensor.nbytes + 2**21
        return tensor

    def lazy_tensors(self) -> dict[str, LazyTensor]:
        """Return every tensor, to be read when it is asked for."""

        def lazy(name: str, tensor: Tensor) -> LazyTensor:
            return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: self.read(name))

        return {name: lazy(name, tensor) for name, tensor in self.tensors.items()}


def map_file(path: Path) -> Tensor:
    """Return a file's bytes, (n,) uint8, mapped privately: writing to them changes no file."""
    try:
        return torch.from_file(str(path), False, path.stat().st_size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {path}: {one_line(error)}") from None


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """Return the JSON object in a file's text; CheckpointError naming the file if it has none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, or a number of 5,000 digits
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object")
    return value


def read_text(path: Path) -> str:
    """Return a file's UTF-8 text. Raises CheckpointError."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises CheckpointError."""
    return parse_json(read_text(path), path)


def read_safetensors(*paths: Path) -> dict[str, LazyTensor]:
    """Return the tensors of .safetensors files. Raises CheckpointError."""

    def open() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
        return tensors

    return MappedFiles(open).lazy_tensors()


# The keys under which nanoGPT, the book and others keep the weights beside the optimizer's state.
_STATE_KEYS = ("model", "model_state_dict", "state_dict")
# The classes of a numpy scalar beside the weights, such as a loss, under its old and new name.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_NUMPY: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    _SCALAR,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4")),
]


def read_pickles(*paths: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Return the named tensors of files that torch.save wrote, and nanoGPT's model_args.

    The second value is {"model_args": ...} if the first file has them, else {}. Only tensors and
    plain containers are taken: a pickle that asks for anything else is a CheckpointError.
    """
    mapped = all(zipfile.is_zipfile(path) for path in paths)  # else the format before torch 1.6
    for path in paths:
        _check_pickle(path)
    extras: dict[str, Any] = {}

    def open() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for i, path in enumerate(paths):
            content = _unpickle(path, mapped)
            if i == 0 and isinstance(content.get("model_args"), dict):
                extras["model_args"] = content["model_args"]
            key = next((key for key in _STATE_KEYS if isinstance(content.get(key), dict)), None)
            state = content if key is None else content[key]
            own = {k: _plain(v, path) for k, v in state.items() if _named(k, v)}
            # A tied head may share the embedding's bytes, hence twice the size of the file.
            if sum(tensor.nbytes for tensor in own.values()) > 2 * path.stat().st_size:
                raise CheckpointError(f"{path} is damaged: its tensors need more bytes than it has")
            tensors |= own
        return tensors

    if mapped:
        return MappedFiles(open).lazy_tensors(), extras

    def loaded(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor, mapped=False)

    return {name: loaded(tensor) for name, tensor in open().items()}, extras


def _check_pickle(path: Path) -> None:
    """Raise CheckpointError for small files that would take much memory in torch's reader."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                large = any(x.compress_type for x in archive.infolist())
                pickles = [x for x in archive.namelist() if x.endswith("data.pkl")]
                large = large or any(b"bytearray" in archive.read(name) for name in pickles)
        else:
            with path.open("rb") as file:
                large = _holds(file, b"bytearray")  # of any length, all zeros; no tensor needs it
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
    if large:
        raise CheckpointError(f"{path} was not read: it is compressed or asks for a bytearray")


def _holds(file: BinaryIO, word: bytes) -> bool:
    """Return whether a file contains a word; reads a mebibyte at a time."""
    window = b""
    while more := file.read(2**20):
        window = window[-len(word) :] + more
        if word in window:
            return True
    return False


def _unpickle(path: Path, mapped: bool) -> dict[str, Any]:
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # about protocols that damaged files name
            torch.serialization.safe_globals(_NUMPY),
        ):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a damaged or hostile pickle makes torch raise
        asked = re.search(r"GLOBAL (\S+)|class (\S+)", str(error))
        why = f"it asks for {asked[1] or asked[2]}" if asked else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, so it was not read: {why}"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors")
    return content


def _named(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _plain(tensor: Tensor, path: Path) -> Tensor:
    """Return the tensor; CheckpointError unless it is dense, on the CPU and all its bytes exist."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.is_quantized or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path} holds a tensor that is not dense, {tuple(tensor.shape)}")
    return tensor.detach()
