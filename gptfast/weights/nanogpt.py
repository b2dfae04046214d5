"""nanoGPT's form, ckpt.pt, as it is written: model_args, and matrices (out, in) in GPT-2's names.

GPT-2 and gptfast have the tanh approximation of GELU, nanoGPT today has the exact function. Its own
files do not record which one the model was trained with; these do, under `config`, which nanoGPT
does not read.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gptfast.config import GPTConfig

_SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")


def to_content(config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the content of ckpt.pt for GPT's state dictionary.

    Raises ValueError for an untied head, which nanoGPT does not have.
    """
    if not config.tie_weights:
        raise ValueError(
            "nanoGPT's form needs a head tied to the embedding, but this model's head is separate; "
            "name a directory, for transformers' form"
        )
    theirs = {f"transformer.{name}": tensor for name, tensor in state.items()}
    if not config.qkv_bias:
        for i in range(config.n_layer):
            bias = state["wte.weight"].new_zeros(3 * config.n_embd)
            theirs[f"transformer.h.{i}.attn.c_attn.bias"] = bias
    theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    args = {name: getattr(config, name) for name in (*_SIZES, "dropout")}
    config_of_run = {"activation": "gelu_tanh"}
    args["bias"] = True
    return {"model": theirs, "model_args": args, "iter_num": 0, "config": config_of_run}
