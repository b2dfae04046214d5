"""Sampling a token from each row of logits, in plain PyTorch.

Order: temperature, top_k, top_p, min_p, draw. Probabilities are integers,
    w = round(exp((l - max l) / T) * 2^40),
so sums are exact in any order. Tokens are ranked by their logits, equal ones by the lower id:
  top_k keeps the first k ranks;
  top_p keeps a rank while the mass of the ranks before it is < top_p * (mass after top_k);
  min_p keeps w >= min_p * 2^40;
  the draw takes the first kept id, in id order, whose running mass exceeds u * (mass kept);
u is the Philox number of (seed, position). Temperature 0 takes the first id of the largest logit.
"""

import torch
from torch import Tensor

from gptfast.kernels.reference.philox import MASK, philox, uniform

# The weight of the largest logit.
WEIGHT_ONE = 2.0**40


def check_rows(bad: Tensor) -> None:
    """Raise ValueError on the CPU for a bad row; a GPU would have to synchronise.

    bad: (B,), whether a row cannot be sampled.
    """
    if bad.device.type == "cpu" and bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"logits row {row} has NaN, +inf or nothing but -inf; check the model's output"
        )


def check_parameters(**parameters: tuple[Tensor, Tensor, str]) -> None:
    """Raise ValueError on the CPU for a value out of range.

    name=(its values, which of them are valid, the valid range in words).
    """
    for name, (values, fit, must) in parameters.items():
        if values.device.type == "cpu" and not fit.all():
            row = int((~fit).nonzero()[0])
            raise ValueError(f"{name} must be {must}, got {values[row].item()} in row {row}")


def draw_uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Return u in [0, 1) for each (seed, position), fp32."""
    zero = torch.zeros_like(position)
    return uniform(philox(position & MASK, (position >> 32) & MASK, zero, zero, seed)[0])


def kept_weights(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Return the weight of every token (B, V), int64; 0 if top_k, top_p or min_p removed it."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    difference = (x - x.amax(-1, keepdim=True)) / temperature.to(x.dtype)[:, None]
    weight = torch.round(torch.exp(difference) * WEIGHT_ONE).to(torch.int64)  # (B, V)
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices  # ties: lower id first
    w = weight.gather(-1, order)
    rank = torch.arange(w.shape[-1], device=w.device)
    w = w * (rank < top_k[:, None])
    mass = w.cumsum(-1)
    limit = top_p.double() * mass[:, -1].double()
    keep = ((mass - w).double() < limit[:, None]) | (rank == 0)
    keep &= w.double() >= min_p.double()[:, None] * WEIGHT_ONE
    return torch.zeros_like(weight).scatter(-1, order, w * keep)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """Draw a token from each row of logits (B, V); all other arguments are (B,).

    Return ids (B,), int64; on a GPU, -1 for a row that cannot be sampled.
    """
    check_parameters(
        temperature=(
            temperature,
            (temperature >= 0) & temperature.isfinite(),
            "a finite number >= 0",
        ),
        top_k=(top_k, top_k >= 1, "an integer >= 1"),
        top_p=(top_p, (top_p > 0) & (top_p <= 1), "in (0, 1]"),
        min_p=(min_p, (min_p >= 0) & (min_p <= 1), "in [0, 1]"),
        position=(position, position >= 0, "an integer >= 0"),
    )
    top = logits.amax(-1)
    bad = ~top.isfinite()  # amax of a row with NaN is NaN
    check_rows(bad)
    greedy = temperature == 0
    temperature = temperature.where(~greedy, 1.0)
    weight = kept_weights(logits, temperature, top_k, top_p, min_p)
    mass = weight.cumsum(-1)
    target = (draw_uniform(seed, position).double() * mass[:, -1].double()).to(torch.int64)
    drawn = (mass <= target[:, None]).sum(-1)
    ids = torch.where(greedy, logits.argmax(-1), drawn)
    return ids.masked_fill(bad, -1)
