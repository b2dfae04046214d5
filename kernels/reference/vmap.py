"""Whether torch.func.vmap stands between a tensor and its values."""

import torch
from torch import Tensor


def is_batched(x: Tensor) -> bool:
    """Return whether x holds one of several tensors of a vmap, whose values cannot be read."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False
