"""Text to token ids and back."""

from gptfast.tokenizer.bpe import Tokenizer
from gptfast.tokenizer.train import train_tokenizer
from gptfast.tokenizer.vocabulary import get_tokenizer

__all__ = ["Tokenizer", "get_tokenizer", "train_tokenizer"]
