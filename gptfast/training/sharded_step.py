"""Steps of processes that share the weights and the optimizer's state (FSDP2, HSDP).

Each block is a group of weights, and so are the embeddings, the last norm and the head, which may
be the token embedding. A group is gathered from all processes before it computes and forgotten
after it; its gradient is summed and cut into the parts of the processes. Checkpoints are those of
one process: the first process gathers the weights and the state, one tensor after the other, in its
main memory.
"""

import contextlib
import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gptfast.config import TrainConfig
from gptfast.device import return_freed_memory
from gptfast.model import GPT
from gptfast.torch_private import forget_gathered_at_once
from gptfast.training.collectives import PieceReduceScatter
from gptfast.training.parallel_step import ParallelStep
from gptfast.training.sharded_table import ShardedTable
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
    kind = ShardedStep if config.parallel in ("fsdp", "hsdp") else ParallelStep
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
        if self.config.compile:
            raise ValueError(
                f"compile does not work with parallel {self.config.parallel} yet: leave out one"
            )
        if self.device.type == "cpu":
            # A gathered block has some 27 MB, and comes and goes between what stays.
            return_freed_memory()
        # What a block returns may be a view, and nothing here writes to it in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        with self._world.together():
            self._mesh = _mesh(self.config, self.device, self._world.size)
            # Autocast's place is taken by the policy where most weights are; the token embedding
            # stays in fp32 for the head, as it does under autocast.
            in_bf16 = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            policy = in_bf16 if self.config.precision == "bf16" else MixedPrecisionPolicy()
            for block in model.h:
                fully_shard(block, mesh=self._mesh, mp_policy=policy)
            model.sharded_table = ShardedTable(model.wte, self._mesh)
            table: Any = model.wte.weight
            fully_shard(
                model,
                mesh=self._mesh,
                reshard_after_forward=True,
                ignored_params={table},
            )
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

    def _lay_out(self) -> None:
        """Do nothing: there are no buckets."""

    def _update(self, *args: Tensor) -> tuple[Tensor, ...]:
        numbers = super()._update(*args)
        # Memory for an evaluation or a checkpoint, until the next backward makes them again.
        self.optimizer.zero_grad(set_to_none=True)
        return numbers

    def _unsharded_copy(self) -> GPT:
        """Return a model of this configuration, in main memory, whose weights mean nothing."""
        with torch.random.fork_rng([]):
            return GPT(self.raw_model.config)

    def whole(self) -> tuple[GPT, Any] | None:
        """Return the model and the optimizer's state in the first process's main memory."""
        first = self._world.is_first
        model = self._unsharded_copy() if first else None
        state: dict[Tensor, dict[str, Tensor]] = {}
        theirs = dict(model.named_parameters()) if model is not None else {}
        with self._world.together(), torch.no_grad():
            for name, param in self.raw_model.named_parameters():
                full = _full(param)
                fields = {k: _full(v) for k, v in self.optimizer.state.get(param, {}).items()}
                if first:
                    theirs[name].copy_(full)
                    state[theirs[name]] = {k: v.cpu() for k, v in fields.items()}
        if model is None:
            return None
        model.tokenizer_name = self.raw_model.tokenizer_name
        model.vocabulary, model.eos_ids = self.raw_model.vocabulary, self.raw_model.eos_ids
        return model, SimpleNamespace(state=state)

    def blank(self) -> tuple[GPT, Any]:
        return self._unsharded_copy(), SimpleNamespace(state=defaultdict(dict))

    @torch.no_grad()
    def take(self, model: GPT, optimizer: Any) -> None:
        theirs = dict(model.named_parameters())
        for name, param in self.raw_model.named_parameters():
            param.copy_(_part(theirs[name], param))
            fields = optimizer.state.get(theirs[name], {})
            self.optimizer.state[param] = {
                k: copy.copy(v).to(self.device) if v.dim() == 0 and k == "step" else _part(v, param)
                for k, v in fields.items()
            }


def _full(x: Tensor) -> Tensor:
    """Return the whole of a tensor of which each process may have a part; all must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every process has, cut into the parts that those of `like` have."""
    assert isinstance(like, DTensor)
    whole = whole.detach().to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
