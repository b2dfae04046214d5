"""Which modules of a GPT are as GPT made them: fused operators take the place of those alone.

A fused operator reads a module's parameters and never calls it. That is right where a call would do
nothing else: the class is PyTorch's own, there are no hooks, and the parameters are plain tensors.
Everything else (an adapter, another norm, a parametrisation, a hook) has to be called. Each forward
asks anew, because all of it may change between two forwards; so the questions are short.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from torch import Tensor, nn

from gptfast.lora import Int8Linear, Layer, LoRALinear, layer_of
from gptfast.torch_private import FakeTensor, FunctionalTensor, any_global_hooks

LayerWeights = tuple[Tensor, Tensor | None]
"""weight (O, C) and bias (O,) of a linear layer."""
NormWeights = tuple[Tensor, Tensor, float]
"""weight (C,), bias (C,) and eps of a layer norm."""

_PLAIN = {nn.Parameter, Tensor}  # functional_call puts tensors in the place of parameters
_TRACED = (FakeTensor, FunctionalTensor)  # what stands for them while a graph is made
_FORWARD = {
    kind: kind.forward
    for kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList)
}


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module does more than its class says, or its forward is its own.

    Hooks on all modules are `any_global_hooks`.
    """
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def has_dropout(modules: Iterable[nn.Module]) -> bool:
    """Return whether one of the modules is a dropout that may drop something."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)


def is_own_class(module: nn.Module) -> bool:
    """Return whether a module is one of PyTorch's of which a GPT is made, not of a subclass."""
    kind = type(module)
    return kind in _FORWARD and kind.forward is _FORWARD[kind]


def foreign_option(module: nn.Module) -> str | None:
    """Return an option of a module that changes what it computes and that no GPT-2 has."""
    if isinstance(module, nn.LayerNorm) and module.eps != 1e-5:
        return f"eps={module.eps}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"max_norm={module.max_norm}"
    return None


def _is_own(module: Any, kind: type[nn.Module]) -> bool:
    return type(module) is kind and kind.forward is _FORWARD[kind] and not has_hooks(module)


def is_plain(tensor: Any) -> TypeGuard[Tensor]:
    """Return whether our operators can read a tensor: it is one, and of no subclass."""
    return type(tensor) in _PLAIN or isinstance(tensor, _TRACED)


def linear_weights(module: Any) -> LayerWeights | None:
    """Return what an operator needs to stand for a linear layer; None where it must be called."""
    if not _is_own(module, nn.Linear):
        return None
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias", module)
    if not is_plain(weight) or not (bias is None or is_plain(bias)):
        return None
    return weight, bias


def _layer(module: Any) -> Layer | None:
    """Return a linear layer, in int8 or with an adapter too; None where it must be called."""
    if type(module) is LoRALinear:
        return None if has_hooks(module) or has_hooks(module.lora_drop) else layer_of(module)
    if type(module) is Int8Linear:
        return None if has_hooks(module) else layer_of(module)
    weights = linear_weights(module)
    return None if weights is None else Layer(*weights)


def norm_weights(module: Any) -> NormWeights | None:
    """Return what an operator needs to stand for a layer norm; None where it must be called."""
    if not _is_own(module, nn.LayerNorm):
        return None
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if not is_plain(weight) or not is_plain(bias) or len(module.normalized_shape) != 1:
        return None
    return weight, bias, module.eps


def embedding_weight(module: Any) -> Tensor | None:
    """Return what an operator needs to stand for an embedding; None where it must be called."""
    if not _is_own(module, nn.Embedding):
        return None
    if module.padding_idx is not None or module.max_norm is not None:
        return None
    if module.scale_grad_by_freq or module.sparse:
        return None
    weight = module._parameters.get("weight")
    return weight if is_plain(weight) else None


def _half_block_weights(
    norm: nn.Module, layers: Mapping[str, Any], first: str
) -> tuple[NormWeights, Layer, Layer] | None:
    """Return the weights of a norm, a block's layer called `first` and its c_proj.

    None where one of these modules, or the dropout, must be called.
    """
    if any_global_hooks() or not _is_own(layers["drop"], nn.Dropout):
        return None
    before = norm_weights(norm)
    layer, proj = _layer(layers[first]), _layer(layers["c_proj"])
    if before is None or layer is None or proj is None:
        return None
    return before, layer, proj


def attention_weights(
    norm: nn.Module, layers: Mapping[str, Any]
) -> tuple[NormWeights, Layer, Layer] | None:
    """Return the weights of attention's half of a block; None where its modules must be called."""
    return _half_block_weights(norm, layers, "c_attn")


def mlp_weights(
    norm: nn.Module, layers: Mapping[str, Any]
) -> tuple[NormWeights, Layer, Layer] | None:
    """Return the weights of a block's perceptron; None where its modules must be called."""
    weights = _half_block_weights(norm, layers, "c_fc")
    if weights is None or weights[1].bias is None or weights[2].bias is None:
        return None
    return weights
