"""The operations, one file and one word each; AdamW's public face is `gptfast.AdamW`."""

from gptfast.ops import adamw, attention_rows, dropout_mask, engine  # noqa: F401 - their operators
from gptfast.ops.attention import attention, attention_qkv
from gptfast.ops.cross_entropy import cross_entropy, linear_cross_entropy
from gptfast.ops.decode_linear import decode_linear
from gptfast.ops.embedding import embedding
from gptfast.ops.flops import register_formulas
from gptfast.ops.linear import linear
from gptfast.ops.mlp import mlp
from gptfast.ops.sampling import sample

register_formulas()

__all__ = [
    "attention",
    "attention_qkv",
    "cross_entropy",
    "decode_linear",
    "embedding",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "sample",
]
