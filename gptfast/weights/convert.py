"""A model written in one of the forms that `gptfast convert` offers."""

import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.files import new_directory, replacing
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.weights import book, llmc, nanogpt
from gptfast.weights.pretrained import save_model

State = Mapping[str, Tensor]


def _pickled(
    content: Callable[[GPTConfig, State], dict[str, Any]],
) -> Callable[[GPTConfig, State, IO[bytes]], None]:
    return lambda config, state, file: torch.save(content(config, state), file)


_WRITERS: dict[str, Callable[[GPTConfig, State, IO[bytes]], None]] = {
    "llm.c": llmc.write,
    "nanogpt": _pickled(nanogpt.to_content),
    "book": _pickled(book.to_content),
}
FORMATS = ("transformers", *_WRITERS)
_SUFFIXES = {".bin": "llm.c", ".pt": "nanogpt", ".pth": "book"}


def format_of(path: str | PathLike) -> str:
    """Return the form that a path's suffix stands for: .bin, .pt or .pth, else transformers."""
    if Path(path).suffix == ".safetensors":
        raise ValueError(f"transformers' form is a directory: give one instead of {path}")
    return _SUFFIXES.get(Path(path).suffix, "transformers")


def check(path: str | PathLike, form: str | None = None) -> None:
    """Raise ValueError for a form that does not exist and for a path that does."""
    if form not in (None, *FORMATS):
        raise ValueError(f"there is no form {form!r}; choose from {', '.join(FORMATS)}")
    form = form or format_of(path)
    if os.path.lexists(path):
        raise ValueError(f"{path} exists; name another or delete it")


def save(
    config: GPTConfig,
    state: State,
    path: str | PathLike,
    form: str | None = None,
    *,
    tokenizer: Tokenizer | str | None = None,
    eos_ids: Sequence[int] = (),
) -> None:
    """Write a model in one of FORMATS, completely or not at all.

    state: GPT's state dictionary. form: None takes `format_of(path)`. tokenizer: one or its name,
    whose files go along in transformers' form. eos_ids: the ids that end a text there.
    Raises ValueError for a form that cannot hold the model and for a path that exists; OSError.
    """
    check(path, form)
    path, form = Path(path), form or format_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "transformers":
        with new_directory(path) as directory:
            save_model(config, state, directory, tokenizer, eos_ids)
    else:
        with replacing(path, "wb") as file:
            _WRITERS[form](config, state, file)
