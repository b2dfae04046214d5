"""GGUF, llama.cpp's form, of its architecture gpt2.

Matrices are (out, in), as GPT has them, and GELU is the approximation by tanh. Norms, biases and
positions are fp32; the other matrices may be of fewer bits. Source: src/models/gpt2.cpp of
llama.cpp.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast.config import GPTConfig, parameter_shapes
from gptfast.gguf_file import GGUFFile, TensorPlace, read_gguf
from gptfast.installed import DISTRIBUTION, has_library
from gptfast.tokenizer.gguf import end_values, has_vocabulary
from gptfast.weights.lazy_tensor import CheckpointError, LazyTensor, MappedFiles, map_file
from gptfast.weights.names import Named
from gptfast.weights.said import Said
from gptfast.weights.text import end_ids
from gptfast.weights.weights import Weights, weights_of

ARCHITECTURE = "gpt2"
QKV_BIAS = "gptfast.qkv_bias"
"""The value, of ours, which says that the biases of queries, keys and values are no parameters."""
EPSILON = 1e-5
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""ggml's numbers of the types that need no library."""
_DTYPES = {kind: dtype for dtype, kind in KINDS.items()}
PARTS = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""llama.cpp's names of GPT's modules."""
_SIZES = {
    "block_size": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
}


def need_library(what: str) -> None:
    """Raise ValueError if the gguf library is missing. what: what needs it."""
    if not has_library("gguf"):
        raise ValueError(f"{what} needs the gguf library: pip install '{DISTRIBUTION}[gguf]'")


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of one of GPT's parameters."""
    block = ""
    if name.startswith("h."):
        _, i, name = name.split(".", 2)
        block = f"blk.{i}."
    part, _, leaf = name.rpartition(".")
    return f"{block}{PARTS[part]}.{leaf}"


def open_file(path: Path) -> Weights:
    """Return the weights of a file that begins as GGUF does.

    They are fp32, or 16-bit if all values in the file fit the 16-bit type of its embedding.
    Raises CheckpointError.
    """
    found = _read(path)
    config = _config(path, found.values, found.tensors)
    complete = parameter_shapes(replace(config, qkv_bias=True, tie_weights=False))
    names = {ours: gguf_name(ours) for ours in complete}
    ours = {theirs: name for name, theirs in names.items()}
    for name in found.tensors:
        if name not in ours:
            raise CheckpointError(f"{path} has a tensor the model does not know: {name!r:.80}")
    reader = _Reader(path)
    tensors = {ours[name]: reader.lazy(name, place) for name, place in found.tensors.items()}
    named = Named(_one_dtype(tensors), names, raw=tuple(found.tensors))
    weights = weights_of(str(path), named, Said(), config=config)
    eos_ids = end_ids(end_values(found.values), config.vocab_size, str(path))
    return replace(weights, tokenizer=_own_tokenizer(path, found), eos_ids=eos_ids)


def tokenizer_in_file(path: Path) -> str | None:
    """Return a GGUF file as a name for `get_tokenizer`, or None if no vocabulary is in it."""
    return _own_tokenizer(path, _read(path))


def _read(path: Path) -> GGUFFile:
    """Return the header of a file. Raises CheckpointError."""
    try:
        return read_gguf(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _own_tokenizer(path: Path, found: GGUFFile) -> str | None:
    return str(path.resolve()) if has_vocabulary(found.values) else None


def _config(path: Path, values: Mapping[str, Any], tensors: Mapping[str, TensorPlace]) -> GPTConfig:
    """Return the configuration in a file's values. Raises CheckpointError."""
    for name, value in values.items():
        whole = name in ("general.architecture", "split.count")
        if (whole or name.startswith(f"{ARCHITECTURE}.")) and isinstance(value, list | np.ndarray):
            raise CheckpointError(f"{path}: {name} is an array, and gptfast's GPT needs one value")
    architecture = values.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{path} is a GGUF of the architecture {architecture!r:.60}, and gptfast reads "
            f"{ARCHITECTURE!r} only; llama.cpp runs the others"
        )
    if (parts := values.get("split.count", 1)) != 1:
        raise CheckpointError(
            f"{path} is one of {parts!r:.20} files of a model; llama-gguf-split --merge {path} "
            "NEW.gguf makes one of them"
        )
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise CheckpointError(f"{path} has no tensor 'token_embd.weight' of two dimensions")
    sizes = {ours: _value(path, values, theirs) for ours, theirs in _SIZES.items()}
    qkv_bias = values.get(QKV_BIAS) is not False
    vocab_size = tensors["token_embd.weight"].shape[0]
    try:
        # Whether the head is tied, its tensor tells.
        config = GPTConfig(vocab_size=vocab_size, **sizes, qkv_bias=qkv_bias)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    fixed = {
        "feed_forward_length": 4 * config.n_embd,
        "attention.head_count_kv": config.n_head,
        "attention.layer_norm_epsilon": float(np.float32(EPSILON)),
        "attention.causal": True,
        "vocab_size": config.vocab_size,
    }
    for name, needed in fixed.items():
        stated = values.get(f"{ARCHITECTURE}.{name}", needed)
        if stated != needed:
            raise CheckpointError(
                f"{path}: {ARCHITECTURE}.{name} is {stated!r:.60}, but gptfast's GPT needs {needed}"
            )
    return config


def _value(path: Path, values: Mapping[str, Any], name: str) -> Any:
    name = f"{ARCHITECTURE}.{name}"
    if name not in values:
        raise CheckpointError(f"{path} has no value {name!r}")
    return values[name]


@dataclass(frozen=True)
class _Packing:
    """How a type holds numbers: so many in so many bytes."""

    numbers: int
    nbytes: int


class _Reader:
    """Makes lazy tensors of one file."""

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, path.stat().st_size
        self._mapped = MappedFiles(lambda: {"": map_file(path)})

    def lazy(self, name: str, place: TensorPlace) -> LazyTensor:
        """Return a tensor, to be read when asked for. Raises CheckpointError if it cannot be."""
        shape, dtype = place.shape, _DTYPES.get(place.kind)
        packing = _Packing(1, dtype.itemsize) if dtype else _packing(self._path, name, place.kind)
        if not shape or min(shape) < 1 or shape[-1] % packing.numbers:
            raise CheckpointError(
                f"{self._path}: {name} has shape {shape}, and its type holds {packing.numbers} "
                "numbers at a time"
            )
        end = place.offset + prod(shape) // packing.numbers * packing.nbytes
        if end > self._size:
            raise CheckpointError(
                f"{self._path} is damaged: {name} ends at {end:,}, and the file has "
                f"{self._size:,} bytes"
            )
        part, where = slice(place.offset, end), (self._path, place.offset, place.kind)
        if dtype is None:
            read = partial(self._dequantized, part, shape, place.kind)
            return LazyTensor(shape, torch.float32, read, fresh=True, place=where)
        return LazyTensor(shape, dtype, partial(self._plain, part, shape, dtype), place=where)

    def _plain(self, part: slice, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._mapped.read("", part).view(dtype).view(shape)

    def _dequantized(self, part: slice, shape: tuple[int, ...], kind: int) -> Tensor:
        from gguf import GGMLQuantizationType, quants

        raw = self._mapped.read("", part).numpy().reshape(*shape[:-1], -1)
        with np.errstate(all="ignore"):  # scales that are not finite, say
            values = quants.dequantize(raw, GGMLQuantizationType(kind))
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(shape)


def _packing(path: Path, name: str, kind: int) -> _Packing:
    """Return how a quantised type holds numbers. Raises CheckpointError for an unknown one."""
    try:
        need_library(f"{path} is quantised, which")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        numbers, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        quants.dequantize(np.zeros((1, nbytes), np.uint8), GGMLQuantizationType(kind))
    except (ValueError, LookupError, NotImplementedError):
        raise CheckpointError(
            f"{path}: {name} is of ggml's type {kind}, which the gguf library cannot read; "
            "llama-quantize --allow-requantize writes it as F16"
        ) from None
    return _Packing(numbers, nbytes)


def _one_dtype(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors in a dtype that loses nothing, which a model takes from its embedding.

    fp32 values beside a 16-bit embedding are read here, to see whether 16 bits hold them.
    """
    dtype = tensors["wte.weight"].dtype
    if dtype == torch.float32 or all(_fits(tensor, dtype) for tensor in tensors.values()):
        return tensors
    return {name: _widened(tensor) for name, tensor in tensors.items()}


def _fits(tensor: LazyTensor, dtype: torch.dtype) -> bool:
    if tensor.dtype == dtype:
        return True
    if tensor.dtype != torch.float32 or tensor.fresh:  # of other 16 bits, or quantised
        return False
    values = tensor.read()
    return torch.equal(values.to(dtype).float(), values)


def _widened(tensor: LazyTensor) -> LazyTensor:
    if tensor.dtype == torch.float32:
        return tensor
    return LazyTensor(
        tensor.shape, torch.float32, lambda: tensor.read().float(), fresh=True, place=tensor.place
    )
