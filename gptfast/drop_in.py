"""`accelerate` and `restore`: gptfast's kernels inside transformers' GPT2LMHeadModel.

Attention goes through transformers' own attention interface, under the name "gptfast". The loss is
computed by `ops.linear_cross_entropy` from the last hidden states; logits only when they are read.
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_tracing
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as theirs

from gptfast import ops
from gptfast.deferred import DeferredTensor, deferred_linear
from gptfast.ops.cross_entropy import fp32_linear_cross_entropy
from gptfast.torch_private import are_transforms_active

_NAME = "gptfast"
# Arguments of transformers' attention that `ops.attention` does not have.
_UNSUPPORTED = ("position_bias", "softcap")
# Arguments of transformers' forward by which somebody asks for keys and values, and their names in
# its output.
_CACHES = ("use_cache", "cache", "past_key_values")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return `ops.attention` of query (B, H, Tq, D), key and value (B, H, Tk, D) as (B, Tq, H, D).

    Calls that it does not support, those with a mask of padding for example, go to transformers'
    own scaled_dot_product_attention.
    """
    Tq, Tk = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    beyond = (
        any(kwargs.get(name) is not None for name in _UNSUPPORTED) or key.shape[1] != query.shape[1]
    )
    if attention_mask is not None or beyond or not (causal or Tq == 1):
        options: dict[str, Any] = dict(dropout=dropout, scaling=scaling, is_causal=is_causal)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, **options, **kwargs
        )
    if 1 < Tq < Tk:  # a preallocated cache, empty after the prompt
        key, value = key[:, :, :Tq], value[:, :, :Tq]
    seed = torch.randint(2**62, (), device=query.device) if dropout > 0 else 0
    out = ops.attention(query, key, value, scale=scaling, dropout_p=dropout, seed=seed)
    return out.transpose(1, 2), None  # (B, Tq, H, D)


AttentionInterface.register(_NAME, attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def causal_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return transformers' ForCausalLMLoss, a scalar, without making the logits.

    hidden (B, T, C), weight (V, C), labels (B, T), which are shifted here. The loss of 16-bit
    inputs is in fp32.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    device = hidden.device
    loss = fp32_linear_cross_entropy(
        hidden,
        weight,
        shift_labels.to(device).reshape(hidden.shape[:-1]),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class LazyLogits(CausalLMOutputWithCrossAttentions):
    """An output whose logits are a plain tensor by name, by index and when it is saved or copied.

    items(), values() and pytrees give a DeferredTensor, because Accelerator copies an output by
    these, and DistributedDataParallel and FSDP look through it, without reading the logits.
    """

    def _read(self) -> None:
        logits = self.__dict__.get("logits")
        if isinstance(logits, DeferredTensor):
            self["logits"] = logits.read()  # the attribute too

    def __getattribute__(self, name: str) -> Any:
        if name == "logits":
            self._read()
        return super().__getattribute__(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.logits if key == "logits" else super().__getitem__(key)
        names = tuple(self)[key]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def __reduce__(self) -> Any:
        # Whoever loads it needs no gptfast.
        return CausalLMOutputWithCrossAttentions(**self).__reduce__()


class GPT2LMHeadModel(theirs.GPT2LMHeadModel):
    """transformers' class with another forward for calls with labels.

    It has the same name because transformers saves the name with the model.
    """

    @functools.wraps(theirs.GPT2LMHeadModel.forward)
    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        # A method bound before `restore` comes here too, and may ask for what is not supported.
        if type(self) is not GPT2LMHeadModel or args or not _is_supported(self, kwargs):
            return theirs.GPT2LMHeadModel.forward(self, input_ids, *args, **kwargs)
        labels = kwargs["labels"]
        kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "return_dict")}
        outputs = self.transformer(input_ids, return_dict=True, **kwargs)
        hidden = outputs.last_hidden_state  # (B, T, C)
        loss = causal_loss(hidden, self.lm_head.weight, labels, **kwargs)
        left_out = {"last_hidden_state"}
        if self.training and all(kwargs.get(name) is None for name in _CACHES):
            left_out |= {*_CACHES}
        rest = {name: value for name, value in outputs.items() if name not in left_out}
        if not self.training:
            logits = self.lm_head(hidden)
            return CausalLMOutputWithCrossAttentions(loss=loss, logits=logits, **rest)
        if torch.compiler.is_compiling():
            return CausalLMOutputWithCrossAttentions(loss=loss, **rest)
        weight = self.lm_head.weight
        logits = self.lm_head(hidden) if _is_traced(hidden) else deferred_linear(hidden, weight)
        return LazyLogits(loss=loss, logits=logits, **rest)


def _is_traced(hidden: Tensor) -> bool:
    """Return whether torch.func, forward-mode AD or torch.jit.trace follows every operation."""
    tangent = torch.autograd.forward_ad.unpack_dual(hidden).tangent
    return are_transforms_active() or tangent is not None or is_tracing()


def _is_supported(model: GPT2LMHeadModel, kwargs: dict[str, Any]) -> bool:
    """Return whether a forward asks for transformers' own loss of a plain head, as a dictionary."""
    head = model.lm_head
    hooked = any((head._forward_hooks, head._forward_pre_hooks, head._backward_hooks))
    plain = type(head) is nn.Linear and head.bias is None and not hooked
    plain = plain and "forward" not in head.__dict__ and model.loss_function is ForCausalLMLoss
    as_dict = kwargs.get("return_dict")
    as_dict = model.config.return_dict if as_dict is None else as_dict
    asks_loss = kwargs.get("labels") is not None and "logits_to_keep" not in kwargs
    return bool(plain and as_dict and asks_loss)


def accelerate(model: nn.Module) -> nn.Module:
    """Make transformers' GPT2LMHeadModel compute with gptfast, in place, and return it.

    Attention without a mask (no padding) becomes `ops.attention`, with dropout from torch's
    generator. With labels, the loss becomes `ops.linear_cross_entropy`: in training, logits are
    computed only when they are read from the output (never in compiled code), in evaluation always.
    After the step of a torch.optim optimizer too, they are those of the forward, but have no
    gradient any more. After another change of the head's weight, reading them raises RuntimeError,
    if PyTorch counts the change or some entries that are compared show it.
    Logits, loss and gradients are the same up to rounding, derivatives of gradients too; generate,
    save_pretrained and Trainer work as before. There are no attention weights, as with SDPA, and in
    training with labels no cache of keys and values unless use_cache=True is passed.
    transformers still serves a head with hooks and a loss of your own. The model gets its own copy
    of its config. `restore` undoes it.

    Raises ValueError for any other model, for one whose forward was replaced, and for one whose
    config asks for attention weights.
    """
    gpt2: Any = model
    if type(gpt2) not in (theirs.GPT2LMHeadModel, GPT2LMHeadModel):
        raise ValueError(
            f"accelerate takes transformers' GPT2LMHeadModel, got {type(gpt2).__name__}; "
            "call accelerate before the model is wrapped"
        )
    if type(gpt2) is GPT2LMHeadModel and gpt2.config._attn_implementation == _NAME:
        return gpt2
    if "forward" in gpt2.__dict__:
        raise ValueError(
            "the model's forward was replaced, for example by Accelerator; call accelerate first"
        )
    if gpt2.config.output_attentions:
        raise ValueError("config.output_attentions asks for attention weights; set it to False")
    before = gpt2.config._attn_implementation
    _own_config(gpt2)
    gpt2.set_attn_implementation(_NAME)
    gpt2.__class__ = GPT2LMHeadModel
    gpt2._attention_before_gptfast = "sdpa" if before == _NAME else before
    return gpt2


def _own_config(model: nn.Module) -> None:
    """Give a model a copy of its config, which other models may share."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` in place, and return the model. Other models do not change."""
    gpt2: Any = model
    if type(gpt2) is GPT2LMHeadModel:
        gpt2.__class__ = theirs.GPT2LMHeadModel
        gpt2.set_attn_implementation(gpt2.__dict__.pop("_attention_before_gptfast", "sdpa"))
    return gpt2
