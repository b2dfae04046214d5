"""Write checkpoints and resume from them.

They hold safetensors, JSON and TOML only, so that loading one never unpickles anything.

A checkpoint is a directory:
    config.json, model.safetensors     as transformers' GPT2LMHeadModel reads them
    optimizer.safetensors              <parameter>.<exp_avg | exp_avg_sq | step | master>
        or optimizer-00001-of-0000N.safetensors, … of N processes with parts of it (shards.py)
    vocab.json, merges.txt, …          the vocabulary, as transformers' tokenizer reads it
    train.toml                         the run's resolved configuration
    state.json                         format, progress, RNG, configs, SHA-256 of every file
It is written to a hidden directory beside it, synced to disk and then renamed. A directory with the
name of a checkpoint is therefore always complete. A checkpoint that is replaced or deleted is first
renamed; if a replacement is killed half-way, the old checkpoint is restored.
"""

import base64
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gptfast import dtensor
from gptfast.config import GPTConfig
from gptfast.device import random_state, restore_random_state
from gptfast.files import fsync, hidden, json_text, new_directory, replace_link, write_files
from gptfast.lora import adapter_state, load_adapter
from gptfast.model import GPT, check_saveable
from gptfast.training.state_tensors import read_state_tensors
from gptfast.weights import adapter
from gptfast.weights.adapter import AdapterConfig, adapter_files
from gptfast.weights.checkpoint import (
    CHECKPOINT_FORMAT,
    checkpoints,
    digest,
    is_adapter,
    read_state,
    sha256,
)
from gptfast.weights.pretrained import NO_ENDS, Ends, hf_config, hf_tensors
from gptfast.weights.transformers import open_directory


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds of a model, its optimizer and the random state."""

    config: GPTConfig
    weights: Mapping[str, Tensor]
    """By name; where several processes have parts, this one's; of a model with adapters, these."""
    state: Mapping[str, Tensor] | None
    """The optimizer's, named <parameter>.<key>; None for a checkpoint of the model only."""
    rng: list[str]
    adapter: AdapterConfig | None = None

    @classmethod
    def of(cls, model: GPT, optimizer: torch.optim.Optimizer | None) -> "Snapshot":
        """Return the current state, in the memory that training uses."""
        state = None
        if optimizer is not None:
            state = {
                f"{name}.{key}": dtensor.local([value.detach()])[0]
                for name, param in model.named_parameters()
                for key, value in optimizer.state.get(param, {}).items()
            }
        rng = [_text(rng) for rng in random_state()]
        weights = local_state(model) if model.adapter is None else adapter_state(model)
        return cls(model.config, weights, state, rng, model.adapter)

    def copied(self) -> "Snapshot":
        """Return a copy in main memory, which the next step does not change."""

        def copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.to("cpu", copy=True) for name, x in tensors.items()}

        state = None if self.state is None else copy(self.state)
        return replace(self, weights=copy(self.weights), state=state)


def local_state(model: GPT) -> dict[str, Tensor]:
    """Return this process's part of each weight, by name, in the memory that training uses."""
    return {name: dtensor.local([t.detach()])[0] for name, t in model.state_dict().items()}


class ShardWriter(Protocol):
    """Writes model.safetensors and the optimizer's files with other processes (shards.py)."""

    def write(self, directory: Path, snapshot: Snapshot) -> dict[str, str]:
        """Write them and return the SHA-256 of each."""


def save_checkpoint(
    out: str | PathLike,
    model: GPT,
    optimizer: torch.optim.Optimizer | None,
    progress: dict[str, Any],
    keep: int,
    *,
    best: int | None = None,
    texts: Mapping[str, str] | None = None,
    ends: Ends = NO_ENDS,
) -> Path:
    """Write the checkpoint out/checkpoints/step-<progress["step"]> and return its path.

    optimizer: None for a checkpoint of the model only. progress: what else a resumed run needs, as
    values of JSON, for state.json. keep: how many of the latest checkpoints to keep. best: the step
    of one that is kept too; out/checkpoints/best links to it. texts: further files; ends: a text's.

    Raises OSError if it cannot be written, and ValueError for a model with modules of others; the
    earlier checkpoints then stay as they were.
    """
    check_saveable(model)
    snapshot = Snapshot.of(model, optimizer)
    return write_checkpoint(
        Path(out), snapshot, progress, keep, best=best, texts=texts or {}, ends=ends
    )


def write_checkpoint(
    out: Path,
    snapshot: Snapshot,
    progress: dict[str, Any],
    keep: int,
    *,
    best: int | None,
    texts: Mapping[str, str],
    ends: Ends,
    shards: ShardWriter | None = None,
) -> Path:
    """Write a snapshot as `save_checkpoint` does; with `shards`, together with other processes."""
    target = out / "checkpoints" / f"step-{progress['step']:08d}"
    old = hidden(target, "old")
    try:
        with new_directory(target) as directory:
            sums = _write_files(directory, snapshot, texts, ends, shards)
            state = {
                "format": CHECKPOINT_FORMAT,
                **progress,
                "rng": snapshot.rng,
                "sha256": sums,
            }
            state["digest"] = digest(state)
            write_files(directory, {}, {"state.json": json_text(state)})
            if target.exists():  # a resumed run that passes this step again
                target.rename(old)
        fsync(out)
        _link_best(target.parent, best)
        _delete_old(out, keep, best)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"cannot save {target}: {why}; earlier checkpoints are intact") from error
    finally:
        if not target.exists() and old.exists():
            old.rename(target)
    return target


def _write_files(
    directory: Path,
    snapshot: Snapshot,
    texts: Mapping[str, str],
    ends: Ends,
    shards: ShardWriter | None,
) -> dict[str, str]:
    """Write all files but state.json; return the SHA-256 of each."""
    tensors: dict[str, dict[str, Tensor]] = {}
    metadata: dict[str, str] = {}
    if snapshot.adapter is not None:
        named, metadata, text = adapter_files(snapshot.adapter, snapshot.weights)
        tensors[adapter.TENSORS] = named
        texts = {adapter.CONFIG: text, **_ends_file(ends), **texts}
    else:
        dtype = snapshot.weights["wte.weight"].dtype
        texts = {"config.json": json_text(hf_config(snapshot.config, dtype, ends)), **texts}
        if shards is None:
            tensors["model.safetensors"] = hf_tensors(snapshot.config, snapshot.weights)
    if shards is None and snapshot.state is not None:
        state = {name: x.cpu().contiguous() for name, x in snapshot.state.items()}
        tensors["optimizer.safetensors"] = state
    written = {} if shards is None else shards.write(directory, snapshot)
    write_files(directory, tensors, texts, metadata)
    return written | {name: sha256(directory / name) for name in (*tensors, *texts)}


def _ends_file(ends: Ends) -> dict[str, str]:
    """Return the file that says which ids end a text, for an adapter, which has no config.json."""
    return (
        {}
        if ends.eos is None
        else {"generation_config.json": json_text({"eos_token_id": ends.eos})}
    )


def _link_best(folder: Path, best: int | None) -> None:
    """Make the link "best" point to the checkpoint of step `best`, if there is one."""
    link, name = folder / "best", f"step-{best or 0:08d}"
    if best is None or not (folder / name).is_dir():
        if link.is_symlink() and not link.exists():
            link.unlink()
        return
    replace_link(link, name)


def _delete_old(out: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the latest `keep` and that of step `best`."""
    for path in checkpoints(out)[:-keep]:
        if best is None or path.name != f"step-{best:08d}":
            path.rename(hidden(path, "deleted"))
    clean_up(out)


def clean_up(out: str | PathLike) -> None:
    """Remove what a killed save or deletion left behind. Call it while nothing is being saved."""
    for path in Path(out).glob("checkpoints/.*"):
        ours = re.fullmatch(r"\.(step-\d+|best)\.(tmp(-\d+)?|old|deleted)", path.name)
        if ours and ours[2] == "old" and not path.with_name(ours[1]).exists():
            path.rename(path.with_name(ours[1]))  # killed between a replacement's two renames
        elif ours and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif ours:
            path.unlink()


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to damaged-step-..., so that it is no longer found."""
    target = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def load_checkpoint(
    path: str | PathLike, model: GPT, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore model, optimizer and random state from a checkpoint; return its state.json.

    Parameters may be DTensors: each process then reads its own part of the values.

    Everything is verified before anything is changed. Raises CheckpointError if it is damaged, and
    ValueError if it is of another architecture or has the model only.
    """
    path = Path(path)
    state = read_state(path)
    files = [path / name for name in state["sha256"] if name.startswith("optimizer")]
    if not files:
        raise ValueError(
            f"{path} holds the model only and cannot be resumed; start from its weights (--init)"
        )
    has_adapter = is_adapter(path)
    if has_adapter != (model.adapter is not None):
        one, other = ("an adapter", "a whole model")[:: 1 if has_adapter else -1]
        raise ValueError(
            f"{path} holds {one}, and {other} is trained now; leave --lora-rank as it was"
        )
    names = dict(model.named_parameters())
    saved = read_state_tensors(files)
    for key in saved:
        if (name := key.rpartition(".")[0]) not in names:
            raise ValueError(
                f"{path} has optimizer state for {name!r}, which the model does not have"
            )
    if has_adapter:
        load_adapter(path, model)
    else:
        open_directory(path).copy_to(model.config, dtensor.own_parts(model.state_dict()))
    for key, stored in saved.items():
        name, _, field = key.rpartition(".")
        optimizer.state[names[name]][field] = stored.read_for(names[name], path)
    restore_random_state([_tensor_of_bytes(text) for text in state["rng"]])
    return state


def _text(rng: Tensor) -> str:
    """Return the bytes of a random state in base64."""
    return base64.b64encode(rng.numpy().tobytes()).decode()


def _tensor_of_bytes(text: str) -> Tensor:
    """Return the uint8 tensor that `_text` wrote."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
