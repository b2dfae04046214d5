"""Loss and perplexity of a model on batches."""

import copy
import math
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gptfast.model import GPT
from gptfast.sequences import evaluating


def batch_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Mean loss over the targets y (B, T) that count, nats per token; moves x, y to the model."""
    device = model.wte.weight.device
    return model(x.to(device), y.to(device))


@torch.no_grad()
def loader_loss(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor]], max_batches: int | None = None
) -> float:
    """Mean loss per token over batches (the first max_batches if given), without dropout.

    Every token counts the same, whatever the size of its batch. Raises ValueError for no tokens.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for x, y in islice(batches, max_batches):
            n = int((y != -100).sum())
            if n:
                total += batch_loss(model, x, y).item() * n
            count += n
    if not count:
        raise ValueError("no tokens to evaluate: the loader is empty or every target is ignored")
    return total / count


def perplexity(loss: float) -> float:
    """exp(loss), loss in nats per token."""
    return math.inf if loss > 700 else math.exp(loss)


def from_start(loader: DataLoader) -> DataLoader:
    """The loader of `create_dataloader` from its first batch on; the one given keeps its place."""
    order = copy.copy(loader.batch_sampler)
    order.set_position(0)
    return DataLoader(
        loader.dataset,
        batch_sampler=order,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),
    )
