"""The learning rate of each step: a linear warm-up, then one of five schedules."""

import math

from gptfast.config import TrainConfig


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0, in a run of `steps`.

    The rate rises linearly to config.lr during the warm-up, then follows config.schedule. "cosine"
    (Loshchilov & Hutter, 2017) and "linear" fall to min_lr at the last step. "constant" stays at
    lr. "wsd" (Hu et al., 2024) stays at lr and falls linearly to min_lr in the last decay_steps.
    "exponential" rises from min_lr to lr, for a learning-rate range test (Smith, 2017).
    """
    warmup = config.warmup_steps if config.warmup_steps is not None else max(1, steps // 20)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    lr, min_lr = config.lr, config.min_lr if config.min_lr is not None else config.lr / 10
    rest = max(1, steps - 1 - warmup)
    done = min(1.0, (step - warmup) / rest)
    if config.schedule == "cosine":
        return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "linear":
        return lr + (min_lr - lr) * done
    if config.schedule == "exponential":
        return min_lr * (lr / min_lr) ** done
    if config.schedule == "wsd":
        decay = min(rest, config.decay_steps or max(1, steps // 5))
        left = max(0, steps - 1 - step)
        return min_lr + (lr - min_lr) * min(1.0, left / decay)
    return lr


def check_schedule(config: TrainConfig, steps: int | None = None) -> None:
    """Raise ValueError for settings of the learning rate that contradict one another.

    steps: the length of the run; None leaves out what depends on it.
    """
    decay = config.decay_steps
    if config.min_lr is not None and config.min_lr > config.lr:
        raise ValueError(
            f"min_lr must be at most lr, got min_lr {config.min_lr} and lr {config.lr}; lower "
            "min_lr, or leave it out for a tenth of lr"
        )
    if decay is not None and config.schedule != "wsd":
        raise ValueError(
            f"decay_steps {decay} is for schedule wsd, not {config.schedule}, which decays during "
            "the whole run; leave it out or choose wsd"
        )
    if steps is None:
        return
    warmup = config.warmup_steps or 0
    if warmup > steps:
        raise ValueError(
            f"warmup_steps {warmup} is longer than the run of {steps} steps; lower it or train for "
            "longer"
        )
    if decay is not None and warmup + decay > steps:
        what = f"decay_steps {decay} is"
        if warmup:
            what = f"warmup_steps {warmup} and decay_steps {decay} together are"
        raise ValueError(
            f"{what} longer than the run of {steps} steps; lower it or train for longer"
        )
