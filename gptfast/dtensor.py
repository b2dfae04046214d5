"""Sharded parameters in the optimizer: their local tensors, and the norm over all processes.

torch.distributed.tensor is looked up and never imported, which would take a second: a process that
has not imported it has no DTensor.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.adamw import grad_norm


def _dtensor_type() -> Any:
    """Return the class DTensor, or None where nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(t: Tensor) -> bool:
    """Return whether t is a DTensor."""
    return any_in([t])


def any_in(tensors: list[Tensor]) -> bool:
    """Return whether one of the tensors is a DTensor."""
    kind = _dtensor_type()
    return kind is not None and any(issubclass(t, kind) for t in set(map(type, tensors)))


def local(tensors: list[Tensor]) -> list[Tensor]:
    """Return each DTensor's part on this process, in the same memory; other tensors unchanged."""
    kind = _dtensor_type()
    parts = [t.to_local() if kind and isinstance(t, kind) else t for t in tensors]
    # A part that is still on its way is an AsyncCollectiveTensor.
    return [part.wait() if hasattr(part, "wait") else part for part in parts]


def check_parameter(param: Tensor) -> None:
    """Raise ValueError for a tensor subclass or a placement that a step would get wrong."""
    if is_dtensor(param):
        placements: Any = param.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise ValueError(
                f"gptfast.AdamW takes sharded or replicated DTensors, got one with {placements}; "
                "call redistribute on it"
            )
        check_parameter(param.detach().to_local())  # type: ignore[attr-defined]
    elif type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        # A fake tensor behaves as the plain tensor that it stands for.
        if type(param).__name__ != "FakeTensor":
            raise ValueError(
                f"gptfast.AdamW takes plain tensors and DTensors, got {type(param).__name__}; "
                "use torch.optim.AdamW for it"
            )


def check_whole(params: list[Tensor]) -> None:
    """Raise ValueError if FullyShardedDataParallel holds a parameter, perhaps only a part of it."""
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        raise ValueError(
            "max_norm would clip to the norm of one process's shard under "
            "FullyShardedDataParallel; shard with torch.distributed.fsdp.fully_shard instead, or "
            "leave max_norm out and call model.clip_grad_norm_ before each step"
        )


def placed_as(t: Tensor, param: Tensor, name: str) -> Tensor:
    """Return t, a parameter's gradient or a part of its state, with the parameter's placements.

    Raises ValueError if only one of the two is a DTensor.
    """
    if is_dtensor(t) != is_dtensor(param):
        kinds = ["a DTensor" if is_dtensor(x) else "a plain tensor" for x in (param, t)]
        remedy = (
            "let backward make the gradient"
            if name == "gradient"
            else "load an optimizer's state with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
        raise ValueError(f"a parameter is {kinds[0]} and its {name} is {kinds[1]}; {remedy}")
    if is_dtensor(t):
        x: Any = t
        of: Any = param
        if x.placements != of.placements or x.device_mesh != of.device_mesh:
            return x.redistribute(of.device_mesh, of.placements)
    return t


def local_gradient(param: Tensor, grad: Tensor | None) -> Tensor | None:
    """Return the part of a gradient that belongs to this process's part of the parameter."""
    return None if grad is None else local([placed_as(grad, param, "gradient")])[0]


def _sharding(param: Tensor) -> tuple[Any, tuple[int, ...]]:
    """Return a parameter's mesh and the dimensions of it that split the parameter.

    Returns (None, ()) for a parameter that every process holds whole.
    """
    if is_dtensor(param):
        of: Any = param
        dims = tuple(i for i, at in enumerate(of.placements) if not at.is_replicate())
        if dims:
            return of.device_mesh, dims
    return None, ()


def shard_index(param: Tensor) -> int:
    """Return the number of the part that this process holds; 0 for a whole parameter."""
    mesh, dims = _sharding(param)
    index = 0
    for dim in dims:
        index = index * mesh.size(dim) + mesh.get_local_rank(dim)
    return index


def _sum_over_shards(square: Tensor, mesh: Any, dims: tuple[int, ...]) -> Tensor:
    """Return the sum of a 0-d tensor over the processes that hold the other parts."""
    # A parameter in CPU memory may belong to a mesh of GPUs, which reduce only what is on them.
    total = square if square.device.type == mesh.device_type else square.to(mesh.device_type)
    for dim in dims:
        torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return total.to(square.device)


def global_norm(params: list[Tensor], grads: list[Tensor | None]) -> Tensor | None:
    """Return the 2-norm over the gradients of all processes, 0-d, or None without a gradient.

    params may be DTensors, grads are their local gradients. Parameters that are split over the same
    processes share one all-reduce. A process takes part in it whichever gradients it has.
    """
    by_sharding: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    for param, grad in zip(params, grads, strict=True):
        members = by_sharding.setdefault(_sharding(param), [])
        if grad is not None:
            members.append(grad)
    present = [grad for grad in grads if grad is not None]
    if by_sharding.keys() == {(None, ())}:
        return grad_norm(present) if present else None
    first = (present or local(params))[0]
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    for (mesh, dims), members in by_sharding.items():
        square = torch.zeros((), dtype=torch.float64, device=first.device)
        if members:
            square = grad_norm(members).double().square().to(first.device)
        total += _sum_over_shards(square, mesh, dims) if dims else square
    return total.sqrt().to(torch.promote_types(first.dtype, torch.float32))


def own_rows(param: Tensor) -> slice:
    """Return which rows of a parameter this process has.

    Raises ValueError for a DTensor that is cut by another dimension than its first, or twice.
    """
    mesh, dims = _sharding(param)
    if not dims:
        return slice(None)
    of: Any = param
    if len(dims) > 1 or of.placements[dims[0]].dim != 0:
        raise ValueError(f"a DTensor with {of.placements} is not cut into rows; use Shard(0)")
    share = -(-param.shape[0] // mesh.size(dims[0]))
    first = min(share * mesh.get_local_rank(dims[0]), param.shape[0])
    return slice(first, min(first + share, param.shape[0]))


def placed_rows(rows: Tensor, param: Tensor) -> Tensor:
    """Return this process's rows of a tensor of a parameter's shape, placed as the parameter."""
    of: Any = param
    rows = rows.to(param.device)
    if not is_dtensor(param):
        return rows
    return type(of).from_local(
        rows, of.device_mesh, of.placements, shape=param.shape, stride=param.stride()
    )


class OwnPart:
    """A parameter to which whole values are copied, of which this process takes its rows."""

    def __init__(self, param: Tensor) -> None:
        self._mine, self._rows = local([param])[0], own_rows(param)

    def copy_(self, whole: Tensor) -> None:
        """Copy this process's rows of the values."""
        self._mine.copy_(whole[self._rows] if whole.dim() else whole)


def own_parts(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a place for the whole values of each tensor of a state dictionary: an OwnPart."""
    return {name: OwnPart(t) for name, t in state.items()}
