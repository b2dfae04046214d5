"""LoRA (Hu et al., 2021): a frozen linear layer plus a trained product of a small rank r.

    y = x W^T + b  +  (alpha / r) drop(x) A^T B^T        A (r, C), B (O, r)
A is drawn as peft draws it and B is zero, so that a new adapter changes nothing. The frozen product
and both small ones are `ops.linear`: each normalises x itself, the last adds what the first gave,
and no gradient of W is computed. weights/adapter.py reads and writes adapters.

W may be in int8 with a scale for each output, as the engine packs it; `ops.int8_linear` then stands
for the frozen product.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast import ops
from gptfast.dropout import Rows, drop
from gptfast.ops.int8_linear import int8_linear, quantize
from gptfast.ops.linear import Norm
from gptfast.weights.adapter import (
    AdapterConfig,
    fingerprint,
    is_target,
    read_config,
    read_tensors,
)

if TYPE_CHECKING:
    from gptfast.model import GPT


class Int8Linear(nn.Linear):
    """The linear layer `base`, which is frozen, with its weight in int8.

    Its parameters keep their names; weight_scale (O,), fp32, is a buffer.
    """

    weight_scale: Tensor

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        values, scale = quantize(base.weight.detach())
        self.weight, self.bias = nn.Parameter(values, requires_grad=False), base.bias
        self.register_buffer("weight_scale", scale)
        self.dtype = base.weight.dtype
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., C)."""
        return layer_of(self)(x)


class LoRALinear(nn.Linear):
    """The linear layer `base`, which is frozen, with an adapter.

    Its parameters keep their names; the adapter's are lora_A (r, C) and lora_B (O, r). The weight
    may be in int8, with weight_scale (O,) as that of `Int8Linear`, which else is None.
    """

    weight_scale: Tensor | None

    def __init__(self, base: nn.Linear, config: AdapterConfig) -> None:
        nn.Module.__init__(self)  # it has the base's weight, and draws none
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.register_buffer("weight_scale", getattr(base, "weight_scale", None))
        dtype = base.dtype if isinstance(base, Int8Linear) else base.weight.dtype
        like, rank = base.weight.detach(), config.rank
        self.lora_A = nn.Parameter(like.new_empty(rank, base.in_features, dtype=dtype))  # (r, C)
        self.lora_B = nn.Parameter(like.new_zeros(base.out_features, rank, dtype=dtype))  # (O, r)
        self.lora_drop = nn.Dropout(config.dropout)
        self.scale = config.scale(rank)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., C)."""
        return layer_of(self)(x)


class Layer(NamedTuple):
    """What stands for a call of a linear layer: its tensors, and its adapter if it has one."""

    weight: Tensor
    bias: Tensor | None
    adapter: LoRALinear | None = None
    weight_scale: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Return whether this is nothing but the product with a weight."""
        return self.adapter is None and self.weight_scale is None

    def __call__(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Return the layer of x (..., C), or of its norm, plus a residual (..., O)."""
        if self.weight_scale is None:
            y = ops.linear(x, self.weight, self.bias, norm=norm, residual=residual)
        else:
            tensors = self.weight, self.weight_scale, self.bias
            y = int8_linear(x, *tensors, norm=norm, residual=residual)
        if self.adapter is None:
            return y
        A, B, dropout = self.adapter.lora_A, self.adapter.lora_B, self.adapter.lora_drop
        if dropout.training and dropout.p > 0:
            if norm is not None:
                x = F.layer_norm(x, x.shape[-1:], *norm)
            low = ops.linear(drop(dropout, x, rows), A)
        else:
            low = ops.linear(x, A, norm=norm)  # (..., r)
        return ops.linear(low, self.adapter.scale * B, residual=y)


def layer_of(module: LoRALinear | Int8Linear) -> Layer:
    """Return the tensors of a layer with an adapter or a weight in int8."""
    adapter = module if isinstance(module, LoRALinear) else None
    return Layer(module.weight, module.bias, adapter, module.weight_scale)


BaseDtype = Literal["int8"] | None
"""What the weights of a base's layers are kept in: int8, or None for their own dtype."""


def _layers(model: "GPT") -> dict[str, nn.Linear | Int8Linear | LoRALinear]:
    """Return the linear layers of a model's blocks, by name."""
    kinds = nn.Linear, Int8Linear, LoRALinear
    named = model.named_modules()
    return {name: m for name, m in named if type(m) in kinds and name.startswith("h.")}


def is_int8(model: "GPT") -> bool:
    """Return whether the layers of a model's blocks are in int8."""
    return any(m.weight.dtype == torch.int8 for m in _layers(model).values())


def add_adapters(
    model: "GPT",
    config: AdapterConfig,
    *,
    base_dtype: BaseDtype = None,
    base_fingerprint: str | None = None,
) -> None:
    """Freeze a GPT and put adapters beside the layers that config.targets names.

    base_dtype: "int8" rounds the weights of all linear layers in the blocks to int8, with a scale
    for each output, one layer after the other; embeddings, norms, biases and the head stay as they
    are. The model records the adapter's configuration and the fingerprint of the weights that it is
    for as `model.adapter`; base_fingerprint: theirs, if they are in int8 already. A model that has
    this adapter already is left as it is. Raises ValueError if it has another, for a target that
    no layer matches, and for another base_dtype.
    """
    if base_dtype not in ("int8", None):
        raise ValueError(f"base_dtype must be 'int8' or None, got {base_dtype!r}")
    if model.adapter is not None:
        kept = "int8" if is_int8(model) else None
        if (model.adapter.settings(), kept) == (config.settings(), base_dtype):
            return
        raise ValueError(
            "the model has an adapter of other settings already; load its base again "
            "(GPT.from_pretrained) for another one"
        )
    layers = _layers(model)
    for target in config.targets:
        if not any(is_target(name, (target,)) for name in layers):
            names = "c_attn, attn.c_proj, c_fc, mlp.c_proj, or c_proj for both of this name"
            raise ValueError(f"lora_targets: no layer is called {target!r}; take of {names}")
    mark = base_fingerprint or fingerprint(model.state_dict())
    model.requires_grad_(False)
    for name in list(layers):
        module = layers.pop(name)  # so that its weight goes once it is rounded
        if base_dtype == "int8" and type(module) is nn.Linear:
            module = Int8Linear(module)
        if is_target(name, config.targets):
            module = LoRALinear(module, config)
        _replace(model, name, module)
    model.adapter = config.of_base(model.source, mark)


def round_layer(model: "GPT", name: str) -> None:
    """Round the parameter of this name to int8, if it is the weight of a block's linear layer."""
    layer, _, leaf = name.rpartition(".")
    module = model.get_submodule(layer)
    if leaf == "weight" and layer.startswith("h.") and type(module) is nn.Linear:
        _replace(model, layer, Int8Linear(module))


def _replace(model: "GPT", name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def is_adapter_name(name: str) -> bool:
    """Return whether a parameter's name is that of a part of an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the values of all adapters of a model, by the names of its parameters."""
    return {name: t.detach() for name, t in model.named_parameters() if is_adapter_name(name)}


@torch.no_grad()
def load_adapter(directory: Path, model: "GPT") -> None:
    """Copy the adapter in a directory into those of a model, which must have the same settings.

    Raises CheckpointError for damaged files, and ValueError, with nothing changed, if model and
    files differ in settings or in the base that they are for.
    """
    if model.adapter is None:
        raise ValueError(f"{directory} is an adapter, and the model has none: add_adapters first")
    saved, parts, own = read_config(directory), read_tensors(directory), adapter_state(model)
    if saved.settings() != model.adapter.settings() or parts.keys() != own.keys():
        raise ValueError(
            f"{directory} has an adapter of other settings ({saved.described()}) than the model "
            f"({model.adapter.described()}); leave the flags of --lora out"
        )
    if saved.fingerprint not in (None, model.adapter.fingerprint):
        raise ValueError(
            f"{directory} was trained on another base than the model has; load that one "
            f"({saved.base})"
        )
    for name, values in own.items():
        if parts[name].shape != values.shape:
            raise ValueError(f"{directory} does not fit the model: its {name} has another shape")
    for name, values in own.items():
        values.copy_(parts[name].read())


@torch.no_grad()
def merge_adapters(model: "GPT") -> None:
    """Add each adapter of a GPT to the weight beside it, and take it away. All is trained again.

    Raises ValueError for a base in int8, whose own weights are not there to be added to.
    """
    if is_int8(model):
        raise ValueError(
            "the base is in int8, and an adapter is added to its own weights: save the adapter "
            "(save_pretrained) and load it (GPT.from_pretrained, or gptfast convert --merge)"
        )
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            wide = torch.promote_types(module.weight.dtype, torch.float32)
            delta = module.scale * (module.lora_B.to(wide) @ module.lora_A.to(wide))  # (O, C)
            module.weight.copy_(module.weight.to(wide) + delta)
            merged = nn.Linear(module.in_features, module.out_features, device="meta")
            merged.weight, merged.bias = module.weight, module.bias
            _replace(model, name, merged.train(module.training))
    model.adapter = None
    model.requires_grad_(True)
