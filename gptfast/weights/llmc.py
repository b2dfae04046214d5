"""llm.c's model file: 256 int32 of header, then every parameter, layers one after the other.

Header: magic 20240326, version (3: fp32, 5: bf16), block_size, vocab_size, n_layer, n_head, n_embd,
rows of the padded token embedding. Matrices are (out, in). Source: llm.c, train_gpt2.py.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.model import GPT
from gptfast.weights.stored import CheckpointError, Mapped, Stored, map_file
from gptfast.weights.weights import Weights

MAGIC = 20240326
_HEADER_BYTES = 1024
_DTYPES = {3: torch.float32, 5: torch.bfloat16}
_PADDING = 128


def _layout(config: GPTConfig, padded: int) -> Iterator[tuple[str, bool, tuple[int, ...]]]:
    """The file's parameters in order: name, whether every layer has it, its shape."""
    C = config.n_embd
    yield "wte.weight", False, (padded, C)
    yield "wpe.weight", False, (config.block_size, C)
    for name, *shape in (
        ("ln_1.weight", C),
        ("ln_1.bias", C),
        ("attn.c_attn.weight", 3 * C, C),
        ("attn.c_attn.bias", 3 * C),
        ("attn.c_proj.weight", C, C),
        ("attn.c_proj.bias", C),
        ("ln_2.weight", C),
        ("ln_2.bias", C),
        ("mlp.c_fc.weight", 4 * C, C),
        ("mlp.c_fc.bias", 4 * C),
        ("mlp.c_proj.weight", C, 4 * C),
        ("mlp.c_proj.bias", C),
    ):
        yield name, True, tuple(shape)
    yield "ln_f.weight", False, (C,)
    yield "ln_f.bias", False, (C,)


def _read_header(path: Path, header: bytes) -> tuple[GPTConfig, torch.dtype, int]:
    magic, version, T, V, n_layer, n_head, C, padded = np.frombuffer(header, "<i4", 8).tolist()
    assert magic == MAGIC
    if version not in _DTYPES:
        raise CheckpointError(
            f"{path} is llm.c's version {version}; 3 (fp32) and 5 (bf16) can be read"
        )
    try:
        config = GPTConfig(V, T, n_layer, n_head, C)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if padded < V:
        raise CheckpointError(f"{path}: the embedding has {padded} rows for {V} tokens")
    return config, _DTYPES[version], padded


def open_file(path: Path) -> Weights:
    """The weights of llm.c's file, whose magic number has been seen; padding rows are left out."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        raise CheckpointError(f"{path} is truncated: it has {len(header)} bytes")
    config, dtype, padded = _read_header(path, header)
    layout = list(_layout(config, padded))
    count = sum(prod(shape) * (config.n_layer if layered else 1) for _, layered, shape in layout)
    size, expected = path.stat().st_size, _HEADER_BYTES + count * dtype.itemsize
    if size != expected:
        raise CheckpointError(
            f"{path} is damaged: it has {size:,} bytes, its header asks for {expected:,}"
        )
    mapped = Mapped(lambda: {"": map_file(path)})
    tensors, at = {}, _HEADER_BYTES
    for name, layered, shape in layout:
        kept = (config.vocab_size, shape[1]) if name == "wte.weight" else shape
        for i in range(config.n_layer if layered else 1):
            part = slice(at, at + prod(kept) * dtype.itemsize)
            tensors[f"h.{i}.{name}" if layered else name] = _stored(mapped, part, dtype, kept)
            at += prod(shape) * dtype.itemsize
    return Weights(str(path), config, tensors)


def _stored(mapped: Mapped, part: slice, dtype: torch.dtype, shape: tuple[int, ...]) -> Stored:
    return Stored(shape, dtype, lambda: mapped.read("", part).view(dtype).view(shape))


def write(model: GPT, file: BinaryIO) -> None:
    """Write the model as llm.c reads it, fp32 or bf16 as it is. ValueError for other dtypes and for
    an untied head, which llm.c has not."""
    config, weight = model.config, model.wte.weight
    version = {dtype: version for version, dtype in _DTYPES.items()}.get(weight.dtype)
    if version is None:
        raise ValueError(f"llm.c has fp32 and bf16, the model is {weight.dtype}; give a --dtype")
    if not config.tie_weights:
        raise ValueError("llm.c ties the head to the embedding; this model's head is its own")
    padded = -(-config.vocab_size // _PADDING) * _PADDING
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    header = np.zeros(_HEADER_BYTES // 4, "<i4")
    header[:8] = MAGIC, version, *sizes, padded
    file.write(header.tobytes())
    state = model.state_dict()
    for name, layered, shape in _layout(config, padded):
        for i in range(config.n_layer) if layered else [None]:
            tensor = state.get(name if i is None else f"h.{i}.{name}")
            file.write(_bytes(weight.new_zeros(shape) if tensor is None else tensor))
            if name == "wte.weight":
                file.write(_bytes(weight.new_zeros(padded - config.vocab_size, shape[1])))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
