"""What `--dry-run` shows: sizes, memory and time of a run or of a search. It writes nothing."""

import dataclasses
import heapq
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast.cli.settings import apply
from gptfast.cli.threads import set_threads
from gptfast.config import GPTConfig, parameter_shapes
from gptfast.device import peak_memory, threads_of
from gptfast.model import GPT
from gptfast.training.flops import flops_per_token
from gptfast.training.log import say
from gptfast.training.schedule import learning_rate
from gptfast.training.trainer import Trainer, run_length
from gptfast.weights.checkpoint import checkpoints

if TYPE_CHECKING:
    from gptfast.cli.train import Train

MEASURED_STEPS = 3
"""Steps that a dry run takes. The first is slower, and does not count."""
TRAINED_BYTES = 16
"""Bytes per trained parameter: fp32 weights, gradients and two moments."""
FP32_BYTES = 4
"""Bytes per parameter in a checkpoint that holds no state of the optimizer for it."""
SAVED_BYTES = 12
"""Bytes per trained parameter in a checkpoint: weights and two moments."""


@dataclass(frozen=True)
class Measured:
    """A few measured steps of a run."""

    seconds: float
    """The time of a step."""
    flops_per_second: float
    memory: int
    """The most bytes that the process has held."""


def plan_run(trainer: Trainer, *, resume: bool) -> None:
    """Print what a run would take, measured on a few steps.

    Raises ValueError for resume=False in a directory that has checkpoints, as the run would.
    """
    config, model = trainer.config, trainer.model.config
    there = checkpoints(config.out)
    if there and not resume:
        raise ValueError(
            f"{config.out} already holds a run; continue it with --resume or choose another --out"
        )
    done = int(there[-1].name.removeprefix("step-")) if there else 0
    n = parameter_count(model)
    print(
        f"model: {n:,} parameters: {_counted(model.n_layer, 'block')}, "
        f"{_counted(model.n_head, 'head')}, {model.n_embd} "
        f"channels, a context of {model.block_size:,} and a vocabulary of {model.vocab_size:,} "
        "tokens"
    )
    epochs = trainer.total_steps * config.accumulation_steps / len(trainer.train_loader)
    print(
        f"batches: {len(trainer.train_loader):,} for training, {len(trainer.val_loader):,} for "
        f"validation; {trainer.total_steps:,} steps are {epochs:.3g} epochs"
    )
    trained, frozen = _trained_and_frozen(trainer.model)
    if not _fits(state := _state_bytes(trainer.model)):
        return
    measured = measure(trainer)
    kept = config.keep + config.keep_best
    adapter = trainer.model.adapter
    if adapter is not None:
        base = ", base in int8" if config.lora_base_dtype else ""
        print(f"adapter: {trained:,} parameters ({adapter.described()}{base})")
    print(f"memory: {_size(measured.memory)}, of which training state {_size(state)}")
    saved = trained * (SAVED_BYTES if config.save_optimizer else FP32_BYTES)
    if adapter is None:  # an adapter is saved alone
        saved += frozen * FP32_BYTES
    print(f"disk: {_size(saved)} for each of up to {kept} checkpoints in {config.out}")
    left = max(0, trainer.total_steps - done)
    per_evaluation = _evaluation_batches(trainer)
    evaluations = left // config.eval_interval + (done == 0)
    # An evaluation goes forward only: a third of the work.
    batch = measured.seconds / config.accumulation_steps
    seconds = left * measured.seconds + evaluations * per_evaluation * batch / 3
    resumed = f" from step {done}" if done else ""
    print(
        f"time: about {_duration(seconds)}{resumed}: {measured.seconds:.3g} s a step, measured, "
        f"and {_counted(evaluations, 'evaluation')} of {per_evaluation} batches"
    )
    say("dry run: nothing was written")


def plan_search(common: "Train", trials: Sequence[dict[str, Any]], jobs: int) -> None:
    """Print what the trials of a search would take: their sizes, and the time of all of them.

    The steps of the first are measured, with the threads that each of `jobs` trials at a time has;
    the others are estimated by their FLOPs. Raises ValueError for a trial whose data or settings
    cannot be used.
    """
    jobs = min(jobs, len(trials))
    commands = [trial_settings(common, trial) for trial in trials]
    trainer, _, _ = commands[0].trainer()
    if not _fits(_state_bytes(trainer.model), jobs):
        return
    shared = jobs > 1 and "OMP_NUM_THREADS" not in os.environ
    set_threads(common.threads or (threads_of(jobs) if shared else None))
    measured, seconds_each = measure(trainer), list[float]()
    found = {_batches_of(commands[0]): trainer}
    for trial, command in zip(trials, commands, strict=True):
        config, steps, T = _shape_of(command, found)
        tokens = command.batch_size * command.train.accumulation_steps * T
        seconds = steps * tokens * flops_per_token(config, T) / measured.flops_per_second
        seconds_each.append(seconds)
        settings = " ".join(f"{name}={value}" for name, value in trial.items())
        print(
            f"{settings}: {parameter_count(config):,} parameters, {steps:,} steps of {tokens:,} "
            f"tokens, about {_duration(seconds)}"
        )
    at_once = f", {jobs} at a time" if jobs > 1 else ""
    # Trials that share a GPU wait for one another.
    shared_by = jobs if trainer.device.type == "cpu" else 1
    print(f"memory: about {_size(measured.memory * jobs)}{at_once}")
    print(
        f"time: about {_duration(_time_of(seconds_each, shared_by))} of training for "
        f"{_counted(len(trials), 'trial')}{at_once}"
    )
    say("dry run: nothing was written")


def _time_of(seconds: Sequence[float], jobs: int) -> float:
    """Return the time of trials of which each starts, in their order, when another one ends."""
    ends = [0.0] * jobs
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def trial_settings(common: "Train", trial: dict[str, Any]) -> "Train":
    """Return the command of a trial. Raises ValueError for a bad setting."""
    if {"max_steps", "epochs"} & trial.keys():
        common = apply(common, {"max_steps": None, "epochs": None}, "the search")
    return apply(common, trial, "the search")


def measure(trainer: Trainer) -> Measured:
    """Take a few steps of a trainer that is not used afterwards."""
    config, seconds = trainer.config, []
    batches = _endless(trainer)
    trainer.model.train()
    for step in range(MEASURED_STEPS):
        of_step = list(islice(batches, config.accumulation_steps))
        start = time.perf_counter()
        trainer.step.run(of_step, learning_rate(step, trainer.total_steps, config))
        seconds.append(time.perf_counter() - start)
    usual = statistics.median(seconds[1:])
    tokens, T = sum(x.numel() for x, _ in of_step), of_step[0][0].shape[1]
    flops = tokens * flops_per_token(trainer.model.config, T)
    return Measured(usual, flops / usual, peak_memory(trainer.device))


def _endless(trainer: Trainer) -> Iterator[Any]:
    while True:
        yield from trainer.train_loader


def parameter_count(config: GPTConfig) -> int:
    """Return the number of parameters of a model."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def _batches_of(command: "Train") -> tuple[Any, ...]:
    """Return the settings that decide which batches there are."""
    window = command.max_length or command.model.block_size
    data = (command.data, command.tokenizer_name(), command.split)
    return (*data, command.batch_size, window, command.stride)


def _shape_of(
    command: "Train", found: dict[tuple[Any, ...], Trainer]
) -> tuple[GPTConfig, int, int]:
    """Return the model's configuration, the number of steps and the tokens per window.

    found: trainers by their batches, of which one is made for each new kind.
    """
    key = _batches_of(command)
    if key not in found:
        found[key], _, _ = command.trainer()
    trainer = found[key]
    vocab_size = max(
        command.model.vocab_size, trainer.tokenizer.n_vocab if trainer.tokenizer else 1
    )
    config = dataclasses.replace(command.model, vocab_size=vocab_size)
    steps = run_length(command.train, len(trainer.train_loader))
    return config, steps, command.max_length or command.model.block_size


def _evaluation_batches(trainer: Trainer) -> int:
    """Return the number of batches of an evaluation, of training and of validation data."""
    n = trainer.config.eval_batches
    of_validation = len(trainer.val_loader)
    return min(n or of_validation, len(trainer.train_loader)) + min(
        n or of_validation, of_validation
    )


def _trained_and_frozen(model: GPT) -> tuple[int, int]:
    """Return the numbers of parameters that a run trains, and of those that it does not."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()) - trained


def _state_bytes(model: GPT) -> int:
    """Return the bytes of parameters, gradients and moments while a model is trained."""
    trained, _ = _trained_and_frozen(model)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    return trained * TRAINED_BYTES + frozen + sum(b.nbytes for b in model.buffers())


def _fits(state: int, jobs: int = 1) -> bool:
    """Return whether the training state of `jobs` runs, in bytes each, fits into memory.

    If not, say so.
    """
    status = Path("/proc/meminfo")
    lines = status.read_text().splitlines() if status.exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line), None)
    needed = state * jobs
    if free is None or needed < free:
        return True
    fewer = ", fewer --jobs" if jobs > 1 else ""
    say(
        f"memory: the training state alone takes {_size(needed)}, and {_size(free)} are free: take "
        f"a smaller model{fewer} or another machine"
    )
    return False


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{max(1, round(n / 1e6)):,} MB"


def _duration(seconds: float) -> str:
    """Return a time in words, such as 2 min 40 s."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {round(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"
