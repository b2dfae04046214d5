"""Text and token files to batches."""

from gptfast.data.loader import create_dataloader
from gptfast.data.tokens import as_tokens, embedded_text, split_tokens

__all__ = ["as_tokens", "create_dataloader", "embedded_text", "split_tokens"]
