"""A model written as transformers' own directory."""

import logging
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.files import _temporary, _write_files, fsync
from gptfast.model import GPT
from gptfast.tokenizer.bpe import BPETokenizer, Tokenizer
from gptfast.tokenizer.vocabulary import get_tokenizer
from gptfast.weights.checkpoint import _json
from gptfast.weights.stored import read_text

_LOGGER = logging.getLogger(__name__)


def _model_files(
    model: GPT, eot: int | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    config = hf_config(model.config, model.wte.weight.dtype, eot)
    return {"model.safetensors": hf_tensors(model)}, {"config.json": _json(config)}


# What transformers may make a tokenizer of.
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
_TOKENIZER += ("special_tokens_map.json", "added_tokens.json")


def tokenizer_texts(tokenizer: Tokenizer | str | None) -> tuple[dict[str, str], int | None]:
    """transformers' files for a tokenizer, and its end of text; of a name those that are there."""
    texts: dict[str, str] = {}
    if isinstance(tokenizer, str):
        files = (Path(tokenizer) / name for name in _TOKENIZER)
        texts = {path.name: read_text(path) for path in files if path.is_file()}
        try:
            tokenizer = get_tokenizer(tokenizer)
        except (OSError, ValueError) as error:
            _LOGGER.warning("the model is saved without a tokenizer of ours: %s", error)
            return texts, None
    if isinstance(tokenizer, BPETokenizer) and not texts:
        texts = tokenizer.transformers_files()
    return texts, None if tokenizer is None else tokenizer.eot


def save_model(
    model: GPT, directory: str | PathLike, tokenizer: Tokenizer | str | None = None
) -> None:
    """Write config.json, model.safetensors and the tokenizer's files, if it has such, into
    `directory`, each replaced whole. tokenizer: one, or a name for `get_tokenizer`, whose files are
    copied where they are transformers'."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(directory / "model")
    try:
        vocabulary, eot = tokenizer_texts(tokenizer)
        tensors, texts = _model_files(model, eot)
        _write_files(temporary, tensors, texts | vocabulary)
        for file in temporary.iterdir():
            file.replace(directory / file.name)
        # Another tokenizer's, which transformers would take before ours.
        for name in set(_TOKENIZER) - vocabulary.keys() if vocabulary else ():
            (directory / name).unlink(missing_ok=True)
        fsync(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# transformers keeps these four as Conv1D: (in, out) where nn.Linear has (out, in).
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


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
