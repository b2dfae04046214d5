"""A model written as GGUF, for llama.cpp, with the gguf library."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from gptfast.config import GPTConfig, parameter_shapes
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.tokenizer.gguf import gguf_values, no_vocabulary_values
from gptfast.weights.gguf import ARCHITECTURE, EPSILON, QKV_BIAS, gguf_name, need_library

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""What matrices may be written as, and the names of the library."""
_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_TORCH = {name: dtype for dtype, name in _OF_DTYPE.items()}
_LARGEST = {"Q8_0": 127, "Q4_0": 8}
"""The largest number of a quantised type, which its block's scale, an fp16 number, multiplies."""
_QUANTIZATION_VERSION = 2


def check_kind(kind: str | None, dtype: torch.dtype, config: GPTConfig) -> str:
    """Return one of TYPES: the one asked for, or that of a model's dtype if none is.

    Raises ValueError if the library is missing or the model's rows cannot be of the type.
    """
    need_library("writing GGUF")
    kind = kind or _OF_DTYPE.get(dtype, "f32")
    if kind in ("q8_0", "q4_0") and config.n_embd % 32:
        raise ValueError(
            f"{kind} holds 32 numbers at a time, which n_embd={config.n_embd} is no multiple of: "
            "take f16 or bf16"
        )
    return kind


def write(
    config: GPTConfig,
    state: Mapping[str, Tensor],
    file: IO[bytes],
    *,
    kind: str | None = None,
    tokenizer: Tokenizer | None = None,
    eos_ids: Sequence[int] = (),
    name: str | None = None,
    license: str | None = None,
) -> None:
    """Write GPT's state dictionary, and a tokenizer if there is one, as llama.cpp reads them.

    kind: of TYPES, for the matrices; None takes the one of the dtype. Norms, biases and positions
    are fp32 as in llama.cpp's own files, and with q4_0 the embedding and the head are q8_0.
    Raises ValueError for what GGUF cannot hold.
    """
    kind = check_kind(kind, state["wte.weight"].dtype, config)
    V = config.vocab_size
    values = gguf_values(tokenizer, V, eos_ids) if tokenizer else no_vocabulary_values()
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    writer: Any = GGUFWriter(Path(file.name), ARCHITECTURE)
    try:
        _describe(writer, config, kind, name, license)
        _add_values(writer, values)
        shapes = parameter_shapes(replace(config, qkv_bias=True))
        types = {ours: _type(ours, shape, kind) for ours, shape in shapes.items()}
        for ours, shape in shapes.items():
            ggml = GGMLQuantizationType[types[ours]]
            numbers, nbytes = GGML_QUANT_SIZES[ggml]
            n = int(np.prod(shape)) // numbers * nbytes
            writer.add_tensor_info(gguf_name(ours), shape, np.dtype(np.float32), n, ggml)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ours, shape in shapes.items():
            tensor = state.get(ours)  # without qkv_bias, zeros are the same function
            tensor = torch.zeros(shape, dtype=torch.float32) if tensor is None else tensor
            writer.write_tensor_data(_bytes(ours, tensor.detach().cpu(), types[ours]))
    finally:
        writer.close()


def _type(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Return the library's name of the type of one of GPT's parameters."""
    if len(shape) == 1 or name == "wpe.weight":
        return TYPES["f32"]
    if kind == "q4_0" and name in ("wte.weight", "lm_head.weight"):
        return TYPES["q8_0"]
    return TYPES[kind]


def _bytes(name: str, tensor: Tensor, ggml: str) -> np.ndarray:
    """Return a tensor's values of a type, as bytes. Raises ValueError for values it cannot hold."""
    from gguf import GGMLQuantizationType, quants

    if (dtype := _TORCH.get(ggml.lower())) is None:
        # Scales are fp16: one value that is too large for that makes its whole block NaN.
        if not tensor.float().abs().amax() / _LARGEST[ggml] <= torch.finfo(torch.float16).max:
            raise ValueError(f"{gguf_name(name)} has values that {ggml} cannot hold: take f32")
        return quants.quantize(tensor.float().numpy(), GGMLQuantizationType[ggml])
    rounded = tensor.to(dtype).contiguous()
    if not torch.equal(rounded.isfinite(), tensor.isfinite()):
        raise ValueError(f"{gguf_name(name)} has values that {ggml} cannot hold: take bf16 or f32")
    return rounded.view(torch.uint8).numpy()


def _describe(
    writer: Any, config: GPTConfig, kind: str, name: str | None, license: str | None
) -> None:
    """Add what a file says about its model."""
    from gguf import LlamaFileType

    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{TYPES[kind]}"
    writer.add_type("model")
    writer.add_file_type(LlamaFileType[file_type])
    if kind.startswith("q"):
        writer.add_quantization_version(_QUANTIZATION_VERSION)
    if name:
        writer.add_name(name)
    if license:
        writer.add_license(license)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(EPSILON)
    if not config.qkv_bias:
        writer.add_bool(QKV_BIAS, False)


def _add_values(writer: Any, values: Mapping[str, Any]) -> None:
    """Add values by the type that each has in Python."""
    for name, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
