"""transformers' form: config.json, and safetensors or a pickle, in one file or in shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptfast.config import GPTConfig
from gptfast.weights.lazy_tensor import (
    CheckpointError,
    LazyTensor,
    read_json,
    read_pickles,
    read_safetensors,
)
from gptfast.weights.weights import (
    Weights,
    reconciled,
    renamed,
    tokenizer_in,
    unwrapped,
    without_config,
)

# In the order in which transformers looks for them.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Conv1D keeps these four as (in, out), where nn.Linear has (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def gpt_config(raw: dict[str, Any], path: Path) -> GPTConfig:
    """Return the GPTConfig of a config.json; CheckpointError for a model that GPT cannot be."""
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
                f"{path}: {name} is {raw[name]!r}, but gptfast's GPT needs {allowed[0]!r}"
            )
    return config


def gpt_tensors(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return transformers' or nanoGPT's tensors in GPT's names and layout.

    The orientation of c_attn tells the two apart. The causal masks of old files are left out.
    """
    tensors = renamed(unwrapped(tensors), lambda name: name.removeprefix("transformer."))
    shape = tensors["h.0.attn.c_attn.weight"].shape if "h.0.attn.c_attn.weight" in tensors else ()
    conv1d = len(shape) == 2 and shape[0] < shape[1]
    return {
        name: tensor.t() if conv1d and name.endswith(CONV1D) and len(tensor.shape) == 2 else tensor
        for name, tensor in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _read_files(paths: list[Path]) -> dict[str, LazyTensor]:
    safe = paths[0].suffix == ".safetensors"
    return read_safetensors(*paths) if safe else read_pickles(*paths)[0]


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
    tensors = _read_files([index.parent / file for file in files])
    for name in where:
        if name not in tensors:
            raise CheckpointError(f"{index} names {name!r}, but {where[name]!r} does not have it")
    return tensors


def open_tensors(path: Path, raw: dict[str, LazyTensor], n_head: int | None) -> Weights:
    """Return the weights among a single file's tensors, with the config.json beside it, if any.

    n_head: for a file without one; None takes heads of 64 channels. Raises CheckpointError.
    """
    tensors = gpt_tensors(raw)
    config_json = path.with_name("config.json")
    if not config_json.is_file():
        return without_config(str(path), tensors, n_head)
    config = gpt_config(read_json(config_json), config_json)
    return reconciled(str(path), tensors, config, tokenizer_in(path.parent))


def open_directory(directory: Path) -> Weights:
    """Return the weights of a directory with config.json and one of FILES.

    Raises CheckpointError.
    """
    config = gpt_config(read_json(directory / "config.json"), directory / "config.json")
    path = next((directory / name for name in FILES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory} has no weights; it needs one of {', '.join(FILES)}")
    raw = _read_shards(path) if path.suffix == ".json" else _read_files([path])
    return reconciled(str(path), gpt_tensors(raw), config, tokenizer_in(directory))
