"""One optimizer step of several processes, each of which computes its rows of the batches."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gptfast.config import TrainConfig
from gptfast.device import moved
from gptfast.model import GPT, foreign_part
from gptfast.modules import has_dropout
from gptfast.training.shares import Piece, Split
from gptfast.training.step import Batch, TrainStep, autocast
from gptfast.training.world import World


class ParallelStep(TrainStep, ABC):
    """A `TrainStep` whose rows are shared by the processes of a world.

    Takes the whole batches of a step, as one process does. Gradients are summed while the backward
    still runs, in a way of its own in each class. Raises ValueError for a model whose dropout would
    depend on the number of processes.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        device: torch.device,
        log: Callable[[str], None],
        world: World,
        split: Split,
    ) -> None:
        self._world, self._split = world, split
        self._pieces: list[Piece] = []
        self._counts: list[int] = []
        if has_dropout(model.modules()) and (part := foreign_part(model)) is not None:
            raise ValueError(
                f"dropout that is the same on any number of processes needs a GPT as gptfast makes "
                f"it, but {part}"
            )
        super().__init__(model, config, device, log)
        self._step = self._compute  # a CUDA graph would repeat one process's part only
        self._compiled: set[tuple[torch.Size, ...]] = set()

    @abstractmethod
    def _summing(self, last: bool) -> contextlib.AbstractContextManager:
        """Return the context of a forward and backward, of which the last sums the gradients."""

    def _begin_alike(self, model: GPT) -> None:
        """Give all processes the first one's values, also of what is not trained."""
        if model.device.type == "meta":  # whose values all will draw alike
            return
        with self._world.together(), torch.no_grad():
            for t in chain(model.parameters(), model.buffers()):
                values = t.detach().contiguous()
                dist.broadcast(values.view(-1).view(torch.uint8), 0)
                t.copy_(values)

    def _lay_out(self) -> None:
        """Prepare for a step, before its first backward."""

    def run(
        self,
        batches: Sequence[Batch],
        lr: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        # All processes know the shapes of all batches, so they agree on when they compile.
        shapes = tuple(x.shape for x, _ in batches)
        compiles = self.config.compile and shapes not in self._compiled
        longer = self._world.compiling() if compiles else contextlib.nullcontext()
        with self._world.together(), longer:
            row = super().run(batches, lr, meanwhile)
        self._compiled.add(shapes)
        return row

    def _inputs(self, batches: Sequence[Batch], counts: Sequence[int], lr: float) -> list[Tensor]:
        """Return the numbers that `_compute` takes; the share of this process is in `_pieces`."""
        self._pieces, self._counts = self._split.pieces(batches), list(counts)
        limits = [self.guard.limit(name) for name in ("loss", "grad_norm")]
        return [torch.tensor([lr, *limits, sum(counts)], dtype=torch.float64, device="cpu")]

    def _compute(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Queue a step, as `TrainStep._compute` does: the numbers are those of all processes."""
        lr, loss_limit, norm_limit, count = moved(inputs[0], self.device).unbind()
        self.optimizer.zero_grad(set_to_none=True)
        total = self._world.sum(self._backward(count))
        return self._update(total, lr, loss_limit, norm_limit)

    def _backward(self, count: Tensor) -> Tensor:
        """Add up the gradients of all processes; return this one's part of the mean loss, fp64.

        count: the number of targets in the step, 0-d.
        """
        self._lay_out()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        mine = [i for i, piece in enumerate(self._pieces) if piece.mine]
        for i, (piece, targets) in enumerate(zip(self._pieces, self._counts, strict=True)):
            last = i == mine[-1]
            # One process draws nothing for a batch without targets.
            if not targets and piece.mine:
                self._take_part(last=last)
            elif targets and not piece.mine:
                self.raw_model.draw_only(*piece.x.shape)
            elif targets and (loss := self._backward_of(piece, count, last)) is not None:
                total = total + loss
        return total

    def _backward_of(self, piece: Piece, count: Tensor, last: bool) -> Tensor | None:
        """Add the gradients of a piece; return its part of the loss, None without a target.

        last: whether it is the last one here, during which the processes add up their gradients.
        """
        share = piece.count / count
        with self._summing(last):
            with autocast(self.device, self.config):
                x, y = moved(piece.x, self.device), moved(piece.y, self.device)
                loss = self._loss(x, y, piece.rows)
            loss.backward(gradient=share.to(loss.dtype))
        return loss.detach().double() * share if piece.count else None

    def _take_part(self, *, last: bool) -> None:
        """Add no gradient to those of the others, without a change of the random state."""
        like = next(piece for piece in self._pieces if piece.mine)  # of a shape to compile anyway
        empty = Piece(like.x, torch.full_like(like.y, -100), 0, like.rows, True)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self._backward_of(empty, torch.ones((), dtype=torch.float64, device=self.device), last)


def _sum_hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Return the sum of a bucket over the processes; by default DDP divides it by their number."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class DDPStep(ParallelStep):
    """A `ParallelStep` of PyTorch's DistributedDataParallel: each process has the whole model."""

    _is_laid_out = False

    def _placed(self, model: GPT) -> Any:
        with self._world.together():
            ddp = DistributedDataParallel(super()._placed(model), gradient_as_bucket_view=True)
        ddp.register_comm_hook(None, _sum_hook)
        return ddp

    def _summing(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.model.no_sync()

    def _lay_out(self) -> None:
        """Let DDP see a backward before the first one that counts.

        DDP lays out its buckets anew after its first backward. A resumed run would otherwise take
        its first step with another order of summation than a run that was not interrupted.
        """
        if not self._is_laid_out:
            self._take_part(last=True)
            self.optimizer.zero_grad(set_to_none=True)
            self._is_laid_out = True
