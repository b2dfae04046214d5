"""transformers' layout of GPT-2: config.json and the tensors of model.safetensors."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.model import GPT

# transformers keeps these four as Conv1D: (in, out) where nn.Linear has (out, in).
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def hf_config(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    eot = 50256 if config.vocab_size == 50257 else None
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
    if raw.get("model_type") != "gpt2":
        raise ValueError(
            f"{path} describes a model of type {raw.get('model_type')!r}, not GPT-2's architecture"
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
        raise ValueError(f"{path} has no {error.args[0]!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    fixed = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * config.n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    }
    for name, allowed in fixed.items():
        if name in raw and raw[name] not in allowed:
            raise ValueError(f"{path}: {name} is {raw[name]!r}, gptfast's GPT has {allowed[0]!r}")
    return config


def hf_tensors(model: GPT) -> dict[str, Tensor]:
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


def from_hf(tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    state = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # old files' causal masks
            continue
        if name == "lm_head.weight" and config.tie_weights:
            continue
        if name.endswith("c_attn.bias") and not config.qkv_bias:
            continue
        state[name] = tensor.t().contiguous() if name.endswith(_CONV1D) else tensor
    return state
