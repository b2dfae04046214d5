"""`accelerate` and `restore`: gptfast's kernels inside transformers' GPT2LMHeadModel.

Attention goes through transformers' own attention interface, under the name "gptfast". The loss is
computed by `ops.linear_cross_entropy` from the last hidden states; logits are made when asked for.
"""

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as theirs

from gptfast import ops

_NAME = "gptfast"
# Of sdpa_attention_forward's: with any of these it serves.
_BEYOND = ("position_bias", "softcap")


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
    """`ops.attention` as transformers calls it; what it is not made for, masks of padding say, is
    left to transformers' call of scaled_dot_product_attention.

    query (B, H, Tq, D), key and value (B, H, Tk, D) -> (B, Tq, H, D).
    """
    Tq, Tk = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    beyond = any(kwargs.get(name) is not None for name in _BEYOND)
    if attention_mask is not None or beyond or not (causal or Tq == 1):
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, **options, **kwargs
        )
    if 1 < Tq < Tk:  # a preallocated cache, empty behind the prompt
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
    """transformers' ForCausalLMLoss without the logits: hidden (B, T, C), weight (V, C), labels
    (B, T), which are shifted here -> scalar, in fp32 for 16-bit inputs."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    device = hidden.device
    # transformers' loss of 16-bit logits is in fp32, as ours under autocast.
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, dtype=hidden.dtype) if half else nullcontext():
        loss = ops.linear_cross_entropy(
            hidden,
            weight,
            shift_labels.to(device),
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class LazyLogits(CausalLMOutputWithCrossAttentions):
    """An output whose logits (B, T, V) are computed when they are first looked at, by name."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "logits" and value is None and "head" in self.__dict__:
            head, hidden = self.__dict__.pop("head")
            value = head(hidden)
            self.__dict__["logits"] = value
        return value


class GPT2LMHeadModel(theirs.GPT2LMHeadModel):
    """transformers' class, its forward with labels changed. It bears its name, which is saved."""

    @functools.wraps(theirs.GPT2LMHeadModel.forward)
    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        head = self.lm_head
        plain = type(head) is nn.Linear and head.bias is None
        plain = plain and self.loss_function is ForCausalLMLoss
        as_dict = kwargs.get("return_dict")
        as_dict = self.config.return_dict if as_dict is None else as_dict
        part = "logits_to_keep" in kwargs
        if labels is None or args or part or not (plain and as_dict):
            return super().forward(input_ids, *args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "return_dict")}
        outputs = self.transformer(input_ids, return_dict=True, **kwargs)
        hidden = outputs.last_hidden_state  # (B, T, C)
        loss = causal_loss(hidden, head.weight, labels, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        if not self.training:
            return CausalLMOutputWithCrossAttentions(loss=loss, logits=head(hidden), **rest)
        if torch.compiler.is_compiling():
            return CausalLMOutputWithCrossAttentions(loss=loss, **rest)
        output = LazyLogits(loss=loss, **rest)
        output.__dict__["head"] = head, hidden
        return output


def accelerate(model: nn.Module) -> nn.Module:
    """Make transformers' GPT2LMHeadModel compute with gptfast, in place; returns it.

    Attention without a mask (no padding) is `ops.attention`, its dropout drawn from torch's
    generator. With labels the loss is `ops.linear_cross_entropy`: in training no logits are made
    unless output.logits is looked at (compiled: None); in evaluation they are. Logits, loss and
    gradients are the same up to rounding; generate, save_pretrained, Trainer work as before. As
    with SDPA, attention weights (output_attentions) are not there.

    Raises ValueError for any other model; `restore` undoes it.
    """
    if type(model) is GPT2LMHeadModel:
        return model
    if type(model) is not theirs.GPT2LMHeadModel:
        raise ValueError(
            f"accelerate takes transformers' GPT2LMHeadModel, got {type(model).__name__}; of a "
            "wrapped model give the one inside, before it is wrapped"
        )
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    model.__class__ = GPT2LMHeadModel
    model._attention_before_gptfast = before
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place; returns the model. Another model is left as it is."""
    if type(model) is GPT2LMHeadModel:
        model.__class__ = theirs.GPT2LMHeadModel
        model.set_attn_implementation(model._attention_before_gptfast)
        del model._attention_before_gptfast
    return model
