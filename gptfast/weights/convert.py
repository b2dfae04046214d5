"""`gptfast convert`: a model from any form into any that has a writer."""

import os
import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gptfast.model import GPT
from gptfast.weights import book, llmc, nanogpt


def _pickled(content: Callable[[GPT], dict[str, Any]]) -> Callable[[GPT, BinaryIO], None]:
    return lambda model, file: torch.save(content(model), file)


_WRITERS = {
    "llm.c": llmc.write,
    "nanogpt": _pickled(nanogpt.to_content),
    "book": _pickled(book.to_content),
}
FORMATS = ("transformers", *_WRITERS)
_SUFFIXES = {".bin": "llm.c", ".pt": "nanogpt", ".pth": "book"}


def format_of(path: str | PathLike) -> str:
    """The form that a path's suffix suggests: .bin, .pt, .pth; else a directory of transformers."""
    if Path(path).suffix == ".safetensors":
        raise ValueError(f"transformers' form is a directory: give one in the place of {path}")
    return _SUFFIXES.get(Path(path).suffix, "transformers")


def check(path: str | PathLike, form: str | None = None) -> None:
    """ValueError for a form that there is not and for a path that exists."""
    if form not in (None, *FORMATS):
        raise ValueError(f"there is no form {form!r}; choose from {', '.join(FORMATS)}")
    form = form or format_of(path)
    if Path(path).exists():
        raise ValueError(f"{path} exists; name another or delete it")


def save(model: GPT, path: str | PathLike, form: str | None = None) -> None:
    """Write a model in one of FORMATS (None: `format_of` the path), whole or not at all.

    Raises ValueError for a form that cannot hold the model and for a path that exists.
    """
    check(path, form)
    path, form = Path(path), form or format_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    if form == "transformers":
        try:
            model.save_pretrained(temporary)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return
    try:
        with temporary.open("wb") as file:
            _WRITERS[form](model, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
