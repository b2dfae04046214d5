"""Files and directories that are written completely or not at all.

New content goes to a hidden sibling, `.<name>.tmp-<process>`. It is synced to the disk and renamed,
and then the parent directory is synced: a reader sees the old content or the new one, also after a
loss of power. The next write to the same path removes what a killed process left behind.
"""

import contextlib
import fcntl
import glob
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_LOGGER = logging.getLogger(__name__)

# The workers of a killed run hold its lock until they notice its end, which takes seconds.
LOCK_TIMEOUT_S = 10.0


def fsync(path: Path) -> None:
    """Wait until the contents of a file or directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hidden(path: Path, kind: str) -> Path:
    """Return the hidden sibling `.<name>.<kind>` of a path."""
    return path.with_name(f".{path.name}.{kind}")


def temporary(path: Path) -> Path:
    """Return this process's temporary sibling of a path, with nothing at it yet.

    Removes the siblings that ended processes left behind.
    """
    for old in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        process = old.name.rpartition("-")[2]
        if process.isdecimal() and not _is_another(int(process)):
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)
    return hidden(path, f"tmp-{os.getpid()}")


def _is_another(process: int) -> bool:
    """Return whether another process than this one runs under a number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return process != os.getpid()


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yield a file to write, which takes the place of `path` if the block ends without an error.

    mode: "w" for UTF-8 text, "wb" for bytes. Raises OSError naming `path` if it cannot be written.
    """
    try:
        part = temporary(path)
        try:
            with part.open(mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        fsync(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a directory to fill, which gets the name `path` if the block ends without an error.

    Parents of `path` are made. `path` itself must be absent or an empty directory: else OSError.
    """
    part = temporary(path)
    try:
        part.mkdir(parents=True)
        yield part
        publish(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def publish(directory: Path, path: Path) -> None:
    """Sync a finished directory and the files in it, and rename it to its sibling `path`."""
    for file in directory.iterdir():
        fsync(file)
    fsync(directory)
    directory.rename(path)
    fsync(path.parent)


@contextlib.contextmanager
def new_files(directory: Path) -> Iterator[Path]:
    """Yield an empty directory, whose files move into `directory` if no error ends the block.

    `directory` is made if it is absent. Each file is complete at any time, and none is replaced
    before all of them are on the disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    part = temporary(directory / "new")
    try:
        part.mkdir()
        yield part
        files = sorted(part.iterdir())
        for file in files:
            fsync(file)
        for file in files:
            file.replace(directory / file.name)
        fsync(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_files(
    directory: Path,
    tensors: Mapping[str, dict[str, Tensor]],
    texts: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write and sync files: safetensors from named tensors, UTF-8 from texts. Raises OSError.

    metadata: texts that each file of tensors has beside them.
    """
    for name, named in tensors.items():
        path = directory / name
        path.touch()
        mode = path.stat().st_mode & 0o777  # what the umask allows; save_file gives 0600
        try:
            save_file(named, path, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(f"{name}: {error}") from None
        path.chmod(mode)
    for name, text in texts.items():
        (directory / name).write_text(text, "utf-8")
    for name in (*tensors, *texts):
        fsync(directory / name)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as JSON. Raises OSError naming it if it cannot be written."""
    with replacing(path) as file:
        file.write(json_text(value))


def json_text(value: Any) -> str:
    """Return a value as JSON text, indented and with a final newline."""
    return json.dumps(value, indent=2) + "\n"


@contextlib.contextmanager
def lock(directory: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Make a directory and hold its lock, waiting up to `timeout_s` seconds for another holder.

    The lock belongs to the process and ends with it. Raises ValueError if the directory cannot be
    made or is still held.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"cannot write to {directory}: {error.strerror}") from None
    end = time.monotonic() + timeout_s
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


def cache_directory() -> Path:
    """Return the directory of downloads: $GPTFAST_CACHE, else gptfast in $XDG_CACHE_HOME or
    ~/.cache.

    Raises RuntimeError for a user without a home directory, if neither variable is set.
    """
    if own := os.environ.get("GPTFAST_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptfast"
    except RuntimeError:
        raise RuntimeError(
            "this user has no home directory; set GPTFAST_CACHE to the directory of downloaded "
            "models"
        ) from None


def replace_link(link: Path, name: str) -> None:
    """Make `link` a symbolic link to the directory `name` beside it, replacing an older link.

    The link is never missing in between. Logs a warning where the file system has no links.
    """
    if link.is_symlink() and os.readlink(link) == name:
        return
    temporary = hidden(link, "tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(name, target_is_directory=True)
    except OSError as error:
        _LOGGER.warning("cannot make the link %s to %s: %s", link, name, error.strerror)
        return
    if link.is_dir() and not link.is_symlink():  # it was copied and its links were followed
        link.rename(hidden(link, "deleted"))
    temporary.replace(link)
