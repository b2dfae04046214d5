"""What a file says about its model beside the tensors: head count, sizes, activation and the like.

Training scripts keep this under many names: nanoGPT's `model_args`, Lightning's `hyper_parameters`,
a `config` that is a dictionary or an object, `args` of a command line, the metadata of safetensors
or of torch's state dictionaries.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from gptfast.inert import Attributed, Inert, mapping_of
from gptfast.weights.lazy_tensor import CheckpointError

# Our names, and those under which files have the same.
NAMES = {
    "n_head": ("n_head", "n_heads", "num_heads", "num_attention_heads"),
    "n_layer": ("n_layer", "n_layers", "num_layers", "num_hidden_layers"),
    "n_embd": ("n_embd", "n_embed", "emb_dim", "embed_dim", "d_model", "hidden_size"),
    "block_size": ("block_size", "n_positions", "context_length", "max_position_embeddings"),
    "vocab_size": ("vocab_size", "n_vocab"),
    "dropout": ("dropout", "resid_pdrop", "drop_rate"),
    "bias": ("bias",),
    "qkv_bias": ("qkv_bias",),
    "tie_weights": ("tie_weights", "tie_word_embeddings"),
    "activation": ("activation_function", "activation", "hidden_act"),
    "epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_eps"),
}
SIZES = ("vocab_size", "block_size", "n_layer", "n_embd")
_OUR_NAME = {theirs: ours for ours, names in NAMES.items() for theirs in names}
# The keys below which a file describes its model: config, GPT_CONFIG_124M, hyper_parameters, ...
_PLACES = re.compile(r"config|cfg|hparams|hyper|args|settings|metadata", re.IGNORECASE)
# What describes something else than the model, whose sizes have the same names.
_ELSEWHERE = re.compile(r"optim|sched|data|token|loader|teacher|critic", re.IGNORECASE)
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_tanh", "gelu_fast")
_EPSILON = 1e-5
_MAX_DEPTH = 4


@dataclass(frozen=True)
class Said:
    """The values that a file states, by our names, and where each of them stands."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or the default if the file does not state it."""
        return self.values.get(name, default)


def _plain(name: str, value: Any) -> Any:
    """Return a stated value as a number, a truth value or text; None for anything else."""
    if isinstance(value, str) and name != "activation":  # metadata and command lines are text
        with suppress(ValueError, RecursionError):
            value = json.loads(value.lower())
    kinds = {"activation": str, "bias": bool, "qkv_bias": bool, "tie_weights": bool}
    if name in kinds:
        return value if isinstance(value, kinds[name]) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value


def _values(
    value: Any, place: str, depth: int, seen: set[int], *, only: re.Pattern[str] | None = None
) -> Iterator[tuple[str, Any, str]]:
    """Yield our name, the value and the place of all that a mapping states, at any depth.

    only: the keys below which to look; None stands for all.
    """
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    mapping = mapping_of(value)
    if mapping is None or id(mapping) in seen or depth == 0:
        return
    seen.add(id(mapping))
    for key, inner in mapping.items():
        if isinstance(key, str) and key in _OUR_NAME:
            if (plain := _plain(_OUR_NAME[key], inner)) is not None:
                yield _OUR_NAME[key], plain, f"{place}.{key}".lstrip(".")
        elif isinstance(key, str) and _ELSEWHERE.search(key) and key != "__metadata__":
            continue
        elif isinstance(key, str) and (only is None or only.search(key)):
            yield from _values(inner, f"{place}.{key}".lstrip("."), depth - 1, seen)


def said_in(source: str, content: Any) -> Said:
    """Return what the content of a file states. Raises CheckpointError where it contradicts itself.

    nanoGPT's model_args describe the model; its `config` may be the settings of an earlier run.
    """
    said = Said()
    mapping = mapping_of(content) or {}
    if mapping_of(mapping.get("model_args")):
        mapping = {"model_args": mapping["model_args"], "config": _activation_only(mapping)}
    stated = [_values(mapping, "", _MAX_DEPTH, set(), only=_PLACES)]
    if isinstance(content, Attributed):  # a state dictionary, as book.py writes it
        modules = mapping_of(content.attributes.get("_metadata")) or {}
        stated.append(_values(modules.get(""), "_metadata", 1, set()))
    for key, value in mapping.items():
        if isinstance(value, Inert) and "_modules" in value.attributes:  # a module saved whole
            stated.append(_values(value, str(key), _MAX_DEPTH, set(), only=_PLACES))
    for name, value, place in chain.from_iterable(stated):
        if said.values.setdefault(name, value) != value and name != "dropout":
            raise CheckpointError(
                f"{source} contradicts itself: {said.places[name]} is {said.values[name]}, but "
                f"{place} is {value}"
            )
        said.places.setdefault(name, place)
    check_fixed(source, said)
    return said


def _activation_only(content: dict[Any, Any]) -> dict[str, Any]:
    config = mapping_of(content.get("config")) or {}
    return {name: config[name] for name in NAMES["activation"] if name in config}


def check_fixed(source: str, said: Said) -> None:
    """Raise CheckpointError if a file states an activation or epsilon that GPT-2 does not have."""
    activation, epsilon = said.get("activation"), said.get("epsilon")
    if activation is not None and activation.lower() not in _TANH_GELU:
        raise CheckpointError(
            f"{source}: {said.places['activation']} is {activation!r:.100}, but gptfast's GPT "
            "needs 'gelu_new'"
        )
    if epsilon is not None and epsilon != _EPSILON:
        raise CheckpointError(
            f"{source}: {said.places['epsilon']} is {epsilon!r}, but gptfast's GPT needs {_EPSILON}"
        )
