"""Sampling: schema, fake, public function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast.kernels.reference import sampling as reference
from gptfast.ops.library import register


def _fake(logits, temperature, top_k, top_p, min_p, seed, position):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_sample = register(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor seed, Tensor position) -> Tensor",
    reference.sample,
    _fake,
)

_LARGEST = torch.finfo(torch.float32).max


class _Parameter(NamedTuple):
    dtype: torch.dtype
    off: float  # the value that None stands for
    is_valid: Callable[[float], bool]  # for a Python number
    wording: str  # the valid numbers, for error messages
    least: float = 0.0  # what is below it would be 0 in float32, and is rounded up


_PARAMETERS = {
    "temperature": _Parameter(
        torch.float32, 1.0, lambda x: 0.0 <= x <= _LARGEST, "a finite number >= 0"
    ),
    "top_k": _Parameter(
        torch.int64,
        2**62,
        lambda x: 1 <= x < 2**63 and float(x).is_integer(),
        "an integer >= 1",
    ),
    "top_p": _Parameter(torch.float32, 1.0, lambda x: 0.0 < x <= 1.0, "in (0, 1]", 2**-126),
    "min_p": _Parameter(torch.float32, 0.0, lambda x: 0.0 <= x <= 1.0, "in [0, 1]"),
    "seed": _Parameter(
        torch.int64, 0, lambda x: -(2**63) <= x < 2**63 and float(x).is_integer(), "an int64"
    ),
    "position": _Parameter(
        torch.int64, 0, lambda x: x >= 0 and float(x).is_integer(), "an integer >= 0"
    ),
}


def per_row(
    batch: int, device: torch.device, **parameters: float | Tensor | None
) -> dict[str, Tensor]:
    """Return `sample`'s parameters as (batch,) tensors on a device; numbers are checked here.

    A loop that samples often calls this once, so that no token pays for it.
    """
    return {name: _one_per_row(name, x, batch, device) for name, x in parameters.items()}


def _one_per_row(name: str, value: Any, batch: int, device: torch.device) -> Tensor:
    parameter = _PARAMETERS[name]
    if not isinstance(value, Tensor):
        value = parameter.off if value is None else value
        if not parameter.is_valid(value):
            raise ValueError(f"{name} must be {parameter.wording}, got {value}")
        try:
            if parameter.dtype.is_floating_point:
                value = max(float(value), parameter.least)
            return torch.full((batch,), value, dtype=parameter.dtype, device=device)
        except OverflowError:  # an integer of more than 64 bits
            raise ValueError(f"{name} must be {parameter.wording}, got {value}") from None
    if value.shape != (batch,) or value.device != device:
        raise ValueError(
            f"{name} must be a number or a tensor of shape ({batch},) on {device}, "
            f"got {tuple(value.shape)} on {value.device}"
        )
    if value.is_floating_point() and not parameter.dtype.is_floating_point:
        raise ValueError(f"{name} must be {parameter.wording}, got a {value.dtype} tensor")
    return value.to(parameter.dtype).contiguous()


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int | Tensor = 0,
    position: int | Tensor = 0,
) -> Tensor:
    """Draw one token id per row of logits (B, V), any floating dtype; return (B,) int64.

    The parameters apply in this order; each is a number, or a (B,) tensor so that rows may differ:
    temperature >= 0 divides the logits, 0 is argmax; top_k >= 1 keeps exactly k tokens, ranked by
    raw logits, ties to the lower id; top_p in (0, 1] keeps the smallest set whose mass,
    renormalised after top_k, is >= top_p (Holtzman et al., 2020); min_p in [0, 1] drops tokens less
    likely than min_p times the likeliest. None is off, and so, per row, are top_k >= V, top_p = 1,
    min_p = 0.
    seed, position: the draw is a pure function of them and the row; position is the index, in its
    sequence, of the token being drawn.

    The same logits, seed and position give the same token on every backend and in any batch. Raises
    ValueError for a parameter out of range and, on the CPU, for a row with NaN, +inf or nothing but
    -inf; on a GPU such a row gives -1.
    """
    if logits.dim() != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating-point (B, V) with V >= 1, "
            f"got {logits.dtype} {tuple(logits.shape)}"
        )
    batch, device = logits.shape[0], logits.device
    cuts = per_row(batch, device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    draw = per_row(batch, device, seed=seed, position=position)
    return _sample(logits, *cuts.values(), *draw.values())
