"""Whether the values of a tensor can be read."""

from torch import Tensor

from gptfast.torch_private import (
    get_unwrapped,
    is_batchedtensor,
    is_wrapped_tensor,
    len_dispatch_stack,
)


def is_readable(x: Tensor) -> bool:
    """Return whether Python can look at x's values without waiting for a device.

    Not on a GPU, where it would synchronise; not under torch.func.vmap, where x holds one of
    several tensors; not while a graph is traced, where x may have no values at all.
    """
    while is_wrapped_tensor(x):
        if is_batchedtensor(x):
            return False
        x = get_unwrapped(x)
    traced = type(x) is not Tensor or len_dispatch_stack() > 0
    return x.device.type == "cpu" and not traced
