"""The files that --data names: files, directories, globs, and what is left out of them."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NoReturn

from gptfast.data.hub import check_library, is_hub, parse
from gptfast.data.kinds import (
    DESCRIPTIONS,
    READ_SUFFIXES,
    TOKEN_SUFFIXES,
    check_kind,
    kind_of,
)
from gptfast.data.streams import STDIN, is_stream

# Characters that are read at a time to see whether a file is empty, and files that are listed.
READ_CHARACTERS = 1 << 12
_MAX_LISTED_FILES = 20
_MAX_LISTED_KINDS = 8
_LOG = logging.getLogger(__name__)


def _files_below(directory: Path) -> list[Path]:
    """Return the files below a directory that are read; log how many others there are."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}")

    found, others = list[Path](), list[Path]()
    for folder, folders, files in os.walk(directory, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in files if not name.startswith(".")):
            read = kind_of(path) in READ_SUFFIXES and path.name not in DESCRIPTIONS
            (found if read else others).append(path)
    if not found:
        _refuse_directory(directory, others)
    if others:
        _LOG.warning(
            "left out of %s: %s; name a file to have it read", directory, _kinds_of(others)
        )
    return sorted(found)


def _refuse_directory(directory: Path, others: Sequence[Path]) -> NoReturn:
    """Raise ValueError for a directory without a file to read."""
    tokens = sorted(p for p in directory.glob("[!.]*") if p.suffix in TOKEN_SUFFIXES)
    if tokens:
        every = directory / f"*{tokens[0].suffix}"
        data = directory if any("train" in p.name for p in tokens) else every
        raise ValueError(
            f"{directory} has token files such as {tokens[0].name} and no text; train on "
            f"them as they are (--data '{data}')"
        )
    there = f", only {_kinds_of(others)}" if others else ""
    raise ValueError(
        f"{directory} has no {', '.join(READ_SUFFIXES)} files in it and no *train*.bin{there}; "
        "give a directory with text or token files"
    )


def _kinds_of(files: Sequence[Path]) -> str:
    """Return how many files there are of each kind, as "2 .pdf, 1 without a suffix"."""
    counts = Counter("".join(f.suffixes[-1:]).lower() or "without a suffix" for f in files)
    listed = [f"{n} {kind}" for kind, n in counts.most_common(_MAX_LISTED_KINDS)]
    more = len(counts) - len(listed)
    return ", ".join(listed) + (f" and {more} more kinds" if more else "")


def find_files(paths: Sequence[str | PathLike]) -> list[Path]:
    """Return the files that paths name: files, those below directories, matches of globs.

    "-" is standard input, and hf:NAME a data set of the `datasets` library. A file that is named
    twice, also through a link, counts once. Empty files that a directory has or a glob matches are
    left out, and so are files of other kinds below a directory, with a line in the log. Raises
    ValueError naming a path that is missing, matches nothing, has only empty files or is of a kind
    that cannot be read.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not str(path):
            raise ValueError("an empty path names no data; give files, directories or globs")
        try:
            for file in _files_of(Path(path)):
                # A pipe has no path of its own: /dev/fd/63 is a link to nowhere.
                own = file if is_hub(file) or is_stream(file) else file.resolve(strict=True)
                found.setdefault(own, file)
        except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
            why = getattr(error, "strerror", None) or error
            where = getattr(error, "filename", None) or path
            raise ValueError(f"cannot read {where}: {why}; give text files") from None
    for file in found.values():
        if not is_hub(file):
            check_kind(file)
    return list(found.values())


def _files_of(path: Path) -> list[Path]:
    if is_hub(path):
        parse(path)
        check_library(path)
        return [path]
    if path.is_dir():
        return _without_empty(path, _files_below(path))
    if path.exists():
        return [path]
    if str(path) == "-":
        return [STDIN]
    if not glob.has_magic(str(path)):
        raise ValueError(f"cannot read {path}: it does not exist; give text files")
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    matches = sorted(match for match in matches if not match.is_dir())
    if not matches:
        raise ValueError(f"no file matches {path}; give text files")
    return _without_empty(path, matches)


def _without_empty(path: Path, files: list[Path]) -> list[Path]:
    """Return the files of a directory or a glob that are not empty, and log the others."""
    empty = [file for file in files if file.suffix not in TOKEN_SUFFIXES and _is_empty(file)]
    if len(empty) == len(files):
        raise ValueError(
            f"{path} has only empty files, such as {files[0].name}; training needs text"
        )
    for file in empty[:_MAX_LISTED_FILES]:
        _LOG.warning("skipped %s: it is empty", file)
    if len(empty) > _MAX_LISTED_FILES:
        _LOG.warning("skipped %d more empty files", len(empty) - _MAX_LISTED_FILES)
    kept = set(files) - set(empty)
    return [file for file in files if file in kept]


def _is_empty(path: Path) -> bool:
    """Return whether a file has nothing but white space."""
    if not path.is_file():  # a pipe can be read only once
        return False
    # What is not UTF-8 becomes a character that is no space; the reader of the file refuses it.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        while text := file.read(READ_CHARACTERS):
            if not text.isspace():
                return False
    return True
