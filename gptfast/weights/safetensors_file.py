"""Write a .safetensors file one tensor after the other, so that no more than one need be held."""

import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


class Layout(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the values."""
        return prod(self.shape) * self.dtype.itemsize


def _offsets(layouts: Mapping[str, Layout]) -> dict[str, int]:
    """Return where the values of each tensor begin, in the order of safetensors' own writer."""
    offsets, end = {}, 0
    for name in sorted(layouts, key=lambda name: (-layouts[name].dtype.itemsize, name)):
        offsets[name] = end
        end += layouts[name].nbytes
    return offsets


def _header(layouts: Mapping[str, Layout], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, begin in _offsets(layouts).items():
        layout = layouts[name]
        entries[name] = {
            "dtype": _NAMES[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [begin, begin + layout.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    layouts: Mapping[str, Layout],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file, and wait until it is on the disk.

    layouts: of the tensors by name. tensors: each of them once, in any order, on the CPU; each is
    asked for when the one before is written. metadata: more text values. Raises OSError.
    """
    header, offsets = _header(layouts, {"format": "pt", **(metadata or {})}), _offsets(layouts)
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            assert layouts[name] == (tensor.dtype, tuple(tensor.shape))
            file.seek(len(header) + offsets.pop(name))
            values: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
            file.write(values)
        assert not offsets, f"{path} lacks {list(offsets)}"
        file.flush()
        os.fsync(file.fileno())
