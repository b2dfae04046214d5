"""A mend of Triton's interpreter, which runs kernels on the CPU; compiled kernels need none."""

import functools
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def mend() -> None:
    """Make the interpreter keep a comparison of scalars a truth value when it becomes a block.

    It fills the block with int32, and the interpreter of Triton 3.9 takes no such block as a mask.
    """
    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self: Any, block: Any, scalar: Any) -> Any:
        if scalar.data.dtype == bool:
            scalar = interpreter.TensorHandle(scalar.data, tl.int1)
        return splat(self, block, scalar)

    interpreter.InterpreterBuilder.create_splat = create_splat
