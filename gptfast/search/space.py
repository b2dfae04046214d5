"""The settings that a search tries: every combination of a grid, or random draws from ranges."""

import contextlib
import difflib
import json
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from gptfast.checks import integer
from gptfast.search.trials import Settings

MAX_REPEATED_DRAWS = 1000
"""A search ends after this many draws in a row without new settings: none are left."""


def _number(text: str) -> int | float | None:
    """Return the number that the text writes; None if it writes none."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None


def _parse_value(text: str, spec: str) -> Any:
    """Return the bool, number or string that the text writes. spec: named in errors."""
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    number = _number(text)
    if number is not None and math.isnan(number):
        raise ValueError(f"{spec}: no setting can be nan")
    if number is not None or not text.startswith('"'):
        return text if number is None else number
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{spec}: {text} is not a string; close its quotes") from None


def _parse_specs(specs: Sequence[str], allowed: Collection[str] | None) -> dict[str, str]:
    """Return REST of each spec NAME=REST by its checked name, with underscores."""
    if not specs:
        raise ValueError("no field to vary; give NAME=VALUE,VALUE")
    fields: dict[str, str] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        name = name.strip().replace("-", "_")
        if not (equals and name and rest.strip()):
            raise ValueError(f"{spec!r} is not of the form NAME=VALUES, for example lr=1e-4,1e-3")
        if name in fields:
            raise ValueError(f"{name} is given twice; give each field once")
        if allowed is not None and name not in allowed:
            close = difflib.get_close_matches(name, allowed)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"there is no field {name!r}{hint}")
        fields[name] = rest
    return fields


def _parse_list(name: str, rest: str) -> list[Any]:
    """Return the values of a list such as 1e-3,3e-3."""
    values: list[Any] = []
    for text in rest.split(","):
        if not text.strip():
            raise ValueError(f"{name}={rest} has an empty value; write {name}=VALUE,VALUE")
        value = _parse_value(text, f"{name}={rest}")
        if value in values:
            raise ValueError(f"{name}={rest} lists {text.strip()} twice")
        values.append(value)
    return values


def parse_grid(specs: Sequence[str], *, allowed: Collection[str] | None = None) -> list[Settings]:
    """Return the settings of a grid, every combination of the values of its fields.

    ["lr=1e-4,1e-3", "n_layer=2,4"] gives four settings; the last field varies fastest. Values are
    numbers, true, false or strings. allowed: the names of the existing fields. Raises ValueError
    for a malformed spec, an unknown field, and a field or value given twice.
    """
    fields = {name: _parse_list(name, rest) for name, rest in _parse_specs(specs, allowed).items()}
    return [dict(zip(fields, values, strict=True)) for values in product(*fields.values())]


@dataclass(frozen=True)
class _Range:
    """The numbers from low to high; log: on a logarithmic scale."""

    low: float
    high: float
    log: bool

    def draw(self, u: float) -> float | int:
        """Return the value at the fraction u of the range, which is in [0, 1)."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        # An integer gets all numbers that round to it, so that each is as likely as another.
        low, high = (self.low - 0.5, self.high + 0.5) if whole else (self.low, self.high)
        value = low * (high / low) ** u if self.log else low + (high - low) * u
        # Four digits are exact enough, and short enough to type.
        value = round(value) if whole else float(f"{value:.4g}")
        return min(max(value, self.low), self.high)


def _parse_range(name: str, rest: str) -> _Range:
    """Return the range that LOW:HIGH or LOW:HIGH:log writes."""
    spec = f"{name}={rest}"
    low, high, *scale = (part.strip() for part in rest.split(":"))
    if scale not in ([], ["log"], ["linear"]):
        raise ValueError(f"{spec} is not of the form {name}=LOW:HIGH or {name}=LOW:HIGH:log")
    bounds = [_parse_value(bound, spec) for bound in (low, high)]
    for bound in bounds:
        if isinstance(bound, bool | str) or not math.isfinite(bound):
            raise ValueError(f"{spec}: a range goes from one number to another, got {bound!r}")
    if not bounds[0] < bounds[1]:
        raise ValueError(f"{spec} is an empty range: {low} is not below {high}")
    if scale == ["log"] and bounds[0] <= 0:
        raise ValueError(f"{spec}: a logarithmic range must start above 0, got {low}")
    return _Range(bounds[0], bounds[1], log=scale == ["log"])


def parse_random(
    specs: Sequence[str], trials: int, seed: int = 0, *, allowed: Collection[str] | None = None
) -> list[Settings]:
    """Return `trials` different settings, drawn at random.

    A spec is a range such as "lr=1e-4:1e-2:log" or "n_layer=2:6", or a list such as
    "dropout=0,0.1". A value of a range is uniform, or log-uniform with :log, and an integer if both
    bounds are integers. More trials only add settings after the others. Raises ValueError as
    `parse_grid` does, for an empty range, and if there are fewer different settings.
    """
    trials = integer("trials", trials, 1)
    fields = {
        name: _parse_range(name, rest) if ":" in rest else _parse_list(name, rest)
        for name, rest in _parse_specs(specs, allowed).items()
    }
    generator = random.Random(seed)
    drawn: list[Settings] = []
    repeats = 0  # draws in a row that gave settings we have already
    while len(drawn) < trials:
        settings = {}
        for name, field in fields.items():
            u = generator.random()
            settings[name] = (
                field.draw(u) if isinstance(field, _Range) else field[int(u * len(field))]
            )
        repeats = 0 if settings not in drawn else repeats + 1
        if not repeats:
            drawn.append(settings)
        elif repeats == MAX_REPEATED_DRAWS:
            raise ValueError(
                f"found only {len(drawn)} different settings, not {trials}; lower trials"
            )
    return drawn


def log_fields(specs: Sequence[str]) -> list[str]:
    """Return the fields that `parse_random` draws on a logarithmic scale."""
    fields = _parse_specs(specs, None) if specs else {}
    return [name for name, rest in fields.items() if rest.rpartition(":")[2].strip() == "log"]
