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
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from gptfast.ops.backend import IMPLEMENTATIONS
from gptfast.ops.library import LIBRARY


def is_transformed() -> bool:
    """Return whether this code runs under a transform of torch.func or in forward mode."""
    # torch.compile does not follow the first question, so it leaves this function as it is.
    level = torch._C._functorch.maybe_current_level()
    return level is not None or forward_ad._current_level >= 0


def needs_reference() -> bool:
    """Return whether a backward must be made of operations that PyTorch can differentiate."""
    return torch.is_grad_enabled() or is_transformed()


def is_batch(gradient: Tensor | None) -> bool:
    """Return whether a gradient is a batch of them, as is_grads_batched=True hands it on.

    Such a batch has no memory of its own. An operator that returns new tensors is then called once
    for each gradient in it; one that writes to its arguments is an error.
    """
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def register_autograd(op: torch._ops.OpOverload, backward: Callable, setup: Callable) -> None:
    """Register an operator's backward; setup(ctx, inputs, output) saves what it needs.

    The backward must be differentiable where `needs_reference` says so; `gradients` helps.
    """
    # What torch.library.register_autograd registers; it has no rules for torch.func and tangents.
    kernel = make_autograd_impl(op, Info(backward, setup))
    reference = IMPLEMENTATIONS["reference"][op]

    def autograd(keyset: torch._C.DispatchKeySet, *args: object) -> object:
        return reference(*args) if is_transformed() else kernel(keyset, *args)

    _implement(op, autograd)


def register_reference_autograd(op: torch._ops.OpOverload) -> None:
    """Let the reference serve every call of an operator that is to be differentiated.

    For operators without a backward kernel.
    """
    reference = IMPLEMENTATIONS["reference"][op]

    def autograd(keyset: torch._C.DispatchKeySet, *args: object) -> object:
        differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if differentiable or is_transformed():
            return reference(*args)
        return _below_autograd(op, keyset, args)

    _implement(op, autograd)


def register_no_derivative(op: torch._ops.OpOverload) -> None:
    """Make an operator raise RuntimeError for arguments that require a gradient.

    For a backward that torch.compile takes into its graph, where PyTorch disables gradients and
    would drop those of the incoming gradient.
    """

    def autograd(keyset: torch._C.DispatchKeySet, *args: object) -> object:
        if torch._C._any_requires_grad(*args):
            raise RuntimeError(
                f"{op._schema.name} has no derivative inside torch.compile; call the function "
                "uncompiled for derivatives of derivatives"
            )
        return _below_autograd(op, keyset, args)

    _set_autograd(op, autograd)


def _below_autograd(
    op: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet, args: tuple
) -> object:
    """Call an operator's kernel without a place in autograd's graph."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _set_autograd(op: torch._ops.OpOverload, autograd: Callable) -> None:
    """Register what an operator does where autograd comes to it."""
    LIBRARY.impl(op._schema.name.removeprefix("gptfast::"), autograd, "Autograd", with_keyset=True)


def _implement(op: torch._ops.OpOverload, autograd: Callable) -> None:
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
