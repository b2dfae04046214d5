"""GPT-2 (Radford et al., 2019): embeddings, pre-norm blocks, a head tied to the embedding.

B batch, T time, C channels (n_embd), H heads, D head dimension, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gptfast import ops
from gptfast.blocks import MLP, Attention, Block
from gptfast.config import GPTConfig, parameter_shapes
from gptfast.dropout import Rows, draw, draw_seed, drop
from gptfast.kv_cache import KVCache
from gptfast.lora import Int8Linear, LoRALinear, adapter_state, is_adapter_name
from gptfast.modules import (
    any_global_hooks,
    embedding_weight,
    foreign_option,
    has_dropout,
    has_hooks,
    is_own_class,
    is_plain,
    linear_weights,
)
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.weights.adapter import AdapterConfig


class GPT(nn.Module):
    """GPT-2, with its own parameter names and initialisation.

    Weights are normal with standard deviation 0.02, divided by sqrt(2 n_layer) for the projections
    onto the residual stream; biases are zero (Radford et al., 2019, section 2.3).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        # Whether the backward computes each block's activations again instead of keeping them.
        self.activation_checkpointing = False
        # See ops.linear_cross_entropy; with 0 the head's gradient is complete.
        self.skip_below = 0.0
        # Which rows of a batch the next forward has; see gptfast/dropout.py. None: all of them.
        self.rows: Rows | None = None
        # The token embedding of processes that share it; see training/sharded_table.py.
        self.sharded_table: Any = None
        # The tokenizer in the files that the model was loaded from, for save_pretrained.
        self.tokenizer_name: str | None = None
        # Where the weights were loaded from; the adapters of lora.py and what they are for.
        self.source: str | None = None
        self.adapter: AdapterConfig | None = None
        # What identifies the vocabulary of its training, and the ids that end a text.
        self.vocabulary: str | None = None
        self.eos_ids: tuple[int, ...] = ()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if not config.tie_weights:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from GPT-2's initialisation, with torch's generator."""
        for name, module in self.named_modules():
            self.reset_module(name, module)

    def reset_module(self, name: str, module: nn.Module) -> None:
        """Draw the parameters of one of the modules, which has this name, as GPT-2 does."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            residual = name.endswith("c_proj")
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()

    @property
    def head_weight(self) -> Tensor:
        """The (V, C) weight of the head, which is the token embedding's if it is tied."""
        if not self.config.tie_weights:
            return self.lm_head.weight
        if "lm_head" in self._modules:
            raise ValueError(
                "model.lm_head was set, but the head is tied to wte and ignores it; delete it, "
                "or make the model with GPTConfig(tie_weights=False)"
            )
        weight = getattr(self.wte, "weight", None)
        if not isinstance(weight, Tensor) or weight.shape[1:] != (self.config.n_embd,):
            raise ValueError(
                f"the head is tied to wte, but a {type(self.wte).__name__} has no weight (V, C); "
                "make the model with GPTConfig(tie_weights=False)"
            )
        return weight

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def head(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of what `hidden` returned, x (..., C)."""
        weight = self.weight_of_plain_head()
        if weight is None and x.dim() == 2:  # it may expect (B, T, C), as in training
            return self._logits(x[:, None], weight)[:, 0]
        return self._logits(x, weight)

    def weight_of_plain_head(self) -> Tensor | None:
        """Return the weight (V, C) if the head is nothing but a product; None if it is a module.

        A module of its own (tie_weights=False) counts as one that must be called if it has hooks
        or a bias, or took the place of the nn.Linear that was there.
        """
        if self.config.tie_weights:
            return self.head_weight
        weights = None if any_global_hooks() else linear_weights(self._modules["lm_head"])
        return None if weights is None or weights[1] is not None else weights[0]

    def _logits(self, x: Tensor, head_weight: Tensor | None) -> Tensor:
        return self.lm_head(x) if head_weight is None else F.linear(x, head_weight)

    def new_cache(self, B: int, size: int) -> KVCache:
        """Return an empty cache for B rows of up to `size` tokens, in the model's dtype."""
        # wte may be a module without a weight, or with one in integers.
        config, like = self.config, next(p for p in self.parameters() if p.is_floating_point())
        shape = (B, config.n_head, size, config.n_embd // config.n_head)
        k, v = ([like.new_zeros(shape) for _ in range(config.n_layer)] for _ in "kv")
        return KVCache(k, v, torch.zeros(B, dtype=torch.int64, device=like.device), 0, False)

    def _embed(self, idx: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the rows of wte (B, T, C), and `weight_of_plain_head`.

        A tied weight gets the gradients of both uses in one tensor if the head takes it from here.
        """
        weight = None if any_global_hooks() else embedding_weight(self._modules["wte"])
        if weight is None:
            return self.wte(idx), self.weight_of_plain_head()
        x, head_weight = ops.embedding(idx, weight)
        if self.config.tie_weights and "lm_head" not in self._modules:
            return x, head_weight
        return x, self.weight_of_plain_head()

    def hidden(
        self, idx: Tensor, *, seed: Tensor | int = 0, cache: KVCache | None = None
    ) -> Tensor:
        """Return the normalised residual stream (B, T, C), the head's input, for idx (B, T) int64.

        With a cache, the tokens follow those in it: their keys and values are written there, row
        b's from cache.length[b] on. The caller then increases length and longest.
        """
        return self._stream(self._embed(idx)[0], seed, cache)

    def _stream(self, x: Tensor, seed: Tensor | int, cache: KVCache | None = None) -> Tensor:
        """Return `hidden` for the rows of wte (B, T, C)."""
        T = x.shape[1]
        start = cache.longest if cache else 0
        time = torch.arange(start, start + T, device=x.device)  # (T,)
        if cache and cache.ragged:
            time = cache.length[:, None] + time - start  # (B, T)
        rows = self.rows if self.training else None
        x = drop(self.drop, x + self.wpe(time), rows)  # (B, T, C)
        recomputed = self.activation_checkpointing and torch.is_grad_enabled()
        draws = recomputed and self._may_draw()
        for layer, block in enumerate(self.h):
            inputs = (x, seed + layer, cache, layer) + (() if rows is None else (rows,))
            if recomputed:
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws)
            else:
                x = block(*inputs)
        return self.ln_f(x)

    def _may_draw(self) -> bool:
        """Return whether a block may draw random numbers, so that recomputing it repeats them.

        A CUDA graph cannot hold that: it reads the state of the generator.
        """
        if torch.compiler.is_compiling():  # which could not follow the second question
            return True
        return has_dropout(self.modules()) or foreign_part(self, adapters=True) is not None

    def forward(
        self, idx: Tensor, target: Tensor | None = None, *, seed: Tensor | int | None = None
    ) -> Tensor:
        """Return logits (B, T, V) for idx (B, T) int64, or the mean loss for a target (B, T) int64.

        target is already shifted by one; -100 is ignored. seed fixes the attention dropout of a
        training step; None draws it from torch's generator. Raises ValueError for a T outside
        [1, block_size] and, on the CPU, IndexError for ids out of range.
        """
        fits = idx.dim() == 2 and 1 <= idx.shape[1] <= self.config.block_size
        if not fits or idx.dtype != torch.int64:
            raise ValueError(
                "idx must be (B, T) int64 with T from 1 to "
                f"block_size={self.config.block_size}, got {tuple(idx.shape)} {idx.dtype}"
            )
        if seed is None:
            draws = self.training and self.config.dropout > 0
            seed = draw_seed(idx.device) if draws else 0
        if self.sharded_table is not None:
            head = None if self.config.tie_weights else self.lm_head
            stream = partial(self._stream, seed=seed)
            return self.sharded_table.loss(idx, target, stream, head, self.skip_below)
        x, head_weight = self._embed(idx)
        x = self._stream(x, seed)
        if target is not None and is_plain(head_weight):
            return ops.linear_cross_entropy(x, head_weight, target, skip_below=self.skip_below)
        logits = self._logits(x, head_weight)  # (B, T, V)
        if target is None:
            return logits
        if target.shape != idx.shape:
            raise ValueError(
                f"target must be int64 of shape {tuple(idx.shape)}, got {target.dtype} of shape "
                f"{tuple(target.shape)}"
            )
        return ops.cross_entropy(logits.flatten(0, 1), target.reshape(-1))

    def draw_only(self, B: int, T: int) -> None:
        """Draw from torch's generator what a forward of (B, T) tokens draws in training."""
        if not self.training or self.config.dropout == 0:
            return
        draw_seed(self.device)
        for _ in range(2 * self.config.n_layer + 1):
            draw((B, T, self.config.n_embd), self.config.dropout, self.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike,
        *,
        n_head: int | None = None,
        resize_vocab: int | None = None,
        dtype: torch.dtype | None = None,
        base: str | PathLike | None = None,
    ) -> Self:
        """Return the model at a path or name, in evaluation mode.

        path: a run or a checkpoint of `gptfast train`; OpenAI's directory; a directory or file of
        transformers (safetensors or .bin, in shards or not); nanoGPT's ckpt.pt; llm.c's .bin; the
        .pth of Raschka's book; llama.cpp's .gguf; or the name of a model that `gptfast download`
        has fetched, such as "gpt2". The form is recognised by content.
        n_head: for a file that does not record it, such as the book's; None takes heads of 64
        channels, and logs that. resize_vocab: the number of tokens of a vocabulary that grew; the
        rows of new tokens are the mean of the old rows. dtype: of all parameters; None takes that
        of the file's token embedding. base: for an adapter, which is merged in fp32, the model that
        it was trained beside; None takes what it names.

        Pickles are read for tensors only; nothing in them is executed. Raises CheckpointError, a
        ValueError, for anything else and for what is damaged or incomplete.
        """
        # Here, because an engine that loads packed weights needs none of the readers.
        from gptfast.weights.open import base_name, open_weights

        weights = open_weights(path, n_head, base)
        if resize_vocab is not None:
            weights = weights.resized(resize_vocab)
        model = empty_model(weights.config, cls)
        weights.move_into(model, dtype)
        model.tokenizer_name, model.vocabulary = weights.tokenizer, weights.vocabulary
        model.eos_ids, model.source = weights.eos_ids, base_name(path)
        return model.eval()

    def save_pretrained(
        self,
        directory: str | PathLike,
        *,
        tokenizer: Tokenizer | None = None,
        push_to_hub: str | None = None,
        private: bool = False,
        run: str | PathLike | None = None,
    ) -> None:
        """Write a directory that transformers' GPT2LMHeadModel and its tokenizer load.

        It gets config.json, model.safetensors and the tokenizer's files, such as vocab.json,
        merges.txt and tokenizer_config.json. tokenizer: None takes the one in the files that the
        model was loaded from, if any. A model with adapters (lora.py) is saved as these alone, in
        peft's form. Raises OSError, and ValueError for a model with modules of others.

        push_to_hub: user/name, a repository of the Hugging Face Hub that gets the same files and a
        model card (README.md, unless there is one of yours). It is created if it is not there.
        private: as a private one; an existing public one is refused with ValueError. run: the run
        or checkpoint that the weights are of, whose data, steps and loss the card tells; None takes
        the one that the model was loaded from, if it has those weights still.
        """
        from gptfast.weights.pretrained import save_adapter, save_model

        check_saveable(self)
        if push_to_hub is not None:
            from gptfast.weights import push

            push.check(push_to_hub, self.adapter)
        tokenizer_or_name = tokenizer or self.tokenizer_name
        if self.adapter is None:
            state, ends = self.state_dict(), () if tokenizer else self.eos_ids
            save_model(self.config, state, directory, tokenizer_or_name, ends)
        else:
            state = adapter_state(self)
            save_adapter(self.adapter, state, directory, tokenizer_or_name)
        if push_to_hub is not None:
            source = None if self.adapter is not None else self.source
            facts = push.facts_for(run, source, state)
            card = push.card(push_to_hub, self.config, state, facts, self.adapter)
            push.push(Path(directory), push_to_hub, card, private=private)


_PARTS = (GPT, Block, Attention, MLP)


def foreign_part(model: nn.Module, *, saving: bool = False, adapters: bool = False) -> str | None:
    """Return what in a model its configuration and weights do not say, in words; None if nothing.

    saving: a file promises nothing about hooks, nor about what a subclass of GPT does. adapters:
    whether those of lora.py may be there.
    """
    if not saving and any_global_hooks():
        return "there are hooks on all modules"
    # An adapter is saved alone; without one, weights in int8 would be taken for the model's own.
    kinds = (LoRALinear, Int8Linear) if getattr(model, "adapter", None) else (LoRALinear,)
    for name, module in model.named_modules():
        kind, where = type(module), name or "the model"
        known = kind in _PARTS or is_own_class(module) or saving and isinstance(module, _PARTS)
        known = known or adapters and kind in kinds
        if not known or not (name or isinstance(module, GPT)):
            return f"{where} is a {kind.__module__}.{kind.__qualname__}"
        if not saving and has_hooks(module):
            return f"{where} has a hook or a forward of its own"
        option = foreign_option(module)
        if option is not None:
            return f"{where} has {option}"
    config: Any = model.config
    shapes, found = parameter_shapes(config), dict(model.named_parameters(remove_duplicate=False))
    if adapters:
        found = {name: p for name, p in found.items() if not is_adapter_name(name)}
    for name in shapes | found:
        if name not in found or name not in shapes:
            return f"it {'has' if name in found else 'lacks'} the parameter {name}"
        if shapes[name] != found[name].shape:
            return f"its {name} is {tuple(found[name].shape)} instead of {shapes[name]}"
        if not is_plain(found[name]):
            return f"its {name} is a {type(found[name]).__name__}"
    buffers = [name for name, _ in model.named_buffers()]
    if adapters:
        buffers = [name for name in buffers if not name.endswith(".weight_scale")]
    return next((f"it has the buffer {name}" for name in buffers), None)


def check_saveable(model: GPT) -> None:
    """Raise ValueError if a file with the weights of a GPT would not be this model."""
    part = foreign_part(model, saving=True, adapters=True)
    if part is not None:
        raise ValueError(
            f"a saved model holds the weights of a GPT alone, but {part}; merge it "
            "(peft: merge_and_unload) or put back the module that was there"
        )


def empty_model(config: GPTConfig, kind: type[GPT] = GPT) -> Any:
    """Return a model without values, on the meta device. Draws nothing."""
    with torch.device("meta"), _WithoutInitialisation():
        return kind(config)


class _WithoutInitialisation(TorchFunctionMode):
    """Make normal_ do nothing: on the meta device it would only import 150 MB of Python."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_ or func is Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
