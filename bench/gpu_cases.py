"""The cases of `make gpu`: each operation beside its peers, with the bytes or FLOPs counted.

The targets are this project's own for one H200. A peer that is not installed, or that this GPU or
this torch does not support, is left out and named.

Counted: for attention 4 D per head, query and visible key in the forward and 10 D in the backward;
for linear cross entropy three products of 2 N V C; for cross entropy the logits read twice and
their gradient written once; for AdamW 28 bytes a parameter, and 4 for the norm; for sampling the
logits read once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import GPT, AdamW, GPTConfig, ops
from gptfast.ops.sampling import per_row

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Built:
    """The sides of a case, ours under "gptfast", and `check`, which raises where they differ."""

    sides: dict[str, Callable[[], object]]
    check: Callable[[], None]


@dataclass(frozen=True)
class GpuCase:
    """One row. build(smoke) makes its data, tiny for a smoke run."""

    name: str
    build: Callable[[bool], Built]
    flops: float = 0.0
    n_bytes: float = 0.0
    target: str = ""
    graph: bool = False
    """Time the replay of a CUDA graph: device time without the launches."""
    wall: bool = False
    """Compare the sides by wall time: how long the host waits, with the launches."""
    device: bool = True
    """Whether device time means something: not if the host reads results within a call."""
    rounds: int = 30
    seconds: float = 40.0
    """The case's time limit, with the start of its process and compilation."""
    smoke: bool = True
    """Whether a smoke run includes it: not if another case runs the same lines."""


def dtype_of(smoke: bool) -> torch.dtype:
    # The interpreter has no bf16.
    return torch.float16 if smoke else BF16


def close(ours: Tensor, peer: Tensor, tolerance: float = 4e-2) -> None:
    error = (ours.float() - peer.float()).abs().max().item()
    assert error <= tolerance * peer.float().abs().max().item(), f"off by {error:.3g}"


def _sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _flex() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return flex_attention compiled by torch.compile: FlashAttention-2 as a Triton template."""
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A backward with donated buffers cannot run twice on the same graph.
    config.donated_buffer = False
    compiled, masks = torch.compile(flex_attention), {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.shape[2]
        if T not in masks:
            masks[T] = create_block_mask(
                lambda b, h, i, j: i >= j, None, None, T, T, device=q.device
            )
        return compiled(q, k, v, block_mask=masks[T])

    return run


def _attention(shape: tuple[int, int, int, int], backward: bool) -> Callable[[bool], Built]:
    def build(smoke: bool) -> Built:
        B, H, T, D = (1, 2, 33, 16) if smoke else shape
        qkv = torch.randn(B, T, 3, H, D).to(dtype_of(smoke))
        leaves = [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]  # (B, H, T, D)
        dout = torch.randn(B, T, H, D).to(qkv.dtype).transpose(1, 2)
        peers = {
            "flash": lambda q, k, v: _sdpa("FLASH_ATTENTION", q, k, v),
            "cudnn": lambda q, k, v: _sdpa("CUDNN_ATTENTION", q, k, v),
            "flex": None if smoke else _flex(),
        }
        functions = {"gptfast": ops.attention, **({} if smoke else peers)}
        sides: dict[str, Callable] = {}
        for side, f in functions.items():
            if not backward:
                sides[side] = torch.no_grad()(lambda f=f: f(*leaves))
                continue
            # The graph is kept, so that only the backward is timed.
            outs: list[Tensor] = []

            def run(f: Callable = f, outs: list = outs) -> list[Tensor]:
                if not outs:
                    outs.append(f(*leaves))
                return list(torch.autograd.grad(outs[0], leaves, dout, retain_graph=True))

            sides[side] = run

        def check() -> None:
            expected = F.scaled_dot_product_attention(*leaves, is_causal=True)
            grads = torch.autograd.grad(expected, leaves, dout)
            out = ops.attention(*leaves)
            for a, b in zip(
                (out, *torch.autograd.grad(out, leaves, dout)), (expected, *grads), strict=True
            ):
                close(a, b)

        return Built(sides, check)

    return build


def _cross_entropy(smoke: bool) -> Built:
    N, V = (16, 101) if smoke else (16384, 50257)
    logits = torch.randn(N, V).to(dtype_of(smoke)).requires_grad_()
    target = torch.randint(V, (N,))

    def through(f: Callable) -> Callable[[], Tensor]:
        def run() -> Tensor:
            return torch.autograd.grad(f(logits, target), logits)[0]

        return run

    sides = {"gptfast": through(ops.cross_entropy), "eager": through(F.cross_entropy)}
    if not smoke:
        sides["compiled"] = through(torch.compile(F.cross_entropy))
    if not smoke and find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        # Liger writes the gradient over the logits: it gets a copy, made outside of what is timed.
        own = logits.detach().clone().requires_grad_()
        sides["liger"] = lambda: torch.autograd.grad(liger_cross_entropy(own, target), own)[0]
    eager = through(F.cross_entropy)
    return Built(sides, lambda: close(sides["gptfast"](), eager()))


def linear_cross_entropy(smoke: bool) -> Built:
    """Return the head with the loss."""
    N, V, C = (16, 101, 32) if smoke else (16384, 50257, 768)
    x = torch.randn(N, C).to(dtype_of(smoke)).requires_grad_()
    w = (torch.randn(V, C) * 0.05).to(x.dtype).requires_grad_()
    target = torch.randint(V, (N,))

    def through(f: Callable) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(f(x, w, target), (x, w))

    def two_steps(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), target)

    sides = {"gptfast": through(ops.linear_cross_entropy), "eager": through(two_steps)}
    if not smoke:
        sides["compiled"] = through(torch.compile(two_steps))
    if not smoke and hasattr(F, "linear_cross_entropy"):
        sides["F.linear_cross_entropy"] = through(F.linear_cross_entropy)
    if not smoke and find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        sides["liger"] = through(lambda x, w, target: liger(x, w, target))

    def check() -> None:
        for a, b in zip(sides["gptfast"](), through(two_steps)(), strict=True):
            close(a, b)

    return Built(sides, check)


def _parameters(smoke: bool) -> list[Tensor]:
    config = GPTConfig(vocab_size=101, block_size=8, n_layer=1, n_head=2, n_embd=16)
    model = GPT(config if smoke else GPTConfig())
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return list(model.parameters())


def _adamw(smoke: bool) -> Built:
    own, others = _parameters(smoke), _parameters(smoke)
    for a, b in zip(own, others, strict=True):
        b.data.copy_(a.data)
        b.grad.copy_(a.grad)
    ours = AdamW(own, lr=1e-4, max_norm=1.0)
    peer = torch.optim.AdamW(others, lr=1e-4, fused=True)

    def fused() -> None:
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        peer.step()

    def check() -> None:
        # Both have made the same number of steps; the peer has clipped its gradients in place.
        for a, b in zip(own, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    return Built({"gptfast": ours.step, "AdamW(fused) + clip_grad_norm_": fused}, check)


def _mask(logits: Tensor) -> Tensor:
    """Return the logits masked by top_k=50 and then top_p=0.9, as code built on torch does it."""
    logits = logits.masked_fill(logits < logits.topk(50).values[:, -1:], -torch.inf)
    ordered, order = logits.sort(descending=True)
    probs = ordered.softmax(-1)
    beyond = probs.cumsum(-1) - probs >= 0.9
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)


def _sampling(B: int) -> Callable[[bool], Built]:
    def build(smoke: bool) -> Built:
        rows, V = (2, 211) if smoke else (B, 50257)
        # Without ties, which torch's sort would order at random.
        steps = torch.stack([torch.randperm(V) for _ in range(rows)])
        logits = (steps / V * 12 - 6).float()
        seed = torch.arange(rows)
        # Every parameter is a tensor already, so that nothing but the sampling is captured.
        options = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.0}
        parameters = per_row(rows, logits.device, **options)

        @torch.inference_mode()
        def ours() -> Tensor:
            return ops.sample(logits, **parameters, seed=seed, position=seed)

        @torch.inference_mode()
        def peer() -> Tensor:
            # The largest p / Exp(1) is a draw from p; multinomial would synchronise the device.
            probs = _mask(logits.float()).softmax(-1)
            return (probs / torch.empty_like(probs).exponential_()).argmax(-1)

        def check() -> None:
            allowed = _mask(logits.float()).gather(1, ours()[:, None])
            assert allowed.isfinite().all(), "a token outside of top-k and top-p"

        sides = {"gptfast": ours, "torch": peer}
        if not smoke and find_spec("flashinfer"):
            import flashinfer

            sides["flashinfer"] = lambda: flashinfer.sampling.top_k_top_p_sampling_from_logits(
                logits.float(), 50, 0.9
            )
        return Built(sides, check)

    return build


def operation_cases() -> Iterator[GpuCase]:
    """Yield the rows of attention, the loss and the optimizer, the most telling first."""
    B, H, T, D = shape = (16, 12, 1024, 64)
    pairs = B * H * T * (T + 1) / 2
    name = f"bf16 causal {shape}"
    yield GpuCase(
        f"attention fwd {name}",
        _attention(shape, False),
        flops=4 * D * pairs,
        target="1.1x, 350 TFLOP/s",
        seconds=60,
    )
    yield GpuCase(
        f"attention bwd {name}",
        _attention(shape, True),
        flops=10 * D * pairs,
        target="1.05x, 300 TFLOP/s",
        seconds=60,
    )
    N, V, C = 16384, 50257, 768
    yield GpuCase(
        f"linear_cross_entropy fwd+bwd bf16 N={N} V={V} C={C}",
        linear_cross_entropy,
        flops=3 * 2.0 * N * V * C,
        target="1.3x, 60%, memory 25% of the logits",
        rounds=15,
        seconds=60,
    )
    yield GpuCase(
        f"cross_entropy fwd+bwd bf16 ({N}, {V})",
        _cross_entropy,
        n_bytes=3 * 2.0 * N * V,
        target="1.2x, 85%",
    )
    params = 124_439_808
    yield GpuCase("AdamW + norm + clip, 124M fp32", _adamw, n_bytes=32.0 * params, target="80%")


def sampling_cases() -> Iterator[GpuCase]:
    """Yield the rows of sampling, from one row of logits to many."""
    V = 50257
    for rows, microseconds in ((1, 30), (64, 60), (512, 300)):
        yield GpuCase(
            f"sample B={rows} V={V} fp32, top_k 50, top_p 0.9",
            _sampling(rows),
            smoke=rows == 1,
            n_bytes=4.0 * rows * V,
            target=f"10x, {microseconds} us",
            graph=True,
            rounds=100,
            seconds=40,
        )
