"""GPT-2 (Radford et al., 2019): embeddings, pre-norm blocks, a head tied to the embedding.

B batch, T time, C channels (n_embd), H heads, D head dimension, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.tokenizer.bpe import Tokenizer


@dataclass
class KVCache:
    """Keys and values of past tokens, in preallocated tensors (B, H, size, D) per layer."""

    k: list[Tensor]
    v: list[Tensor]
    length: Tensor  # (B,) int64, tokens in each row
    longest: int  # the largest length, on the host so that no step waits for the device
    ragged: bool  # whether the lengths differ; if not, one slice serves all rows

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, T, D) to a layer's; return all its keys and values so far."""
        end = self.longest + k.shape[2]
        if self.ragged:
            time = self.length[:, None] + torch.arange(k.shape[2], device=k.device)  # (B, T)
            row = torch.arange(k.shape[0], device=k.device)[:, None]
            self.k[layer][row, :, time] = k.transpose(1, 2)
            self.v[layer][row, :, time] = v.transpose(1, 2)
        else:
            self.k[layer][:, :, self.longest : end] = k
            self.v[layer][:, :, self.longest : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


def _norm_parameters(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


class Attention(nn.Module):
    """Causal self-attention with the layer norm before it and the residual after it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, seed: Tensor | int, cache: KVCache | None, layer: int
    ) -> Tensor:
        """Return x (B, T, C) plus the output of attention."""
        qkv = ops.linear(
            x, self.c_attn.weight, self.c_attn.bias, norm=_norm_parameters(norm)
        )  # (B, T, 3C)
        out = self._attend(qkv, seed, cache, layer)  # (B, T, C)
        if self.training and self.drop.p > 0:
            return x + self.drop(ops.linear(out, self.c_proj.weight, self.c_proj.bias))
        return ops.linear(out, self.c_proj.weight, self.c_proj.bias, residual=x)

    def _attend(self, qkv: Tensor, seed: Tensor | int, cache: KVCache | None, layer: int) -> Tensor:
        if cache is None:
            p = self.drop.p if self.training else 0.0
            return ops.attention_qkv(qkv, self.n_head, dropout_p=p, seed=seed)
        B, T, C = *qkv.shape[:2], qkv.shape[2] // 3
        q, k, v = qkv.view(B, T, 3, self.n_head, C // self.n_head).permute(
            2, 0, 3, 1, 4
        )  # (B, H, T, D)
        kv_len = cache.length + T if cache.ragged else None
        out = ops.attention(q, *cache.append(layer, k, v), kv_len=kv_len)  # (B, H, T, D)
        return out.transpose(1, 2).reshape(B, T, C)


class MLP(nn.Module):
    """Two linear layers with GELU between, the layer norm before them and the residual after."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Return x (B, T, C) plus the output of the perceptron."""
        layers = self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias
        if self.training and self.drop.p > 0:
            return x + self.drop(ops.mlp(x, *layers, norm=_norm_parameters(norm)))
        return ops.mlp(x, *layers, norm=_norm_parameters(norm), residual=True)


class Block(nn.Module):
    """One layer of GPT-2: attention, then the perceptron."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, seed: Tensor | int, cache: KVCache | None, layer: int) -> Tensor:
        """Return x (B, T, C) after this layer.

        seed: of attention's dropout. cache: the keys and values of earlier tokens, to which those
        of layer number `layer` are appended; None in training.
        """
        x = self.attn(x, self.ln_1, seed, cache, layer)
        return self.mlp(x, self.ln_2)


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
        # The tokenizer in the files that the model was loaded from, for save_pretrained.
        self.tokenizer_name: str | None = None
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
        return self.wte.weight if self.config.tie_weights else self.lm_head.weight

    def new_cache(self, B: int, size: int) -> KVCache:
        """Return an empty cache for B rows of up to `size` tokens, in the model's dtype."""
        config, like = self.config, self.wte.weight
        shape = (B, config.n_head, size, config.n_embd // config.n_head)
        k, v = ([like.new_zeros(shape) for _ in range(config.n_layer)] for _ in "kv")
        return KVCache(k, v, torch.zeros(B, dtype=torch.int64, device=like.device), 0, False)

    def _embed(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of wte (B, T, C), and the weight (V, C) for the head.

        A tied weight gets the gradients of both uses in one tensor if the head takes it from here.
        """
        x, head_weight = ops.embedding(idx, self.wte.weight)
        return x, head_weight if self.config.tie_weights else self.lm_head.weight

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
        x = self.drop(x + self.wpe(time))  # (B, T, C)
        for layer, block in enumerate(self.h):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, seed + layer, cache, layer, use_reentrant=False)
            else:
                x = block(x, seed + layer, cache, layer)
        return self.ln_f(x)

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
            seed = torch.randint(2**62, (), device=idx.device) if draws else 0
        x, head_weight = self._embed(idx)
        x = self._stream(x, seed)
        if target is None:
            return F.linear(x, head_weight)  # (B, T, V)
        return ops.linear_cross_entropy(x, head_weight, target, skip_below=self.skip_below)

    @classmethod
    def from_pretrained(cls, path: str | PathLike, *, n_head: int | None = None) -> Self:
        """Return the model at a path or name, in evaluation mode.

        path: a run or a checkpoint of `gptfast train`; OpenAI's directory; a directory or file of
        transformers (safetensors or .bin, in shards or not); nanoGPT's ckpt.pt; llm.c's .bin; the
        .pth of Raschka's book; or the name of a model that `gptfast download` has fetched, such as
        "gpt2". The form is recognised by content.
        n_head: for a file that does not record it, such as the book's; None takes heads of 64
        channels.

        All parameters have the dtype of the file's token embedding. Pickles are read for tensors
        only; nothing in them is executed. Raises CheckpointError, a ValueError, for anything else
        and for what is damaged or incomplete.
        """
        # Here, because an engine that loads packed weights needs none of the readers.
        from gptfast.weights.open import open_weights

        weights = open_weights(path, n_head)
        with torch.device("meta"), _WithoutInitialisation():
            model = cls(weights.config)
        weights.move_into(model)
        model.tokenizer_name = weights.tokenizer
        return model.eval()

    def save_pretrained(
        self, directory: str | PathLike, *, tokenizer: Tokenizer | None = None
    ) -> None:
        """Write a directory that transformers' GPT2LMHeadModel and its tokenizer load.

        It gets config.json, model.safetensors and, for a byte-pair encoding, vocab.json, merges.txt
        and tokenizer_config.json. tokenizer: None takes the one in the files that the model was
        loaded from, if any. Raises OSError.
        """
        from gptfast.weights.pretrained import save_model

        tokenizer_or_name = tokenizer or self.tokenizer_name
        save_model(self.config, self.state_dict(), directory, tokenizer_or_name)


class _WithoutInitialisation(TorchFunctionMode):
    """Make normal_ do nothing: on the meta device it would only import 150 MB of Python."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_ or func is Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
