"""Read the rows of metrics.jsonl, the file to which a training run writes its numbers."""

import json
import math
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

MetricsRow = dict[str, Any]
"""The numbers of one step by name: "step", "loss", "val_loss" and so on."""


def read_metrics(path: str | PathLike) -> list[MetricsRow]:
    """Return the rows of a metrics.jsonl; path is the file or its run directory.

    Raises ValueError if there is no such file, and for a damaged line as `metrics_of` does.
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        return list(metrics_of(file))
    except OSError as error:
        why = "has no metrics.jsonl" if path.is_dir() else f"cannot be read: {error.strerror}"
        raise ValueError(f"{path} {why}; give the directory of a training run") from None


def finite(row: Mapping[str, Any], name: str) -> bool:
    """Return whether the row has a finite number of that name: a skipped step has no loss."""
    value = row.get(name)
    return isinstance(value, int | float) and math.isfinite(value)


def json_numbers(row: MetricsRow) -> MetricsRow:
    """Return the row without NaN and infinity, which JSON does not have."""
    return {
        name: x for name, x in row.items() if not (isinstance(x, float) and not math.isfinite(x))
    }


def metrics_of(file: Path) -> Iterator[MetricsRow]:
    """Yield the rows of a metrics.jsonl, one after the other.

    Leaves out an incomplete last line, which a run is writing or was killed while writing. Raises
    ValueError with the number of a damaged line.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # damaged JSON or UTF-8
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{file}:{number} is damaged: {error}") from None
            if not isinstance(row, dict) or "step" not in row:
                raise ValueError(f"{file}:{number} is damaged: a row must be an object with a step")
            yield row
