"""A model written in one of the forms that `gptfast convert` offers."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.files import new_directory, new_files, replacing
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.tokenizer.vocabulary import get_tokenizer
from gptfast.weights import book, gguf, gguf_save, llmc, nanogpt, onnx
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
FORMATS = ("transformers", *_WRITERS, "gguf")
"""The forms that are written and read."""
_WRITTEN = (*FORMATS, "onnx")
_SUFFIXES = {
    ".bin": "llm.c",
    ".pt": "nanogpt",
    ".pth": "book",
    ".gguf": "gguf",
    ".onnx": "onnx",
}
# Suffixes of forms that other programs have, of archives and of texts: no model of ours is there.
_OTHERS = frozenset(
    ".gguf .ggml .onnx .h5 .hdf5 .keras .pb .tflite .msgpack .npz .npy .ckpt .mlmodel .mlpackage "
    ".ot .pkl .pickle .joblib .zip .tar .gz .tgz .zst .json .toml .txt .index".split()
)


def format_of(path: str | PathLike) -> str:
    """Return the form that a path's suffix stands for: that of _SUFFIXES, else transformers.

    Raises ValueError for a suffix that stands for another form than these.
    """
    name, suffix = Path(path).name, Path(path).suffix.lower()
    if name.lower() == "pytorch_model.bin":
        raise ValueError(
            f"{path} is transformers' name for its own file, and .bin means llm.c's form here: "
            "name a directory for transformers' form, or another file"
        )
    # What begins with a digit is no suffix but a version or a size, as in gpt2-1.5b.
    if suffix == ".safetensors":
        raise ValueError(f"transformers' form is a directory: give one instead of {path}")
    if suffix not in _SUFFIXES and re.fullmatch(r"\.[a-z]\w*", suffix):
        raise ValueError(
            f"the suffix {suffix} stands for no form that is written; .bin is llm.c's, .pt "
            "nanoGPT's, .pth the book's, .gguf llama.cpp's, .onnx ONNX, and a directory, without "
            "a suffix, transformers' (--to chooses a form for any other name)"
        )
    return _SUFFIXES.get(suffix, "transformers")


def check_name(path: str | PathLike, form: str) -> None:
    """Raise ValueError for a path whose suffix says that it is of another form than `form`."""
    suffix = Path(path).suffix.lower()
    is_directory = form in ("transformers", "packed")
    if is_directory and suffix in (*_SUFFIXES, ".safetensors"):
        raise ValueError(f"the {form} form is a directory: give one instead of {path}")
    if suffix in (*_OTHERS, ".safetensors") and _SUFFIXES.get(suffix) != form:
        raise ValueError(
            f"{path} would be no {suffix} file, but of the {form} form; choose another name"
        )


def check(path: str | PathLike, form: str | None = None) -> None:
    """Raise ValueError for a form that does not exist or lacks its library, or a path that does."""
    if form not in (None, *_WRITTEN):
        raise ValueError(f"there is no form {form!r}; choose from {', '.join(_WRITTEN)}")
    if form is None:
        form = format_of(path)
    check_name(path, form)
    if form == "gguf":
        gguf.need_library(f"writing {path}")
    paths = [path]
    if form == "onnx":
        onnx.need_libraries(f"writing {path}")
        paths.append(f"{path}{onnx.DATA}")
    for there in paths:
        if os.path.lexists(there):
            raise ValueError(f"{there} exists; name another or delete it")


def save(
    config: GPTConfig,
    state: State,
    path: str | PathLike,
    form: str | None = None,
    *,
    tokenizer: Tokenizer | str | None = None,
    eos_ids: Sequence[int] = (),
    kind: str | None = None,
    license: str | None = None,
) -> None:
    """Write a model in one of FORMATS or as ONNX, completely or not at all.

    state: GPT's state dictionary. form: None takes `format_of(path)`. tokenizer: one or its name,
    which goes along in transformers' form and in GGUF. eos_ids: the ids that end a text there.
    kind: for GGUF, one of gguf_save.TYPES. license: for GGUF, what it says of the model's.
    Raises ValueError for a form that cannot hold the model and for a path that exists; OSError.
    """
    check(path, form)
    path, form = Path(path), form or format_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "transformers":
        with new_directory(path) as directory:
            save_model(config, state, directory, tokenizer, eos_ids)
    elif form == "gguf":
        tokenizer = get_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        with replacing(path, "wb") as file:
            gguf_save.write(
                config,
                state,
                file,
                kind=kind,
                tokenizer=tokenizer,
                eos_ids=eos_ids,
                name=path.stem,
                license=license,
            )
    elif form == "onnx":
        with new_files(path.parent) as directory:
            onnx.write(config, state, directory, path.name)
    else:
        with replacing(path, "wb") as file:
            _WRITERS[form](config, state, file)
