"""Models, texts and runs small enough for a test."""

import importlib.util
import subprocess
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from seeds import shifted, torch_generator
from torch import Tensor

from gptfast import GPT, GPTConfig, TrainConfig, Trainer, create_dataloader, get_tokenizer
from gptfast.data.tokens import as_tokens, split_tokens
from gptfast.weights import convert


def tiny_config(**changes: Any) -> GPTConfig:
    sizes = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 24}
    return GPTConfig(**{**sizes, **changes})


def random_model(seed: int = 0, std: float = 0.2, **changes: Any) -> GPT:
    """Return a tiny model with random parameters: no bias or norm has its neutral value."""
    model = GPT(tiny_config(**changes))
    generator = torch_generator(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std, generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, mean=1.0, std=std, generator=generator)
    return model


def hide_library(patch: pytest.MonkeyPatch, name: str, spec: ModuleSpec | None = None) -> None:
    """Let a library be missing; spec: what Python finds in its place."""
    find_spec = importlib.util.find_spec

    def found(asked: str, *args: Any) -> ModuleSpec | None:
        return spec if asked == name else find_spec(asked, *args)

    patch.setattr(importlib.util, "find_spec", found)


def scripted_model(text: str) -> GPT:
    """Return a model of bytes whose weights are set by hand so that it writes `text`, then ends.

    Its logits depend on the position alone: at position p, byte p + 1 has by far the largest logit,
    whatever the input. So a prompt must be the beginning of the text.
    """
    ids = [*get_tokenizer("byte").encode(text), get_tokenizer("byte").eot]
    T = len(ids) - 1
    config = GPTConfig(257, block_size=T, n_layer=1, n_head=1, n_embd=T, tie_weights=False)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                p.zero_()
        model.wpe.weight.copy_(torch.eye(T))
        for position, i in enumerate(ids[1:]):
            model.lm_head.weight[i, position] = 10.0
    return model


def random_ids(*shape: int, vocab_size: int = 61, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch_generator(seed))


def english() -> str:
    """Return half a megabyte of English fast; `embedded_text` takes seconds to collect its text."""
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def make_trainer(
    out: Path,
    *,
    dropout: float = 0.1,
    init_seed: int = 0,
    n_tokens: int = 500,
    model: GPT | None = None,
    on_row: Callable[[dict[str, Any]], Any] | None = None,
    **train: Any,
) -> Trainer:
    """Return a trainer on bytes of English; an epoch is 7 batches of 4 windows of 16 tokens."""
    tokenizer = get_tokenizer("byte")
    tokens = as_tokens(english()[:n_tokens], tokenizer)
    config = TrainConfig(
        **{
            "out": str(out),
            "device": "cpu",
            "log_interval": 1,
            "eval_interval": 3,
            "sample_tokens": 8,
            **train,
        }
    )
    parts = split_tokens(tokens)
    loaders = [
        create_dataloader(parts[0], 4, 16, 16, seed=config.seed),
        create_dataloader(parts[1], 4, 16, 16, shuffle=False, drop_last=False),
    ]
    torch.manual_seed(shifted(init_seed))
    model = model or GPT(tiny_config(vocab_size=tokenizer.n_vocab, dropout=dropout))
    return Trainer(model, config, *loaders, tokenizer=tokenizer, on_row=on_row)


def without_speed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without the columns that differ from run to run."""
    machine = ("tokens_per_second", "mfu", "memory_mb")
    return [{k: v for k, v in row.items() if k not in machine} for row in history]


def parameters(model: GPT) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Return the names whose tensors are not equal bit for bit in the two sets."""
    return [name for name in {*a, *b} if name not in a or not torch.equal(a[name], b[name])]


def disk_of(size: str, path: Path) -> Iterator[Path]:
    """Mount a file system of that size at `path` for a fixture; skip where that is not allowed."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def save(model: GPT, path: Path | str, form: str | None = None) -> None:
    """Write a model with its tokenizer in one of the forms of `gptfast convert`."""
    convert.save(model.config, model.state_dict(), path, form, tokenizer=model.tokenizer_name)
