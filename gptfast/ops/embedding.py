"""The token embedding of a tied head: schema, fake, autograd, public function."""

import sys

import torch
from torch import Tensor

from gptfast.kernels.reference import embedding as reference
from gptfast.ops.autograd import (
    is_batch,
    is_transformed,
    needs_reference,
    register_no_derivative,
    register_reference_autograd,
)
from gptfast.ops.library import register
from gptfast.torch_private import disable_modes, is_transformed_in_graph, use_counts


def _fwd_fake(weight: Tensor, idx: Tensor) -> Tensor:
    return weight.new_empty((*idx.shape, weight.shape[1]))


def _bwd_fake(dweight: Tensor, dx: Tensor, idx: Tensor) -> None:
    return None


_fwd = register(
    "embedding_fwd(Tensor weight, Tensor idx) -> Tensor x", reference.embedding_fwd, _fwd_fake
)
_bwd = register(
    "embedding_bwd(Tensor(a!) dweight, Tensor dx, Tensor idx) -> ()",
    reference.embedding_bwd,
    _bwd_fake,
)
register_reference_autograd(_fwd)
register_no_derivative(_bwd)


class _Embedding(torch.autograd.Function):
    """(idx, weight) -> (x, weight again): both gradients of weight then meet in one backward."""

    @staticmethod
    def forward(idx, weight):  # type: ignore[no-untyped-def]
        return _fwd(weight, idx), weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        idx, weight = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(idx)
        ctx.V = weight.shape[0]

    @staticmethod
    def backward(ctx, dx, dhead):  # type: ignore[no-untyped-def]
        (idx,) = ctx.saved_tensors
        if dx is None:
            return None, dhead
        if _is_differentiated(dx, dhead):
            in_range = (idx >= 0) & (idx < ctx.V)
            rows = torch.ops.aten.embedding_dense_backward(
                dx, idx.where(in_range, -1), ctx.V, -1, False
            )
            return None, rows if dhead is None else dhead + rows
        if dhead is None:
            dweight = dx.new_zeros(ctx.V, dx.shape[-1])
        elif torch.compiler.is_compiling():
            # The compiler sees whether anything else reads dhead, and leaves the copy out.
            dweight = dhead.clone(memory_format=torch.contiguous_format)
        elif type(dhead) is Tensor and dhead.is_contiguous() and _holders(dhead) == _alone():
            dweight = dhead
        else:
            dweight = dhead.clone(memory_format=torch.contiguous_format)
        _bwd(dweight, dx, idx)
        return None, dweight


def _is_differentiated(*gradients: Tensor | None) -> bool:
    """Return whether a backward must be made of operations that PyTorch can differentiate."""
    if torch.compiler.is_dynamo_compiling():
        return torch.is_grad_enabled()
    return needs_reference() or any(map(is_batch, gradients))


def _holders(tensor: Tensor) -> tuple[int, ...]:
    """Return how many references a tensor and its memory have, in C++ and in Python."""
    storage = tensor.untyped_storage()
    return *use_counts(tensor, storage), sys.getrefcount(tensor), sys.getrefcount(storage)


class _Probe(torch.autograd.Function):
    """Its backward counts the references of its gradient, at the place where `_Embedding` does."""

    holders: tuple[int, ...] = ()

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):  # type: ignore[no-untyped-def]
        _Probe.holders = _holders(dx)
        return dx


def _alone() -> tuple[int, ...]:
    """Return `_holders` of a gradient that no hook, caller or other node will read again.

    Only such a gradient may be written to: autograd itself decides so whether to add in place. The
    counts depend on the versions of Python and PyTorch, and on whether torch.compile was used in
    this process, so they are measured each time, in some 60 us.
    """
    with disable_modes(), torch.enable_grad(), torch.device("cpu"):
        x = torch.ones(2, dtype=torch.float32).requires_grad_()
        _Probe.apply(x).square().sum().backward()
    return _Probe.holders


def _is_traced_or_transformed() -> bool:
    """Return whether `_Embedding` cannot be used: under torch.jit.trace, torch.func or tangents."""
    if torch.compiler.is_dynamo_compiling():
        return is_transformed_in_graph()
    return torch.jit.is_tracing() or is_transformed()


def embedding(idx: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of weight, and the weight for a head tied to it: (weight[idx], weight).

    idx: (...) int64 in [0, V); weight: (V, C) floating. Returns x (..., C) and head_weight (V, C),
    which is weight itself in the same memory. Give head_weight to `linear_cross_entropy` or
    F.linear: the backward then adds the rows of the tokens into the head's gradient instead of
    making a second (V, C) gradient and adding the two. Gradients are deterministic; the rows of
    a token are summed in fp32.

    Raises ValueError for inputs that do not fit and, on the CPU, IndexError for an id out of range;
    on a GPU its row is NaN, and it gets no gradient.
    """
    if weight.dim() != 2 or weight.shape[0] < 1 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be (V, C) floating with V >= 1, got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    if idx.dtype != torch.int64:
        raise ValueError(f"idx must be int64, got {idx.dtype}")
    if idx.device != weight.device:
        raise ValueError(f"idx is on {idx.device}, weight on {weight.device}; move one of them")
    if torch.is_grad_enabled() and weight.requires_grad and not _is_traced_or_transformed():
        return _Embedding.apply(idx, weight)
    return _fwd(weight, idx), weight
