"""GPT-2 training and generation in PyTorch, its hot core in hand-written C++ and Triton kernels."""

from typing import Any

from gptfast import ops
from gptfast.config import GPTConfig, TrainConfig
from gptfast.data import create_dataloader
from gptfast.generate import generate
from gptfast.model import GPT
from gptfast.ops.library import empty_cache, use_backend
from gptfast.optim import AdamW
from gptfast.tokenizer import get_tokenizer
from gptfast.trainer import Trainer
from gptfast.weights.stored import CheckpointError

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "AdamW",
    "CheckpointError",
    "GPTConfig",
    "TrainConfig",
    "Trainer",
    "create_dataloader",
    "empty_cache",
    "generate",
    "get_tokenizer",
    "ops",
    "use_backend",
]


_LAZY = ("accelerate", "restore")  # transformers is imported for those who ask for them


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from gptfast import drop_in

        return getattr(drop_in, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
