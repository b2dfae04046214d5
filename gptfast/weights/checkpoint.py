"""A checkpoint of `gptfast train`: found, verified and read as weights.

training/checkpoint.py writes it, and says what is in it.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from gptfast.files import json_text
from gptfast.weights import adapter, transformers
from gptfast.weights.lazy_tensor import CheckpointError, parse_json, read_text
from gptfast.weights.weights import Weights, named_or_kept, tokenizer_in

CHECKPOINT_FORMAT = 2
_MODELS = (("config.json", "model.safetensors"), adapter.FILES)


def is_run(path: Path) -> bool:
    """Return whether a directory is a checkpoint or a run's output, which record their settings."""
    return (path / "state.json").is_file() or bool(checkpoints(path))


def checkpoints(out: str | PathLike) -> list[Path]:
    """Return the checkpoints in a run's output directory, oldest first."""
    found: dict[int, Path] = {}
    # In this order: the old one of a replacement counts only until the new one is there.
    for pattern, name in ((".step-*.old", r"\.step-(\d+)\.old"), ("step-*", r"step-(\d+)")):
        for path in Path(out).glob(f"checkpoints/{pattern}"):
            if (step := re.fullmatch(name, path.name)) and path.is_dir():
                found[int(step[1])] = path
    return [found[step] for step in sorted(found)]


def find_checkpoint(path: str | PathLike) -> Path:
    """Return `path` if it holds a model, else the latest checkpoint of the run in it.

    Raises CheckpointError if it is neither.
    """
    path = Path(path)
    if not path.is_dir():
        why = "it is not a directory" if path.exists() else "there is no such directory"
        raise CheckpointError(f"{path} is not a checkpoint: {why}")
    if files_of_model(path):
        return path
    if found := checkpoints(path):
        return found[-1]
    raise CheckpointError(
        f"{path} is not a checkpoint: it has no config.json with model.safetensors, and no "
        "checkpoints/"
    )


def files_of_model(path: Path) -> tuple[str, str] | None:
    """Return which two files of a directory are a model or an adapter; None if it has neither."""
    return next((two for two in _MODELS if all((path / name).is_file() for name in two)), None)


def is_adapter(path: Path) -> bool:
    """Return whether a directory is an adapter in peft's form."""
    return files_of_model(path) == adapter.FILES


def open_directory(directory: Path, base: Weights | None = None) -> Weights:
    """Return the weights of a directory with `files_of_model`, with the tokenizer of its settings.

    base: for an adapter, what it is merged into. The SHA-256 of the files is checked where
    state.json records them. Raises CheckpointError.
    """
    if all((directory / name).is_file() for two in _MODELS for name in two):
        raise CheckpointError(
            f"{directory} holds a model and an adapter: move {' and '.join(adapter.FILES)} to a "
            "directory of their own"
        )
    state = recorded(directory)
    if state is not None:
        _verify(directory, state, files_of_model(directory) or ())
    if base is None:
        weights = transformers.open_directory(directory)
    else:
        weights = adapter.merged(base, directory)
    if state is None:
        return weights
    vocabulary = state.get("config", {}).get("vocabulary")
    return replace(weights, tokenizer=own_tokenizer(directory), vocabulary=vocabulary)


def own_tokenizer(directory: Path) -> str | None:
    """Return the name of the tokenizer that a checkpoint was trained with, if it is on record.

    A vocabulary that others may change or remove is taken from the checkpoint's own files.
    """
    return named_or_kept((read_settings(directory) or {}).get("tokenizer"), directory)


def read_state(path: str | PathLike) -> dict[str, Any]:
    """Return state.json of a checkpoint, after checking its format and every file's SHA-256.

    Raises CheckpointError naming the file that is damaged or missing.
    """
    path = Path(path)
    if not (path / "state.json").is_file():
        raise CheckpointError(f"{path} cannot be resumed: it has no state.json (weights only)")
    state = _read_state(path)
    _verify(path, state, state["sha256"])
    return state


def recorded(path: Path) -> dict[str, Any] | None:
    """Return state.json of a checkpoint, without a look at the other files; None without one.

    Raises CheckpointError if it is damaged.
    """
    return _read_state(path) if (path / "state.json").is_file() else None


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the flat configuration in a checkpoint's train.toml; None if absent or damaged.

    A vocabulary that lies in the run's own directory is found there, wherever the run was moved to;
    for one that is gone, the checkpoint's own files are taken.
    """
    try:
        _verify(path, _read_state(path), ("train.toml",))
        settings = tomllib.loads((path / "train.toml").read_text("utf-8"))
    except (CheckpointError, KeyError, FileNotFoundError, tomllib.TOMLDecodeError):
        return None
    own = path.absolute().parent.parent / "tokenizer"
    recorded = Path(str(settings.get("tokenizer")))
    if recorded.name == own.name and own.is_dir():
        settings["tokenizer"] = str(own)
    elif recorded.is_absolute() and not recorded.is_dir() and (kept := tokenizer_in(path)):
        settings["tokenizer"] = kept
    return settings


def sha256(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(state: dict[str, Any]) -> str:
    """Return the SHA-256 of all values of state.json but "digest", in hexadecimal."""
    rest = {name: value for name, value in state.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint, after checking its format and digest."""
    text = read_text(path / "state.json")
    state = parse_json(text, path / "state.json")
    if state.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path / 'state.json'} has checkpoint format {state.get('format')!r}, "
            f"expected {CHECKPOINT_FORMAT}"
        )
    sums = state.get("sha256")
    if not isinstance(sums, dict) or not any(sums.keys() >= {*two} for two in _MODELS):
        raise CheckpointError(f"{path / 'state.json'} is damaged: it has no SHA-256 of the files")
    # Compare the text too: the digest is the same for another spelling of a number.
    if state.get("digest") != digest(state) or text != json_text(state):
        raise CheckpointError(
            f"{path / 'state.json'} is damaged: its digest does not match its values"
        )
    return state


def _verify(path: Path, state: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if not (path / name).is_file() or sha256(path / name) != state["sha256"][name]:
            raise CheckpointError(
                f"{path / name} is damaged: its SHA-256 is not the one it was saved with"
            )
