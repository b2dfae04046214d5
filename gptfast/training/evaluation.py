"""The losses of an evaluation, which the processes of a run share."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from gptfast.config import TrainConfig
from gptfast.data.loader import from_start
from gptfast.evaluate.loss import loader_loss
from gptfast.generation.model_decoder import as_decoder
from gptfast.model import GPT
from gptfast.training.step import Batch, autocast
from gptfast.training.world import World


class EvaluationInterrupted(Exception):
    """The evaluation was stopped because the run was asked to stop."""


class Evaluation:
    """Measures a model on loaders.

    must_stop: returns whether the run was asked to stop; asked before each batch, by all processes.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        device: torch.device,
        world: World,
        must_stop: Callable[[], bool],
    ) -> None:
        self._model, self._config, self._device = model, config, device
        self._world, self._must_stop = world, must_stop

    def loss(self, loader: DataLoader, n: int | None) -> float:
        """Return the mean loss over the first n batches of a loader; None means all.

        Raises EvaluationInterrupted if the run was asked to stop.
        """
        with autocast(self._device, self._config):
            if self._world.size == 1:
                return loader_loss(self._model, self._until_stopped(loader), n)
            # Only the blocks of processes that share the weights are compiled for evaluation too.
            compiles = self._config.compile and self._config.parallel in ("fsdp", "hsdp")
            with self._world.compiling() if compiles else contextlib.nullcontext():
                return self._shared_loss(loader, min(n or len(loader), len(loader)))

    def _until_stopped(self, loader: DataLoader) -> Iterator[Batch]:
        for batch in from_start(loader):
            if self._must_stop():
                raise EvaluationInterrupted
            yield batch

    def _shared_loss(self, loader: DataLoader, n: int) -> float:
        """Return the loss of n batches, of which each process takes as many as the others.

        The losses are added in the order of the batches, as one process adds them: the result is
        the same bit for bit.
        """
        rank, size, decoder = self._world.rank, self._world.size, as_decoder(self._model)
        losses = torch.zeros(n, 2, dtype=torch.float64, device=self._device)
        batches = iter(from_start(loader, first=rank, every=size))
        batch: Batch | None = None
        for i in range(0, n, size):
            if self._must_stop():
                raise EvaluationInterrupted
            is_mine = i + rank < n
            if is_mine or batch is None:
                batch = next(batches, None) if is_mine else next(iter(from_start(loader)))
            assert batch is not None
            x, y = batch
            count = int((y != -100).sum())
            # Where the processes share the weights, a forward takes all of them: whoever has no
            # batch left computes one again.
            if is_mine and count or self._config.parallel in ("fsdp", "hsdp"):
                loss = decoder.mean_loss(x, y).double() * count
            if is_mine and count:
                losses[i + rank] = torch.stack((loss, loss.new_tensor(count)))
        total, targets = 0.0, 0.0
        for loss, count in self._world.sum(losses).tolist():
            total, targets = total + loss, targets + count
        if not targets:
            raise ValueError("no tokens to evaluate: every target is ignored")
        return total / targets
