"""A model from whatever form its weights are in, told by the content of the files."""

from os import PathLike
from pathlib import Path

from gptfast.checks import one_line
from gptfast.config import PRESETS
from gptfast.files import cache_directory
from gptfast.weights import book, llmc, nanogpt, openai, transformers
from gptfast.weights.checkpoint import find_checkpoint, find_model, is_run, read_settings
from gptfast.weights.stored import CheckpointError, read_pickles, read_safetensors
from gptfast.weights.weights import Weights, tokenizer_in


def open_weights(path: str | PathLike, n_head: int | None = None) -> Weights:
    """The weights at `path`, none of them read yet: see `GPT.from_pretrained` for what it may be.

    n_head: of a file that does not tell, the book's say; None takes heads of 64 channels.
    Raises CheckpointError for anything else, naming what is wrong.
    """
    try:
        path = _find(path)
        weights = _open_directory(path) if path.is_dir() else _open_file(path, n_head)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # a name that no file can have, say
        raise CheckpointError(f"{str(path)!r:.200} cannot be read: {one_line(error)}") from None
    if n_head not in (None, weights.config.n_head):
        raise CheckpointError(
            f"{weights.source} has {weights.config.n_head} heads, not n_head={n_head}"
        )
    return weights


def tokenizer_of(path: str | PathLike) -> str | None:
    """The tokenizer of the model at `path`, a name or a directory, if it is on record."""
    path = _find(path)
    if is_run(path) and (settings := read_settings(find_checkpoint(path))):
        return settings.get("tokenizer")
    return tokenizer_in(path if path.is_dir() else path.parent)


def _find(path: str | PathLike) -> Path:
    """The path, or the place in the cache of the name that it is."""
    found = Path(path)
    if str(path) not in PRESETS or found.exists():
        return found
    cached = cache_directory() / str(path)
    if not cached.is_dir():
        raise CheckpointError(
            f"{path} is not in {cache_directory()}; run `gptfast download {path}`, or give a path"
        )
    return cached


def _open_directory(path: Path) -> Weights:
    ours = (path / "config.json").is_file() and (path / "model.safetensors").is_file()
    if (path / "hparams.json").is_file() and not ours:
        return openai.open_directory(path)
    if (path / "config.json").is_file() and not ours:
        if any((path / name).is_file() for name in transformers.FILES):
            return transformers.open_directory(path)
    if (path / "ckpt.pt").is_file():  # nanoGPT's output directory
        return _open_file(path / "ckpt.pt", None)
    from gptfast.engine import is_packed  # which for its part reads weights through this file

    if not ours and is_packed(path):
        raise CheckpointError(
            f"{path} is packed for generation, by gptfast.Engine, `gptfast generate` or "
            "`gptfast chat`; take the model it was made of"
        )
    return transformers.open_directory(find_model(path))


def _open_file(path: Path, n_head: int | None) -> Weights:
    if not path.is_file():
        why = "it is no file" if path.exists() else "there is no such directory"
        raise CheckpointError(f"{path} is no checkpoint: {why}")
    with path.open("rb") as file:
        start = file.read(16)
    if start[:4] == llmc.MAGIC.to_bytes(4, "little"):
        return llmc.open_file(path)
    if start[8:9] == b"{" and start[:4] != b"PK\x03\x04":  # after the length of the header
        raw = read_safetensors(path)
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":  # a zip file, a pickle
        raw, beside = read_pickles(path)
        if nanogpt.recognise(beside):
            return nanogpt.open_tensors(path, raw, beside)
    else:
        raise CheckpointError(
            f"{path} is no checkpoint: it begins neither as safetensors nor as what torch.save or "
            "llm.c writes; of OpenAI's and transformers' models give the directory"
        )
    if book.recognise(raw):
        return book.open_tensors(path, raw, n_head)
    return transformers.open_tensors(path, raw, n_head)
