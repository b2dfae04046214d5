"""The training steps of bench/gpu.py: eager, compiled and captured, each beside plain PyTorch's.

"gptfast" is the step that `gptfast train --precision bf16` takes: fp32 weights under autocast, with
the guard that reads loss and norm on the host. "gptfast, bf16 parameters" has bf16 parameters with
fp32 masters and no guard. "plain" is plain_gpt.py under autocast with torch's fused AdamW. FLOPs
are counted as in bench_train.py.
"""

from collections.abc import Callable, Iterator

import torch
from bench_train import flops as step_flops
from gpu_cases import BF16, Built, GpuCase
from plain_gpt import PlainGPT, decay_groups
from torch import Tensor, nn

from gptfast import GPT, AdamW, GPTConfig, TrainConfig
from gptfast.training.step import TrainStep

LR, MAX_NORM = 1e-4, 1.0
OURS, PARAMETERS, PLAIN = "gptfast", "gptfast, bf16 parameters", "plain"

Step = Callable[[], object]


def _stepper(
    net: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], cast: bool,
    clip: bool, compiled: bool,
) -> Step:  # fmt: skip
    """Return a step without anything that waits for the device, so that it can be captured."""
    f = torch.compile(net, fullgraph=True) if compiled else net

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch[0].device.type, BF16, enabled=cast):
            loss = f(*batch)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
        optimizer.step()
        return loss

    return run


def steps(form: str, B: int, smoke: bool, sides: tuple[str, ...]) -> dict[str, Step]:
    """Return training steps on the same batch from the same weights; form: "eager", "compiled" or
    "captured", a step to capture."""
    small = GPTConfig(vocab_size=101, block_size=8, n_layer=1, n_head=2, n_embd=32)
    config, rows = (small, 2) if smoke else (GPTConfig(), B)
    batch = tuple(torch.randint(config.vocab_size, (2, rows, config.block_size)))
    compiled = form == "compiled" and not smoke
    torch.manual_seed(0)
    state = GPT(config).state_dict()
    cast = not smoke  # the interpreter has no bf16

    def model(kind: type[nn.Module]) -> nn.Module:
        net = kind(config)
        net.load_state_dict(state)
        return net

    def command() -> Step:
        precision = "bf16" if cast else "fp32"
        settings = TrainConfig(
            precision=precision, lr=LR, max_norm=MAX_NORM, compile=compiled, cuda_graph=False
        )
        step = TrainStep(model(GPT), settings, batch[0].device)
        return lambda: step.run([batch], LR)

    def ours(bf16: bool) -> Step:
        net = model(GPT).bfloat16() if bf16 and cast else model(GPT)
        optimizer = AdamW(decay_groups(net), lr=LR, max_norm=MAX_NORM)
        return _stepper(net, optimizer, batch, cast and not bf16, False, compiled)

    def plain() -> Step:
        net = model(PlainGPT)
        optimizer = torch.optim.AdamW(
            decay_groups(net), lr=LR, fused=True, capturable=form == "captured" and not smoke
        )
        return _stepper(net, optimizer, batch, cast, True, compiled)

    # What the command runs reads its loss on the host: a graph can hold the same step without that.
    first = command if form != "captured" else lambda: ours(bf16=False)
    made = {OURS: first, PARAMETERS: lambda: ours(bf16=True), PLAIN: plain}
    return {side: made[side]() for side in sides}


def _loss(result: object) -> float:
    """Return the loss that a step returned."""
    return float(result["loss"] if isinstance(result, dict) else result)  # type: ignore[arg-type]


def _train(form: str, B: int, sides: tuple[str, ...]) -> Callable[[bool], Built]:
    def build(smoke: bool) -> Built:
        first: dict[str, float] = {}
        made = steps(form, B, smoke, sides)
        if form != "captured":

            def noting(side: str, step: Step) -> Step:
                def run() -> object:
                    result = step()
                    if side not in first:
                        first[side] = _loss(result)
                    return result

                return run

            made = {side: noting(side, step) for side, step in made.items()}

        def check() -> None:
            for side, loss in first.items():
                expected = first.get(PLAIN, loss)
                assert abs(loss - expected) < 2e-2, f"{side}: loss {loss:.4f}, not {expected:.4f}"

        return Built(made, check)

    return build


def train_cases() -> Iterator[GpuCase]:
    """Yield batches whose logits plain PyTorch can hold in 80 GB, the most telling first."""
    T = 1024
    for form, rows, sides, seconds in (
        ("eager", 16, (OURS, PARAMETERS, PLAIN), 90),
        ("captured", 16, (OURS, PARAMETERS, PLAIN), 90),
        ("compiled", 16, (OURS, PLAIN), 150),
        ("compiled", 32, (PARAMETERS, PLAIN), 150),
    ):
        yield GpuCase(
            f"GPT-2 124M step bf16 B={rows} T={T} {form}",
            _train(form, rows, sides),
            flops=step_flops(GPTConfig(), rows, T),
            target="1.25x, 55% MFU",
            graph=form == "captured",
            wall=form != "captured",
            rounds=10,
            seconds=seconds,
            smoke=form == "eager",
        )
