"""transformers' form: config.json, and safetensors or a pickle, in one file or in shards."""

import re
from pathlib import Path
from typing import Any

from gptfast.config import GPTConfig
from gptfast.weights.lazy_tensor import (
    CheckpointError,
    LazyTensor,
    read_json,
    read_safetensors,
    safetensors_metadata,
)
from gptfast.weights.names import Named, gpt_names
from gptfast.weights.pickles import read_pickles
from gptfast.weights.said import NAMES, Said, said_in
from gptfast.weights.weights import Weights, tokenizer_in, weights_of

# In the order in which transformers looks for them.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHARD = re.compile(r"(?:model|pytorch_model)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")
_SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def gpt_config(raw: dict[str, Any], path: Path) -> GPTConfig:
    """Return the GPTConfig of a config.json; CheckpointError for a model that GPT cannot be."""
    if raw.get("model_type", "gpt2") != "gpt2":  # the oldest have none
        raise CheckpointError(
            f"{path} describes a model of type {raw['model_type']!r}, not GPT-2's architecture"
        )
    try:
        config = GPTConfig(
            **{name: _size(raw, name, path) for name in _SIZES},
            dropout=raw.get("resid_pdrop", 0.0),
            qkv_bias=raw.get("qkv_bias", True),
            tie_weights=raw.get("tie_word_embeddings", True),
        )
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
                f"{path}: {name} is {raw[name]!r}, but gptfast's GPT needs {allowed[0]!r}"
            )
    return config


def _size(raw: dict[str, Any], name: str, path: Path) -> Any:
    """Return a size by any of the names that transformers' GPT2Config knows for it."""
    for theirs in NAMES[name]:
        if theirs in raw and theirs != "block_size":
            return raw[theirs]
    raise CheckpointError(f"{path} has no {'n_positions' if name == 'block_size' else name!r}")


def _notes(raw: dict[str, Any], config: GPTConfig) -> tuple[str, ...]:
    """Return what of a config.json is used in another way than it says."""
    rates = {name: raw[name] for name in _DROPOUTS if name in raw}
    if any(rate != config.dropout for rate in rates.values()):
        stated = ", ".join(f"{name} {rate}" for name, rate in rates.items())
        return (f"training takes one dropout, {config.dropout}, for {stated}",)
    return ()


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def read_files(*paths: Path) -> tuple[dict[str, LazyTensor], Any]:
    """Return the tensors of files of one kind, and what the first has beside them."""
    if paths[0].suffix == ".safetensors":
        return read_safetensors(*paths), {"__metadata__": safetensors_metadata(paths[0])}
    return read_pickles(*paths)


def _read_shards(index: Path) -> dict[str, LazyTensor]:
    """Return the tensors of every file that an index.json lists."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(map(_is_text, where.values())):
        raise CheckpointError(f"{index} is damaged: it has no weight_map of names and files")
    files = sorted(set(where.values()))
    for file in files:
        path = index.parent / file
        if Path(file).name != file or not path.is_file() or path.suffix != Path(files[0]).suffix:
            raise CheckpointError(f"{index} names {file!r:.200}, but that file is not beside it")
    tensors, _ = read_files(*(index.parent / file for file in files))
    for name in where:
        if name not in tensors:
            raise CheckpointError(f"{index} names {name!r}, but {where[name]!r} does not have it")
    return tensors


def open_tensors(
    path: Path, raw: dict[str, LazyTensor], content: Any, n_head: int | None
) -> Weights:
    """Return the weights among a single file's tensors, with the config.json beside it, if any.

    content: what the file has beside the tensors. n_head: for a file that does not state it; None
    takes heads of 64 channels. Raises CheckpointError.
    """
    source, named = str(path), gpt_names(str(path), raw)
    said, config_json = said_in(source, content), path.with_name("config.json")
    nanogpt = isinstance(content, dict) and "model_args" in content
    own = nanogpt or any("trf_blocks." in name for name in raw)  # never described by a config.json
    if config_json.is_file() and not own:
        return _with_config(config_json, source, named, said)
    unknown = nanogpt and "activation" not in said.values
    notes = (_NANOGPT_ACTIVATION,) if unknown else ()
    return weights_of(source, named, said, n_head=n_head, notes=notes)


_NANOGPT_ACTIVATION = (
    "nanoGPT does not record its activation: GPT-2's GELU, by tanh, is taken; logits of a model of "
    "the exact GELU differ by about 1e-3"
)


def _with_config(config_json: Path, source: str, named: Named, said: Said) -> Weights:
    """Return the weights of tensors that a config.json describes. source: for messages."""
    values = read_json(config_json)
    config = gpt_config(values, config_json)
    for name in _SIZES:
        if said.get(name, getattr(config, name)) != getattr(config, name):
            raise CheckpointError(
                f"{source} contradicts {config_json}: {said.places[name]} is {said.get(name)}, but "
                f"{name} there is {getattr(config, name)}"
            )
    tokenizer, notes = tokenizer_in(config_json.parent), _notes(values, config)
    return weights_of(source, named, Said(), config=config, tokenizer=tokenizer, notes=notes)


def open_directory(directory: Path) -> Weights:
    """Return the weights of a directory with config.json and one of FILES, or complete shards.

    Raises CheckpointError.
    """
    config_json = directory / "config.json"
    gpt_config(read_json(config_json), config_json)  # before its weights: it may be no GPT-2 at all
    path = next((directory / name for name in FILES if (directory / name).is_file()), None)
    shards = complete_shards(directory)
    if path is None and not shards:
        raise CheckpointError(f"{directory} has no weights; it needs one of {', '.join(FILES)}")
    if path is None:
        path, raw = shards[0], read_files(*shards)[0]
    else:
        raw = _read_shards(path) if path.suffix == ".json" else read_files(path)[0]
    return _with_config(config_json, str(path), gpt_names(str(path), raw), Said())


def complete_shards(directory: Path) -> list[Path]:
    """Return the shards of a directory without an index, in order; [] unless all are there."""
    found = sorted(directory.glob("*-?????-of-?????.*"))
    shards = [path for path in found if SHARD.fullmatch(path.name)]
    counts = {SHARD.fullmatch(path.name)[2] for path in shards}  # type: ignore[index]
    complete = len(counts) == 1 and len(shards) == int(counts.pop())
    return shards if complete else []
