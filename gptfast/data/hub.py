"""Data sets of the `datasets` library, from the Hugging Face Hub or a directory: hf:NAME.

NAME is a data set on the Hub, user/name or user/name/configuration, or a directory: one that
`save_to_disk` wrote, or one of files that `load_dataset` reads. A split and the field of the text
may follow: hf:NAME:SPLIT:FIELD. Rows are streamed: nothing is held but a thousand of them.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from gptfast.checks import one_line
from gptfast.data.forms import NO_FIELD, Fields
from gptfast.data.rows import Row
from gptfast.installed import DISTRIBUTION, has_library

PREFIX = "hf:"
BATCH_ROWS = 1000
_DEFAULT_SPLIT = "train"
# Before it, the library ran a script that a data set brought along.
_OLDEST_LIBRARY = 4


class HubData(NamedTuple):
    """What hf:NAME:SPLIT:FIELD names."""

    name: str
    split: str | None
    field: str | None

    @property
    def is_local(self) -> bool:
        """Whether the name is that of a directory."""
        return self.name.startswith(("/", ".", "~")) or Path(self.name).is_dir()

    @property
    def directory(self) -> Path:
        """The directory that the name is."""
        return Path(self.name).expanduser()


def is_hub(path: str | PathLike) -> bool:
    """Return whether a path names a data set of the `datasets` library."""
    return str(path).startswith(PREFIX)


def parse(path: str | PathLike) -> HubData:
    """Return the parts of hf:NAME:SPLIT:FIELD. Raises ValueError for none or too many."""
    parts = str(path).removeprefix(PREFIX).split(":")
    for n in range(len(parts), 1, -1):  # a directory may have a colon in its name
        if Path(":".join(parts[:n])).is_dir():
            parts = [":".join(parts[:n]), *parts[n:]]
    if len(parts) > 3 or not parts[0]:
        raise ValueError(
            f"{path} is no data set: give hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:FIELD"
        )
    name, split, field = (*parts, "", "")[:3]
    return HubData(name, split or None, field or None)


def absolute(path: str) -> str:
    """Return hf:NAME so that it means the same from another working directory."""
    found = parse(path)
    if not found.is_local:
        return path
    rest = path.removeprefix(f"{PREFIX}{found.name}")
    return f"{PREFIX}{os.path.abspath(found.directory)}{rest}"


def check_library(path: str | PathLike) -> None:
    """Raise ValueError if `datasets` is not installed, or too old."""
    if not has_library("datasets"):
        raise ValueError(
            f"{path} needs datasets to be read: pip install '{DISTRIBUTION}[datasets]'"
        )
    found = version("datasets")
    if int(found.partition(".")[0]) < _OLDEST_LIBRARY:
        raise ValueError(
            f"{path} needs datasets {_OLDEST_LIBRARY} or newer, got {found}: pip install -U "
            f"'{DISTRIBUTION}[datasets]'"
        )


def fields_of(path: Path, fields: Fields) -> Fields:
    """Return which fields are read: that of the path as the text, if it names one."""
    field = parse(path).field
    return fields if field is None else dataclasses.replace(fields, text=field, prompt=NO_FIELD)


def hub_rows(
    path: Path,
    needed: Callable[[Collection[str]], list[str] | None],
    on_bytes: Callable[[int], Any],
) -> Iterator[Row]:
    """Yield the rows of a data set.

    needed: returns the columns to read of those there are, None for all of them. on_bytes: called
    with the number of characters in each thousand rows. Raises ValueError for a data set or a split
    that is not there, which names the splits there are.
    """
    data = _open(path)
    if data.column_names and (columns := needed(data.column_names)):
        data = data.select_columns(columns)
    number = 0
    try:
        for batch in data.iter(BATCH_ROWS):
            on_bytes(sum(len(x) for column in batch.values() for x in column if type(x) is str))
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield f"{path}, row {number}", dict(zip(batch, values, strict=True))
    except Exception as error:  # of any transport and any form of file
        raise _failure(path, f"after {number:,} rows", error) from None


def _open(path: Path) -> Any:
    """Return one split of a data set: a Dataset, mapped into memory, or an IterableDataset."""
    asked = parse(path)
    if asked.directory.is_file():
        raise ValueError(f"cannot read {path}: {asked.name} is a file; give it without {PREFIX}")
    if asked.is_local and not asked.directory.is_dir():
        raise ValueError(f"cannot read {path}: there is no directory {asked.directory}")
    try:
        data, files = _load(asked)
    except Exception as error:  # of any transport and any form of file
        raise _failure(path, "", error) from None
    _check_files(path, asked, files)
    if not isinstance(data, Mapping):  # saved as one split
        own = str(data.split) if data.split is not None else None
        if asked.split not in (None, own):
            what = f"only {own}" if own else "as it was saved without splits"
            remedy = (
                f"leave it out ({PREFIX}{asked.name}{f'::{asked.field}' if asked.field else ''})"
            )
            raise ValueError(f"{path} has no split {asked.split!r}, {what}; {remedy}")
        return data
    split = asked.split
    if split is None:
        split = next(iter(data)) if len(data) == 1 else _DEFAULT_SPLIT
    if split not in data:
        raise ValueError(
            f"{path} has no split {split!r}, only {', '.join(data)}; name one "
            f"({PREFIX}{asked.name}:{next(iter(data), 'SPLIT')})"
        )
    return data[split]


def _load(asked: HubData) -> tuple[Any, list[str]]:
    """Return the splits of a data set by name, or its only one if it was saved alone.

    Nothing of it is read yet but descriptions. The second value is the files that have its rows.
    """
    import datasets

    name, configuration = asked.name, None
    if asked.is_local:
        name = os.path.abspath(asked.directory)  # of "." the library would take the name
        saved = [asked.directory / file for file in ("dataset_dict.json", "state.json")]
        if any(file.is_file() for file in saved):
            data = datasets.load_from_disk(name, keep_in_memory=False)
            parts = data.values() if isinstance(data, Mapping) else [data]
            return data, [file["filename"] for part in parts for file in part.cache_files]
    else:
        user, _, rest = asked.name.partition("/")
        repository, _, configuration = rest.partition("/")
        name = f"{user}/{repository}" if repository else user
    builder = datasets.load_dataset_builder(name, configuration or None)
    files = [file for part in (builder.config.data_files or {}).values() for file in part]
    return builder.as_streaming_dataset(), files


def _check_files(path: Path, asked: HubData, files: Iterable[str]) -> None:
    """Raise ValueError for a file that is no part of the data set.

    A data set's own descriptions say where its rows are. Those of a directory must lie in it, and
    no data set of the Hub has any on this machine.
    """
    for file in files:
        place = file.rpartition("::")[2]  # of zip://rows.csv::archive.zip, the archive
        if asked.is_local:
            folders = {os.path.abspath(asked.directory), os.path.realpath(asked.directory)}
            inside = any(Path(os.path.abspath(place)).is_relative_to(f) for f in folders)
            belongs = "://" not in place and inside
        else:
            belongs = "://" in place and not place.startswith(("file:", "local:"))
        if not belongs:
            raise ValueError(
                f"{path} says that it has rows in {file}, which is no part of it; give that file "
                "itself if you want it"
            )


def _failure(path: Path, where: str, error: Exception) -> ValueError:
    """Return the error of a data set that cannot be read, with a remedy."""
    import datasets

    why = one_line(error) or type(error).__name__
    remedy = ""
    if why.startswith("Config name is missing"):
        why = " ".join(str(error).partition("\nExample of usage")[0].split())[:500]
        asked = parse(path)
        remedy = f"; name one ({PREFIX}{asked.name}/CONFIGURATION)"
        if asked.is_local:
            remedy = "; of a directory with several, give the files themselves"
    elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
        remedy = "; look at its name, and log in (hf auth login) if it is not public"
    elif isinstance(error, ConnectionError) or type(error).__module__.startswith("httpx"):
        remedy = (
            "; with a network, datasets.load_dataset(...).save_to_disk(DIRECTORY) keeps it for "
            f"{PREFIX}DIRECTORY"
        )
    return ValueError(f"cannot read {' '.join(filter(None, (str(path), where)))}: {why}{remedy}")
