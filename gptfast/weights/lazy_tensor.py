"""Tensors in files: names, shapes and dtypes are known at once, values are read when asked for.

Files are mapped into memory and tensors copied out one at a time, so that loading a model takes
little more memory than the model itself. pickles.py reads those of torch.save.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

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
    """Return the values, which may be a view of the mapped file."""
    fresh: bool = False
    """Whether `read` returns contiguous memory of the values' own, which nothing else holds."""
    place: tuple[Any, ...] | None = None
    """Where the values lie: two tensors of one place, shape and dtype are equal. None: unknown."""

    def numel(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    def t(self) -> "LazyTensor":
        """Return the transpose of a matrix."""
        return LazyTensor(self.shape[::-1], self.dtype, lambda: self.read().t())

    def load(self) -> Tensor:
        """Return the values as contiguous memory of their own."""
        if self.fresh:
            return self.read()
        # What stays is made before what `read` may make: no hole is left where that was.
        return torch.empty(self.shape, dtype=self.dtype).copy_(self.read())


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


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the text values that a .safetensors file has beside its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
