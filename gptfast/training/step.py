"""One optimizer step: forward, backward, clip, AdamW, unless the numbers are at fault."""

import contextlib
import fnmatch
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.config import TrainConfig
from gptfast.device import random_state, restore_random_state
from gptfast.evaluate.loss import batch_loss
from gptfast.model import GPT
from gptfast.ops.adamw import grad_norm
from gptfast.optim import AdamW
from gptfast.training.guard import Fault, Guard

Batch = tuple[Tensor, Tensor]


class RefusedStep(ArithmeticError):
    """A step that would have spoilt the weights; it changed none and drew no random number."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def autocast(device: torch.device, config: TrainConfig) -> contextlib.AbstractContextManager:
    """bf16 autocast if config.precision asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


class TrainStep:
    """Trains a model on batches, one optimizer step a call. Freezes what config.freeze names."""

    def __init__(self, model: GPT, config: TrainConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        freeze(model, config.freeze)
        model.activation_checkpointing = config.activation_checkpointing
        model.skip_below = config.skip_below
        compiled = torch.compile(model, fullgraph=True) if config.compile else model
        self.loss = partial(batch_loss, compiled)
        self.optimizer = AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            max_norm=config.max_norm,
        )
        self.guard = Guard(config)

    def __call__(self, batches: Sequence[Batch], lr: float) -> dict[str, Any]:
        """Step on the mean loss over all targets of `batches` (x, y), each (B, T) int64.

        Returns "loss" in nats per token, "lr", "grad_norm" before clipping, "targets", how many;
        where the guard passes the step over, also "skipped", the reason, and no number that is not
        finite. Raises RefusedStep where the run must not go on.
        """
        rng, judged = random_state(), self.guard.state_dict()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        counts = [int((y != -100).sum()) for _, y in batches]
        try:
            loss, norm = self._backward(batches, counts), None
        except Exception:  # a compiler that was interrupted, say: the step can be tried again
            restore_random_state(rng)
            raise
        fault = Fault("every target is masked", finite=True)
        if sum(counts):
            fault = self.guard.fault("loss", loss)
        if fault is None:
            norm, fault = self._update()
        row = {"loss": loss, "lr": lr, "grad_norm": norm, "targets": sum(counts)}
        if fault is None:
            self.guard.accept()
            return row
        if not self.guard.skips(fault):
            times = f" after {self.guard.in_a_row} steps skipped" if self.guard.in_a_row else ""
            remedy = "raise --skip-zscore" if fault.finite else "--nonfinite skip passes it over"
            # As if the step had not been tried; a resumed run may skip as often again.
            restore_random_state(rng)
            self.guard.load_state_dict({**judged, "in_a_row": 0})
            raise RefusedStep(fault.reason + times, remedy)
        finite = {name: x for name, x in row.items() if x is not None and math.isfinite(x)}
        return finite | {"targets": 0, "skipped": fault.reason}

    def _backward(self, batches: Sequence[Batch], counts: list[int]) -> float:
        """Accumulate gradients; every target weighs the same, whatever its batch. The mean loss."""
        total = 0.0 if any(counts) else math.nan
        for (x, y), count in zip(batches, counts, strict=True):
            if count:
                with autocast(self.device, self.config):
                    loss = self.loss(x, y)
                share = count / sum(counts)
                loss.backward(gradient=loss.new_tensor(share))
                total += loss.item() * share
        return total

    def _update(self) -> tuple[float, Fault | None]:
        """Step the optimizer unless the gradient norm is at fault; the norm and what is wrong."""
        if self.config.skip_zscore is not None:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = grad_norm(grads).item()
            if fault := self.guard.fault("grad_norm", norm):
                return norm, fault
            self.optimizer.step()
            return norm, None
        self.optimizer.step()  # changes nothing if the norm is not finite
        norm = self.optimizer.grad_norm.item()
        return norm, self.guard.fault("grad_norm", norm)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters whose names match a pattern out of training.

    Raises ValueError for a pattern that no name matches, and if nothing is left to train.
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
    """Matrices and embeddings, which decay; biases and norms, which do not. Less what is frozen."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
