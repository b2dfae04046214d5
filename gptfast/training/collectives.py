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


def _row_pieces(V: int, row_bytes: int, size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield which rows of its own a process sends now, and which rows of V those of each rank are.

    Each process has ceil(V / size) rows, fewer at the end, as DTensor's Shard(0) has them. The
    first slice may reach beyond the rows of a process.
    """
    share = -(-V // size)
    step = max(1, PIECE_BYTES // row_bytes)
    for begin in range(0, share, step):
        end = min(begin + step, share)
        ranks = range(size)
        yield (
            slice(begin, end),
            [slice(min(rank * share + begin, V), min(rank * share + end, V)) for rank in ranks],
        )


def _padded(rows: Tensor, n: int) -> Tensor:
    """Return n rows, of which the last are zeros where there are fewer."""
    if len(rows) == n:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(n - len(rows), *rows.shape[1:])])


def reduce_rows(mine: Tensor, whole: Tensor, group: Any) -> None:
    """Write to `mine` the process's rows of the sum of `whole` (V, C) over a group's processes."""
    size, (V, C) = dist.get_world_size(group), whole.shape
    for here, of_ranks in _row_pieces(V, C * whole.element_size(), size):
        n = here.stop - here.start
        parts = torch.stack([_padded(whole[rows], n) for rows in of_ranks])
        total = torch.empty_like(parts[0])
        _sum_parts(total, parts, group)
        mine[here] = total[: len(mine[here])]


def gather_rows(mine: Tensor, V: int, group: Any) -> Tensor:
    """Return the whole (V, C) of which each process of a group has its rows."""
    size, C = dist.get_world_size(group), mine.shape[1]
    whole = mine.new_empty(V, C)
    for here, of_ranks in _row_pieces(V, C * mine.element_size(), size):
        own = _padded(mine[here], here.stop - here.start)
        parts = own.new_empty(size, *own.shape)
        dist.all_gather(list(parts), own, group=group)
        for part, rows in zip(parts, of_ranks, strict=True):
            whole[rows] = part[: rows.stop - rows.start]
    return whole


def gather_to_first(mine: Tensor, shape: Sequence[int], group: Any) -> Tensor | None:
    """Return the whole of a tensor that is cut by its first dimension, on the CPU.

    mine: this process's part; shape: of the whole. group: of gloo. Its other processes get None.
    """
    size, V = dist.get_world_size(group), shape[0]
    mine = mine.reshape(len(mine), -1)
    C = torch.Size(shape[1:]).numel()
    is_first = dist.get_rank(group) == 0
    whole = mine.new_empty(V, C, device="cpu") if is_first else None
    for here, of_ranks in _row_pieces(V, C * mine.element_size(), size):
        own = _padded(mine[here].view(-1, C).cpu(), here.stop - here.start)
        parts = own.new_empty(size, *own.shape) if is_first else None
        dist.gather(own, None if parts is None else list(parts), group=group, group_dst=0)
        if whole is not None and parts is not None:
            for part, rows in zip(parts, of_ranks, strict=True):
                whole[rows] = part[: rows.stop - rows.start]
    return None if whole is None else whole.view(shape)


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
