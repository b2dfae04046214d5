"""Data sets of the `datasets` library, from the Hugging Face Hub or a directory: hf:NAME.

NAME is a data set on the Hub, user/name or user/name/configuration, or a directory: one that
`save_to_disk` wrote, or one of files that `load_dataset` reads. A split and the field of the text
may follow: hf:NAME:SPLIT:FIELD. Rows are streamed: nothing is held but a thousand of them.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping
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
# Before its version 4, the library ran a script that a data set brought along.
_OPTIONS = {"streaming": True, "trust_remote_code": False}


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
    """Raise ValueError if `datasets` is not installed."""
    if not has_library("datasets"):
        raise ValueError(
            f"{path} needs datasets to be read: pip install '{DISTRIBUTION}[datasets]'"
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
    if asked.is_local and not asked.directory.is_dir():
        raise ValueError(f"cannot read {path}: there is no directory {asked.directory}")
    try:
        data = _load(asked)
    except Exception as error:  # of any transport and any form of file
        raise _failure(path, "", error) from None
    if not isinstance(data, Mapping):  # saved as one split
        own = str(data.split) if data.split is not None else None
        if asked.split not in (None, own):
            what = f"only {own}" if own else "as it was saved without splits"
            raise ValueError(f"{path} has no split {asked.split!r}, {what}")
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


def _load(asked: HubData) -> Any:
    """Return the splits of a data set by name, or its only one if it was saved alone."""
    import datasets

    if not asked.is_local:
        user, _, rest = asked.name.partition("/")
        name, _, configuration = rest.partition("/")
        repository = f"{user}/{name}" if name else user
        return datasets.load_dataset(repository, configuration or None, **_OPTIONS)
    directory = asked.directory
    saved = [directory / name for name in ("dataset_dict.json", "state.json")]
    if any(file.is_file() for file in saved):
        return datasets.load_from_disk(str(directory))
    return datasets.load_dataset(str(directory), **_OPTIONS)


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
