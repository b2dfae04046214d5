"""Sampling: schema, fake, public function."""

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
# name: (dtype, what None stands for, test for a Python number, what the number must be)
_PARAMETERS = {
    "temperature": (torch.float32, 1.0, lambda x: 0.0 <= x <= _LARGEST, "a finite number >= 0"),
    "top_k": (
        torch.int64,
        2**62,
        lambda x: 1 <= x < 2**63 and float(x).is_integer(),
        "an integer >= 1",
    ),
    "top_p": (torch.float32, 1.0, lambda x: 0.0 < x <= 1.0, "in (0, 1]"),
    "min_p": (torch.float32, 0.0, lambda x: 0.0 <= x <= 1.0, "in [0, 1]"),
    "seed": (torch.int64, 0, lambda x: -(2**63) <= x < 2**63 and float(x).is_integer(), "an int64"),
    "position": (torch.int64, 0, lambda x: x >= 0 and float(x).is_integer(), "an integer >= 0"),
}


def per_row(logits: Tensor, **parameters: float | Tensor | None) -> dict[str, Tensor]:
    """`sample`'s parameters as (B,) tensors beside logits (B, V); numbers are checked here.

    A loop that samples often does it once, so that no token pays for it.
    """
    return {name: _one_per_row(name, value, logits) for name, value in parameters.items()}


def _one_per_row(name: str, value: float | Tensor | None, logits: Tensor) -> Tensor:
    dtype, off, fits, must = _PARAMETERS[name]
    B = logits.shape[0]
    if not isinstance(value, Tensor):
        value = off if value is None else value
        if not fits(value):
            raise ValueError(f"{name} must be {must}, got {value}")
        try:
            value = float(value) if dtype.is_floating_point else value
            return torch.full((B,), value, dtype=dtype, device=logits.device)
        except OverflowError:  # an integer of more than 64 bits
            raise ValueError(f"{name} must be {must}, got {value}") from None
    if value.shape != (B,) or value.device != logits.device:
        raise ValueError(
            f"{name} must be a number or a tensor of shape ({B},) on {logits.device}, "
            f"got {tuple(value.shape)} on {value.device}"
        )
    if value.is_floating_point() and not dtype.is_floating_point:
        raise ValueError(f"{name} must be {must}, got a {value.dtype} tensor")
    return value.to(dtype).contiguous()


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
    """Draw one token id per row of logits (B, V) floating -> (B,) int64.

    Applied in this order, each a number or a (B,) tensor so that rows may differ:
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
    kept = per_row(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    at = per_row(logits, seed=seed, position=position)
    return _sample(logits, *kept.values(), *at.values())
