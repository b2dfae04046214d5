"""Models and checkpoints on disk. Only safetensors, JSON and TOML: nothing is ever unpickled.

A checkpoint is a directory:
    config.json, model.safetensors     as transformers' GPT2LMHeadModel reads them
    optimizer.safetensors              <parameter>.<exp_avg | exp_avg_sq | step | master>
    train.toml                         the run's resolved configuration
    state.json                         format, progress, RNG, configs, SHA-256 of every file
It is written to a hidden sibling, each file and the directory synced, then renamed: at any moment a
directory of that name is a whole checkpoint. What is replaced or deleted is renamed first; the old
one of a replacement that was killed half-way still counts.
"""

import base64
import os
import re
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.device import random_state, restore_random_state
from gptfast.files import _hidden, _temporary, _write_files, fsync
from gptfast.model import GPT
from gptfast.weights.checkpoint import FORMAT, _digest, _json, _sha256, checkpoints, read_state
from gptfast.weights.pretrained import _LOGGER, _model_files
from gptfast.weights.stored import read_safetensors
from gptfast.weights.transformers import open_directory


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, param in model.named_parameters()
        for key, value in optimizer.state.get(param, {}).items()
    }


def save_checkpoint(
    out: str | PathLike,
    model: GPT,
    optimizer: torch.optim.Optimizer | None,
    progress: dict[str, Any],
    keep: int,
    *,
    best: int | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write out/checkpoints/step-<progress["step"]>; its path.

    optimizer: None for a checkpoint of the model only. progress: whatever else JSON can hold that a
    resumed run needs; it ends up in state.json. keep: how many of the latest stay; that of step
    `best` stays too, and the link out/checkpoints/best points to it. texts: further files.

    Raises OSError if it cannot be written; the checkpoints before it are then as they were.
    """
    target = Path(out) / "checkpoints" / f"step-{progress['step']:08d}"
    temporary = _hidden(target, f"tmp-{os.getpid()}")
    try:
        _temporary(target)
        tensors, files = _model_files(model)
        if optimizer is not None:
            tensors["optimizer.safetensors"] = _optimizer_tensors(model, optimizer)
        files |= texts or {}
        _write_files(temporary, tensors, files)
        state = {
            "format": FORMAT,
            **progress,
            "rng": [_text(rng) for rng in random_state()],
            "sha256": {name: _sha256(temporary / name) for name in (*tensors, *files)},
        }
        state["digest"] = _digest(state)
        _write_files(temporary, {}, {"state.json": _json(state)})
        _move_into_place(temporary, target)
        fsync(Path(out))
        _link_best(target.parent, best)
        _delete_old(Path(out), keep, best)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"cannot save {target}: {why}; earlier checkpoints are whole") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.exists() and _hidden(target, "old").exists():
            _hidden(target, "old").rename(target)
    return target


def _move_into_place(temporary: Path, target: Path) -> None:
    fsync(temporary)
    if target.exists():  # a resumed run that passes this step again
        target.rename(_hidden(target, "old"))
    temporary.rename(target)
    fsync(target.parent)


def _link_best(folder: Path, best: int | None) -> None:
    link, name = folder / "best", f"step-{best or 0:08d}"
    if best is None or not (folder / name).is_dir():
        if link.is_symlink() and not link.exists():
            link.unlink()
        return
    if link.is_symlink() and os.readlink(link) == name:
        return
    temporary = _hidden(link, "tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(name, target_is_directory=True)
    except OSError as error:
        _LOGGER.warning("no link %s to %s: %s", link, name, error.strerror)
        return
    if link.is_dir() and not link.is_symlink():  # the run was copied and its links were followed
        link.rename(_hidden(link, "deleted"))
    temporary.replace(link)


def _delete_old(out: Path, keep: int, best: int | None) -> None:
    for path in checkpoints(out)[:-keep]:
        if best is None or path.name != f"step-{best:08d}":
            path.rename(_hidden(path, "deleted"))
    clean_up(out)


def clean_up(out: str | PathLike) -> None:
    """Remove what a save or a deletion that was killed has left; call it with no save under way."""
    for path in Path(out).glob("checkpoints/.*"):
        ours = re.fullmatch(r"\.(step-\d+|best)\.(tmp(-\d+)?|old|deleted)", path.name)
        if ours and ours[2] == "old" and not path.with_name(ours[1]).exists():
            path.rename(path.with_name(ours[1]))  # killed between a replacement's two renames
        elif ours and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif ours:
            path.unlink()


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to damaged-step-..., so that it counts as one no more."""
    target = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def load_checkpoint(
    path: str | PathLike, model: GPT, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore model, optimizer and random state from a checkpoint; returns its state.json.

    Everything is verified before anything is changed. Raises CheckpointError for damage, ValueError
    for a checkpoint of another architecture or of the model only.
    """
    path = Path(path)
    state = read_state(path)
    if "optimizer.safetensors" not in state["sha256"]:
        raise ValueError(
            f"{path} holds the model only and cannot be resumed; start from its weights (--init)"
        )
    open_directory(path).copy_to(model)
    names = dict(model.named_parameters())
    for key, stored in read_safetensors(path / "optimizer.safetensors").items():
        name, _, field = key.rpartition(".")
        if name not in names:
            raise ValueError(
                f"{path} has optimizer state for {name!r}, which the model does not have"
            )
        optimizer.state[names[name]][field] = stored.load().to(names[name].device)
    restore_random_state([_tensor_of_bytes(text) for text in state["rng"]])
    return state


def _text(rng: Tensor) -> str:
    return base64.b64encode(rng.numpy().tobytes()).decode()


def _tensor_of_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
