"""The layers' cases of `make gpu`: linear and mlp with their norm, beside PyTorch's.

FLOPs counted: those of the matrix products. "cuBLASLt's GELU" is the forward with GELU in the
epilogue of the first product, which PyTorch has without a gradient; biases are in an epilogue on
all sides but the compiled one.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from gpu_cases import Built, GpuCase, close, dtype_of
from torch import Tensor

from gptfast import ops

N, C = 16384, 768
EPS = 1e-5
Layer = Callable[..., Tensor]
"""Takes x, the norm's weight and bias, then the layers' weights and biases."""


def _linear(x: Tensor, ln: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.linear(x, weight, bias, norm=(ln, ln_bias, EPS))


def _eager_linear(x: Tensor, ln: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, ln.shape, ln, ln_bias, EPS), weight, bias)


def _mlp(x: Tensor, ln: Tensor, ln_bias: Tensor, *layers: Tensor) -> Tensor:
    return ops.mlp(x, *layers, norm=(ln, ln_bias, EPS), residual=True)


def _eager_mlp(
    x: Tensor, ln: Tensor, ln_bias: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor, bias: Tensor
) -> Tensor:
    h = _eager_linear(x, ln, ln_bias, fc, fc_bias)
    return x + F.linear(F.gelu(h, approximate="tanh"), proj, bias)


def _epilogue_mlp(
    x: Tensor, ln: Tensor, ln_bias: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor, bias: Tensor
) -> Tensor:
    a = F.layer_norm(x, ln.shape, ln, ln_bias, EPS)
    g = torch._addmm_activation(fc_bias, a, fc.t(), use_gelu=True)
    return x + F.linear(g, proj, bias)


# The name: ours, PyTorch's, its forward with an epilogue, and the sizes of the layers in C.
LAYERS: dict[str, tuple[Layer, Layer, Layer | None, list[tuple[int, int]]]] = {
    "linear": (_linear, _eager_linear, None, [(3, 1)]),
    "mlp": (_mlp, _eager_mlp, _epilogue_mlp, [(4, 1), (1, 4)]),
}


def _inputs(sizes: list[tuple[int, int]], smoke: bool) -> list[Tensor]:
    rows, channels = (16, 32) if smoke else (N, C)
    tensors = [torch.randn(rows, channels), 1 + 0.1 * torch.randn(channels), torch.randn(channels)]
    for out, given in sizes:
        weight = torch.randn(out * channels, given * channels) * (given * channels) ** -0.5
        tensors += [weight, torch.randn(out * channels)]
    return [t.to(dtype_of(smoke)).requires_grad_() for t in tensors]


def _layer(name: str, backward: bool, smoke: bool) -> Built:
    ours, eager, epilogue, sizes = LAYERS[name]
    inputs = _inputs(sizes, smoke)
    dout = torch.randn_like(eager(*inputs))

    def through(f: Layer) -> Callable[[], list[Tensor]]:
        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [f(*inputs)]

        def both() -> list[Tensor]:
            out = f(*inputs)
            return [out, *torch.autograd.grad(out, inputs, dout)]

        return both if backward else forward

    sides = {"gptfast": through(ours), "eager": through(eager)}
    if not smoke:
        sides["compiled"] = through(torch.compile(eager))
    if not smoke and epilogue is not None and not backward:
        sides["cuBLASLt's GELU"] = through(epilogue)

    def check() -> None:
        for mine, theirs in zip(sides["gptfast"](), sides["eager"](), strict=True):
            close(mine, theirs)

    return Built(sides, check)


def layer_cases() -> Iterator[GpuCase]:
    """Yield each layer forward, and forward and backward."""
    for name, (*_, sizes) in LAYERS.items():
        flops = sum(2.0 * N * out * given * C * C for out, given in sizes)
        for backward in (True, False):
            yield GpuCase(
                f"norm and {name} {'fwd+bwd' if backward else 'fwd'} bf16 ({N}, {C})",
                partial(_layer, name, backward),
                flops=(3 if backward else 1) * flops,
                target="1.1x",
                seconds=50,
            )
