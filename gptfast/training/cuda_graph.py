"""A training step as a CUDA graph, which a GPU runs again at one call of the host.

A graph repeats what a function did to tensors at fixed addresses. So nothing that changes from step
to step may be a Python value: batches, learning rate, limits and shares are input tensors, and
dropout draws from the GPU's own generator, which a replay advances. `tests/test_cuda_graph.py`
replays steps on the CPU, operator by operator, to hold that.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gptfast.checks import one_line
from gptfast.config import TrainConfig
from gptfast.device import pinned

WARM_UP_STEPS = 2
"""Ordinary steps before a capture: they compile kernels and make the optimizer's state."""

Tensors = tuple[Tensor, ...]
Compute = Callable[[], Tensors]


class Recorder(Protocol):
    """Runs functions, and records them to be run again. Tests have one that needs no GPU."""

    def run(self, function: Compute) -> Tensors:
        """Return function(), run so that a later capture finds everything prepared."""

    def capture(self, function: Compute) -> Compute:
        """Return a function that repeats what this one does, and returns the same tensors anew.

        No tensor has changed meanwhile.
        """


class CudaGraphs:
    """Records with `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def run(self, function: Compute) -> Tensors:
        # What is made on the default stream may wait for it later, which a capture forbids.
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def capture(self, function: Compute) -> Compute:
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        errors: list[BaseException] = []
        try:
            # The outer context leaves the stream even if ending the capture fails.
            with (
                torch.cuda.stream(self._stream),
                # Other threads may use the GPU during the capture.
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = function()
                except BaseException as error:
                    errors.append(error)
                    raise
        except BaseException as error:
            # A capture that fails leaves a generator which draws in captures only.
            generator.graphsafe_set_state(before)
            # Ending it raises another error than the one that says why it failed.
            raise errors.pop() if errors else error from None

        def replay() -> Tensors:
            graph.replay()
            return result

        return replay


def recorder_for(config: TrainConfig, device: torch.device) -> Recorder | None:
    """Return what records the steps of a run, or None for a run without a graph."""
    wanted = config.cuda_graph and device.type == "cuda" and not config.compile
    return CudaGraphs() if wanted else None


class StepGraph:
    """A function of tensors that becomes a graph once it has run often enough.

    compute: takes input tensors, queues a step on the device and returns tensors. params: it sets
    their gradients. held: returns what a graph holds besides the inputs, such as addresses; a graph
    is used as long as that is the same. obstacle: returns why there can be no graph, or None.

    There is one graph at a time. Inputs of other shapes than the graph's run without it, as does
    everything after a capture that failed.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Tensor]], Tensors],
        params: Sequence[Tensor],
        held: Callable[[], Hashable],
        obstacle: Callable[[], str | None],
        recorder: Recorder,
        device: torch.device,
        log: Callable[[str], None],
    ) -> None:
        self._compute, self._params, self._held, self._obstacle = compute, params, held, obstacle
        self._recorder, self._device, self._log = recorder, device, log
        self._may_capture = True
        self._forget()

    def _forget(self) -> None:
        """Drop the graph with its memory, and warm up anew."""
        self._replay: Compute | None = None
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        # The shapes and what was held when the last step ended, and the steps like it in a row.
        self._key: tuple[Hashable, Hashable] | None = None
        self._steps = 0

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph."""
        return self._replay is not None

    def __call__(self, inputs: Sequence[Tensor]) -> Tensors:
        """Return compute(inputs). The inputs may be on the CPU.

        A replay writes to the tensors that the one before it returned.
        """
        if not self._may_capture:
            return self._recorder.run(lambda: self._compute(inputs))
        key = tuple(x.shape for x in inputs), self._held()
        if self._replay is not None and self._key is not None and key[1] != self._key[1]:
            self._forget()
        warm = key == self._key and self._steps >= WARM_UP_STEPS
        if self._replay is None and warm:
            self._capture(inputs)
        if self._replay is not None and key == self._key:
            self._fill(inputs)
            for param, gradient in zip(self._params, self._gradients, strict=True):
                if param.grad is not gradient:  # a step without the graph came between
                    param.grad = gradient
            return self._replay()
        result = self._recorder.run(lambda: self._compute(inputs))
        if self._replay is None:
            self._steps = self._steps + 1 if key == self._key else 1
            self._key = key[0], self._held()
        return result

    def _fill(self, inputs: Sequence[Tensor]) -> None:
        """Copy the inputs to where the graph reads them."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(pinned(given, self._device), non_blocking=True)

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        """Capture a graph for inputs like these, or log why there will be none."""
        reason = self._obstacle()
        if reason is None:
            self._inputs = [torch.empty_like(x, device=self._device) for x in inputs]
            self._fill(inputs)
            for param in self._params:
                # Now: what is freed during a capture is no memory for that capture.
                param.grad = None
            try:
                self._replay = self._recorder.capture(lambda: self._compute(self._inputs))
            except Exception as error:  # out of memory, or an operation that no graph can hold
                reason = f"its capture failed: {one_line(error):.200}"
        if reason is not None:
            self._forget()
            self._may_capture = False
            self._log(f"no CUDA graph, {reason}; steps run without, as with --no-cuda-graph")
            return
        self._gradients = [param.grad for param in self._params]
