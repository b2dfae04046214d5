"""A GPT as it runs on a GPU to generate: its weights once more, and the layers over a static cache.

B rows, T tokens, C channels, H heads, D head dimension, V vocabulary, S block_size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.kernels.reference.decode_linear import quantize
from gptfast.model import GPT

# Of activations, keys and values; int8 is of the weights alone.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """A linear layer behind its norm, if it has one; int8 has a scale an output."""

    weight: Tensor  # (O, C)
    scale: Tensor | None
    bias: Tensor | None
    norm: tuple[Tensor, Tensor, float] | None

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, *, gelu: bool = False, wide: bool = False
    ) -> Tensor:
        """x (..., C) -> (..., O)."""
        rest = {"scale": self.scale, "norm": self.norm, "residual": residual}
        return ops.decode_linear(x, self.weight, self.bias, gelu=gelu, wide=wide, **rest)

    @property
    def n_bytes(self) -> int:
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
    """The weights of a GPT, copied: they do not change with the model's.

    dtype: "fp32", "bf16", or "int8", which keeps the matrices and the head in int8 and the rest in
    bf16; activations: another dtype for that rest. Where the head is tied to the embedding, int8
    has a copy of its own: a step reads all of it, of the embedding only a row a token.
    """

    def __init__(
        self, model: GPT, dtype: str = "fp32", activations: torch.dtype | None = None
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.config: GPTConfig = model.config
        self.tokenizer = model.tokenizer_name
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
            for block in model.h
        ]
        # A tied head that is not rounded is the embedding, not another copy.
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
        return Layer(*self._matrix(linear.weight), bias, norm and self._norm(norm))

    @property
    def device(self) -> torch.device:
        return self.wte.device

    @property
    def weight_bytes(self) -> int:
        """Bytes that a step reads: all but the rows of the two embeddings."""
        layers = [layer for block in self.blocks for layer in vars(block).values()]
        return sum(layer.n_bytes for layer in (*layers, self.head))

    def new_cache(self, n_rows: int) -> Tensor:
        """Keys and values (n_layer, 2, n_rows, H, S + 1, D). What nobody wants goes to place S."""
        config = self.config
        D = config.n_embd // config.n_head
        # Zeros, not what is left in memory: the reference multiplies what it masks by 0.
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
        """ids and time, their positions, (B, T) int64 -> the stream (B, T, C) that the head reads.

        cache: the B rows of it, whose keys and values go to place (B, T) and are then read up to
        kv_len (B,), none behind the first `size`.
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
