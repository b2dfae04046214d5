"""Tensors in files: what they are is known at once, their values are read when they are asked for.

Files are mapped into memory and tensors copied out one at a time, so that loading a model takes
little more memory than the model has. Of pickles, torch's restricted reader takes tensors and plain
containers; nothing is executed.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptfast.checks import one_line

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Bytes read from a mapping before it is made anew, which gives its resident pages back.
_RESIDENT = 2**24


class CheckpointError(ValueError):
    """Files that hold no model or run of ours or no GPT-2, not all of it, or a damaged one."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `read` gives its values, as a view of a mapped file or, if not mapped, as
    memory of their own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    mapped: bool = True

    def t(self) -> "Stored":
        """The transpose of a matrix."""
        return Stored(self.shape[::-1], self.dtype, lambda: self.read().t(), self.mapped)

    def load(self) -> Tensor:
        """The values in memory of their own, contiguous."""
        values = self.read()
        if not self.mapped:
            return values.contiguous()
        return torch.empty(self.shape, dtype=self.dtype).copy_(values)


class Mapped:
    """Named tensors over mapped files; mapped anew before many of their pages are resident."""

    def __init__(self, open: Callable[[], Mapping[Any, Tensor]]) -> None:
        self._open, self.tensors, self._resident = open, open(), 0

    def read(self, name: Any, part: slice = slice(None)) -> Tensor:
        """A tensor, or of a vector a part. Views given before stay valid as long as they live."""
        if self._resident > _RESIDENT:
            self.tensors, self._resident = {}, 0
            self.tensors = self._open()
        tensor = self.tensors[name][part] if part != slice(None) else self.tensors[name]
        # The kernel maps what lies around too, up to a large page.
        self._resident += tensor.nbytes + 2**21
        return tensor

    def stored(self) -> dict[str, Stored]:
        def one(name: str, tensor: Tensor) -> Stored:
            return Stored(tuple(tensor.shape), tensor.dtype, lambda: self.read(name))

        return {name: one(name, tensor) for name, tensor in self.tensors.items()}


def map_file(path: Path) -> Tensor:
    """A file's bytes, (n,) uint8, mapped; what is written there stays in memory."""
    try:
        return torch.from_file(str(path), False, path.stat().st_size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {path}: {one_line(error)}") from None


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file's text; CheckpointError naming the file if there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, or a number of 5,000 digits
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return value


def read_text(path: Path) -> str:
    """A file's text."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    return parse_json(read_text(path), path)


def read_safetensors(*paths: Path) -> dict[str, Stored]:
    """The tensors of .safetensors files."""

    def open() -> dict[str, Tensor]:
        tensors = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
        return tensors

    return Mapped(open).stored()


# Where nanoGPT, the book and others keep the weights beside the optimizer's state.
_STATE = ("model", "model_state_dict", "state_dict")
# A scalar of numpy's, a loss say, may stand beside the weights; by its names of old and new.
_NUMPY = [
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np._core.multiarray.scalar,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4")),
]


def read_pickles(*paths: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The named tensors of files that torch.save wrote, and nanoGPT's model_args if the first has
    them.

    Only tensors and plain containers are taken: a pickle that asks for anything else is refused.
    """
    mapped = all(zipfile.is_zipfile(path) for path in paths)  # else the format before torch 1.6
    for path in paths:
        _check_pickle(path)
    args: dict[str, Any] = {}

    def open() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for i, path in enumerate(paths):
            content = _unpickle(path, mapped)
            if i == 0 and isinstance(content.get("model_args"), dict):
                args["model_args"] = content["model_args"]
            key = next((key for key in _STATE if isinstance(content.get(key), dict)), None)
            state = content if key is None else content[key]
            own = {k: _plain(v, path) for k, v in state.items() if _named(k, v)}
            # A head may be the embedding once more; further tensors over the same bytes are none.
            if sum(tensor.nbytes for tensor in own.values()) > 2 * path.stat().st_size:
                raise CheckpointError(f"{path} is damaged: its tensors are more than its bytes")
            tensors |= own
        return tensors

    if mapped:
        return Mapped(open).stored(), args

    def one(tensor: Tensor) -> Stored:
        return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor, mapped=False)

    return {name: one(tensor) for name, tensor in open().items()}, args


def _check_pickle(path: Path) -> None:
    """CheckpointError for what small files can make large in torch's reader."""
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
        raise CheckpointError(f"{path} is not read: it is compressed or asks for a bytearray")


def _holds(file: BinaryIO, word: bytes) -> bool:
    """Whether a word stands in a file, which is read a piece at a time."""
    piece = b""
    while more := file.read(2**20):
        piece = piece[-len(word) :] + more
        if word in piece:
            return True
    return False


def _unpickle(path: Path, mapped: bool) -> dict[str, Any]:
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of protocols that damaged files name
            torch.serialization.safe_globals(_NUMPY),
        ):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a damaged or hostile pickle makes torch raise
        asked = re.search(r"GLOBAL (\S+)|class (\S+)", str(error))
        why = f"it asks for {asked[1] or asked[2]}" if asked else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and is not read: {why}"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors")
    return content


def _named(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _plain(tensor: Tensor, path: Path) -> Tensor:
    """The tensor, if it is dense, on the CPU and no larger than what is stored of it."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.is_quantized or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path} holds a tensor that is not dense, {tuple(tensor.shape)}")
    return tensor.detach()
