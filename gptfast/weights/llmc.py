"""llm.c's model file: a header of 256 int32, then each parameter of all layers in turn.

Header: magic 20240326, version (3: fp32, 5: bf16), block_size, vocab_size, n_layer, n_head, n_embd,
rows of the padded token embedding. Matrices are (out, in). Source: llm.c, train_gpt2.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from gptfast.config import GPTConfig, parameter_shapes
from gptfast.weights.lazy_tensor import CheckpointError, LazyTensor, MappedFiles, map_file
from gptfast.weights.weights import Weights

MAGIC = 20240326
_HEADER_BYTES = 1024
_DTYPES = {3: torch.float32, 5: torch.bfloat16}
_PADDING_ROWS = 128


def _layout(config: GPTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of each parameter, in the file's order; c_attn has a bias there."""
    shapes = parameter_shapes(replace(config, qkv_bias=True))
    in_block = [name.removeprefix("h.0.") for name in shapes if name.startswith("h.0.")]
    for name in ("wte.weight", "wpe.weight"):
        yield name, shapes[name]
    for leaf in in_block:
        for i in range(config.n_layer):
            yield f"h.{i}.{leaf}", shapes[f"h.{i}.{leaf}"]
    for name in ("ln_f.weight", "ln_f.bias"):
        yield name, shapes[name]


def _read_header(path: Path, header: bytes) -> tuple[GPTConfig, torch.dtype, int]:
    """Return the configuration, the dtype and the rows of the padded token embedding."""
    magic, version, T, V, n_layer, n_head, C, padded_rows = np.frombuffer(header, "<i4", 8).tolist()
    assert magic == MAGIC
    if version not in _DTYPES:
        raise CheckpointError(
            f"{path} has llm.c's version {version}; only 3 (fp32) and 5 (bf16) can be read"
        )
    try:
        config = GPTConfig(V, T, n_layer, n_head, C)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if padded_rows < V:
        raise CheckpointError(f"{path}: the embedding has {padded_rows} rows for {V} tokens")
    return config, _DTYPES[version], padded_rows


def open_file(path: Path) -> Weights:
    """Return the weights of a file that begins with MAGIC. Raises CheckpointError."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        raise CheckpointError(f"{path} is truncated: it has {len(header)} bytes")
    config, dtype, padded_rows = _read_header(path, header)
    padding = (padded_rows - config.vocab_size) * config.n_embd * dtype.itemsize
    parts, end = {}, _HEADER_BYTES
    for name, shape in _layout(config):
        start, end = end, end + prod(shape) * dtype.itemsize
        parts[name] = slice(start, end), shape
        if name == "wte.weight":
            end += padding
    if (size := path.stat().st_size) != end:
        raise CheckpointError(
            f"{path} is damaged: it has {size:,} bytes, but its header asks for {end:,}"
        )
    mapped = MappedFiles(lambda: {"": map_file(path)})
    tensors = {name: _lazy(mapped, part, dtype, shape) for name, (part, shape) in parts.items()}
    return Weights(str(path), config, tensors)


def _lazy(
    mapped: MappedFiles, part: slice, dtype: torch.dtype, shape: tuple[int, ...]
) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda: mapped.read("", part).view(dtype).view(shape))


def write(config: GPTConfig, state: Mapping[str, Tensor], file: IO[bytes]) -> None:
    """Write GPT's state dictionary as llm.c reads it, in fp32 or bf16 as it is.

    Raises ValueError for other dtypes and for an untied head, which llm.c does not have.
    """
    embedding = state["wte.weight"]
    version = {dtype: version for version, dtype in _DTYPES.items()}.get(embedding.dtype)
    if version is None:
        raise ValueError(
            f"llm.c's form holds fp32 or bf16, but the model is {embedding.dtype}; give a --dtype"
        )
    if not config.tie_weights:
        raise ValueError(
            "llm.c's form needs a head tied to the embedding, but this model's head is separate; "
            "name a directory, for transformers' form"
        )
    padded_rows = -(-config.vocab_size // _PADDING_ROWS) * _PADDING_ROWS
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    header = np.zeros(_HEADER_BYTES // 4, "<i4")
    header[:8] = MAGIC, version, *sizes, padded_rows
    file.write(header.tobytes())
    for name, shape in _layout(config):
        tensor = state.get(name)  # without qkv_bias, zeros are the same function
        file.write(_bytes(embedding.new_zeros(shape) if tensor is None else tensor))
        if name == "wte.weight":
            padding = embedding.new_zeros(padded_rows - config.vocab_size, config.n_embd)
            file.write(_bytes(padding))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
