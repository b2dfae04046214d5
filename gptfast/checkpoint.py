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
import hashlib
import json
import logging
import os
import re
import shutil
import tomllib
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gptfast.model import GPT
from gptfast.token_files import fsync
from gptfast.tokenizer import BPETokenizer, Tokenizer, get_tokenizer
from gptfast.weights.stored import CheckpointError, parse_json, read_safetensors, read_text
from gptfast.weights.transformers import hf_config, hf_tensors, open_directory

FORMAT = 2
_LOGGER = logging.getLogger(__name__)


def _write_files(
    directory: Path, tensors: Mapping[str, dict[str, Tensor]], texts: Mapping[str, str]
) -> None:
    for name, named in tensors.items():
        try:
            save_file(named, directory / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{name}: {error}") from None
    for name, text in texts.items():
        (directory / name).write_text(text, "utf-8")
    for name in (*tensors, *texts):
        fsync(directory / name)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _temporary(path: Path) -> Path:
    temporary = _hidden(path, f"tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def _model_files(
    model: GPT, eot: int | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    config = hf_config(model.config, model.wte.weight.dtype, eot)
    return {"model.safetensors": hf_tensors(model)}, {"config.json": _json(config)}


# What transformers may make a tokenizer of.
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
_TOKENIZER += ("special_tokens_map.json", "added_tokens.json")


def tokenizer_texts(tokenizer: Tokenizer | str | None) -> tuple[dict[str, str], int | None]:
    """transformers' files for a tokenizer, and its end of text; of a name those that are there."""
    texts: dict[str, str] = {}
    if isinstance(tokenizer, str):
        files = (Path(tokenizer) / name for name in _TOKENIZER)
        texts = {path.name: read_text(path) for path in files if path.is_file()}
        try:
            tokenizer = get_tokenizer(tokenizer)
        except (OSError, ValueError) as error:
            _LOGGER.warning("the model is saved without a tokenizer of ours: %s", error)
            return texts, None
    if isinstance(tokenizer, BPETokenizer) and not texts:
        texts = tokenizer.transformers_files()
    return texts, None if tokenizer is None else tokenizer.eot


def save_model(
    model: GPT, directory: str | PathLike, tokenizer: Tokenizer | str | None = None
) -> None:
    """Write config.json, model.safetensors and the tokenizer's files, if it has such, into
    `directory`, each replaced whole. tokenizer: one, or a name for `get_tokenizer`, whose files are
    copied where they are transformers'."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(directory / "model")
    try:
        vocabulary, eot = tokenizer_texts(tokenizer)
        tensors, texts = _model_files(model, eot)
        _write_files(temporary, tensors, texts | vocabulary)
        for file in temporary.iterdir():
            file.replace(directory / file.name)
        # Another tokenizer's, which transformers would take before ours.
        for name in set(_TOKENIZER) - vocabulary.keys() if vocabulary else ():
            (directory / name).unlink(missing_ok=True)
        fsync(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        fsync(temporary)
        if target.exists():  # a resumed run that passes this step again
            target.rename(_hidden(target, "old"))
        temporary.rename(target)
        fsync(target.parent)
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


def random_state() -> list[Tensor]:
    """The states of torch's generators: the CPU's, then each GPU's."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpus]


def restore_random_state(state: list[Tensor]) -> None:
    """Set torch's generators to what `random_state` gave, as far as this machine has them."""
    torch.set_rng_state(state[0])
    for device, rng in zip(range(torch.cuda.device_count()), state[1:], strict=False):
        torch.cuda.set_rng_state(rng, device)


def _text(rng: Tensor) -> str:
    return base64.b64encode(rng.numpy().tobytes()).decode()


def _tensor_of_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
