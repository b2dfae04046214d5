"""A checkpoint of a run, found, verified and read."""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from gptfast.weights.stored import CheckpointError, parse_json, read_text

FORMAT = 2


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def find_model(path: str | PathLike) -> Path:
    """The model directory that `path` stands for (see `find_checkpoint`), verified if it can be."""
    directory = find_checkpoint(path)
    if (directory / "state.json").is_file():
        _verify(directory, _read_state(directory), ("config.json", "model.safetensors"))
    return directory


def is_run(path: Path) -> bool:
    """Whether a directory is a checkpoint or a run's, which keep their settings."""
    return (path / "state.json").is_file() or bool(checkpoints(path))


def checkpoints(out: str | PathLike) -> list[Path]:
    """The checkpoints of a training run's output directory, oldest first."""
    found: dict[int, Path] = {}
    # In this order: the old one of a replacement counts only until the new one is there.
    for pattern, name in ((".step-*.old", r"\.step-(\d+)\.old"), ("step-*", r"step-(\d+)")):
        for path in Path(out).glob(f"checkpoints/{pattern}"):
            if (step := re.fullmatch(name, path.name)) and path.is_dir():
                found[int(step[1])] = path
    return [found[step] for step in sorted(found)]


def find_checkpoint(path: str | PathLike) -> Path:
    """`path` if it holds a model, else the latest checkpoint of the run in it; or ValueError."""
    path = Path(path)
    if not path.is_dir():
        why = "it is not a directory" if path.exists() else "there is no such directory"
        raise CheckpointError(f"{path} is no checkpoint: {why}")
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return path
    if found := checkpoints(path):
        return found[-1]
    raise CheckpointError(
        f"{path} is no checkpoint: it has no config.json and model.safetensors, and no checkpoints/"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of all of state.json but the digest itself."""
    rest = {name: value for name, value in state.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    text = read_text(path / "state.json")
    state = parse_json(text, path / "state.json")
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / 'state.json'} has checkpoint format {state.get('format')!r}, "
            f"expected {FORMAT}"
        )
    sums = state.get("sha256")
    if not isinstance(sums, dict) or not {"config.json", "model.safetensors"} <= sums.keys():
        raise CheckpointError(f"{path / 'state.json'} is damaged: it names no files and sums")
    # The text too: another spelling of a number has its value.
    if state.get("digest") != _digest(state) or text != _json(state):
        raise CheckpointError(
            f"{path / 'state.json'} is damaged: its digest is not that of its values"
        )
    return state


def _verify(path: Path, state: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if not (path / name).is_file() or _sha256(path / name) != state["sha256"][name]:
            raise CheckpointError(
                f"{path / name} is damaged: its SHA-256 is not the one it was saved with"
            )


def read_state(path: str | PathLike) -> dict[str, Any]:
    """state.json of a checkpoint, after checking its format and every file's SHA-256.

    Raises CheckpointError naming the file that is damaged or missing.
    """
    path = Path(path)
    if not (path / "state.json").is_file():
        raise CheckpointError(f"{path} cannot be resumed: it has no state.json (weights only)")
    state = _read_state(path)
    _verify(path, state, state["sha256"])
    return state


def read_settings(path: Path) -> dict[str, Any] | None:
    """The flat configuration in a checkpoint's train.toml; None if it has none that is whole."""
    try:
        _verify(path, _read_state(path), ("train.toml",))
        return tomllib.loads((path / "train.toml").read_text("utf-8"))
    except (CheckpointError, KeyError, FileNotFoundError, tomllib.TOMLDecodeError):
        return None
