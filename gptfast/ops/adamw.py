"""AdamW and the global gradient norm: schemas and fakes; `gptfast.AdamW` is their public face."""

import torch
from torch import Tensor

from gptfast.kernels.reference import adamw as reference
from gptfast.ops.library import register


def _grad_norm_fake(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.promote_types(grads[0].dtype, torch.float32))


def _adamw_fake(*args: object) -> None:
    return None


grad_norm = register("grad_norm(Tensor[] grads) -> Tensor", reference.grad_norm, _grad_norm_fake)
_adamw = register(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] masters, Tensor(e!)[] steps, Tensor lr, Tensor? grad_norm, float max_norm, "
    "float beta1, float beta2, float eps, float weight_decay, int[] param_ids, bool stochastic, "
    "int seed) -> ()",
    reference.adamw,
    _adamw_fake,
)


def adamw(params: list[Tensor], *args: object) -> None:
    """Take one step in place; the arguments are the schema's."""
    _adamw(params, *args)
    # As ATen's in-place operators do: a backward that saved the old values is now an error.
    torch.autograd.graph.increment_version(params)
