"""The training steps of bench/gpu.py: ours replayed, eager and compiled, beside plain PyTorch's.

"gptfast" is the step that `gptfast train --precision bf16` takes: `TrainStep`, with fp32 weights
under autocast, the guard, and the CUDA graph that it replays. "gptfast, eager" is the same with
--no-cuda-graph, "gptfast, compiled" with --compile. "gptfast, bf16 parameters" has fp32 masters and
no guard. "plain" is plain_gpt.py under autocast with torch's fused AdamW. FLOPs are counted as in
bench_train.py. The host's time of a TrainStep ends where it has queued its work; then it waits.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from bench_train import flops as step_flops
from gpu_cases import BF16, Built, GpuCase
from gpu_timing import Run, Waiting
from plain_gpt import PlainGPT, decay_groups
from torch import Tensor, nn

from gptfast import GPT, AdamW, GPTConfig, TrainConfig
from gptfast.training.cuda_graph import StepGraph
from gptfast.training.step import TrainStep

LR, MAX_NORM = 1e-4, 1.0
REPLAYED, EAGER, COMPILED = "gptfast", "gptfast, eager", "gptfast, compiled"
PARAMETERS = "gptfast, bf16 parameters"
PLAIN, PLAIN_COMPILED = "plain", "plain, compiled"
# What the command is told for each of its forms.
FORMS = {
    REPLAYED: {"cuda_graph": True},
    EAGER: {"cuda_graph": False},
    COMPILED: {"cuda_graph": False, "compile": True},
}

Batch = tuple[Tensor, Tensor]


def command_step(
    model: GPT, side: str, smoke: bool, device: torch.device, log: Callable[[str], None]
) -> TrainStep:
    """Return a step of `gptfast train --precision bf16`; log takes why there is no graph."""
    # The interpreter has no bf16, and nothing is compiled in a smoke run.
    options = {"precision": "fp32" if smoke else "bf16", **FORMS[side]}
    if smoke:
        options.pop("compile", None)
    settings = TrainConfig(lr=LR, max_norm=MAX_NORM, **options)  # type: ignore[arg-type]
    return TrainStep(model, settings, device, log)


def is_replayed(step: TrainStep) -> bool:
    """Return whether a step has captured its CUDA graph."""
    return isinstance(step._step, StepGraph) and step._step.is_captured


def _plain_step(
    net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, cast: bool, clip: bool
) -> Run:
    """Return a step that waits for nothing."""
    params = list(net.parameters())

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch[0].device.type, BF16, enabled=cast):
            loss = net(*batch)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        return loss

    return run


class Steps:
    """Training steps on the same batch, from the same weights."""

    def __init__(self, B: int, smoke: bool) -> None:
        small = GPTConfig(vocab_size=101, block_size=8, n_layer=1, n_head=2, n_embd=32)
        self.config, rows = (small, 2) if smoke else (GPTConfig(), B)
        self.smoke, self.cast = smoke, not smoke
        ids = torch.randint(self.config.vocab_size, (2, rows, self.config.block_size))
        self.batch: Batch = (ids[0], ids[1])
        torch.manual_seed(0)
        self.state = GPT(self.config).state_dict()
        self.nets: list[nn.Module] = []
        self.replayed: list[TrainStep] = []
        self.reasons: list[str] = []

    def make(self, side: str) -> Run:
        """Return the step of a side."""
        if side in FORMS:
            return self._command(side)
        if side == PARAMETERS:
            net = self._model(GPT)
            net = net.bfloat16() if self.cast else net
            optimizer = AdamW(decay_groups(net), lr=LR, max_norm=MAX_NORM)
            return _plain_step(net, optimizer, self.batch, False, False)
        net = self._model(PlainGPT)
        adamw = torch.optim.AdamW(decay_groups(net), lr=LR, fused=True)
        if side == PLAIN_COMPILED and not self.smoke:
            net = torch.compile(net, fullgraph=True)  # type: ignore[assignment]
        return _plain_step(net, adamw, self.batch, self.cast, True)

    def _model(self, kind: type[nn.Module]) -> nn.Module:
        net = kind(self.config)
        net.load_state_dict(self.state)
        self.nets.append(net)
        return net

    def _command(self, side: str) -> Run:
        model, device = self._model(GPT), self.batch[0].device
        assert isinstance(model, GPT)
        step = command_step(model, side, self.smoke, device, self.reasons.append)
        if side == REPLAYED:
            self.replayed.append(step)
        return Waiting(lambda queued: step.run([self.batch], LR, meanwhile=queued))

    def restart(self) -> None:
        """Give all models the weights that they had at first."""
        for net in self.nets:
            net.load_state_dict(self.state)

    def check_graphs(self) -> None:
        """Check that the steps that should replay a graph have captured one."""
        if self.batch[0].device.type == "cuda":
            reason = self.reasons[0] if self.reasons else "its inputs or addresses change"
            assert all(map(is_replayed, self.replayed)), f"no CUDA graph: {reason}"


def _loss(result: object) -> float:
    """Return the loss that a step returned."""
    return float(result["loss"] if isinstance(result, dict) else result)  # type: ignore[arg-type]


def _train(B: int, sides: tuple[str, ...], smoke: bool) -> Built:
    steps = Steps(B, smoke)
    made = {side: steps.make(side) for side in sides}

    def check() -> None:
        """Compare the losses of one more step, from the same weights."""
        steps.check_graphs()
        steps.restart()
        losses = {side: _loss(step()) for side, step in made.items()}
        expected = losses[sides[-1]]
        for side, loss in losses.items():
            assert abs(loss - expected) < 2e-2, f"{side}: loss {loss:.4f}, not {expected:.4f}"

    return Built(made, check)


def _case(name: str, B: int, sides: tuple[str, ...], seconds: float, smoke: bool) -> GpuCase:
    T = 1024
    return GpuCase(
        f"GPT-2 124M step bf16 B={B} T={T}{name}",
        partial(_train, B, sides),
        flops=step_flops(GPTConfig(), B, T),
        target="1.25x, 55% MFU",
        wall=True,
        rounds=10,
        seconds=seconds,
        smoke=smoke,
    )


def train_cases() -> Iterator[GpuCase]:
    """Yield the command's step, eager and replayed, and then its other forms; the last is plain."""
    yield _case("", 16, (REPLAYED, EAGER, PLAIN_COMPILED), 170, True)
    yield _case(", other forms", 16, (COMPILED, PARAMETERS, PLAIN), 150, False)


def large_case() -> Iterator[GpuCase]:
    """Yield the largest batch whose logits plain PyTorch can hold in 80 GB."""
    yield _case("", 32, (REPLAYED, PLAIN_COMPILED), 150, False)
