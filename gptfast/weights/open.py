"""Weights from whatever form they are in, which is recognised by the content of the files."""

from os import PathLike
from pathlib import Path
from typing import Any

from gptfast.checks import one_line
from gptfast.files import cache_directory
from gptfast.weights import checkpoint, found_in, llmc, openai, transformers
from gptfast.weights.lazy_tensor import CheckpointError, read_safetensors, safetensors_metadata
from gptfast.weights.packed import is_packed
from gptfast.weights.pickles import read_pickles
from gptfast.weights.text import described
from gptfast.weights.weights import Weights, tokenizer_in


def open_weights(path: str | PathLike, n_head: int | None = None) -> Weights:
    """Return the weights at `path`, which may be whatever `GPT.from_pretrained` takes.

    Names, shapes and dtypes are known and checked; values are read when they are asked for.
    n_head: for a file that does not record it, such as the book's; None takes heads of 64 channels.
    Raises CheckpointError, which says what is wrong, for anything else.
    """
    try:
        found = _find(path)
        weights = _open_directory(found) if found.is_dir() else _open_file(found, n_head)
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
    if checkpoint.is_run(found):
        if name := checkpoint.own_tokenizer(checkpoint.find_checkpoint(found)):
            return name
    return tokenizer_in(found if found.is_dir() else found.parent)


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


def _open_directory(path: Path) -> Weights:
    ours = (path / "config.json").is_file() and (path / "model.safetensors").is_file()
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
            f"{path} is packed for generation: only gptfast.Engine and `gptfast generate`, `chat` "
            "and `eval` take it; use the model it was made from"
        )
    if not ours and not checkpoint.checkpoints(path):
        raise CheckpointError(f"{path} is not a checkpoint: {found_in.directory(path)}")
    return checkpoint.open_directory(path)


def _open_file(path: Path, n_head: int | None) -> Weights:
    if not path.is_file():
        why = "it is not a file" if path.exists() else found_in.nothing(str(path))
        raise CheckpointError(f"{path} is not a checkpoint: {why}")
    with path.open("rb") as file:
        start = file.read(64)
    if start[:4] == llmc.MAGIC.to_bytes(4, "little"):
        return llmc.open_file(path)
    if start[8:9] == b"{" and start[:4] != b"PK\x03\x04":  # after the length of the header
        raw = read_safetensors(path)
        content: Any = {"__metadata__": safetensors_metadata(path)}
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":  # a zip file, a pickle
        raw, content = read_pickles(path)
    else:
        raise CheckpointError(f"{path} is not a checkpoint: {found_in.file(start)}")
    return transformers.open_tensors(path, raw, content, n_head)
