"""Steps of processes that share one machine's memory."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from gptfast.model import GPT
from gptfast.optim import AdamW
from gptfast.torch_private import has_step_hooks
from gptfast.training.parallel_step import ParallelStep
from gptfast.training.shared_state import SharedState
from gptfast.training.shared_sums import SharedSums


class SharedStep(ParallelStep):
    """A `ParallelStep` in which the processes of one machine share the weights and their state."""

    _state: SharedState | None = None
    _sums: SharedSums | None = None

    def _placed(self, model: GPT) -> Any:
        self._begin_alike(model)
        return super()._placed(model)

    def _lay_out(self) -> None:
        """Share what is there at the first step, and what was loaded since."""
        if self._state is None or not self._state.is_in_place():
            if self._sums is not None:
                self._sums.remove()
            with self._world.together():
                self._state = SharedState(self.raw_model, self.optimizer, self._world)
            self._sums = SharedSums(self._state, self._world)

    def _summing(self, last: bool) -> contextlib.AbstractContextManager:
        assert self._sums is not None
        return self._sums.of_backward() if last else contextlib.nullcontext()

    def _updating(self) -> AdamW:
        assert self._state is not None
        if has_step_hooks(self.optimizer):
            raise ValueError(
                "the optimizer has a hook, which processes that share its state do not call: "
                "remove the hook, or train in one process"
            )
        return self._state.own_optimizer()

    def _update(self, *args: Tensor) -> tuple[Tensor, ...]:
        assert self._state is not None
        numbers = super()._update(*args)
        self._state.forget_gradients()
        # What a parameter has is this process's part of the gradient, of no use to anybody else.
        self.optimizer.zero_grad(set_to_none=True)
        # Nobody may compute with weights that another one still updates.
        self._world.meet()
        torch.autograd.graph.increment_version(self._state.params)
        return numbers

    def close(self) -> None:
        if self._state is not None and self._sums is not None:
            self._state.release()
            self._sums.remove()  # the parameters' hooks would keep the boxes
            self._state = self._sums = None
