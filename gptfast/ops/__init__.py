"""The operations: attention, cross entropy, embedding, AdamW, sampling. One file, one word each."""

from gptfast.ops.attention import attention, attention_qkv
from gptfast.ops.cross_entropy import cross_entropy, linear_cross_entropy
from gptfast.ops.embedding import embedding
from gptfast.ops.sampling import sample

__all__ = [
    "attention",
    "attention_qkv",
    "cross_entropy",
    "embedding",
    "linear_cross_entropy",
    "sample",
]
