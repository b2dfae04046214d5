"""The weights that `gptfast train` starts from: those of --init, or those beside an adapter."""

from functools import partial
from os import PathLike

import torch

from gptfast.config import TrainConfig
from gptfast.dtensor import own_parts
from gptfast.lora import round_layer
from gptfast.model import GPT
from gptfast.training.step import adapt
from gptfast.weights.adapter import fingerprint
from gptfast.weights.checkpoint import checkpoints
from gptfast.weights.lazy_tensor import CheckpointError
from gptfast.weights.open import base_name, open_weights, recorded_base


def adapter_base(out: str) -> str:
    """Return the base of the adapter that a run in `out` has saved. Raises CheckpointError."""
    found = checkpoints(out)
    for directory in reversed(found):
        try:
            name = recorded_base(directory)
        except CheckpointError:
            # A damaged checkpoint is set aside later, with a line.
            if directory == found[0]:
                raise
            continue
        if name is None:
            raise CheckpointError(
                f"{out} does not say which model its adapter is for: name it (--base)"
            )
        return name
    raise CheckpointError(f"{out} has no checkpoint")


def load_base(model: GPT, out: str, base: str | None, config: TrainConfig) -> None:
    """Give `model`, which has no values, those beside the adapter of a run in `out`, and adapters.

    base: where they are; None takes what the run says. Raises CheckpointError, with the remedy.
    """
    name = adapter_base(out) if base is None else base
    try:
        load_adapted(model, name, config)
    except CheckpointError as error:
        remedy = "" if base is not None else "; if the base has moved, name its place (--base)"
        raise CheckpointError(f"{out} has an adapter of {name}: {error}{remedy}") from None


def load_weights(model: GPT, path: str | PathLike, *, resize_vocab: bool = False) -> None:
    """Copy the weights at `path`, and the ids that end a text there, into `model`.

    Its parameters may be DTensors, of which each process has some rows.
    Raises ValueError if they do not fit. resize_vocab: if the model has more tokens, their rows are
    the mean of those at `path`.
    """
    weights = open_weights(path)
    if resize_vocab:
        weights = weights.resized(model.config.vocab_size)
    weights.copy_to(model.config, own_parts(model.state_dict()))
    model.eos_ids, model.source = weights.eos_ids, base_name(path)


def load_adapted(model: GPT, path: str | PathLike, config: TrainConfig) -> None:
    """Give `model`, which has no values, those at `path` in fp32, and the adapters of config.

    Weights that config wants in int8 are rounded one by one as they are read, so that no more is
    held than the result. Raises ValueError if they do not fit.
    """
    weights = open_weights(path)
    weights.check_shape(model.config)
    mark = after_each = None
    if config.lora_base_dtype == "int8":
        mark, after_each = fingerprint(weights.tensors), partial(round_layer, model)
    weights.move_into(model, torch.float32, after_each)
    model.eos_ids, model.source = weights.eos_ids, base_name(path)
    adapt(model, config, mark)
