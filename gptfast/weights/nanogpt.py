"""nanoGPT's ckpt.pt: model_args and, under GPT-2's names, linear layers (out, in).

nanoGPT's activation today is the exact GELU, GPT-2's and gptfast's its tanh approximation; the file
does not say which it was. Where it was the exact one, logits differ from nanoGPT's by about 1e-3.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.model import GPT
from gptfast.weights.stored import CheckpointError, Stored
from gptfast.weights.transformers import gpt_tensors
from gptfast.weights.weights import Weights, fitted

_SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")


def recognise(beside: dict[str, Any]) -> bool:
    """Whether what stands beside the weights in a pickle is nanoGPT's."""
    return isinstance(beside.get("model_args"), dict)


def open_tensors(path: Path, raw: dict[str, Stored], beside: dict[str, Any]) -> Weights:
    """The weights in a ckpt.pt, of its tensors and of what stands beside them."""
    args = beside["model_args"]
    for name in _SIZES:
        if name not in args:
            raise CheckpointError(f"{path}: model_args has no {name!r}")
    try:
        config = GPTConfig(
            **{name: args[name] for name in _SIZES}, dropout=args.get("dropout", 0.0)
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    tensors = gpt_tensors(raw)
    if args.get("bias") is False:
        tensors |= _zero_biases(tensors)
    return fitted(str(path), tensors, config)


def _zero_biases(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """For every layer and norm without a bias one of zeros, which is the same function."""

    def zeros(n: int, dtype: torch.dtype) -> Stored:
        return Stored((n,), dtype, lambda: torch.zeros(n, dtype=dtype))

    return {
        name.removesuffix("weight") + "bias": zeros(stored.shape[0], stored.dtype)
        for name, stored in tensors.items()
        if name.startswith(("h.", "ln_f.")) and name.endswith("weight")
        if name.removesuffix("weight") + "bias" not in tensors and stored.shape
    }


def to_content(model: GPT) -> dict[str, Any]:
    """What ckpt.pt holds of a model; ValueError for an untied head, which nanoGPT has not."""
    config = model.config
    if not config.tie_weights:
        raise ValueError("nanoGPT ties the head to the embedding; this model's head is its own")
    state: dict[str, Tensor] = {f"transformer.{k}": v for k, v in model.state_dict().items()}
    if not config.qkv_bias:
        for i in range(config.n_layer):
            bias = model.wte.weight.new_zeros(3 * config.n_embd)
            state[f"transformer.h.{i}.attn.c_attn.bias"] = bias
    state["lm_head.weight"] = state["transformer.wte.weight"]
    args = {name: getattr(config, name) for name in (*_SIZES, "dropout")}
    return {"model": state, "model_args": {**args, "bias": True}, "iter_num": 0, "config": {}}
