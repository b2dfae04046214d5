"""Sums of gradients over the processes of one machine, through memory that they share."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from gptfast.training.shared_state import SharedState
from gptfast.training.world import World

GROUP_BYTES = 2**22
"""Of gradients that are complete before a process tells the others so."""


class SharedSums:
    """Adds up gradients while the backward still runs, each process those of its slices.

    Parameters are taken in groups, from the last to the first, as a backward comes to them. When a
    group is complete in all processes, each adds what the others have put into their boxes to its
    own gradients, in the order of the ranks that follow its own.
    """

    def __init__(self, state: SharedState, world: World) -> None:
        self._names, self._params, self._slices = state.names, state.params, state.slices
        self._mine, *self._others = state.boxes[world.rank :] + state.boxes[: world.rank]
        self._groups: list[list[int]] = [[]]
        for i in reversed(range(len(self._params))):
            if sum(self._params[j].nbytes for j in self._groups[-1]) >= GROUP_BYTES:
                self._groups.append([])
            self._groups[-1].append(i)
        # One each: a sum may still be under way when the next begins.
        self._flags = torch.zeros(len(self._groups), dtype=torch.float32, device="cpu")
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(self._take, i))
            for i, param in enumerate(self._params)
        ]
        self._is_open = False

    def remove(self) -> None:
        """Take no more gradients."""
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def of_backward(self) -> Iterator[None]:
        """Add up the gradients of the block's backward; this process's slices are then complete.

        Raises RuntimeError if a process is gone, ValueError for a parameter without a gradient.
        """
        self._waiting = [set(group) for group in self._groups]
        self._sums: list[torch.futures.Future] = []
        self._is_open = True
        try:
            yield
            for i in sorted(set[int]().union(*self._waiting)):  # of an earlier backward alone
                if self._params[i].grad is None:
                    raise ValueError(
                        f"{self._names[i]} has no gradient: the loss does not depend on it; leave "
                        "it out of the training (freeze)"
                    )
                self._take(i, self._params[i])
        finally:
            self._is_open = False
        for done in self._sums:
            done.wait()

    def _take(self, i: int, param: Tensor) -> None:
        """Show the others the gradient of parameter i, which is complete."""
        if not self._is_open:
            return
        assert param.grad is not None
        grad, box, own = param.grad.view(-1), self._mine[i].view(-1), self._slices[i]
        box[: own.start] = grad[: own.start]
        box[own.stop :] = grad[own.stop :]
        for waiting in self._waiting:
            waiting.discard(i)
        # In the same order in all processes, which is how gloo knows what belongs together.
        while len(self._sums) < len(self._groups) and not self._waiting[len(self._sums)]:
            self._announce(len(self._sums))

    def _announce(self, group: int) -> None:
        """Tell the others that a group is complete here; add it up once it is everywhere."""
        work = dist.all_reduce(self._flags[group], async_op=True)
        self._sums.append(work.get_future().then(partial(self._add, group)))

    def _add(self, group: int, arrived: torch.futures.Future) -> None:
        arrived.value()  # raises if a process is gone
        with torch.profiler.record_function("gptfast::sum_gradients"):
            for i in self._groups[group]:
                grad, own = self._params[i].grad, self._slices[i]
                assert grad is not None
                mine = grad.view(-1)[own]
                for boxes in self._others:
                    mine += boxes[i].view(-1)[own]
