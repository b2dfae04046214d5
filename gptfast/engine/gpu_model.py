"""A GPT for generation on a GPU: a copy of its weights, and its layers over a static KV cache.

B rows, T tokens, C channels, H heads, D head dimension, V vocabulary, S block_size.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.kernels.reference.decode_linear import quantize
from gptfast.model import GPT

# The dtype of activations, keys and values; only weights are in int8.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """A linear layer after its norm, if it has one; int8 has a scale for each output."""

    weight: Tensor  # (O, C)
    scale: Tensor | None
    bias: Tensor | None
    norm: tuple[Tensor, Tensor, float] | None

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        gelu: bool = False,
        fp32_out: bool = False,
    ) -> Tensor:
        """Return `ops.decode_linear` of x (..., C) with these weights: (..., O)."""
        return ops.decode_linear(
            x,
            self.weight,
            self.bias,
            scale=self.scale,
            norm=self.norm,
            residual=residual,
            gelu=gelu,
            fp32_out=fp32_out,
        )

    @property
    def n_bytes(self) -> int:
        """The size of the layer's tensors."""
        parts = (self.weight, self.scale, self.bias, *(self.norm or ())[:2])
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class Block:
    """The four matrices of a block of GPT-2."""

    qkv: Layer
    proj: Layer
    fc: Layer
    mlp_proj: Layer


class GpuModel:
    """A copy of a GPT's weights, which does not change with the model.

    dtype: "fp32", "bf16", or "int8", which keeps the matrices and the head in int8 and the rest in
    bf16; activations: another dtype for that rest. With int8, a head tied to the embedding is a
    separate copy: a step reads all of the head but only one row per token of the embedding.
    Raises ValueError for another dtype.
    """

    def __init__(
        self, model: GPT, dtype: str = "fp32", activations: torch.dtype | None = None
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.config: GPTConfig = model.config
        self.tokenizer, self.vocabulary = model.tokenizer_name, model.vocabulary
        self.eos_ids = model.eos_ids
        self.dtype = dtype
        self.activations = activations or DTYPES[dtype]
        self.wte, self.wpe = self._copy(model.wte.weight), self._copy(model.wpe.weight)
        self.blocks = [
            Block(
                self._layer(block.attn.c_attn, block.ln_1),
                self._layer(block.attn.c_proj),
                self._layer(block.mlp.c_fc, block.ln_2),
                self._layer(block.mlp.c_proj),
            )
            for block in cast(Iterable[Any], model.h)
        ]
        # A tied head that is not rounded shares the embedding's memory.
        shared = dtype != "int8" and model.config.tie_weights
        head = (self.wte, None) if shared else self._matrix(model.head_weight)
        self.head = Layer(*head, None, self._norm(model.ln_f))

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.activations, copy=True).contiguous()

    def _norm(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
        return self._copy(norm.weight), self._copy(norm.bias), norm.eps

    def _matrix(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.dtype == "int8":
            return quantize(weight.detach())
        return self._copy(weight), None

    def _layer(self, linear: nn.Linear, norm: nn.LayerNorm | None = None) -> Layer:
        bias = None if linear.bias is None else self._copy(linear.bias)
        return Layer(*self._matrix(linear.weight), bias, None if norm is None else self._norm(norm))

    @property
    def device(self) -> torch.device:
        return self.wte.device

    @property
    def weight_bytes(self) -> int:
        """Bytes that a decode step reads: all weights but the two embeddings."""
        layers = [layer for block in self.blocks for layer in vars(block).values()]
        return sum(layer.n_bytes for layer in (*layers, self.head))

    def new_cache(self, n_rows: int) -> Tensor:
        """Return an empty KV cache (n_layer, 2, n_rows, H, S + 1, D); padding goes to place S."""
        config = self.config
        D = config.n_embd // config.n_head
        # Zeros, because the reference multiplies masked values by 0, and 0 * NaN is NaN.
        shape = (config.n_layer, 2, n_rows, config.n_head, config.block_size + 1, D)
        return self.wte.new_zeros(shape)

    def hidden(
        self,
        ids: Tensor,
        time: Tensor,
        cache: Tensor,
        place: Tensor,
        kv_len: Tensor,
        size: int,
    ) -> Tensor:
        """Return the residual stream (B, T, C) of ids (B, T) at positions time (B, T), int64.

        cache: that of these B rows. Keys and values are written to place (B, T), then read up to
        kv_len (B,), and none after the first `size`.
        """
        B, T = ids.shape
        row = torch.arange(B, device=ids.device)[:, None]
        x = ops.embedding(ids, self.wte)[0] + F.embedding(time, self.wpe)  # (B, T, C)
        for block, past in zip(self.blocks, cache, strict=True):
            qkv = block.qkv(x).view(B, T, 3, self.config.n_head, -1)
            past[:, row, :, place] = qkv[:, :, 1:]  # (B, T, 2, H, D)
            k, v = past[:, :, :, :size]  # (B, H, size, D)
            q = qkv[:, :, 0].transpose(1, 2)  # (B, H, T, D)
            out = ops.attention(q, k, v, kv_len=kv_len)
            x = block.proj(out.transpose(1, 2).reshape(B, T, -1), x)
            x = block.mlp_proj(block.fc(x, gelu=True), x)
        return x
