"""Steps of processes that share the weights and the optimizer's state (FSDP2, HSDP).

Each block is a group of weights, and so are the embeddings, the last norm and the head, which may
be the token embedding. A group is gathered from all processes before it computes and forgotten
after it; its gradient is summed and cut into the parts of the processes. sharded_table.py has the
token embedding, shards.py the checkpoints.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from gptfast.config import TrainConfig
from gptfast.device import return_freed_memory
from gptfast.model import GPT
from gptfast.torch_private import forget_gathered_at_once
from gptfast.training.checkpoint import local_state
from gptfast.training.collectives import PieceReduceScatter
from gptfast.training.parallel_step import DDPStep, ParallelStep
from gptfast.training.sharded_table import ShardedTable
from gptfast.training.shards import Shards
from gptfast.training.shared_step import SharedStep
from gptfast.training.shares import Split
from gptfast.training.world import World


def parallel_step(
    model: GPT,
    config: TrainConfig,
    device: torch.device,
    log: Callable[[str], None],
    world: World,
    batch_size: int,
) -> ParallelStep:
    """Return the steps of several processes, as config.parallel wants them.

    Raises ValueError for a number of processes that does not fit.
    """
    split = Split(world.rank, world.size, batch_size, config.accumulation_steps)
    kind: type[ParallelStep] = ShardedStep
    if config.parallel not in ("fsdp", "hsdp"):
        shares = device.type == "cpu" and world.shared_memory(1) is not None
        kind = SharedStep if shares else DDPStep
    return kind(model, config, device, log, world, split)


def _mesh(config: TrainConfig, device: torch.device, size: int) -> DeviceMesh:
    """Return the processes in their order: (size,), or (replicas, size / replicas) for hsdp."""
    if config.parallel != "hsdp":
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    replicas = config.replicas or 2
    if size % replicas:
        raise ValueError(
            f"{size} processes cannot form {replicas} groups of the same size (replicas): start a "
            f"multiple of {replicas}"
        )
    sizes = replicas, size // replicas
    return init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))


class ShardedStep(ParallelStep):
    """A `ParallelStep` in which each process keeps a part of the weights."""

    def _placed(self, model: GPT) -> Any:
        if self.device.type == "cpu":
            # A gathered block has some 27 MB, and comes and goes between what stays.
            return_freed_memory()
        # What a block returns may be a view, and nothing here writes to it in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self._begin_alike(model)
        with self._world.together():
            self._mesh = _mesh(self.config, self.device, self._world.size)
            self.shards = Shards(self._mesh, self._world)
            # Autocast's place is taken by the policy where most weights are; the token embedding
            # stays in fp32 for the head, as it does under autocast.
            in_bf16 = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            policy = in_bf16 if self.config.precision == "bf16" else MixedPrecisionPolicy()
            for block in model.h:
                if self.config.compile:
                    # Its weights are gathered before and forgotten after, outside of what is
                    # compiled.
                    block.forward = torch.compile(block.forward, fullgraph=True)
                fully_shard(block, mesh=self._mesh, mp_policy=policy)
            model.sharded_table = ShardedTable(model.wte, self._mesh)
            table: Any = model.wte.weight
            fully_shard(
                model,
                mesh=self._mesh,
                reshard_after_forward=True,
                ignored_params={table},
            )
        if model.device.type == "meta":
            model.to_empty(device=self.device)  # for draw_parts
        for module in self._groups(model):
            if self.device.type == "cpu":
                in_pieces: Any = PieceReduceScatter()
                module.set_custom_reduce_scatter(in_pieces)
                forget_gathered_at_once(module)
            # Losses are divided by the number of targets, so gradients are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        return model

    @staticmethod
    def _groups(model: GPT) -> Iterator[FSDPModule]:
        return (module for module in model.modules() if isinstance(module, FSDPModule))

    @contextlib.contextmanager
    def _summing(self, last: bool) -> Iterator[None]:
        self.model.set_requires_gradient_sync(last)
        yield

    def _update(self, *args: Tensor) -> tuple[Tensor, ...]:
        numbers = super()._update(*args)
        # Memory for an evaluation or a checkpoint, until the next backward makes them again.
        self.optimizer.zero_grad(set_to_none=True)
        return numbers

    def whole_model(self) -> GPT | None:
        """Return the model in the first process's main memory."""
        config, model = self.raw_model.config, None
        if self._world.is_first:
            with torch.random.fork_rng([]):
                model = GPT(config)
        theirs = dict(model.named_parameters()) if model is not None else {}
        with self._world.together(), torch.no_grad():
            for name, whole in self.shards.gathered(config, local_state(self.raw_model)):
                if whole is not None:
                    theirs[name].copy_(whole)
        return model
