"""One copy of the weights and of AdamW's state for the processes of one machine.

Each parameter is cut into as many slices as there are processes, and each process updates its own
slices in the one copy. So no update is done twice, and no weights are sent.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from gptfast.optim import AdamW
from gptfast.training.shared_memory import ALIGNMENT, Allotment, padded
from gptfast.training.world import World


def own_slice(t: Tensor, rank: int, size: int) -> slice:
    """Return which elements of a tensor belong to a process; slices end where cache lines do."""
    line = ALIGNMENT // t.element_size()
    share = -(-t.numel() // (size * line)) * line
    first = min(rank * share, t.numel())
    return slice(first, min(first + share, t.numel()))


class _OwnAdamW(AdamW):
    """AdamW of the slices of one process; the norm is that of the slices of all."""

    world: World

    def _norm(self, *args: Any) -> Tensor | None:
        norm = super()._norm(*args)
        assert norm is not None
        return self.world.sum(norm.double().square()).sqrt().to(norm.dtype)


class SharedState:
    """The weights to train and their state, in memory that the processes of a world share.

    All must make theirs at the same time, and have the first one's values from then on. Raises
    RuntimeError if the memory is not to be had.
    """

    def __init__(self, model: nn.Module, optimizer: AdamW, world: World) -> None:
        optimizer.make_state()
        self._whole, self._world = optimizer, world
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.params = list(trained), list(trained.values())
        self.slices = [own_slice(p, world.rank, world.size) for p in self.params]
        """Which elements of each parameter this process updates."""
        for_gradients = world.size * sum(padded(p.nbytes) for p in self.params)
        n_bytes = for_gradients + sum(padded(t.nbytes) for t in self._tensors())
        memory = world.shared_memory(n_bytes)
        if memory is None:
            raise RuntimeError(
                f"the processes found no {n_bytes / 2**20:.0f} MB of memory to share: start fewer, "
                "or give them more memory"
            )
        allotment = Allotment(memory)
        self._move(allotment)
        self.boxes = [[allotment.like(p) for p in self.params] for _ in range(world.size)]
        """Of each process and parameter: where it puts a gradient for the others."""
        self._addresses = self._current_addresses()
        self._own_params = [
            p.detach().view(-1)[own] for p, own in zip(self.params, self.slices, strict=True)
        ]
        self._own = self._own_optimizer()

    def _tensors(self) -> Iterator[Tensor]:
        """Yield the weights and their states, without the numbers of steps."""
        for param in self.params:
            yield param.detach()
            state = self._whole.state[param]
            yield from (state[name] for name in sorted(state) if name != "step")

    def _current_addresses(self) -> list[int]:
        return [t.data_ptr() for t in self._tensors()]

    def is_in_place(self) -> bool:
        """Return whether weights and state are still those that are shared."""
        return self._addresses == self._current_addresses()

    def _move(self, allotment: Allotment) -> None:
        """Let weights and state be in the shared memory, with the first process's values."""
        rooms = [allotment.like(t) for t in self._tensors()]
        if self._world.is_first:
            for room, t in zip(rooms, self._tensors(), strict=True):
                if t.any():  # the room is of zeros, and takes no memory yet
                    room.copy_(t)
        self._world.meet()
        shared = iter(rooms)
        for param in self.params:
            param.data = next(shared)
            state = self._whole.state[param]
            state.update({name: next(shared) for name in sorted(state) if name != "step"})

    def _own_optimizer(self) -> _OwnAdamW:
        """Return an optimizer of the slices of this process, with slices of the state."""
        part_of = dict(zip(self.params, self._own_params, strict=True))
        optimizer = _OwnAdamW(
            [{"params": [part_of[p] for p in g["params"]]} for g in self._whole.param_groups],
            max_norm=self._whole.max_norm,
        )
        optimizer.world = self._world
        for param, own in zip(self.params, self.slices, strict=True):
            optimizer.state[part_of[param]] = {
                # The number of steps is that of the whole parameter, in the same tensor.
                name: value if name == "step" else value.view(-1)[own]
                for name, value in self._whole.state[param].items()
            }
        return optimizer

    def own_optimizer(self) -> AdamW:
        """Return an optimizer that updates this process's slices, and so the weights of all.

        It has the gradients of the parameters, until `forget_gradients`, and the options of the
        whole optimizer.
        """
        self._own.max_norm = self._whole.max_norm
        for param, part, own in zip(self.params, self._own_params, self.slices, strict=True):
            assert param.grad is not None
            part.grad = param.grad.view(-1)[own]
        for ours, theirs in zip(self._own.param_groups, self._whole.param_groups, strict=True):
            ours.update({name: x for name, x in theirs.items() if name != "params"})
        return self._own

    def forget_gradients(self) -> None:
        """Let the gradients of the parameters be freed when those forget them."""
        self._own.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Give this process weights and state of its own, with the values of those shared."""
        for param in self.params:
            param.data = param.detach().clone()
            state = self._whole.state[param]
            state.update({name: t.clone() for name, t in state.items() if name != "step"})
