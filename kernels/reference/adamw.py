"""AdamW with global-norm clipping in plain PyTorch (Loshchilov & Hutter, 2019, algorithm 2).

    norm = sqrt(sum g^2) over every gradient;  g *= min(1, max_norm / (norm + 1e-6))
    step += 1;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr / (1 - b1^step) * m / (sqrt(v) / sqrt(1 - b2^step) + eps)

The arithmetic is fp32 (fp64 for fp64 parameters). A 16-bit parameter is either its fp32 master,
rounded, or is rounded stochastically: half of a Philox word is added to the fp32 bits, then their
low half is dropped. An element that is not its rounded master was written by somebody else since
the last step: p is then the element itself. With a norm that is not finite, nothing changes.
"""

import torch
from torch import Tensor

from gptfast.kernels.reference.philox import philox


def grad_norm(grads: list[Tensor]) -> Tensor:
    """Return the 2-norm over all gradients together, 0-d fp32 (fp64 for fp64 gradients)."""
    square = torch.stack([g.double().square().sum() for g in grads]).sum()
    return square.sqrt().to(torch.promote_types(grads[0].dtype, torch.float32))


def _round_stochastic(p: Tensor, param_id: int, step: Tensor, seed: int) -> Tensor:
    """Return fp32 p as bf16, rounded up with the probability of its distance to the lower value."""
    index = torch.arange(p.numel(), device=p.device)
    param, domain = torch.full_like(index, param_id), torch.full_like(index, 2)
    counter_step = step.to(torch.int64).to(p.device).expand_as(index)
    key = torch.tensor(seed, dtype=torch.int64, device=p.device)
    # A counter's four words serve eight elements: each word the lower half first.
    words = torch.stack(philox(index >> 3, param, counter_step, domain, key), -1)
    word = words.gather(-1, ((index & 7) >> 1)[:, None])[:, 0]
    half = (word >> 16 * (index & 1)) & 0xFFFF
    bits = p.view(torch.int32) + half.to(torch.int32).view(p.shape)
    rounded = (bits & -0x10000).view(torch.float32)
    return torch.where(p.isfinite(), rounded, p).to(torch.bfloat16)


def _follow(master: Tensor, param: Tensor) -> Tensor:
    """Return the master, or the parameter where it is not the rounded master."""
    rounded = master.to(param.dtype)
    # Compared as bits: 0 and -0 differ. Two NaN are the same, whatever their bits.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[param.itemsize]
    same = (rounded.view(bits) == param.view(bits)) | (rounded.isnan() & param.isnan())
    return torch.where(same, master, param.to(master.dtype))


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    grad_norm: Tensor | None,
    max_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    param_ids: list[int],
    stochastic: bool,
    seed: int,
) -> None:
    """Take one step in place. masters: empty, or one fp32 tensor per parameter."""
    proceed: Tensor | bool = True
    clip: Tensor | float = 1.0
    if grad_norm is not None:
        proceed = grad_norm.isfinite()
        clip = (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    for i, param in enumerate(params):
        dtype = torch.promote_types(param.dtype, torch.float32)
        step = steps[i] + 1
        g = grads[i].to(dtype) * clip
        m = exp_avgs[i].to(dtype).lerp(g, 1 - beta1)
        v = exp_avg_sqs[i].to(dtype) * beta2 + (1 - beta2) * g * g
        bias1, bias2 = 1 - beta1 ** step.double(), 1 - beta2 ** step.double()
        # 0-d doubles do not promote fp32 tensors: the arithmetic below stays in `dtype`.
        denominator = v.sqrt() / bias2.sqrt() + eps
        p = (_follow(masters[i], param) if masters else param).to(dtype)
        p = p * (1 - lr.double() * weight_decay) - (lr.double() / bias1) * (m / denominator)
        rounded = _round_stochastic(p, param_ids[i], step, seed) if stochastic else p
        updates = [(param, rounded), (exp_avgs[i], m), (exp_avg_sqs[i], v), (steps[i], step)]
        updates += [(masters[i], p)] if masters else []
        for old, new in updates:
            old.copy_(
                torch.where(torch.as_tensor(proceed, dtype=torch.bool), new.to(old.dtype), old)
            )
