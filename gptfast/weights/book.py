"""The .pth of Raschka's *Build a Large Language Model (From Scratch)*: separate query, key and
value, a head with weights of its own, and no word of the number of heads."""

import re
from pathlib import Path

import torch
from torch import Tensor

from gptfast.model import GPT
from gptfast.weights.stored import CheckpointError, Stored
from gptfast.weights.weights import Weights, unwrapped, with_head

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


def recognise(raw: dict[str, Stored]) -> bool:
    """Whether tensors bear the book's names."""
    return any(name.endswith("tok_emb.weight") for name in raw)


def open_tensors(path: Path, raw: dict[str, Stored], n_head: int | None) -> Weights:
    """The weights among tensors in the book's names. n_head: None takes 64 channels a head, as
    every GPT-2 has. A head that is the token embedding once more is tied to it."""
    raw, tensors = unwrapped(raw), {}
    ours = {theirs: name for name, theirs in _OUTER.items()}
    inner = {theirs: name for name, theirs in _INNER.items()}
    for name, stored in raw.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            tensors[ours.get(name, name)] = stored
        elif block[2] in inner:
            tensors[f"h.{block[1]}.{inner[block[2]]}"] = stored
        elif block[2].startswith("att.W_query."):
            leaf = block[2].removeprefix("att.W_query.")
            tensors[f"h.{block[1]}.attn.c_attn.{leaf}"] = _joined(path, raw, block[1], leaf)
        elif not re.fullmatch(r"att\.(mask|W_(key|value)\.(weight|bias))", block[2]):
            tensors[name] = stored  # not the book's: to be refused by its name
    return with_head(str(path), tensors, n_head)


def _joined(path: Path, raw: dict[str, Stored], block: str, leaf: str) -> Stored:
    """Query, key and value, one under the other."""
    names = [f"trf_blocks.{block}.att.W_{part}.{leaf}" for part in _QKV]
    for name in names:
        if name not in raw:
            raise CheckpointError(f"{path} has no tensor {name!r}")
    parts = [raw[name] for name in names]
    if len({(part.shape, part.dtype) for part in parts}) > 1 or not parts[0].shape:
        raise CheckpointError(f"{path}: the parts of {names[0]!r} differ in shape or dtype")
    shape = (3 * parts[0].shape[0], *parts[0].shape[1:])
    return Stored(
        shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]), mapped=False
    )


def to_content(model: GPT) -> dict[str, Tensor]:
    """The state_dict of the book's GPTModel, for a model with or without qkv_bias."""
    config, state = model.config, model.state_dict()
    T, like = config.block_size, model.wte.weight
    mask = torch.ones(T, T, dtype=like.dtype).triu(1)  # a buffer of each block; saved once
    content = {theirs: state[ours] for ours, theirs in _OUTER.items() if ours in state}
    content["out_head.weight"] = model.head_weight.detach()
    for i in range(config.n_layer):
        block = f"trf_blocks.{i}"
        content[f"{block}.att.mask"] = mask
        content |= {f"{block}.{theirs}": state[f"h.{i}.{ours}"] for ours, theirs in _INNER.items()}
        for leaf in ("weight", "bias") if config.qkv_bias else ("weight",):
            for part, tensor in zip(_QKV, state[f"h.{i}.attn.c_attn.{leaf}"].chunk(3), strict=True):
                content[f"{block}.att.W_{part}.{leaf}"] = tensor
    return content
