"""The loads that Triton's interpreter makes from a tensor's memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

# A load of one granule reads at most this many bytes before or after what it is for. No allocation
# lies that close to another.
NEAR = 16


@contextmanager
def recorded_loads(tensor: Tensor) -> Iterator[list[np.ndarray]]:
    """Collect, for each load in the `with` from or near the memory of tensor, the bytes' offsets.

    An offset counts from the memory's start to the first byte of an element.
    """
    storage = tensor.untyped_storage()
    begin, length = storage.data_ptr(), storage.nbytes()
    loads: list[np.ndarray] = []
    real = interpreter._interpreter

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def load(self, ptrs: np.ndarray, mask: np.ndarray, *rest: Any) -> np.ndarray:
            at = ptrs[mask].astype(np.int64) - begin
            loads.append(at[(at >= -NEAR) & (at < length + NEAR)])
            return real.load(ptrs, mask, *rest)

    with mock.patch.object(interpreter, "_interpreter", Recorder()):
        yield loads
