"""The base of an adapter that is a run's checkpoint, kept where the adapter is.

An adapter is worth nothing without its base, and a run that goes on removes its older checkpoints.
"""

import dataclasses
import os
import shutil
from pathlib import Path

from gptfast.files import new_directory
from gptfast.model import GPT
from gptfast.weights.adapter import KEPT_BASE
from gptfast.weights.checkpoint import checkpoints

# What a checkpoint has for the run that goes on from it.
_OF_RUN = ("optimizer", "state.json", "train.toml")


def keep_base(model: GPT, out: Path) -> str | None:
    """Keep the base of a model's adapter in out/adapter_base if it is a checkpoint of a run.

    The adapter names that place from then on. Its files are links to the checkpoint's, and copies
    on another disk. Returns a line that says so; None if nothing had to be kept. Raises OSError.
    """
    config = model.adapter
    source = Path(config.base) if config is not None and config.base else None
    if config is None or source is None or source not in checkpoints(source.parent.parent):
        return None
    target = out.resolve() / KEPT_BASE
    shutil.rmtree(target, ignore_errors=True)  # of a run that ended before its first checkpoint
    try:
        with new_directory(target) as directory:
            for path in source.iterdir():
                if path.is_file() and not path.name.startswith(_OF_RUN):
                    _link_or_copy(path, directory / path.name)
    except OSError as error:
        raise OSError(f"cannot keep the base {source} in {target}: {error.strerror}") from error
    model.adapter = dataclasses.replace(config, base=str(target))
    return f"the base is a run's checkpoint, which that run may remove: it is kept in {target}"


def _link_or_copy(path: Path, target: Path) -> None:
    try:
        os.link(path, target)  # checkpoints are never written to
    except OSError:
        shutil.copy2(path, target)
