"""Weights from whatever form they are in, which is recognised by the content of the files."""

from os import PathLike
from pathlib import Path
from typing import Any

from gptfast.checks import one_line
from gptfast.files import cache_directory
from gptfast.gguf_file import MAGIC as GGUF_MAGIC
from gptfast.gguf_file import is_gguf
from gptfast.weights import adapter, checkpoint, found_in, gguf, llmc, openai, transformers
from gptfast.weights.lazy_tensor import CheckpointError, read_safetensors, safetensors_metadata
from gptfast.weights.packed import is_packed
from gptfast.weights.pickles import read_pickles
from gptfast.weights.text import described
from gptfast.weights.weights import Weights, tokenizer_in


def open_weights(
    path: str | PathLike, n_head: int | None = None, base: str | PathLike | None = None
) -> Weights:
    """Return the weights at `path`, which may be whatever `GPT.from_pretrained` takes.

    Names, shapes and dtypes are known and checked; values are read when they are asked for.
    n_head: for a file that does not record it, such as the book's; None takes heads of 64 channels.
    base: for an adapter, where the model is that it was trained beside; None takes what it says.
    Raises CheckpointError, which says what is wrong, for anything else.
    """
    try:
        found = _find(path)
        if base is not None and not is_adapter(found):
            raise CheckpointError(f"{path} is no adapter, so it has no base: leave it out (--base)")
        weights = _open_directory(found, base) if found.is_dir() else _open_file(found, n_head)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # a name that no file can have, say
        raise CheckpointError(f"{str(path)!r:.200} cannot be read: {one_line(error)}") from None
    if n_head not in (None, weights.config.n_head):
        raise CheckpointError(
            f"{weights.source} has {weights.config.n_head} heads, not n_head={n_head}"
        )
    return described(weights, found)


def tokenizer_of(path: str | PathLike) -> str | None:
    """Return the name of the tokenizer that the model at `path` was trained with, if on record."""
    found = _find(path)
    if is_gguf(found):
        return gguf.tokenizer_in_file(found) or tokenizer_in(found.parent)
    if checkpoint.is_run(found):
        if name := checkpoint.own_tokenizer(checkpoint.find_checkpoint(found)):
            return name
    if own := tokenizer_in(found if found.is_dir() else found.parent):
        return own
    base = recorded_base(found) if checkpoint.is_adapter(found) else None
    return tokenizer_of(base) if base is not None and not is_adapter(base) else None


def _find(path: str | PathLike) -> Path:
    """Return the path, or the place in the cache of the model that it names."""
    found = Path(path)
    name = found_in.preset_of(str(path))
    if name is None or found.exists():
        return found
    cached = cache_directory() / name
    if not cached.is_dir():
        raise CheckpointError(
            f"{name} is not in {cache_directory()}; run `gptfast download {name}`, or give a path"
        )
    return cached


def _open_directory(path: Path, base: str | PathLike | None = None) -> Weights:
    ours = checkpoint.files_of_model(path) is not None
    if (path / "hparams.json").is_file() and not ours:
        return openai.open_directory(path)
    if (path / "config.json").is_file() and not ours:
        files = any((path / name).is_file() for name in transformers.FILES)
        if files or transformers.complete_shards(path):
            return transformers.open_directory(path)
    if (path / "ckpt.pt").is_file():  # nanoGPT's output directory
        return _open_file(path / "ckpt.pt", None)
    if not ours and is_packed(path):
        raise CheckpointError(
            f"{path} is packed for generation: only gptfast.Engine and `gptfast generate`, `chat`, "
            "`serve` and `eval` take it; use the model it was made from"
        )
    if not ours and not checkpoint.checkpoints(path):
        raise CheckpointError(f"{path} is not a checkpoint: {found_in.directory(path)}")
    directory = checkpoint.find_checkpoint(path)
    beside = _open_base(directory, base) if checkpoint.is_adapter(directory) else None
    return checkpoint.open_directory(directory, beside)


def recorded_base(directory: Path) -> str | None:
    """Return the path or name of the model that an adapter says it is for, if it says so.

    A base that the adapter's run keeps is found there, wherever the run was moved to. Raises
    CheckpointError.
    """
    name = adapter.read_config(directory).base
    kept = directory.absolute().parent.parent / adapter.KEPT_BASE
    if name is None or Path(name).name != kept.name or not kept.is_dir():
        return name
    return str(kept)


def _open_base(directory: Path, given: str | PathLike | None) -> Weights:
    """Return the weights that an adapter is for: those given, or what it says."""
    name = recorded_base(directory) if given is None else str(given)
    if name is None:
        raise CheckpointError(
            f"{directory} does not say which model it is an adapter of: name it (--base)"
        )
    if is_adapter(name):
        raise CheckpointError(
            f"{directory} is an adapter of {name}, which is an adapter itself; gptfast convert "
            f"--merge {name} DIR makes a model of that one"
        )
    try:
        return open_weights(name)
    except CheckpointError as error:
        remedy = "" if given is not None else "; if the base has moved, name its place (--base)"
        raise CheckpointError(f"{directory} is an adapter of {name}: {error}{remedy}") from None


def is_adapter(path: str | PathLike) -> bool:
    """Return whether a path is an adapter of peft's form, or a run that trains one."""
    found = Path(path)
    latest = checkpoint.checkpoints(found)
    return checkpoint.is_adapter(latest[-1] if latest else found)


def base_name(path: str | PathLike) -> str:
    """Return what an adapter records as its base: a preset's name, else an absolute path."""
    if not Path(path).exists():
        return found_in.preset_of(str(path)) or str(path)
    found = _find(path)
    is_run = found.is_dir() and not checkpoint.files_of_model(found) and checkpoint.is_run(found)
    return str((checkpoint.find_checkpoint(found) if is_run else found).resolve())


def _open_file(path: Path, n_head: int | None) -> Weights:
    if not path.is_file():
        why = "it is not a file" if path.exists() else found_in.nothing(str(path))
        raise CheckpointError(f"{path} is not a checkpoint: {why}")
    with path.open("rb") as file:
        start = file.read(64)
    if start[:4] == llmc.MAGIC.to_bytes(4, "little"):
        return llmc.open_file(path)
    if start.startswith(GGUF_MAGIC):
        return gguf.open_file(path)
    if start[8:9] == b"{" and start[:4] != b"PK\x03\x04":  # after the length of the header
        raw = read_safetensors(path)
        content: Any = {"__metadata__": safetensors_metadata(path)}
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":  # a zip file, a pickle
        raw, content = read_pickles(path)
    else:
        raise CheckpointError(f"{path} is not a checkpoint: {found_in.file(start)}")
    return transformers.open_tensors(path, raw, content, n_head)
