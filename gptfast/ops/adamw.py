"""AdamW and the global gradient norm: schemas and fakes; `gptfast.AdamW` is their public face."""

import torch
from torch import Tensor

from gptfast.kernels.reference import adamw as reference
from gptfast.ops.library import direct, register


def _grad_norm_fake(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.promote_types(grads[0].dtype, torch.float32))


def _adamw_fake(*args: object) -> None:
    return None


_grad_norm = register("grad_norm(Tensor[] grads) -> Tensor", reference.grad_norm, _grad_norm_fake)
_adamw = register(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] masters, Tensor(e!)[] steps, Tensor lr, Tensor? grad_norm, float max_norm, "
    "float beta1, float beta2, float eps, float weight_decay, int[] param_ids, bool stochastic, "
    "int seed) -> ()",
    reference.adamw,
    _adamw_fake,
)


def grad_norm(grads: list[Tensor], layout: object = None) -> Tensor:
    """Return the 2-norm over all gradients together, 0-d; layout: as in `adamw`."""
    launcher = None if layout is None else direct(_grad_norm, grads[0])
    return _grad_norm(grads) if launcher is None else launcher(grads, layout)


def adamw(params: list[Tensor], *args: object, layout: object = None) -> None:
    """Take one step in place; the arguments are the schema's.

    layout: an object that the caller gives with plain tensors alone, and only with such as have the
    classes, dtypes, devices, sizes and strides that the tensors had the last time.
    """
    launcher = None if layout is None else direct(_adamw, params[0])
    if launcher is None:
        _adamw(params, *args)
    else:
        launcher(params, *args, layout)
    # As ATen's in-place operators do: a backward that saved the old values is now an error.
    torch.autograd.graph.increment_version(params)
