"""The rows of metrics.jsonl, read back."""

import json
import math
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_metrics(path: str | PathLike) -> list[Row]:
    """The rows of a run's metrics.jsonl; path is the file or the directory it lies in.

    An incomplete last line, of a run that is writing or was killed, is passed over. Raises
    ValueError where there is no such file, and for a damaged line, by its number.
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        return list(metrics_of(file))
    except OSError as error:
        why = "has no metrics.jsonl" if path.is_dir() else f"cannot be read: {error.strerror}"
        raise ValueError(f"{path} {why}; give the directory of a training run") from None


def finite(row: Row, name: str) -> bool:
    """Whether the row has a finite number of that name: a skipped step has no finite loss."""
    value = row.get(name)
    return isinstance(value, int | float) and math.isfinite(value)


def metrics_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl, one after the other.

    An incomplete last line, of a run that is writing or was killed, is passed over. Raises
    ValueError for a damaged line, by its number.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # also for what is not UTF-8
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{file}:{number} is damaged: {error}") from None
            if not isinstance(row, dict) or "step" not in row:
                raise ValueError(f"{file}:{number} is damaged: a row is an object with a step")
            yield row
