"""The weights that GPT(config) draws, for a model of which a process has its part only.

GPT(config) makes all weights at once. A process that keeps a half, or a hundredth, of them would
need the memory of all before its first step. So it makes a model without values, on the meta
device, cuts it, and draws one module after the other, of which it keeps its rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gptfast.blocks import Block
from gptfast.config import GPTConfig
from gptfast.dtensor import own_parts
from gptfast.model import GPT, empty_model


def _draw_as_modules_are_made(config: GPTConfig) -> None:
    """Draw what PyTorch's modules draw when GPT(config) makes them, before it draws its own."""
    nn.Embedding(config.vocab_size, config.n_embd)
    nn.Embedding(config.block_size, config.n_embd)
    for _ in range(config.n_layer):
        Block(config)
    if not config.tie_weights:
        nn.Linear(config.n_embd, config.vocab_size, bias=False)


def drawn(config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the values of each parameter of GPT(config), in main memory.

    Draws from torch's generator what GPT(config) draws. The values of one module are held at once.
    """
    _draw_as_modules_are_made(config)
    model = empty_model(config)
    for name, module in model.named_modules():
        if not module._parameters:
            continue
        module.to_empty(device="cpu", recurse=False)
        model.reset_module(name, module)
        for leaf, param in module.named_parameters(recurse=False):
            yield f"{name}.{leaf}", param.detach()
        module.to(device="meta")


@torch.no_grad()
def draw_parts(model: GPT, seed: int) -> None:
    """Give a model the values that GPT draws after torch.manual_seed(seed), or this process's rows.

    Its parameters may be DTensors that are cut into rows.
    """
    torch.manual_seed(seed)
    parts = own_parts(model.state_dict())
    for name, whole in drawn(model.config):
        parts[name].copy_(whole)
