"""Whether the values of a tensor can be read."""

import torch
from torch import Tensor


def is_readable(x: Tensor) -> bool:
    """Return whether Python can look at x's values without waiting for a device.

    Not on a GPU, where it would synchronise; not under torch.func.vmap, where x holds one of
    several tensors; not while a graph is traced, where x may have no values at all.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return False
        x = functorch.get_unwrapped(x)
    traced = type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0
    return x.device.type == "cpu" and not traced
