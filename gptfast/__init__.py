"""GPT-2 training and generation in PyTorch with hand-written C++ and Triton kernels."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from gptfast.startup import ENDING, answer, catch_ctrl_c, is_command, told_on_one_line

__version__ = "0.1.0"

_IS_COMMAND = is_command(sys.orig_argv, sys.argv)

# Only in the command's own process, and before the imports that take seconds.
if _IS_COMMAND:
    catch_ctrl_c()
    ENDING.register()
    answer(sys.argv[1:], __version__)

with told_on_one_line(_IS_COMMAND):
    # Imported at once, so that the operators are in torch.ops after `import gptfast`.
    from gptfast import ops

    # Imported at once, because a later import of the submodule would replace the function.
    from gptfast.generate import generate

if TYPE_CHECKING:
    from gptfast.config import GPTConfig, TrainConfig
    from gptfast.data.loader import create_dataloader
    from gptfast.drop_in import accelerate, restore  # noqa: F401 - they import transformers
    from gptfast.engine import Engine
    from gptfast.model import GPT
    from gptfast.ops.backend import empty_cache, use_backend
    from gptfast.optim import AdamW
    from gptfast.tokenizer.vocabulary import get_tokenizer
    from gptfast.training.trainer import Trainer
    from gptfast.weights.lazy_tensor import CheckpointError

__all__ = [
    "GPT",
    "AdamW",
    "CheckpointError",
    "Engine",
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

# The module of each name, imported on first use: generating text does not import training.
_HOMES = {
    "GPT": "model",
    "AdamW": "optim",
    "CheckpointError": "weights.lazy_tensor",
    "Engine": "engine",
    "GPTConfig": "config",
    "TrainConfig": "config",
    "Trainer": "training.trainer",
    "accelerate": "drop_in",
    "create_dataloader": "data.loader",
    "empty_cache": "ops.backend",
    "get_tokenizer": "tokenizer.vocabulary",
    "restore": "drop_in",
    "use_backend": "ops.backend",
}

# Modules that the pages name, so that `gptfast.lora.add_adapters` needs no import of its own.
_MODULES = ("data", "engine", "evaluate", "lora", "model", "search", "tokenizer", "training")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"gptfast.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gptfast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
