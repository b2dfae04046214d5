"""Dropout of some rows of a batch, with the masks that these rows have in the whole batch.

Several processes may share a batch, each with some of its rows. The mask of a row depends on its
place in the whole batch, so that the result does not depend on how many share it: a process draws
the mask of all rows, as one process does, and takes that of its own. It also draws what others draw
for the batches that it does not compute, so that the random state is the same on all processes.

Compiled code would draw other numbers, in an order of its own. There the mask comes from an
operator that torch.compile calls as it is. It takes the input of the dropout, which depends on the
masks before it, so that the order stays that of an uncompiled model.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.ops.library import LIBRARY


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
    return x * _mask(x, module.p, *rows)


def _mask(x: Tensor, p: float, first: int, total: int) -> Tensor:
    """Return the mask of x (B, ...), 0 or 1/(1-p): rows from `first` on of that of `total` rows."""
    ones = x.new_ones((total, *x.shape[1:]))
    return F.dropout(ones, p).narrow(0, first, x.shape[0])


LIBRARY.define(
    "dropout_mask(Tensor x, float p, SymInt first, SymInt total) -> Tensor mask",
    tags=(torch.Tag.nondeterministic_seeded,),
)
LIBRARY.impl("dropout_mask", lambda *args: _mask(*args).contiguous(), "CompositeExplicitAutograd")
torch.library.register_fake(
    "gptfast::dropout_mask", lambda x, *_: x.new_empty(x.shape), lib=LIBRARY
)


def draw(shape: tuple[int, ...], p: float, device: torch.device) -> None:
    """Draw what a dropout of a tensor of that shape draws."""
    F.dropout(torch.ones(shape, dtype=torch.float32, device=device), p)


def draw_seed(device: torch.device) -> Tensor:
    """Return the seed of attention's dropout in one forward pass, 0-d int64."""
    return torch.randint(2**62, (), device=device)
