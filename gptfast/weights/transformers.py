"""transformers' layout of GPT-2: config.json, and safetensors or a pickle, whole or in shards."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.model import GPT
from gptfast.weights.stored import (
    CheckpointError,
    Stored,
    read_json,
    read_pickles,
    read_safetensors,
)
from gptfast.weights.weights import Weights, infer_config, renamed, tokenizer_in, unwrapped

# transformers keeps these four as Conv1D: (in, out) where nn.Linear has (out, in).
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# In the order in which transformers looks for them.
FILES = ("model.safetensors", "model.safetensors.index.json")
FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")


def hf_config(config: GPTConfig, dtype: torch.dtype, eot: int | None = None) -> dict[str, Any]:
    """config.json of a model; eot is its tokenizer's end of text, if that is known."""
    if eot is None and config.vocab_size == 50257:
        eot = 50256
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "tie_word_embeddings": config.tie_weights,
        "qkv_bias": config.qkv_bias,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": str(dtype).removeprefix("torch."),
    }


def gpt_config(raw: dict[str, Any], path: Path) -> GPTConfig:
    """The GPTConfig of a config.json; CheckpointError for what gptfast's GPT is not."""
    if raw.get("model_type", "gpt2") != "gpt2":  # the oldest have none
        raise CheckpointError(
            f"{path} describes a model of type {raw['model_type']!r}, not GPT-2's architecture"
        )
    try:
        config = GPTConfig(
            vocab_size=raw["vocab_size"],
            block_size=raw["n_positions"],
            n_layer=raw["n_layer"],
            n_head=raw["n_head"],
            n_embd=raw["n_embd"],
            dropout=raw.get("resid_pdrop", 0.0),
            qkv_bias=raw.get("qkv_bias", True),
            tie_weights=raw.get("tie_word_embeddings", True),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} has no {error.args[0]!r}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    fixed = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * config.n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for name, allowed in fixed.items():
        if name in raw and raw[name] not in allowed:
            raise CheckpointError(
                f"{path}: {name} is {raw[name]!r}, gptfast's GPT has {allowed[0]!r}"
            )
    return config


def hf_tensors(model: GPT) -> dict[str, Tensor]:
    """The tensors of model.safetensors."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        if name.endswith(_CONV1D):
            tensor = tensor.t()
        prefix = "" if name.startswith("lm_head") else "transformer."
        tensors[prefix + name] = tensor.contiguous()
        if name.endswith("c_attn.weight") and not model.config.qkv_bias:
            # GPT-2's layout has no switch for it: a zero bias is the same function.
            bias = tensor.new_zeros(3 * model.config.n_embd)
            tensors[f"transformer.{name.removesuffix('weight')}bias"] = bias
    return tensors


def gpt_tensors(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors in GPT's names and layout, of those in transformers' or nanoGPT's: these are told
    apart by the orientation of c_attn. Old files' causal masks are left out."""
    tensors = renamed(unwrapped(tensors), lambda name: name.removeprefix("transformer."))
    shape = tensors["h.0.attn.c_attn.weight"].shape if "h.0.attn.c_attn.weight" in tensors else ()
    conv1d = len(shape) == 2 and shape[0] < shape[1]
    return {
        name: stored.t() if conv1d and name.endswith(_CONV1D) and len(stored.shape) == 2 else stored
        for name, stored in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def fitted(
    source: str, tensors: dict[str, Stored], config: GPTConfig, tokenizer: str | None = None
) -> Weights:
    """Weights without what the model does not keep: a tied head's copy, a zero bias. Where the
    values say that the head is not tied, or that the bias counts, they are believed."""
    head = "lm_head.weight"
    if config.tie_weights and head in tensors:
        if _same(tensors, head, "wte.weight"):
            del tensors[head]
        else:
            config = replace(config, tie_weights=False)
    biases = [name for name in tensors if name.endswith("attn.c_attn.bias")]
    if not config.qkv_bias and biases:
        if any(tensors[name].read().any() for name in biases):
            config = replace(config, qkv_bias=True)
        else:
            tensors = {name: s for name, s in tensors.items() if name not in biases}
    return Weights(source, config, tensors, tokenizer)


def with_head(source: str, tensors: dict[str, Stored], n_head: int | None) -> Weights:
    """Weights of tensors whose configuration no file tells: the head is tied if it is absent or
    the token embedding once more."""
    tied = "lm_head.weight" not in tensors or _same(tensors, "lm_head.weight", "wte.weight")
    return fitted(source, tensors, infer_config(source, tensors, n_head, tie_weights=tied))


def _same(tensors: Mapping[str, Stored], a: str, b: str) -> bool:
    if b not in tensors or tensors[a].shape != tensors[b].shape:
        return False
    return torch.equal(tensors[a].read(), tensors[b].read())


def _read_files(paths: list[Path]) -> dict[str, Stored]:
    safe = paths[0].suffix == ".safetensors"
    return read_safetensors(*paths) if safe else read_pickles(*paths)[0]


def _read_shards(index: Path) -> dict[str, Stored]:
    """The tensors of every file that an index.json lists."""
    where = read_json(index).get("weight_map")
    named = isinstance(where, dict) and all(isinstance(file, str) for file in where.values())
    if not named or not where:
        raise CheckpointError(f"{index} is damaged: it has no weight_map of names and files")
    files = sorted(set(where.values()))
    for file in files:
        path = index.parent / file
        if Path(file).name != file or not path.is_file() or path.suffix != Path(files[0]).suffix:
            raise CheckpointError(f"{index} names {file!r:.200}, which is no file beside it")
    tensors = _read_files([index.parent / file for file in files])
    for name in where:
        if name not in tensors:
            raise CheckpointError(f"{index} names {name!r}, which {where[name]!r} has not")
    return tensors


def open_tensors(path: Path, raw: dict[str, Stored], n_head: int | None) -> Weights:
    """The weights among the tensors of a single file, whose config.json, if any, is beside it."""
    tensors = gpt_tensors(raw)
    config_json = path.with_name("config.json")
    if not config_json.is_file():
        return with_head(str(path), tensors, n_head)
    config = gpt_config(read_json(config_json), config_json)
    return fitted(str(path), tensors, config, tokenizer_in(path.parent))


def open_directory(directory: Path) -> Weights:
    """The weights of a directory with config.json and one of FILES."""
    config = gpt_config(read_json(directory / "config.json"), directory / "config.json")
    path = next((directory / name for name in FILES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory} has no weights; it needs one of {', '.join(FILES)}")
    raw = _read_shards(path) if path.suffix == ".json" else _read_files([path])
    return fitted(str(path), gpt_tensors(raw), config, tokenizer_in(directory))
