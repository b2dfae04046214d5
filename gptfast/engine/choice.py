"""The choice between a model as it is and an engine that is packed for one call."""

import torch

from gptfast.engine.engine import Engine
from gptfast.generation.decoder import Decoder
from gptfast.generation.model_decoder import ModelDecoder
from gptfast.model import GPT, foreign_part
from gptfast.ops.backend import EXTENSION, chosen_backend

MIN_TOKENS_TO_PACK = 16
"""New tokens per prompt from which packing a model for one call pays."""


def decoder_for(model: GPT | Decoder, n: int) -> Decoder:
    """Return the decoder for n tokens: a decoder as it is; for a model, an engine if that pays."""
    if isinstance(model, Decoder):
        return model
    dtype = dtype_to_pack(model, n)
    return ModelDecoder(model) if dtype is None else Engine(model, dtype)


def dtype_to_pack(model: GPT, n: int) -> str | None:
    """Return the dtype in which to pack a model for n tokens, or None where the model does it."""
    pays = n >= MIN_TOKENS_TO_PACK and EXTENSION is not None
    if not pays or chosen_backend() != "auto" or torch.is_autocast_enabled("cpu"):
        return None
    kinds = {(p.dtype, p.device.type) for p in model.parameters()}
    names = {(torch.float32, "cpu"): "fp32", (torch.bfloat16, "cpu"): "bf16"}
    dtype = names.get(kinds.pop()) if len(kinds) == 1 else None
    return None if dtype is None or foreign_part(model) is not None else dtype
