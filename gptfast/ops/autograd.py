"""Derivatives of the operators: first ones by the kernels, all others by the reference.

A kernel computes the gradient of one backward pass. PyTorch asks for more in three ways: with
create_graph=True it differentiates the backward; torch.func (grad, vmap, jvp, hessian) runs the
operators under its transforms; forward mode carries tangents. In all three the reference runs
instead, plain PyTorch that autograd differentiates as often and in whichever mode it is asked to.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.backend import IMPLEMENTATIONS
from gptfast.ops.library import LIBRARY
from gptfast.torch_private import (
    DispatchKeySet,
    OpOverload,
    any_requires_grad,
    autograd_kernel,
    below_autograd,
    is_legacy_batchedtensor,
    is_transformed,
)


def needs_reference() -> bool:
    """Return whether a backward must be made of operations that PyTorch can differentiate."""
    return torch.is_grad_enabled() or is_transformed()


def is_batch(gradient: Tensor | None) -> bool:
    """Return whether a gradient is a batch of them, as is_grads_batched=True hands it on.

    Such a batch has no memory of its own. An operator that returns new tensors is then called once
    for each gradient in it; one that writes to its arguments is an error.
    """
    return gradient is not None and is_legacy_batchedtensor(gradient)


def register_autograd(op: OpOverload, backward: Callable, setup: Callable) -> None:
    """Register an operator's backward; setup(ctx, inputs, output) saves what it needs.

    The backward must be differentiable where `needs_reference` says so; `gradients` helps.
    """
    # What torch.library.register_autograd registers; it has no rules for torch.func and tangents.
    kernel = autograd_kernel(op, backward, setup)
    reference = IMPLEMENTATIONS["reference"][op]

    def autograd(keyset: DispatchKeySet, *args: object) -> object:
        return reference(*args) if is_transformed() else kernel(keyset, *args)

    _implement(op, autograd)


def register_reference_autograd(op: OpOverload) -> None:
    """Let the reference serve every call of an operator that is to be differentiated.

    For operators without a backward kernel.
    """
    reference = IMPLEMENTATIONS["reference"][op]

    def autograd(keyset: DispatchKeySet, *args: object) -> object:
        differentiable = torch.is_grad_enabled() and any_requires_grad(*args)
        if differentiable or is_transformed():
            return reference(*args)
        return below_autograd(op, keyset, args)

    _implement(op, autograd)


def register_no_derivative(op: OpOverload) -> None:
    """Make an operator raise RuntimeError for arguments that require a gradient.

    For a backward that torch.compile takes into its graph, where PyTorch disables gradients and
    would drop those of the incoming gradient.
    """

    def autograd(keyset: DispatchKeySet, *args: object) -> object:
        if any_requires_grad(*args):
            raise RuntimeError(
                f"{op.name()} has no derivative inside torch.compile; call the function "
                "uncompiled for derivatives of derivatives"
            )
        return below_autograd(op, keyset, args)

    _set_autograd(op, autograd)


def _set_autograd(op: OpOverload, autograd: Callable) -> None:
    """Register what an operator does where autograd comes to it."""
    LIBRARY.impl(op.name().removeprefix("gptfast::"), autograd, "Autograd", with_keyset=True)


def _implement(op: OpOverload, autograd: Callable) -> None:
    """Register an operator's implementation for autograd, and its rule for vmap."""

    def vmapped(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple:
        """Call the operator once for each sample; PyTorch would too, with a warning."""
        samples = []
        for i in range(info.batch_size):
            sample = (
                x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)
            )
            samples.append(op(*sample))
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
        return outputs, (0,) * len(outputs)

    _set_autograd(op, autograd)
    torch.library.register_vmap(op, vmapped, lib=LIBRARY)


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dout: Tensor
) -> list[Tensor | None]:
    """Return the gradient of function(*inputs) with respect to each input, for dout.

    function: made of PyTorch's own operations. Inputs that are None or need no gradient get None.
    The result can be differentiated again, with respect to dout too.
    """
    with_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: where one input is computed from another, no gradient must flow between them here.
        views = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        out = function(*views)
    needed = [x for x in views if x is not None and x.requires_grad]
    found = torch.autograd.grad(out, needed, dout, create_graph=with_graph, allow_unused=True)
    remaining = iter(found)
    return [next(remaining) if x is not None and x.requires_grad else None for x in views]
