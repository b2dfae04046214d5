"""The token embedding of processes that share its rows, and the head that is tied to it.

It is a third of GPT-2 124M. FSDP2 would keep it whole from the head's backward to the end of the
step, with a whole gradient and a copy of it to add up. Here the whole is gathered for the forward
only, the head's gradient is added up and cut as soon as it is there, and the rows of the tokens go
to the process that has them.

    forward     gather; rows of the tokens; blocks; head and loss with both gradients; forget
    backward    cut the head's gradient; blocks; add the gradients of the tokens' rows
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from gptfast import ops
from gptfast.ops.backend import empty_cache
from gptfast.training.collectives import gather_rows, reduce_rows

TOKENS_PER_PIECE = 1024
"""The tokens of a process whose gradients are sent at once."""


class ShardedTable:
    """The weight of an embedding (V, C) and of the head tied to it, in parts.

    mesh: the processes, (shard,) or (replicate, shard). Takes the place of the embedding's weight.
    """

    def __init__(self, embedding: nn.Embedding, mesh: DeviceMesh) -> None:
        self.mesh, self._embedding = mesh, embedding
        self.group = mesh.get_group("shard")
        names = mesh.mesh_dim_names or ()
        self._replicas = mesh.get_group("replicate") if "replicate" in names else None
        whole = embedding.weight
        self.V = whole.shape[0]
        share = -(-self.V // dist.get_world_size(self.group))
        self.first = min(dist.get_rank(self.group) * share, self.V)
        mine = whole.detach()[self.first : self.first + share].clone()
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        self._layout = mesh, placements, whole.shape, whole.stride()
        embedding.weight = nn.Parameter(self._as_part(mine), requires_grad=whole.requires_grad)

    def _as_part(self, mine: Tensor) -> DTensor:
        mesh, placements, shape, stride = self._layout
        return DTensor.from_local(mine, mesh, placements, shape=shape, stride=stride)

    def gradient(self, mine: Tensor) -> DTensor:
        """Return the gradient of the weight from its rows here, summed over the replicas."""
        if self._replicas is not None:
            dist.all_reduce(mine, group=self._replicas)
        return self._as_part(mine)

    def loss(
        self,
        idx: Tensor,
        target: Tensor,
        stream: Callable[[Tensor], Tensor],
        head: nn.Module | None,
        skip_below: float,
    ) -> Tensor:
        """Return the mean loss for idx and target, (B, T) int64.

        stream: the model between embedding and head. head: a module of its own, None if it is tied.
        """
        mine = _Part.apply(self._embedding.weight, self)
        whole = gather_rows(mine.detach(), self.V, self.group)
        x, mine = _Rows.apply(idx, mine, whole, self)
        x = stream(x)
        if head is None and torch.is_grad_enabled():
            return _Head.apply(x, mine, whole, target, skip_below, self)
        weight: Any = whole if head is None else head.weight
        return ops.linear_cross_entropy(x, weight, target, skip_below=skip_below)


class _Part(torch.autograd.Function):
    """The rows of this process, as a plain tensor."""

    @staticmethod
    def forward(ctx: Any, weight: DTensor, table: ShardedTable) -> Tensor:
        ctx.table = table
        mine = weight.to_local()
        return mine.view_as(mine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.table.gradient(*gradients), None


class _Rows(torch.autograd.Function):
    """(idx, the rows here) -> (x of the tokens, the rows here again for the head)."""

    @staticmethod
    def forward(ctx: Any, idx: Tensor, mine: Tensor, whole: Tensor, table: ShardedTable) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(idx)
        ctx.table, ctx.shape = table, mine.shape
        return ops.embedding(idx, whole)[0], mine.view_as(mine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        (idx,), (dx, dmine) = ctx.saved_tensors, gradients
        assert dx is not None
        if dmine is None:
            dmine = dx.new_zeros(ctx.shape)
        # Else it is the tensor that _Head has just made, and nobody else holds it.
        C = ctx.shape[1]
        for theirs, drows in _pieces(idx.flatten(), dx.reshape(-1, C), ctx.table.group):
            at = theirs - ctx.table.first
            is_here = (at >= 0) & (at < len(dmine))
            drows = drows.where(is_here[:, None], 0)
            torch.ops.gptfast.embedding_bwd(dmine, drows, at.where(is_here, 0))
        return None, dmine, None, None


def _pieces(idx: Tensor, dx: Tensor, group: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids (n,) and gradients (n, C) of the tokens of all processes, a few at a time.

    idx (N,), dx (N, C): those of this process; N may differ. Ids of -1 stand for none.
    """
    size = dist.get_world_size(group)
    longest = torch.tensor(len(idx), dtype=torch.int64, device="cpu")
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    for begin in range(0, int(longest), TOKENS_PER_PIECE):
        n = min(TOKENS_PER_PIECE, int(longest) - begin)
        ids, rows = idx.new_full((n,), -1), dx.new_zeros(n, dx.shape[1])
        here = idx[begin : begin + n]
        ids[: len(here)], rows[: len(here)] = here, dx[begin : begin + n]
        all_ids, all_rows = ids.new_empty(size * n), rows.new_empty(size * n, dx.shape[1])
        dist.all_gather(list(all_ids.split(n)), ids, group=group)
        dist.all_gather(list(all_rows.split(n)), rows, group=group)
        yield all_ids, all_rows


class _Head(torch.autograd.Function):
    """The loss of the head, whose gradient is cut as soon as it is known how much it weighs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mine: Tensor,
        whole: Tensor,
        target: Tensor,
        skip_below: float,
        table: ShardedTable,
    ) -> Tensor:
        with torch.enable_grad():
            x, whole = x.detach().requires_grad_(), whole.detach().requires_grad_()
            loss = ops.linear_cross_entropy(x, whole, target, skip_below=skip_below)
        ctx.gradients = torch.autograd.grad(loss, (x, whole))
        ctx.table, ctx.shape = table, mine.shape
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dloss,), (dx, dwhole) = gradients, ctx.gradients
        ctx.gradients = None  # which would be held to the end of the backward
        dmine = None
        if ctx.needs_input_grad[1]:
            dmine = dwhole.new_empty(ctx.shape)
            reduce_rows(dmine, dwhole.mul_(dloss), ctx.table.group)
        del dwhole
        empty_cache()  # it is large, and its memory would be kept for the next step
        return dx.mul_(dloss), dmine, None, None, None, None
