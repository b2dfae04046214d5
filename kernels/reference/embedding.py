"""The token embedding and the gradient of its weight, in plain PyTorch.

    x_n = weight[idx_n]
    dweight_v += sum over n with idx_n = v of dx_n
The sum is computed in fp32 and in a fixed order, then added to dweight: a row is rounded once, and
two runs give the same bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.kernels.reference.readable import is_readable


def check_ids(idx: Tensor, V: int) -> None:
    """Raise IndexError for an id outside [0, V), where ids can be read."""
    if not is_readable(idx) or not idx.numel():
        return
    low, high = idx.min().item(), idx.max().item()
    if low < 0 or high >= V:
        raise IndexError(f"token ids must lie in [0, {V}), got {low} to {high}")


def embedding_fwd(weight: Tensor, idx: Tensor) -> Tensor:
    """Return x (..., C) for weight (V, C) and idx (...), int64."""
    V = weight.shape[0]
    check_ids(idx, V)
    in_range = (idx >= 0) & (idx < V)
    x = F.embedding(idx.where(in_range, 0), weight)
    # An id may be out of range where it could not be read, on a GPU for example: a row of NaN.
    return x.masked_fill(~in_range[..., None], torch.nan)


def embedding_bwd(dweight: Tensor, dx: Tensor, idx: Tensor) -> None:
    """Add the rows of dx (..., C) to the rows of dweight (V, C) that idx (...) names, in place."""
    V = dweight.shape[0]
    check_ids(idx, V)
    dtype = torch.promote_types(dweight.dtype, torch.float32)
    in_range = (idx >= 0) & (idx < V)
    # The gradient of F.embedding; ids that equal padding_idx are left out.
    rows = torch.ops.aten.embedding_dense_backward(
        dx.to(dtype), idx.where(in_range, -1), V, padding_idx=-1, scale_grad_by_freq=False
    )
    dweight.copy_(dweight.to(dtype) + rows)
