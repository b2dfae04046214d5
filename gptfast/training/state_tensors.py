"""The optimizer's state in the files of a checkpoint, in one file or cut into rows over several."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gptfast.dtensor import own_rows, placed_rows
from gptfast.weights.lazy_tensor import (
    CheckpointError,
    LazyTensor,
    read_safetensors,
    safetensors_metadata,
)


class StateTensor:
    """A tensor whose rows lie in one file or in several."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, LazyTensor]] = []
        """The first row of each piece, and its values."""

    def read_for(self, param: Tensor, path: Path) -> Tensor:
        """Return the values, placed as the parameter that they belong to: this process's rows.

        path: of the checkpoint, for messages. Raises CheckpointError if rows are missing.
        """
        first, whole = self.pieces[0]
        if not whole.shape:
            return whole.load().to(param.device)
        rows = own_rows(param)
        begin, end = rows.start or 0, len(param) if rows.stop is None else rows.stop
        if first == 0 and whole.shape == param.shape and rows == slice(None):
            return placed_rows(whole.load(), param)
        mine = torch.empty(end - begin, *param.shape[1:], dtype=whole.dtype)
        n_read = 0
        for first, piece in self.pieces:
            lower, upper = max(begin, first), min(end, first + piece.shape[0])
            if lower < upper:
                values = piece.read()[lower - first : upper - first]
                if values.shape[1:] != mine.shape[1:]:
                    raise CheckpointError(f"{path} has optimizer state of another shape")
                mine[lower - begin : upper - begin] = values
                n_read += upper - lower
        if n_read != end - begin:
            raise CheckpointError(f"{path} lacks rows of the optimizer's state")
        return placed_rows(mine, param)


def read_state_tensors(paths: Sequence[Path]) -> dict[str, StateTensor]:
    """Return the tensors of the optimizer's files, by name. Raises CheckpointError."""
    tensors: dict[str, StateTensor] = defaultdict(StateTensor)
    for path in paths:
        info = json.loads(safetensors_metadata(path).get("DCP_SHARDING_INFO", "{}"))
        for key, piece in read_safetensors(path).items():
            offsets = info.get(key, {}).get("saved_offsets") or [0]
            tensors[key].pieces.append((offsets[0], piece))
    return dict(tensors)
