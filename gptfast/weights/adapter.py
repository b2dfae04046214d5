"""Adapters in peft's form: adapter_config.json beside adapter_model.safetensors.

The files hold A (r, C) and B (O, r) of each adapted layer; the weights beside which they were
trained, the base, stay where they are. peft writes such directories and loads them.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.config import parameter_shapes
from gptfast.files import json_text
from gptfast.weights.lazy_tensor import (
    FLOATS,
    CheckpointError,
    LazyTensor,
    read_json,
    read_safetensors,
    safetensors_metadata,
)
from gptfast.weights.names import CONV1D, unwrapped
from gptfast.weights.weights import Weights

CONFIG, TENSORS = FILES = ("adapter_config.json", "adapter_model.safetensors")
KEPT_BASE = "adapter_base"
"""The directory, in a run's own, of a base that would not stay where it was."""
_FINGERPRINT = "gptfast_base_fingerprint"
_SAMPLED = 64
# Options of peft that change what an adapter computes, and the values that leave it as it is.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "init_lora_weights": (True, False, "gaussian"),  # others change the base's weights too
}


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says. Raises ValueError for values out of range."""

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("c_attn", "c_proj")
    """Names of layers, or the ends of such names."""
    rslora: bool = False
    """Divide alpha by the root of the rank (Kalajdzievski, 2023)."""
    other_ranks: tuple[tuple[str, int], ...] = ()
    """Layers' names, or their ends, and the rank that these have instead, as in peft's adapters."""
    base: str | None = None
    """Where the base is: a path, or the name of a model."""
    fingerprint: str | None = None
    """That of the base; None for an adapter of others."""

    def __post_init__(self) -> None:
        for name, good, must in (
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", 0 < self.alpha < float("inf"), "a finite number > 0"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("targets", bool(self.targets), "at least one name"),
        ):
            if not good:
                raise ValueError(f"lora_{name} must be {must}, got {getattr(self, name)}")

    def rank_of(self, layer: str) -> int:
        """Return the rank of a layer, by the first of the other ranks that is for it."""
        name = f"transformer.{layer}"
        return next((r for end, r in self.other_ranks if is_target(name, [end])), self.rank)

    def scale(self, rank: int) -> float:
        """Return the factor of the product of an adapter of this rank."""
        return self.alpha / (rank**0.5 if self.rslora else rank)

    def settings(self) -> tuple[Any, ...]:
        """Return what two adapters must have in common to be trained as one."""
        return self.rank, self.alpha, self.dropout, tuple(self.targets), self.rslora

    def described(self) -> str:
        """Return the settings in words."""
        what = f"rank {self.rank}, alpha {self.alpha:g}, dropout {self.dropout:g}"
        return f"{what}, targets {' '.join(self.targets)}"

    def of_base(self, base: str | None, fingerprint: str | None) -> "AdapterConfig":
        """Return this for a base."""
        return replace(self, base=base, fingerprint=fingerprint)


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Return whether a layer's name is one of the targets or ends in one, as peft compares."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor | LazyTensor]) -> str:
    """Return what identifies weights by GPT's names, whatever their form, fp32 or bf16.

    It is the SHA-256 of up to 64 x 64 values of each tensor, rounded to bf16.
    """
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        values = tensor.read() if isinstance(tensor, LazyTensor) else tensor.detach()
        steps = [slice(None, None, max(1, n // _SAMPLED)) for n in values.shape]
        sample = values[tuple(steps)].cpu().to(torch.bfloat16).contiguous()
        sha256.update(f"{name} {tuple(values.shape)}".encode())
        sha256.update(sample.view(torch.int16).numpy().tobytes())
    return sha256.hexdigest()[:16]


def adapter_files(
    config: AdapterConfig, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Return the tensors of adapter_model.safetensors, its metadata, and adapter_config.json.

    tensors: by the names of GPT's parameters, which end in lora_A and lora_B.
    """
    prefix = "base_model.model.transformer."
    named = {f"{prefix}{name}.weight": x.cpu().contiguous() for name, x in tensors.items()}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "use_rslora": config.rslora,
        "fan_in_fan_out": True,  # transformers' Conv1D keeps its weight as (C, O)
        "bias": "none",
    }
    metadata = {_FINGERPRINT: config.fingerprint} if config.fingerprint else {}
    return named, metadata, json_text(values)


def read_config(directory: Path) -> AdapterConfig:
    """Return what an adapter says. Raises CheckpointError for one that is not plain LoRA."""
    path = directory / CONFIG
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} is of peft_type {values.get('peft_type')!r:.40}, and gptfast reads LORA: "
            "merge it in peft (merge_and_unload) and give what that saves"
        )
    for name, plain in _PLAIN.items():
        if name in values and values[name] not in plain:
            raise CheckpointError(
                f"{path} has {name} {values[name]!r:.40}, which gptfast does not compute: merge it "
                "in peft (merge_and_unload) and give what that saves"
            )
    rslora, others = values.get("use_rslora", False), values.get("rank_pattern") or {}
    if not isinstance(rslora, bool):
        raise CheckpointError(f"{path} is damaged: use_rslora is {rslora!r:.40}, not true or false")
    if not isinstance(others, dict) or any(type(rank) is not int for rank in others.values()):
        raise CheckpointError(
            f"{path} is damaged: rank_pattern {others!r:.40} has no ranks by name"
        )
    if patterns := [name for name in others if not re.fullmatch(r"[\w.]+", name)]:
        raise CheckpointError(
            f"{path} has {patterns[0]!r:.40} in rank_pattern, and gptfast reads plain names: merge "
            "it in peft (merge_and_unload) and give what that saves"
        )
    targets, base = values.get("target_modules"), values.get("base_model_name_or_path")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise CheckpointError(f"{path} is damaged: its target_modules are no names")
    if not isinstance(base, str | None):
        raise CheckpointError(f"{path} is damaged: base_model_name_or_path is no text")
    try:
        config = AdapterConfig(
            _number(values, "r", path, int),
            float(_number(values, "lora_alpha", path)),
            float(_number(values, "lora_dropout", path)),
            tuple(targets),
            rslora,
            tuple(others.items()),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return config.of_base(base or None, safetensors_metadata(directory / TENSORS).get(_FINGERPRINT))


def _number(values: dict[str, Any], name: str, path: Path, kind: Any = (int, float)) -> Any:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise CheckpointError(f"{path} is damaged: {name} is {value!r:.40}, not a number")
    return value


def read_tensors(directory: Path) -> dict[str, LazyTensor]:
    """Return the tensors of an adapter, by GPT's names, which end in lora_A and lora_B.

    Raises CheckpointError for a tensor that is no part of a layer of GPT-2's.
    """
    found = {}
    for name, tensor in read_safetensors(directory / TENSORS).items():
        plain = unwrapped(name).removesuffix(".weight")
        layer, _, part = plain.rpartition(".")
        known = re.match(r"h\.\d{1,5}\.", layer) and f"{layer}.weight".endswith(CONV1D)
        if not known or part not in ("lora_A", "lora_B"):
            raise CheckpointError(
                f"{directory / TENSORS} has {name!r:.200}, which is no adapter of a GPT-2 layer: "
                "merge it in peft (merge_and_unload) and give what that saves"
            )
        if tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            raise CheckpointError(f"{directory / TENSORS}: {name!r:.200} is no matrix of numbers")
        found[plain] = tensor
    if not found:
        raise CheckpointError(f"{directory / TENSORS} has no tensors")
    return found


def merged(base: Weights, directory: Path) -> Weights:
    """Return the weights of a base with an adapter in them: the sums in fp32, the rest as it is.

    Raises CheckpointError if the adapter is damaged or was trained beside another base.
    """
    config, parts = read_config(directory), read_tensors(directory)
    if config.fingerprint not in (None, fingerprint(base.tensors)):
        raise CheckpointError(
            f"{directory} was trained on another base than {base.source} is now; put back the "
            "weights that it was trained on"
        )
    tensors, shapes = dict(base.tensors), parameter_shapes(base.config)
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in parts):
        A, B = (parts.get(f"{layer}.{part}") for part in ("lora_A", "lora_B"))
        if A is None or B is None:
            raise CheckpointError(f"{directory / TENSORS} is damaged: {layer} has one half alone")
        wanted = shapes.get(f"{layer}.weight")
        if wanted is None or wanted != (B.shape[0], A.shape[1]) or A.shape[0] != B.shape[1]:
            raise CheckpointError(
                f"{directory} does not fit {base.source}: its adapter of {layer} is {B.shape} by "
                f"{A.shape}, the base has {wanted}"
            )
        if A.shape[0] != config.rank_of(layer):
            raise CheckpointError(
                f"{directory} is damaged: its adapter of {layer} has rank {A.shape[0]}, and in "
                f"{CONFIG} it is {config.rank_of(layer)}"
            )
        name = f"{layer}.weight"
        tensors[name] = _sum(tensors[name], A, B, config.scale(A.shape[0]))
    source = str(directory / TENSORS)
    return replace(base, source=source, tensors=tensors)


def _sum(weight: LazyTensor, A: LazyTensor, B: LazyTensor, scale: float) -> LazyTensor:
    """Return weight + scale B A, in fp32 at least, computed when it is read."""
    dtype = torch.promote_types(weight.dtype, torch.float32)

    def read() -> Tensor:
        delta = scale * (B.read().to(dtype) @ A.read().to(dtype))
        return delta.add_(weight.read().to(dtype))

    return LazyTensor(weight.shape, dtype, read, fresh=True)
