"""The .pth of Raschka's *Build a Large Language Model (From Scratch)*, as it is written.

Query, key and value are separate, and the head has weights of its own. The book's files do not
record the number of heads. These do, in the `_metadata` that every state dictionary of torch has:
the book's `load_state_dict` takes no notice of it, and said.py reads it.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.weights.names import QKV

_OUTER = {
    "wte.weight": "tok_emb.weight",
    "wpe.weight": "pos_emb.weight",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
    "lm_head.weight": "out_head.weight",
}
_INNER = {
    "ln_1.weight": "norm1.scale",
    "ln_1.bias": "norm1.shift",
    "attn.c_proj.weight": "att.out_proj.weight",
    "attn.c_proj.bias": "att.out_proj.bias",
    "ln_2.weight": "norm2.scale",
    "ln_2.bias": "norm2.shift",
    "mlp.c_fc.weight": "ff.layers.0.weight",
    "mlp.c_fc.bias": "ff.layers.0.bias",
    "mlp.c_proj.weight": "ff.layers.2.weight",
    "mlp.c_proj.bias": "ff.layers.2.bias",
}


def to_content(config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dictionary of the book's GPTModel for GPT's, with the number of heads."""
    T, embedding = config.block_size, state["wte.weight"]
    mask = torch.ones(T, T, dtype=embedding.dtype).triu(1)  # a buffer of each block; saved once
    content: Any = OrderedDict((theirs, state[o]) for o, theirs in _OUTER.items() if o in state)
    content._metadata = {"": {"version": 1, "n_heads": config.n_head}}
    content.setdefault("out_head.weight", embedding)
    for i in range(config.n_layer):
        block = f"trf_blocks.{i}"
        content[f"{block}.att.mask"] = mask
        for ours, theirs in _INNER.items():
            content[f"{block}.{theirs}"] = state[f"h.{i}.{ours}"]
        for leaf in ("weight", "bias") if config.qkv_bias else ("weight",):
            for part, tensor in zip(QKV, state[f"h.{i}.attn.c_attn.{leaf}"].chunk(3), strict=True):
                content[f"{block}.att.W_{part}.{leaf}"] = tensor
    return content
