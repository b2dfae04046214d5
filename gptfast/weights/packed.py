"""Weights that are packed for the engine, as a directory: how one is recognised.

The engine itself writes and reads them (engine/packed.py); nothing else can be made of them again.
"""

from os import PathLike
from pathlib import Path

FILE = "packed.safetensors"


def is_packed(path: str | PathLike) -> bool:
    """Return whether `path` is a directory of packed weights."""
    try:
        return (Path(path) / FILE).is_file()
    except OSError:  # a name that no file can have
        return False
