"""nanoGPT's form, ckpt.pt: model_args, and tensors in GPT-2's names with matrices (out, in).

GPT-2 and gptfast have the tanh approximation of GELU, nanoGPT today has the exact function; the
file does not record which one the model was trained with. For a model of the exact one, logits
differ from nanoGPT's by about 1e-3.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.weights.lazy_tensor import CheckpointError, LazyTensor
from gptfast.weights.transformers import gpt_tensors
from gptfast.weights.weights import Weights, reconciled

_SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")


def recognise(extras: dict[str, Any]) -> bool:
    """Return whether the values beside the weights in a pickle are nanoGPT's."""
    return isinstance(extras.get("model_args"), dict)


def open_tensors(path: Path, raw: dict[str, LazyTensor], extras: dict[str, Any]) -> Weights:
    """Return the weights of a ckpt.pt, given its tensors and its values beside them.

    Raises CheckpointError.
    """
    args = extras["model_args"]
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
    return reconciled(str(path), tensors, config)


def _zero_biases(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return a bias of zeros, which changes nothing, for every layer and norm without a bias."""

    def zeros(n: int, dtype: torch.dtype) -> LazyTensor:
        return LazyTensor((n,), dtype, lambda: torch.zeros(n, dtype=dtype))

    return {
        name.removesuffix("weight") + "bias": zeros(tensor.shape[0], tensor.dtype)
        for name, tensor in tensors.items()
        if name.startswith(("h.", "ln_f.")) and name.endswith("weight")
        if name.removesuffix("weight") + "bias" not in tensors and tensor.shape
    }


def to_content(config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the content of ckpt.pt for GPT's state dictionary.

    Raises ValueError for an untied head, which nanoGPT does not have.
    """
    if not config.tie_weights:
        raise ValueError(
            "nanoGPT's form needs a head tied to the embedding, but this model's head is separate; "
            "choose transformers' form"
        )
    theirs = {f"transformer.{name}": tensor for name, tensor in state.items()}
    if not config.qkv_bias:
        for i in range(config.n_layer):
            bias = state["wte.weight"].new_zeros(3 * config.n_embd)
            theirs[f"transformer.h.{i}.attn.c_attn.bias"] = bias
    theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    args = {name: getattr(config, name) for name in (*_SIZES, "dropout")}
    return {"model": theirs, "model_args": {**args, "bias": True}, "iter_num": 0, "config": {}}
