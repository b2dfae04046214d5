"""The layers of GPT-2: pre-norm attention and perceptron, each with its residual.

B batch, T time, C channels (n_embd), H heads, D head dimension.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.dropout import Rows, drop
from gptfast.kv_cache import KVCache
from gptfast.modules import attention_weights, mlp_weights
from gptfast.ops.attention_rows import attention_qkv_rows


class Attention(nn.Module):
    """Causal self-attention with the layer norm before it and the residual after it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        norm: nn.LayerNorm,
        seed: Tensor | int,
        cache: KVCache | None,
        layer: int,
        rows: Rows | None = None,
    ) -> Tensor:
        """Return x (B, T, C) plus the output of attention."""
        weights = attention_weights(norm, self._modules)
        if weights is None:
            out = self._attend(self.c_attn(norm(x)), seed, cache, layer, rows)  # (B, T, C)
            return x + drop(self.drop, self.c_proj(out), rows)
        first, c_attn, c_proj = weights
        qkv = c_attn(x, norm=first, rows=rows)  # (B, T, 3C)
        out = self._attend(qkv, seed, cache, layer, rows)
        if self._dropout_p() > 0:
            return x + drop(self.drop, c_proj(out, rows=rows), rows)
        return c_proj(out, residual=x, rows=rows)

    def _dropout_p(self) -> float:
        """Return the probability that `drop` applies now; 0 if something else took its place."""
        dropout: Any = self._modules["drop"]
        return getattr(dropout, "p", 0.0) if dropout.training else 0.0

    def _attend(
        self,
        qkv: Tensor,
        seed: Tensor | int,
        cache: KVCache | None,
        layer: int,
        rows: Rows | None,
    ) -> Tensor:
        if rows is not None and cache is None:
            p = self._dropout_p()
            return attention_qkv_rows(qkv, self.n_head, rows.first, dropout_p=p, seed=seed)
        if cache is None:
            return ops.attention_qkv(qkv, self.n_head, dropout_p=self._dropout_p(), seed=seed)
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

    def forward(self, x: Tensor, norm: nn.LayerNorm, rows: Rows | None = None) -> Tensor:
        """Return x (B, T, C) plus the output of the perceptron."""
        weights = mlp_weights(norm, self._modules)
        if weights is None:
            hidden = F.gelu(self.c_fc(norm(x)), approximate="tanh")  # (B, T, 4C)
            return x + drop(self.drop, self.c_proj(hidden), rows)
        first, c_fc, c_proj = weights
        dropout: Any = self._modules["drop"]
        drops = dropout.training and dropout.p > 0
        if not (c_fc.is_plain and c_proj.is_plain):
            hidden = F.gelu(c_fc(x, norm=first, rows=rows), approximate="tanh")
            y = c_proj(hidden, residual=None if drops else x, rows=rows)
            return x + drop(dropout, y, rows) if drops else y
        layers: Any = (*c_fc[:2], *c_proj[:2])
        if drops:
            return x + drop(dropout, ops.mlp(x, *layers, norm=first), rows)
        return ops.mlp(x, *layers, norm=first, residual=True)


class Block(nn.Module):
    """One layer of GPT-2: attention, then the perceptron."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        seed: Tensor | int,
        cache: KVCache | None,
        layer: int,
        rows: Rows | None = None,
    ) -> Tensor:
        """Return x (B, T, C) after this layer.

        seed: of attention's dropout. cache: the keys and values of earlier tokens, to which those
        of layer number `layer` are appended; None in training. rows: which of a batch x has, for
        dropout; None for all.
        """
        if rows is None:  # as before there were rows, for modules of others in these places
            return self.mlp(self.attn(x, self.ln_1, seed, cache, layer), self.ln_2)
        x = self.attn(x, self.ln_1, seed, cache, layer, rows)
        return self.mlp(x, self.ln_2, rows)
