"""The files of a checkpoint of processes that have parts of the weights (FSDP2, HSDP).

model.safetensors is that of one process: the first process gathers one tensor after the other and
writes it. Each process writes its own part of the optimizer's state, `optimizer-00001-of-00002
.safetensors`, in the layout of PyTorch's HuggingFaceStorageWriter: DCP_SHARDING_INFO in the file's
metadata says where in the whole each tensor begins. The directory gets its name when all have
written.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gptfast.config import GPTConfig, parameter_shapes
from gptfast.training.checkpoint import Snapshot
from gptfast.training.collectives import gather_to_first
from gptfast.training.world import World
from gptfast.weights.checkpoint import sha256
from gptfast.weights.pretrained import hf_layouts, hf_tensors
from gptfast.weights.safetensors_file import Layout, write_safetensors

MAX_BYTES_AHEAD = 2**26
"""After so many bytes of its parts, a process waits until the first one has written them."""


class Shards:
    """Writes the parts of a checkpoint.

    mesh: the processes, (shard,) or (replicate, shard), of which the first replica writes.
    """

    def __init__(self, mesh: DeviceMesh, world: World) -> None:
        self._world = world
        ranks = mesh.mesh.view(-1, mesh.mesh.shape[-1])[0].tolist()
        # Its own, on the CPU: a save may go on beside the steps.
        self._group = dist.new_group(ranks, timeout=getattr(world, "silence", None), backend="gloo")
        self._index = ranks.index(world.rank) if world.rank in ranks else None
        self._size = len(ranks)
        self._saves, self._gathers = 0, 0

    def gathered(
        self, config: GPTConfig, weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Yield the name and the whole of each weight, None on other processes than the first."""
        if self._index is None:
            return
        self._gathers += 1
        n_bytes = 0
        for name, shape in parameter_shapes(config).items():
            if n_bytes > MAX_BYTES_AHEAD:
                # The first may write for long; gloo would take it for dead.
                self._world.wait_for_first(f"gather/{self._gathers}/{name}")
                n_bytes = 0
            n_bytes += Layout(weights[name].dtype, shape).nbytes // self._size
            yield name, gather_to_first(weights[name], shape, self._group)

    def write(self, directory: Path, snapshot: Snapshot) -> dict[str, str]:
        """Write the files with all others; return the SHA-256 of each. For the first process."""
        key = self._begin(directory.name)[0]
        return self._take_part(key, directory, snapshot)

    def follow(self, folder: Path, snapshot: Snapshot) -> None:
        """Take part in the `write` of the first process, to a directory in this folder.

        Raises OSError if the part of this process cannot be written.
        """
        key, name = self._begin("")
        try:
            self._take_part(key, folder / name, snapshot)
        except OSError as error:
            raise OSError(
                f"cannot save {folder / name}: {error.strerror or error}; earlier checkpoints are "
                "intact"
            ) from error

    def _begin(self, name: str) -> tuple[str, str]:
        self._saves += 1
        key = f"save/{self._saves}"
        return key, self._world.exchange(f"{key}/to", name)[0]

    def _take_part(self, key: str, directory: Path, snapshot: Snapshot) -> dict[str, str]:
        written = []
        with self._world.together():
            if self._index == 0:
                written.append(directory / "model.safetensors")
                layouts = hf_layouts(snapshot.config, snapshot.weights["wte.weight"].dtype)
                write_safetensors(written[0], layouts, self._hf_tensors(snapshot))
            else:
                for _ in self.gathered(snapshot.config, snapshot.weights):
                    pass
        if snapshot.state is not None and self._index is not None:
            name = f"optimizer-{self._index + 1:05d}-of-{self._size:05d}.safetensors"
            written.append(directory / name)
            # The first process is inside one already.
            limit = nullcontext() if self._world.is_first else self._world.writing(directory)
            with limit:
                self._write_state(written[-1], snapshot.config, snapshot.state)
        sums = {path.name: sha256(path) for path in written}
        every = self._world.exchange(f"{key}/written", json.dumps(sums))
        return {name: value for text in every for name, value in json.loads(text).items()}

    def _hf_tensors(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        for name, whole in self.gathered(snapshot.config, snapshot.weights):
            assert whole is not None
            yield from hf_tensors(snapshot.config, {name: whole}).items()

    def _write_state(self, path: Path, config: GPTConfig, state: Mapping[str, Tensor]) -> None:
        """Write this process's rows of the optimizer's state."""
        shapes, info, layouts = parameter_shapes(config), {}, {}
        for key, part in state.items():
            first = 0
            if part.dim():
                V = shapes[key.rpartition(".")[0]][0]
                first = min(-(-V // self._size) * (self._index or 0), V)
            if part.numel() and (part.dim() or self._index == 0):
                info[key] = {"saved_offsets": [first, *[0] * (part.dim() - 1)][: part.dim()]}
                layouts[key] = Layout(part.dtype, tuple(part.shape))
        metadata = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0"}
        write_safetensors(path, layouts, ((key, state[key].cpu()) for key in layouts), metadata)
