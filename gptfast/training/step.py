"""One optimizer step: forward, backward, gradient clipping and AdamW, watched by the guard."""

import contextlib
import fnmatch
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.config import TrainConfig
from gptfast.device import moved, random_state, restore_random_state
from gptfast.dropout import Rows, draw_seed
from gptfast.lora import add_adapters
from gptfast.model import GPT, foreign_part
from gptfast.modules import has_dropout, has_hooks
from gptfast.ops.backend import chosen_backend
from gptfast.optim import AdamW
from gptfast.torch_private import any_global_hooks, has_gradient_hooks, has_step_hooks
from gptfast.training.cuda_graph import StepGraph, recorder_for
from gptfast.training.drawn import draw_parts
from gptfast.training.guard import Fault, Guard
from gptfast.weights.adapter import AdapterConfig

Batch = tuple[Tensor, Tensor]
"""Input ids and targets, each (B, T) int64. A target of -100 is masked: it has no loss."""

_requires_grad = attrgetter("requires_grad")


class RefusedStep(ArithmeticError):
    """A step that the guard refused. It left the weights and the random state as they were."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def autocast(device: torch.device, config: TrainConfig) -> contextlib.AbstractContextManager:
    """Return a context that runs operations in bf16 if config.precision is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


@contextlib.contextmanager
def _restored_precision(products: Any) -> Iterator[None]:
    """Set the fp32_precision of a part of torch.backends to what it was, once the context ends.

    One that equals what it would inherit counts as inherited: PyTorch does not tell them apart.
    """
    before = products.fp32_precision
    try:
        yield
    finally:
        products.fp32_precision = "none"
        if products.fp32_precision != before:
            products.fp32_precision = before


@contextlib.contextmanager
def matmul_precision(config: TrainConfig) -> Iterator[None]:
    """Make fp32 products as exact as config.matmul_precision says, while the context lasts.

    This is a setting of the process. None leaves it as it is. Raises ValueError where the process
    has set it by PyTorch's other way, which cannot be mixed with this one.
    """
    if config.matmul_precision is None:
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        raise ValueError(
            "matmul_precision cannot be set where a fp32_precision of torch.backends is: leave one "
            "of the two out"
        ) from None
    backends: Any = torch.backends  # some of its attributes are made when it is imported
    with (
        _restored_precision(backends.cuda.matmul),
        _restored_precision(backends.mkldnn.matmul),
    ):
        torch.set_float32_matmul_precision(config.matmul_precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def adapt(model: GPT, config: TrainConfig, base_fingerprint: str | None = None) -> None:
    """Give a model the adapters of config.lora_rank, if any. Raises ValueError if it has others.

    base_fingerprint: see `add_adapters`.
    """
    if config.lora_rank is not None:
        settings = (config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
        add_adapters(
            model,
            AdapterConfig(*settings),
            base_dtype=config.lora_base_dtype,
            base_fingerprint=base_fingerprint,
        )
    elif model.adapter is not None:
        raise ValueError("the model has an adapter: train it with its lora_rank, or merge it first")


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

    Applies config.lora_rank, freeze, activation_checkpointing, skip_below and compile to the model,
    and config.cuda_graph on a GPU. log: takes a line about a graph that cannot be made.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        device: torch.device,
        log: Callable[[str], None] = print,
    ) -> None:
        self.config, self.device = config, device
        adapt(model, config)
        freeze(model, config.freeze)
        model.activation_checkpointing = config.activation_checkpointing
        model.skip_below = config.skip_below
        self.raw_model = model
        # Compiled code is given the random numbers of dropout, so that they are the same without
        # it; a part of others would not know what to do with them.
        self._draws_first = (
            config.compile
            and has_dropout(model.modules())
            and foreign_part(model, adapters=True) is None
        )
        # Who writes which part of a checkpoint, where several processes have parts of the weights.
        self.shards: Any = None
        is_empty = model.device.type == "meta"
        self.model = self._placed(model)
        if is_empty:
            draw_parts(model, config.seed)
        self.optimizer = AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            max_norm=config.max_norm,
        )
        self.guard = Guard(config)
        self._parts, self._params = list(model.modules()), list(model.parameters())
        recorder = recorder_for(config, device)
        self._step: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = self._compute
        if recorder is not None:
            self._step = StepGraph(
                self._compute, self._params, self._held, self._obstacle, recorder, device, log
            )

    def _placed(self, model: GPT) -> Any:
        """Return what is called in a step, before the optimizer takes the model's parameters.

        A model on the meta device gets memory here, and its values after that.
        """
        if model.device.type == "meta":
            model.to_empty(device=self.device)
        return torch.compile(model, fullgraph=True) if self.config.compile else model

    def whole_model(self) -> GPT | None:
        """Return the model with all of its weights, on the first process at least.

        All processes must call it.
        """
        return self.raw_model

    def run(
        self,
        batches: Sequence[Batch],
        lr: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Take a step with learning rate lr on the mean loss over all targets of the batches.

        meanwhile: called while a GPU computes the step; must not raise.

        Returns "loss" in nats per token, "lr", "grad_norm" before clipping, and "targets", the
        number of targets. If the guard skips the step, "skipped" has the reason, and numbers that
        are not finite are left out. Raises RefusedStep if the run must not continue.
        """
        rng, guard_before = random_state(), self.guard.state_dict()
        counts = [int((y != -100).sum()) for _, y in batches]
        loss, norm = math.nan, None
        fault: Fault | None = Fault("every target is masked", finite=True)
        if sum(counts):
            try:
                # A replay knows nothing of the attribute, which has the norm of the step before.
                numbers, self.optimizer.grad_norm = self._step(self._inputs(batches, counts, lr))
                if meanwhile is not None:
                    meanwhile()
                # The only time that a step waits for a GPU.
                loss, norm = numbers.tolist()
            except Exception:  # for example from an interrupted compiler; the step can be retried
                restore_random_state(rng)
                raise
            norm, fault = self._judge(loss, norm)
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

    def _inputs(self, batches: Sequence[Batch], counts: Sequence[int], lr: float) -> list[Tensor]:
        """Return what `_compute` takes: x and y of each batch with targets, then the numbers.

        counts: the number of targets in each batch. Every target has the same weight.
        """
        limits = [self.guard.limit(name) for name in ("loss", "grad_norm")]
        shares = [count / sum(counts) for count in counts if count]
        numbers = torch.tensor([lr, *limits, *shares], dtype=torch.float64, device="cpu")
        kept = [batch for batch, count in zip(batches, counts, strict=True) if count]
        return [*(tensor for batch in kept for tensor in batch), numbers]

    def _compute(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Queue a step; return its loss and gradient norm as they will be, (2,) fp64.

        Also returns the optimizer's own gradient norm, 0-d. Where the guard will find fault with
        one of the numbers, the update changes nothing. All that differs between two steps is in the
        inputs, and nothing is read back.
        """
        *tensors, numbers = [moved(x, self.device) for x in inputs]
        lr, loss_limit, norm_limit, *shares = numbers.unbind()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for x, y, share in zip(tensors[::2], tensors[1::2], shares, strict=True):
            with autocast(self.device, self.config):
                loss = self._loss(x, y)
            loss.backward(gradient=share.to(loss.dtype))
            total = total + loss.detach().double() * share
        return self._update(total, lr, loss_limit, norm_limit)

    def _loss(self, x: Tensor, y: Tensor, rows: Rows | None = None) -> Tensor:
        """Return the mean loss of a batch, (B, T) int64. rows: which rows of one; None for all."""
        model = self.raw_model
        try:
            if not (self._draws_first and model.training):
                model.rows = rows
                return self.model(x, y)
            model.rows = rows or Rows(0, len(x))
            draws = model.config.dropout > 0  # as GPT asks, without the dropout of adapters
            return self.model(x, y, seed=draw_seed(x.device) if draws else 0)
        finally:
            model.rows = None

    def _update(
        self, total: Tensor, lr: Tensor, loss_limit: Tensor, norm_limit: Tensor
    ) -> tuple[Tensor, ...]:
        """Update the weights, unless the loss or the norm is above its limit; see `_compute`.

        All are 0-d. total: the loss of the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        accepted = total.isfinite() & (total <= loss_limit)
        optimizer = self._updating()
        optimizer.step(norm_limit=norm_limit.where(accepted, math.nan))
        norm = optimizer.grad_norm
        assert norm is not None  # max_norm is set
        return torch.stack((total, norm.double())), norm

    def _updating(self) -> AdamW:
        """Return the optimizer of what this process updates."""
        return self.optimizer

    def close(self) -> None:
        """Give this process weights of its own, if it shares them; a further step may follow."""

    def _held(self) -> Hashable:
        """Return what a graph of `_compute` holds besides its inputs."""
        # Asked before each step: lists that were made once, and no traversal of the model.
        groups, state, model = self.optimizer.param_groups, self.optimizer.state, self.raw_model
        states = chain.from_iterable(map(dict.values, state.values()))
        addresses = map(Tensor.data_ptr, chain(self._params, states))
        changing = ("params", "lr")
        options = [v for group in groups for name, v in group.items() if name not in changing]
        options += [(m.training, m.p) for m in self._parts if isinstance(m, nn.Dropout)]
        options += [self.optimizer.max_norm, model.skip_below, model.activation_checkpointing]
        options += [chosen_backend(), *map(_requires_grad, self._params)]
        return *addresses, *options, self.model, self._hook()

    def _hook(self) -> str:
        """Return what has a hook, which a graph would not call: it repeats kernels alone."""
        if any_global_hooks() or any(map(has_hooks, self._parts)):
            return "a module has a hook"
        if any(map(has_gradient_hooks, self._params)):
            return "a parameter has a hook"
        return "the optimizer has a hook" if has_step_hooks(self.optimizer) else ""

    def _obstacle(self) -> str | None:
        """Return why a graph would not do what the step does, or None."""
        if hook := self._hook():
            return hook
        part = foreign_part(self.raw_model, adapters=True)
        if part is not None:
            return f"the model is not a GPT as gptfast makes it, {part}"
        if self.config.activation_checkpointing and has_dropout(self._parts):
            # The recomputation reads the state of the generator, which a capture forbids.
            return "activation checkpointing with dropout repeats random numbers"
        return None

    def _judge(self, loss: float, norm: float) -> tuple[float | None, Fault | None]:
        """Record the numbers; return the norm and the fault.

        The norm is None, and is not recorded, if the loss is at fault.
        """
        fault = self.guard.judge("loss", loss)
        self.guard.record("loss", loss)
        if fault is not None:
            return None, fault
        fault = self.guard.judge("grad_norm", norm)
        self.guard.record("grad_norm", norm)
        return norm, fault

    def _refused(self, fault: Fault) -> RefusedStep:
        """Return the error that names the fault and its remedy."""
        times = f" after {self.guard.in_a_row} steps skipped" if self.guard.in_a_row else ""
        remedy = "raise --skip-zscore" if fault.finite else "--nonfinite skip skips such steps"
        return RefusedStep(fault.reason + times, remedy)
