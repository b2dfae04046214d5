"""Flags that cannot apply beside others: refused in one line instead of being ignored."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptfast.cli.flags import UsageError
from gptfast.training.schedule import check_schedule

if TYPE_CHECKING:
    from gptfast.cli.train import Train

# What a learning-rate range test sets itself.
_RANGE_TEST = (
    *("lr", "min_lr", "schedule", "warmup_steps", "decay_steps"),
    *("early_stopping", "skip_zscore", "nonfinite"),
)
# Flags of `gptfast eval` by what they belong to.
_OF_DATA, _OF_TASKS = ("stride", "part"), ("limit",)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != []


def refuse(*rules: tuple[bool, str]) -> None:
    """Raise UsageError with the message of the first rule that holds."""
    for holds, message in rules:
        if holds:
            raise UsageError(message)


def check_start(given: Mapping[str, Any]) -> None:
    """Raise UsageError for flags that start a run in more than one way. given: flags by name."""
    on = {name for name, value in given.items() if _is_set(value)}
    refuse(
        (
            {"resume", "init"} <= on,
            "--resume continues a run with its own weights, --init starts one from others: leave "
            "one out. To start a run once and continue it ever after, write init = ... into a "
            "file for --config",
        ),
        (
            {"resume", "preset"} <= on,
            "--resume continues a run, which has its shape: leave out --preset",
        ),
        (
            {"init", "preset"} <= on,
            "--init brings the shape of its model: leave out --preset",
        ),
    )


def check_training(given: Mapping[str, Any], train: "Train") -> None:
    """Raise UsageError for flags of `gptfast train` that contradict one another.

    given: the flags by name. train: the command with all its settings.
    """
    run = train.train
    on = {name for name, value in given.items() if _is_set(value)}
    window = train.model.block_size if train.max_length is None else train.max_length
    refuse(
        (
            bool(on & {"parallel", "replicas", "dist_timeout"}) and "RANK" not in os.environ,
            "--parallel, --replicas and --dist-timeout are for several processes: start them with "
            "torchrun --nproc-per-node N -m gptfast train ..., or leave the flag out",
        ),
        (
            "min_lr" in on and run.schedule == "constant",
            "--min-lr is where a schedule ends, and --schedule constant stays at --lr: leave one "
            "out",
        ),
        (
            "sample_prompt" in on and run.sample_tokens == 0,
            "--sample-prompt is for the text samples, and --sample-tokens 0 writes none: leave one "
            "out",
        ),
        (
            train.resize_vocab and train.init is None,
            "--resize-vocab needs --init: it is that model that gets more tokens",
        ),
        (
            train.stride is not None and train.stride > window,
            f"--stride {train.stride} would skip the text between windows of {window} tokens: take "
            f"at most {window}",
        ),
    )
    _check_adapter(on, train)
    try:
        check_schedule(run, run.max_steps)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_adapter(on: Collection[str], train: "Train") -> None:
    """Raise UsageError for flags of an adapter without one, and for what an adapter cannot hold."""
    rank = train.train.lora_rank
    refuse(
        (
            rank is None and bool({"lora_alpha", "lora_dropout", "lora_targets"} & set(on)),
            "--lora-alpha, --lora-dropout and --lora-targets are for --lora-rank: give it, or "
            "leave them out",
        ),
        (
            rank is not None and train.init is None and not train.continues(),
            "--lora-rank needs --init: an adapter is trained beside a model that has learnt",
        ),
        (
            rank is not None and train.resize_vocab,
            "--resize-vocab adds rows to the model, and an adapter holds none of them: leave out "
            "--lora-rank or --resize-vocab",
        ),
        (
            train.base is not None and (rank is None or not train.continues()),
            "--base says where the base of an adapter is that --resume continues: leave it out",
        ),
    )


def check_search(given: Mapping[str, Any]) -> None:
    """Raise UsageError for flags of `gptfast search` that contradict one another."""
    kinds = [name for name in ("grid", "random", "lr_range") if _is_set(given.get(name))]
    refuse((len(kinds) != 1, "give one of --grid, --random and --lr-range"))
    taken = [name for name in _RANGE_TEST if _is_set(given.get(name))]
    refuse(
        (
            kinds[0] != "random" and "trials" in given,
            f"--trials counts the draws of --random; {_flag(kinds[0])} says itself what is tried: "
            "leave it out",
        ),
        (
            kinds[0] == "lr_range" and given.get("jobs", 1) != 1,
            "--lr-range is one run: leave out --jobs",
        ),
        (
            kinds[0] == "lr_range" and bool(taken),
            f"--lr-range sets {_flag(taken[0]) if taken else ''} itself: leave it out",
        ),
    )


def check_evaluation(given: Collection[str], data: Sequence[str], asked: Collection[str]) -> None:
    """Raise UsageError for flags of `gptfast eval` that what is measured does not use.

    given: the names of the flags. asked: those of data, hellaswag and tasks that are given.
    """
    from gptfast.data.sources import is_prepared

    of_data = [name for name in _OF_DATA if name in given]
    of_tasks = [name for name in _OF_TASKS if name in given]
    refuse(
        (
            bool(of_data) and "data" not in asked,
            f"{_flag(of_data[0]) if of_data else ''} is for --data: leave it out or give --data",
        ),
        (
            bool(of_tasks) and not {"hellaswag", "tasks"} & set(asked),
            "--limit counts the examples of --hellaswag and --tasks: leave it out; all of --data "
            "is measured",
        ),
        (
            "max_length" in given and not {"data", "tasks"} & set(asked),
            "--max-length is for --data and --tasks: leave it out",
        ),
        (
            "part" in given and "data" in asked and not is_prepared(data),
            "--part is for data that gptfast prepare has split, and this data is measured whole: "
            "leave it out, or prepare the data",
        ),
    )
