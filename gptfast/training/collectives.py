"""Sums over processes that take little memory beside what they add up.

gloo adds and cuts (reduce-scatter) by adding the whole in a copy and throwing most of it away. Here
the processes exchange pieces, and each adds up those of its own part, in the order of the ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PIECE_BYTES = 2**22
"""What a process sends to another at once."""


def _sum_parts(out: Tensor, parts: Tensor, group: Any) -> None:
    """Write to out (...) the sum over the processes of their parts[rank]; parts is (size, ...)."""
    if parts.device.type != "cpu":
        dist.reduce_scatter(out, list(parts), group=group)
        return
    theirs = torch.empty_like(parts)
    dist.all_to_all_single(theirs, parts, group=group)
    torch.sum(theirs, 0, out=out)


def _row_pieces(whole: Tensor, group: Any) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """Yield which rows of its own a process sends now, room for them, and those of every rank.

    whole: (V, C), of which each process has ceil(V / size) rows, fewer at the end, as DTensor's
    Shard(0) has them. The room (size, n, C) may be larger than the rows.
    """
    size, (V, C) = dist.get_world_size(group), whole.shape
    share = -(-V // size)
    step = max(1, PIECE_BYTES // (C * whole.element_size()))
    for begin in range(0, share, step):
        end = min(begin + step, share)
        ranges = (slice(min(rank * share + begin, V), rank * share + end) for rank in range(size))
        yield slice(begin, end), whole.new_zeros(size, end - begin, C), [whole[r] for r in ranges]


def reduce_rows(mine: Tensor, whole: Tensor, group: Any) -> None:
    """Write to `mine` the process's rows of the sum of `whole` (V, C) over a group's processes."""
    for here, parts, rows_of_ranks in _row_pieces(whole, group):
        for part, rows in zip(parts, rows_of_ranks, strict=True):
            part[: len(rows)] = rows
        total = torch.empty_like(parts[0])
        _sum_parts(total, parts, group)
        mine[here] = total[: len(mine[here])]


def gather_rows(mine: Tensor, V: int, group: Any) -> Tensor:
    """Return the whole (V, C) of which each process of a group has its rows."""
    whole = mine.new_empty(V, mine.shape[1])
    for here, parts, rows_of_ranks in _row_pieces(whole, group):
        own = torch.zeros_like(parts[0])
        own[: len(mine[here])] = mine[here]
        dist.all_gather(list(parts), own, group=group)
        for part, rows in zip(parts, rows_of_ranks, strict=True):
            rows.copy_(part[: len(rows)])
    return whole


class PieceReduceScatter:
    """The reduce-scatter of FSDP2's groups of weights over gloo, in pieces.

    For `FSDPModule.set_custom_reduce_scatter`.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the memory for the gradients of a group, or for their sum."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM and not async_op
        parts = input_tensor.view(dist.get_world_size(group), -1)
        step = PIECE_BYTES // input_tensor.element_size()
        for begin in range(0, len(output_tensor), step):
            piece = slice(begin, begin + step)
            _sum_parts(output_tensor[piece], parts[:, piece].contiguous(), group)
