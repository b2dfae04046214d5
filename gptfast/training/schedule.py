"""The learning rate of a step: a linear warm-up, then one of five shapes."""

import math

from gptfast.config import TrainConfig


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step`, counted from 0, of a run of `steps`.

    A linear warm-up to config.lr, then by config.schedule: "cosine" (Loshchilov & Hutter, 2017) and
    "linear" reach min_lr at the last step; "constant" stays; "wsd" stays until the last
    decay_steps, then falls linearly to min_lr (Hu et al., 2024); "exponential" rises from min_lr to
    lr (a range test: Smith, 2017).
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
