"""One optimizer step: forward, backward, gradient clipping and AdamW, watched by the guard."""

import contextlib
import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.config import TrainConfig
from gptfast.device import random_state, restore_random_state
from gptfast.model import GPT
from gptfast.ops.adamw import grad_norm
from gptfast.optim import AdamW
from gptfast.training.guard import Fault, Guard

Batch = tuple[Tensor, Tensor]
"""Input ids and targets, each (B, T) int64. A target of -100 is masked: it has no loss."""


class RefusedStep(ArithmeticError):
    """A step that the guard refused. It left the weights and the random state as they were."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def autocast(device: torch.device, config: TrainConfig) -> contextlib.AbstractContextManager:
    """Return a context that runs operations in bf16 if config.precision is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude the parameters whose names match one of the patterns from training.

    Raises ValueError for a pattern that matches no name, and if nothing is left to train.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ValueError(
                f"freeze: no parameter matches {pattern!r}; names are like {next(iter(names))}"
            )
        for name in matching:
            names[name].requires_grad_(False)
    if not any(p.requires_grad for p in names.values()):
        raise ValueError(f"freeze {' '.join(patterns)} leaves no parameter to train")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters to train as two groups for AdamW.

    Matrices and embeddings have weight decay; biases and norms have none.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


class TrainStep:
    """A model with its optimizer and its guard. `run` takes one optimizer step.

    Applies config.freeze, activation_checkpointing, skip_below and compile to the model.
    """

    def __init__(self, model: GPT, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        freeze(model, config.freeze)
        model.activation_checkpointing = config.activation_checkpointing
        model.skip_below = config.skip_below
        self.raw_model = model
        self.model = torch.compile(model, fullgraph=True) if config.compile else model
        self.optimizer = AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            max_norm=config.max_norm,
        )
        self.guard = Guard(config)

    def run(self, batches: Sequence[Batch], lr: float) -> dict[str, Any]:
        """Take a step with learning rate lr on the mean loss over all targets of the batches.

        Returns "loss" in nats per token, "lr", "grad_norm" before clipping, and "targets", the
        number of targets. If the guard skips the step, "skipped" has the reason, and numbers that
        are not finite are left out. Raises RefusedStep if the run must not continue.
        """
        rng, guard_before = random_state(), self.guard.state_dict()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        counts = [int((y != -100).sum()) for _, y in batches]
        try:
            loss, norm = self._forward_backward(batches, counts), None
        except Exception:  # for example from an interrupted compiler; the step can be tried again
            restore_random_state(rng)
            raise
        if sum(counts):
            fault = self.guard.judge("loss", loss)
            self.guard.record("loss", loss)
        else:
            fault = Fault("every target is masked", finite=True)
        if fault is None:
            norm, fault = self._update()
        row = {"loss": loss, "lr": lr, "grad_norm": norm, "targets": sum(counts)}
        if fault is None:
            self.guard.record_step()
            return row
        if self.guard.may_skip(fault):
            self.guard.record_skip()
            if not self.guard.gives_up:
                finite = {name: x for name, x in row.items() if x is not None and math.isfinite(x)}
                return finite | {"targets": 0, "skipped": fault.reason}
        refused = self._refused(fault)
        # Undo what the step changed. A resumed run may skip MAX_SKIPS_IN_A_ROW steps again.
        restore_random_state(rng)
        self.guard.load_state_dict({**guard_before, "in_a_row": 0})
        raise refused

    def _forward_backward(self, batches: Sequence[Batch], counts: Sequence[int]) -> float:
        """Accumulate gradients and return the mean loss.

        Every target has the same weight. counts: the number of targets in each batch.
        """
        mean_loss = 0.0 if any(counts) else math.nan
        for (x, y), count in zip(batches, counts, strict=True):
            if not count:
                continue
            with autocast(self.device, self.config):
                loss = self.model(x.to(self.device), y.to(self.device))
            share = count / sum(counts)
            loss.backward(gradient=loss.new_tensor(share))
            mean_loss += loss.item() * share
        return mean_loss

    def _update(self) -> tuple[float, Fault | None]:
        """Step the optimizer unless the gradient norm is bad; return the norm and its fault."""
        if self.config.skip_zscore is not None:  # the optimizer would not refuse an outlier
            grads = [p.grad for p in self.raw_model.parameters() if p.grad is not None]
            norm = grad_norm(grads).item()
            fault = self.guard.judge("grad_norm", norm)
            if fault is None:
                self.optimizer.step()
        else:
            self.optimizer.step()  # changes nothing if the norm is not finite
            assert self.optimizer.grad_norm is not None  # max_norm is set
            norm = self.optimizer.grad_norm.item()
            fault = self.guard.judge("grad_norm", norm)
        self.guard.record("grad_norm", norm)
        return norm, fault

    def _refused(self, fault: Fault) -> RefusedStep:
        """Return the error that names the fault and its remedy."""
        times = f" after {self.guard.in_a_row} steps skipped" if self.guard.in_a_row else ""
        remedy = "raise --skip-zscore" if fault.finite else "--nonfinite skip skips such steps"
        return RefusedStep(fault.reason + times, remedy)
