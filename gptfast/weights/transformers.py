"""transformers' layout of GPT-2: config.json, and safetensors or a pickle, whole or in shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptfast.config import GPTConfig
from gptfast.weights.pretrained import _CONV1D
from gptfast.weights.stored import (
    CheckpointError,
    Stored,
    read_json,
    read_pickles,
    read_safetensors,
)
from gptfast.weights.weights import Weights, fitted, renamed, tokenizer_in, unwrapped, with_head

# In the order in which transformers looks for them.
FILES = ("model.safetensors", "model.safetensors.index.json")
FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")


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
