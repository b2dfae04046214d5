"""Dropout of some rows of a batch, with the masks that these rows have in the whole batch.

Several processes may share a batch, each with some of its rows. The mask of a row depends on its
place in the whole batch, so that the result does not depend on how many share it: a process draws
the mask of all rows, as one process does, and takes that of its own. It also draws what others draw
for the batches that it does not compute, so that the random state is the same on all processes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.ops.dropout_mask import mask


class Rows(NamedTuple):
    """Which rows of a batch are computed: those from `first` on, of `total`."""

    first: int
    total: int


def drop(module: nn.Module, x: Tensor, rows: Rows | None) -> Tensor:
    """Return module(x), where the module is a dropout and x (B, ...) has these rows of a batch."""
    if rows is None or type(module) is not nn.Dropout or not module.training or module.p == 0:
        return module(x)
    if torch.compiler.is_compiling():
        return x * torch.ops.gptfast.dropout_mask(x.detach(), module.p, *rows)
    return x * mask(x, module.p, *rows)


def draw(shape: tuple[int, ...], p: float, device: torch.device) -> None:
    """Draw what a dropout of a tensor of that shape draws."""
    F.dropout(torch.ones(shape, dtype=torch.float32, device=device), p)


def draw_seed(device: torch.device) -> Tensor:
    """Return the seed of attention's dropout in one forward pass, 0-d int64."""
    return torch.randint(2**62, (), device=device)
