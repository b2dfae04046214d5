"""Measure an AdamW step with global-norm clipping against `torch.optim.AdamW(fused=True)` and
`clip_grad_norm_`.

Bytes counted per fp32 parameter: 32. The parameter and both moments are read and written; the
gradient is read for the norm and again for the update. Per bf16 parameter with an fp32 master: 32
(4 for the parameter, 4 to read the gradient twice, 24 for master and moments). The bf16 peer
keeps masters too: it copies the gradients to fp32, steps the masters and copies the result back.
Each side updates its own copy of GPT-2's tensors.

The check clips the peer's gradients by a norm computed in float64: at 124M parameters in fp32,
`clip_grad_norm_` is 0.075% off, which alone would fail the check (ours is 7e-9 off).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from harness import Case, Pair, assert_close, both_sides, dtype_name, tolerance_of
from plain_gpt import PlainGPT, decay_groups
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from gptfast import GPTConfig
from gptfast.optim import AdamW

LR, MAX_NORM = 1e-4, 1.0


@dataclass(frozen=True)
class _Side:
    params: list[Tensor]
    step: Callable[[], None]
    checked_step: Callable[[], None]


def _parameters(config: GPTConfig, dtype: torch.dtype) -> PlainGPT:
    torch.manual_seed(0)
    model = PlainGPT(config).to(dtype)
    for param in model.parameters():
        param.grad = torch.randn_like(param) * 1e-2
    return model


def _ours(config: GPTConfig, dtype: torch.dtype) -> _Side:
    model = _parameters(config, dtype)
    optimizer = AdamW(decay_groups(model), lr=LR, max_norm=MAX_NORM)
    return _Side(list(model.parameters()), optimizer.step, optimizer.step)


def _peer(config: GPTConfig, dtype: torch.dtype) -> _Side:
    model = _parameters(config, dtype)
    params = list(model.parameters())
    # An fp32 model is updated itself, a bf16 model through its fp32 masters.
    stepped = model if dtype == torch.float32 else _parameters(config, torch.float32)
    masters = list(stepped.parameters())
    optimizer = torch.optim.AdamW(decay_groups(stepped), lr=LR, fused=True)

    def to_masters() -> None:
        for param, master in zip(params, masters, strict=True):
            if master is not param:
                master.grad.copy_(param.grad)

    @torch.no_grad()
    def from_masters() -> None:
        for param, master in zip(params, masters, strict=True):
            if master is not param:
                param.copy_(master)

    def step() -> None:
        to_masters()
        clip_grad_norm_(masters, MAX_NORM)
        optimizer.step()
        from_masters()

    def checked_step() -> None:
        to_masters()
        norm = sum(p.grad.double().square().sum() for p in masters).sqrt().item()
        for master in masters:
            master.grad.mul_(min(1.0, MAX_NORM / (norm + 1e-6)))
        optimizer.step()
        from_masters()

    return _Side(params, step, checked_step)


def _no_masters_pair(config: GPTConfig, moment_dtype: torch.dtype | None) -> Callable[[], Pair]:
    """Return a pair with bf16 parameters and no masters; our side rounds stochastically."""

    def build() -> Pair:
        model, plain = (_parameters(config, torch.bfloat16) for _ in range(2))
        optimizer = AdamW(
            decay_groups(model),
            lr=LR,
            max_norm=MAX_NORM,
            bf16_update="stochastic",
            moment_dtype=moment_dtype,
        )
        plain_optimizer = torch.optim.AdamW(decay_groups(plain), lr=LR, fused=True)
        params, plain_params = list(model.parameters()), list(plain.parameters())

        def peer() -> None:
            clip_grad_norm_(plain_params, MAX_NORM)
            plain_optimizer.step()

        def check() -> None:
            optimizer.step()
            peer()
            assert_close(params, plain_params, tolerance_of(torch.bfloat16))

        return Pair(optimizer.step, peer, check)

    return build


def _pair(config: GPTConfig, dtype: torch.dtype) -> Callable[[], Pair]:
    def build() -> Pair:
        ours, peer = _ours(config, dtype), _peer(config, dtype)

        def check() -> None:
            ours.checked_step()
            peer.checked_step()
            assert_close(ours.params, peer.params, tolerance_of(dtype))

        return Pair(ours.step, peer.step, check)

    return build


def cases(quick: bool) -> Iterator[Case]:
    """Yield the cases on GPT-2's tensors (124M parameters in 148 tensors) or a smaller model's."""
    config = GPTConfig(n_layer=4, n_head=4, n_embd=320) if quick else GPTConfig()
    with torch.device("meta"):
        shapes = [p.shape for p in PlainGPT(config).parameters()]
    n_params = sum(shape.numel() for shape in shapes)
    shape = f"{n_params / 1e6:.0f}M in {len(shapes)} tensors"
    for dtype, bytes_each in ((torch.float32, 32), (torch.bfloat16, 32)):
        yield Case(
            "adamw",
            f"step, max_norm {dtype_name(dtype)}",
            shape,
            "AdamW(fused) + clip_grad_norm_",
            _pair(config, dtype),
            n_bytes=bytes_each * n_params,
            target=1.7 if dtype == torch.float32 else 2.0,
        )
    for moment_dtype, name, bytes_each in ((None, "fp32", 24), (torch.bfloat16, "bf16", 16)):
        yield Case(
            "adamw",
            f"step, max_norm bf16 stochastic, {name} moments",
            shape,
            "AdamW(fused) on bf16 + clip_grad_norm_",
            _no_masters_pair(config, moment_dtype),
            n_bytes=bytes_each * n_params,
            target=2.0,
        )


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_adamw(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
