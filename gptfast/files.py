"""Whole files and directories: written entirely or not at all."""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


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


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _temporary(path: Path) -> Path:
    temporary = _hidden(path, f"tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


# The workers of a run that was killed hold its lock until they notice, which takes them seconds.
PATIENCE = 10.0


@contextlib.contextmanager
def lock(directory: Path, patience: float = 0.0) -> Iterator[None]:
    """Make a directory and hold it alone, waiting up to `patience` seconds for whoever has it.

    The lock is the process's: it ends with it. ValueError if the directory cannot be made or had.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"cannot write to {directory}: {error.strerror}") from None
    end = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(
                        f"{directory} is in use by another process; wait or choose another out"
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A file to write that takes the place of the one at `path`, whole, when all went well."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Have a file's or a directory's contents reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(directory: Path, contents: Mapping[str, str]) -> None:
    """Write files that are never there in part, the last of them only after all others."""
    temporaries = {name: directory / f".{name}.{os.getpid()}" for name in contents}
    try:
        for name, temporary in temporaries.items():
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(contents[name])
                file.flush()
                os.fsync(file.fileno())
        for name, temporary in temporaries.items():
            temporary.replace(directory / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace the file whole: it is never seen half written."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def cache_directory() -> Path:
    """Where downloads lie: $GPTFAST_CACHE, else $XDG_CACHE_HOME/gptfast, else ~/.cache/gptfast."""
    if own := os.environ.get("GPTFAST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptfast"
