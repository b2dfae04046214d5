"""A model packed for the C++ engine: one tensor of bytes, and the directory that keeps it.

csrc/engine.h describes the layout of matrices in it. A packed directory holds packed.safetensors,
which describes the model too, and the tokenizer's files.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptfast.checks import one_line
from gptfast.config import GPTConfig
from gptfast.model import GPT
from gptfast.ops.backend import EXTENSION, MISSING, check_isa
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.weights.lazy_tensor import CheckpointError
from gptfast.weights.packed import FILE
from gptfast.weights.weights import Weights, named_or_kept

DTYPES = ("fp32", "bf16", "int8", "int4")  # in the order of WeightType
CACHE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.float16,
    "int4": torch.float16,
}
FORMAT = "gptfast-packed-2"
FORMAT_BEFORE = "gptfast-packed-1"
"""The same but for bf16 matrices, whose inputs were padded to a multiple of 2 instead of 32."""
IO_CHUNK_BYTES = 2**20


class Shape(NamedTuple):
    """A packed model's shape as the operators take it: the fields of ModelShape in csrc."""

    weight_type: int
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    tied: int


@dataclass(frozen=True)
class Packed:
    """A GPT-2's packed weights. data: (n,) uint8; shape: the model's shape for the operators."""

    config: GPTConfig
    dtype: str
    data: Tensor
    tokenizer: str | None = None
    """A name or directory for `get_tokenizer`, if one is on record."""
    vocabulary: str | None = None
    """What identifies the vocabulary of its training, if it is on record."""
    eos_ids: tuple[int, ...] = ()
    """The ids that end a text, as far as the model's files name any."""

    @property
    def weight_bytes(self) -> int:
        """Bytes that a decode step reads: all weights but the position embeddings."""
        return len(self.data) - 4 * self.config.block_size * self.config.n_embd

    @property
    def shape(self) -> Shape:
        return _shape(self.config, self.dtype)


def _shape(config: GPTConfig, dtype: str) -> Shape:
    return Shape(
        weight_type=DTYPES.index(dtype),
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        vocab_size=config.vocab_size,
        block_size=config.block_size,
        tied=int(config.tie_weights),
    )


def _new(config: GPTConfig, dtype: str) -> Tensor:
    check_isa()
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if EXTENSION is None:
        raise RuntimeError(f"the engine needs the C++ kernels: {MISSING}")
    return torch.ops.gptfast.engine_new(torch.ops.gptfast.engine_bytes(_shape(config, dtype)))


@torch.no_grad()
def _pack(
    config: GPTConfig, dtype: str, tensors: Iterable[tuple[str, Tensor]], **of_text: Any
) -> Packed:
    packed = Packed(config, dtype, _new(config, dtype), **of_text)
    for name, tensor in tensors:
        torch.ops.gptfast.engine_pack(packed.data, packed.shape, name, tensor.detach())
    return packed


def pack_model(model: GPT, dtype: str) -> Packed:
    """Return the packed weights of a model on the CPU that has no `foreign_part`."""
    tensors = model.named_parameters(remove_duplicate=False)
    of_text = {"vocabulary": model.vocabulary, "eos_ids": model.eos_ids}
    return _pack(model.config, dtype, tensors, tokenizer=model.tokenizer_name, **of_text)


def pack_weights(weights: Weights, dtype: str) -> Packed:
    """Return the packed weights of files, read one tensor after the other to save memory."""
    of_text = {"vocabulary": weights.vocabulary, "eos_ids": weights.eos_ids}
    return _pack(weights.config, dtype, weights.read(), tokenizer=weights.tokenizer, **of_text)


def _bytes_of(data: Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array)


def _checksum(dtype: str, config: str) -> Any:
    """Return a CRC-32C that begins with the dtype and config, which say how to read the rest."""
    import google_crc32c  # here, because only files need it

    return google_crc32c.Checksum(f"{dtype} {config}".encode())


def _header(packed: Packed) -> bytes:
    buffer, config = _bytes_of(packed.data), json.dumps(asdict(packed.config))
    crc = _checksum(packed.dtype, config)
    for begin in range(0, len(buffer), IO_CHUNK_BYTES):
        crc.update(bytes(buffer[begin : begin + IO_CHUNK_BYTES]))
    metadata = {
        "format": FORMAT,
        "dtype": packed.dtype,
        "config": config,
        "crc32c": crc.hexdigest().decode(),
    }
    if packed.tokenizer and not Path(packed.tokenizer).is_dir():
        metadata["tokenizer"] = packed.tokenizer
    if packed.vocabulary:
        metadata["vocabulary"] = packed.vocabulary
    if packed.eos_ids:
        metadata["eos_ids"] = json.dumps(packed.eos_ids)
    tensor = {"dtype": "U8", "shape": [len(packed.data)], "data_offsets": [0, len(packed.data)]}
    text = json.dumps({"__metadata__": metadata, "packed": tensor}).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def save(
    packed: Packed, directory: str | PathLike, tokenizer: Tokenizer | str | None = None
) -> None:
    """Write a packed directory, whole or not at all. ValueError for a path that exists."""
    path = Path(directory)
    if path.exists():
        raise ValueError(f"{path} exists; name another or delete it")
    # Loading a packed model needs neither.
    from gptfast.files import new_directory, write_files
    from gptfast.tokenizer.vocabulary import fingerprint_of
    from gptfast.weights.pretrained import tokenizer_texts

    chosen = tokenizer or packed.tokenizer
    texts, _ = tokenizer_texts(chosen)
    if packed.vocabulary is None and chosen is not None:
        packed = replace(packed, vocabulary=fingerprint_of(chosen))
    with new_directory(path) as part:
        with (part / FILE).open("wb") as file:
            file.write(_header(packed))
            file.write(_bytes_of(packed.data))
        write_files(part, {}, texts)


class _OlderFormat(Exception):
    """The file has an order of weights that is read no more."""


def _metadata(path: Path) -> tuple[GPTConfig, dict[str, str]]:
    """Return the model's shape and a packed file's other metadata. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names, size = list(file.keys()), file.get_slice("packed").get_shape()
        if metadata.get("format") not in (FORMAT, FORMAT_BEFORE) or names != ["packed"]:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        config, dtype = GPTConfig(**json.loads(metadata["config"])), metadata["dtype"]
        if metadata["format"] == FORMAT_BEFORE and dtype == "bf16" and config.n_embd % 32:
            raise _OlderFormat
        if dtype not in DTYPES or size != [torch.ops.gptfast.engine_bytes(_shape(config, dtype))]:
            raise ValueError(f"a model of this shape in {dtype!r} does not have {size} bytes")
        return config, metadata
    except _OlderFormat:
        raise CheckpointError(
            f"{path} was packed by an older gptfast, which padded bf16 weights otherwise; "
            "pack the model again (gptfast convert)"
        ) from None
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None


def _read(path: Path, data: Tensor, crc: Any) -> str:
    """Fill data with the bytes after the header; return the checksum of all, in hexadecimal."""
    buffer = _bytes_of(data)
    with path.open("rb", buffering=0) as file:
        file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
        for begin in range(0, len(buffer), IO_CHUNK_BYTES):
            piece = buffer[begin : begin + IO_CHUNK_BYTES]
            if file.readinto(piece) != len(piece):
                raise CheckpointError(f"{path} is damaged: it ends too soon")
            crc.update(bytes(piece))
    return crc.hexdigest().decode()


def _eos_ids(path: Path, text: str, vocab_size: int) -> tuple[int, ...]:
    from gptfast.weights.text import end_ids

    try:
        return end_ids(json.loads(text), vocab_size, str(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None


def load(directory: str | PathLike) -> Packed:
    """Read a packed directory; its checksum is verified. Raises CheckpointError."""
    path = Path(directory) / FILE
    if EXTENSION is None:
        raise RuntimeError(f"the engine needs the C++ kernels: {MISSING}")
    config, metadata = _metadata(path)
    data = _new(config, metadata["dtype"])
    crc = _checksum(metadata["dtype"], metadata["config"])
    if _read(path, data, crc) != metadata.get("crc32c"):
        raise CheckpointError(f"{path} is damaged: its CRC-32C is not the one it was saved with")
    tokenizer = named_or_kept(metadata.get("tokenizer"), Path(directory))
    eos_ids = _eos_ids(path, metadata.get("eos_ids", "[]"), config.vocab_size)
    return Packed(config, metadata["dtype"], data, tokenizer, metadata.get("vocabulary"), eos_ids)
