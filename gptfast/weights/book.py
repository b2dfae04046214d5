"""The .pth of Raschka's *Build a Large Language Model (From Scratch)*.

Query, key and value are separate, the head has weights of its own, and the number of heads is not
recorded.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.weights.lazy_tensor import CheckpointError, LazyTensor
from gptfast.weights.weights import Weights, unwrapped, without_config

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
_QKV = ("query", "key", "value")
_BLOCK = re.compile(r"trf_blocks\.(\d{1,5})\.(.+)")


def recognise(raw: dict[str, LazyTensor]) -> bool:
    """Return whether tensors have the book's names."""
    return any(name.endswith("tok_emb.weight") for name in raw)


def open_tensors(path: Path, raw: dict[str, LazyTensor], n_head: int | None) -> Weights:
    """Return the weights among tensors in the book's names.

    n_head: None takes heads of 64 channels, as every GPT-2 has. A head that equals the token
    embedding is tied to it. Raises CheckpointError.
    """
    raw = unwrapped(raw)
    tensors: dict[str, LazyTensor] = {}
    ours = {theirs: name for name, theirs in _OUTER.items()}
    inner = {theirs: name for name, theirs in _INNER.items()}
    for name, tensor in raw.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            tensors[ours.get(name, name)] = tensor
        elif block[2] in inner:
            tensors[f"h.{block[1]}.{inner[block[2]]}"] = tensor
        elif block[2].startswith("att.W_query."):
            leaf = block[2].removeprefix("att.W_query.")
            tensors[f"h.{block[1]}.attn.c_attn.{leaf}"] = _joined(path, raw, block[1], leaf)
        elif not re.fullmatch(r"att\.(mask|W_(key|value)\.(weight|bias))", block[2]):
            tensors[name] = tensor  # not the book's: refused by its name later
    return without_config(str(path), tensors, n_head)


def _joined(path: Path, raw: dict[str, LazyTensor], block: str, leaf: str) -> LazyTensor:
    """Return one layer's query, key and value as c_attn has them: one under the other."""
    names = [f"trf_blocks.{block}.att.W_{part}.{leaf}" for part in _QKV]
    for name in names:
        if name not in raw:
            raise CheckpointError(f"{path} has no tensor {name!r}")
    parts = [raw[name] for name in names]
    if len({(part.shape, part.dtype) for part in parts}) > 1 or not parts[0].shape:
        raise CheckpointError(f"{path}: the parts of {names[0]!r} differ in shape or dtype")
    shape = (3 * parts[0].shape[0], *parts[0].shape[1:])
    return LazyTensor(
        shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]), mapped=False
    )


def to_content(config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dictionary of the book's GPTModel for GPT's."""
    T, embedding = config.block_size, state["wte.weight"]
    mask = torch.ones(T, T, dtype=embedding.dtype).triu(1)  # a buffer of each block; saved once
    content = {theirs: state[ours] for ours, theirs in _OUTER.items() if ours in state}
    content.setdefault("out_head.weight", embedding)
    for i in range(config.n_layer):
        block = f"trf_blocks.{i}"
        content[f"{block}.att.mask"] = mask
        content |= {f"{block}.{theirs}": state[f"h.{i}.{ours}"] for ours, theirs in _INNER.items()}
        for leaf in ("weight", "bias") if config.qkv_bias else ("weight",):
            for part, tensor in zip(_QKV, state[f"h.{i}.attn.c_attn.{leaf}"].chunk(3), strict=True):
                content[f"{block}.att.W_{part}.{leaf}"] = tensor
    return content
