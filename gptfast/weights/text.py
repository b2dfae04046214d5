"""What the files of a model say about its text: its vocabulary, and the ids that end a text."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptfast.weights.lazy_tensor import CheckpointError, read_json
from gptfast.weights.weights import Weights, tokenizer_in


def end_ids(value: Any, vocab_size: int, source: str) -> tuple[int, ...]:
    """Return the ids of an eos_token_id, which is None, an id or a list of ids.

    Ids that the model has no row for can never be drawn and are left out. Raises CheckpointError
    for any other value.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(
            f"{source}: eos_token_id is {value!r:.80}, neither an id nor a list of ids"
        )
    return tuple(i for i in ids if 0 <= i < vocab_size)


def ends_in(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a text, by generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.is_file():
            value = read_json(path).get("eos_token_id")
            if ends := end_ids(value, vocab_size, str(path)):
                return ends
    return ()


def described(weights: Weights, found: Path) -> Weights:
    """Return weights with what the files beside them say. found: the path that was opened."""
    directory = Path(weights.source).parent
    if weights.tokenizer is None:
        weights = replace(weights, tokenizer=tokenizer_in(found if found.is_dir() else directory))
    if weights.eos_ids:
        return weights
    rows = weights.config.vocab_size
    if found.is_dir():
        return replace(weights, eos_ids=ends_in(directory, rows))
    # Beside a single file there may be the config.json of another model.
    with contextlib.suppress(CheckpointError):
        if read_json(directory / "config.json").get("vocab_size") == rows:
            return replace(weights, eos_ids=ends_in(directory, rows))
    return weights
