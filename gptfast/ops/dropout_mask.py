"""The mask of a dropout of some rows of a batch, as an operator for compiled code.

Compiled code would draw other numbers, in an order of its own, so torch.compile calls the operator
as it is. It takes the input of the dropout, which depends on the masks before it, so that the order
stays that of an uncompiled model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops.library import define_opaque


def mask(x: Tensor, p: float, first: int, total: int) -> Tensor:
    """Return the mask of x (B, ...), 0 or 1/(1-p): rows from `first` on of that of `total` rows."""
    ones = x.new_ones((total, *x.shape[1:]))
    return F.dropout(ones, p).narrow(0, first, x.shape[0])


define_opaque(
    "dropout_mask(Tensor x, float p, SymInt first, SymInt total) -> Tensor mask",
    lambda *args: mask(*args).contiguous(),
    lambda x, *_: x.new_empty(x.shape),
    tags=(torch.Tag.nondeterministic_seeded,),
)
