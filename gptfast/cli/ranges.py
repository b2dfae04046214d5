"""Values out of range: the wrong use of a command, refused before it reads or writes anything."""

import math
from collections.abc import Sequence
from typing import Any

from gptfast.checks import integer
from gptfast.cli.flags import UsageError

MAX_THREADS = 4096


def check_whole(command: Any, *names: str, least: int = 1, most: int | None = None) -> None:
    """Raise UsageError unless fields of a command are None or integers from `least` to `most`."""
    for name in names:
        value = getattr(command, name)
        try:
            if value is not None:
                integer(name, value, least, most)
        except ValueError as error:
            raise UsageError(str(error)) from None


def check_split(split: Sequence[float], least: int) -> None:
    """Raise UsageError unless a split has `least` to three positive shares that sum to 1."""
    counted = {1: "one to three", 2: "two or three"}[least]
    summed = math.isclose(sum(split), 1.0, abs_tol=1e-6)
    if not (least <= len(split) <= 3 and summed and all(share > 0 for share in split)):
        got = " ".join(f"{share:g}" for share in split)
        raise UsageError(
            f"split must be {counted} shares above 0 that sum to 1, such as 0.9 0.1, got {got}"
        )
