"""A model written as a directory that transformers' GPT2LMHeadModel reads."""

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast.config import GPTConfig, parameter_shapes
from gptfast.files import json_text, new_files, write_files
from gptfast.tokenizer.bpe import Tokenizer, end_of_text
from gptfast.tokenizer.characters import CHARACTERS_JSON
from gptfast.tokenizer.vocabulary import get_tokenizer
from gptfast.weights import adapter
from gptfast.weights.adapter import AdapterConfig, adapter_files
from gptfast.weights.lazy_tensor import read_text
from gptfast.weights.names import CONV1D
from gptfast.weights.safetensors_file import Layout

# The files that transformers or this package may make a tokenizer of.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHARACTERS_JSON,
)


def save_model(
    config: GPTConfig,
    state: Mapping[str, Tensor],
    directory: str | PathLike,
    tokenizer: Tokenizer | str | None = None,
    eos_ids: Sequence[int] = (),
) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into a directory.

    state: GPT's state dictionary. tokenizer: one, or a name for `get_tokenizer`. eos_ids: the ids
    that end a text; without any it is the tokenizer's end-of-text. The directory is made if it is
    absent; each file is replaced completely. Raises OSError.
    """
    vocabulary, ends = tokenizer_texts(tokenizer)
    if eos_ids:
        ends = ends._replace(eos=_one_or_list(eos_ids))
    tensors, texts = model_files(config, state, ends)
    with new_files(Path(directory)) as files:
        write_files(files, tensors, texts | vocabulary)
    # Files of another tokenizer, which would be taken before ours.
    for name in set(TOKENIZER_FILES) - vocabulary.keys() if vocabulary else ():
        (Path(directory) / name).unlink(missing_ok=True)
    # An adapter that was there would be taken for one of this model.
    for name in adapter.FILES:
        (Path(directory) / name).unlink(missing_ok=True)


def save_adapter(
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    directory: str | PathLike,
    tokenizer: Tokenizer | str | None = None,
) -> None:
    """Write an adapter in peft's form, and the tokenizer's files, into a directory.

    tensors: by the names of GPT's parameters, which end in lora_A and lora_B. Raises OSError, and
    ValueError if the directory holds a whole model.
    """
    if (Path(directory) / "config.json").is_file():
        raise ValueError(f"{directory} holds a model: give the adapter a directory of its own")
    named, metadata, text = adapter_files(config, tensors)
    texts = {adapter.CONFIG: text, **tokenizer_texts(tokenizer)[0]}
    with new_files(Path(directory)) as files:
        write_files(files, {adapter.TENSORS: named}, texts, metadata)


class Ends(NamedTuple):
    """The ids that begin and end a text, as config.json names them."""

    bos: int | None = None
    eos: int | list[int] | None = None


NO_ENDS = Ends()


def _one_or_list(ids: Sequence[int]) -> int | list[int]:
    return list(ids) if len(ids) > 1 else ids[0]


def joined_ends(ends: Ends, eos_ids: Sequence[int], n_vocab: int) -> Ends:
    """Return a tokenizer's ends with those of the model that training started from.

    Training goes on to separate texts by the tokenizer's; both end one. n_vocab: the number of the
    tokenizer's ids, beyond which none is kept.
    """
    own = () if ends.eos is None else (ends.eos,) if isinstance(ends.eos, int) else ends.eos
    ids = [i for i in dict.fromkeys((*eos_ids, *own)) if i < n_vocab]
    return ends._replace(eos=_one_or_list(ids)) if ids else ends


def model_files(
    config: GPTConfig, state: Mapping[str, Tensor], ends: Ends = NO_ENDS
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Return the tensors of model.safetensors and the text of config.json, by file name."""
    description = json_text(hf_config(config, state["wte.weight"].dtype, ends))
    return {"model.safetensors": hf_tensors(config, state)}, {"config.json": description}


def tokenizer_texts(tokenizer: Tokenizer | str | None) -> tuple[dict[str, str], Ends]:
    """Return the text of transformers' files for a tokenizer, by name, and its ends.

    The files of a directory whose tokenizer cannot be loaded are taken as they are, which is
    logged.
    """
    if isinstance(tokenizer, str):
        name = tokenizer
        try:
            tokenizer = get_tokenizer(name)
        except (OSError, ValueError) as error:
            logging.getLogger(__name__).warning(
                "the model is saved, but its tokenizer cannot be loaded: %s", error
            )
            files = (Path(name) / file for file in TOKENIZER_FILES)
            return {path.name: read_text(path) for path in files if path.is_file()}, Ends()
    if tokenizer is None:
        return {}, Ends()
    eot = end_of_text(tokenizer)
    ends = Ends(getattr(tokenizer, "bos", eot), eot)
    files_of = getattr(tokenizer, "transformers_files", dict)
    return files_of(), ends


def hf_config(config: GPTConfig, dtype: torch.dtype, ends: Ends = NO_ENDS) -> dict[str, Any]:
    """Return the values of config.json; ends: those of the tokenizer, if it is known."""
    if ends.eos is None and config.vocab_size == 50257:
        ends = Ends(50256, 50256)
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
        "bos_token_id": ends.bos,
        "eos_token_id": ends.eos,
        "dtype": str(dtype).removeprefix("torch."),
    }


def hf_tensors(config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors, on the CPU, from GPT's state dictionary."""
    tensors = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        if name.endswith(CONV1D):
            tensor = tensor.t()
        prefix = "" if name.startswith("lm_head") else "transformer."
        tensors[prefix + name] = tensor.contiguous()
        if name.endswith("c_attn.weight") and not config.qkv_bias:
            # transformers cannot leave this bias out: zeros are the same function.
            bias = tensor.new_zeros(3 * config.n_embd)
            tensors[f"transformer.{name.removesuffix('weight')}bias"] = bias
    return tensors


def hf_layouts(config: GPTConfig, dtype: torch.dtype) -> dict[str, Layout]:
    """Return the layouts of `hf_tensors`, in the order of the model's parameters."""
    layouts = {}
    for name, shape in parameter_shapes(config).items():
        prefix = "" if name.startswith("lm_head") else "transformer."
        layouts[prefix + name] = Layout(dtype, shape[::-1] if name.endswith(CONV1D) else shape)
        if name.endswith("c_attn.weight") and not config.qkv_bias:
            bias = f"transformer.{name.removesuffix('weight')}bias"
            layouts[bias] = Layout(dtype, (3 * config.n_embd,))
    return layouts
