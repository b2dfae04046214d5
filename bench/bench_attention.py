"""Measure causal attention against `F.scaled_dot_product_attention`.

FLOPs counted per head, query and visible key: 4 D in the forward (two products), 10 D in the
backward (five). Bytes counted when one token is decoded: keys and values, read once.
Both sides read strided views of one packed (B, T, 3C) projection. In the "packed" cases the peer
also splits the projection, merges the heads and packs the gradient; `ops.attention_qkv` needs none
of that. With dropout the masks differ by design, so ours is checked against the reference.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from harness import Case, Pair, assert_close, both_sides, dtype_name, pair_of, tolerance_of
from torch import Tensor

from gptfast import ops, use_backend

Shape = tuple[int, int, int, int]


def _heads(qkv: Tensor, H: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, H, C3 // 3 // H).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    return q, k, v


def _training(shape: Shape, dtype: torch.dtype, dropout_p: float) -> Callable[[], Pair]:
    def build() -> Pair:
        B, H, T, D = shape
        torch.manual_seed(0)
        qkv = torch.randn(B, T, 3 * H * D, dtype=dtype)
        leaves = tuple(x.detach().requires_grad_() for x in _heads(qkv, H))
        dout = torch.randn(B, T, H, D, dtype=dtype).transpose(1, 2)  # (B, H, T, D)

        def ours() -> tuple[Tensor, ...]:
            out = ops.attention(*leaves, dropout_p=dropout_p)
            return out, *torch.autograd.grad(out, leaves, dout)

        def peer() -> tuple[Tensor, ...]:
            out = F.scaled_dot_product_attention(*leaves, is_causal=True, dropout_p=dropout_p)
            return out, *torch.autograd.grad(out, leaves, dout)

        def check_dropout() -> None:
            with use_backend("reference"):
                expected = ours()
            assert_close(ours(), expected, tolerance_of(dtype))

        pair = pair_of(ours, peer, tolerance_of(dtype))
        return Pair(ours, peer, check_dropout) if dropout_p else pair

    return build


def _packed(shape: Shape, dtype: torch.dtype) -> Callable[[], Pair]:
    def build() -> Pair:
        B, H, T, D = shape
        torch.manual_seed(0)
        qkv = torch.randn(B, T, 3 * H * D, dtype=dtype, requires_grad=True)
        dout = torch.randn(B, T, H * D, dtype=dtype)

        def ours() -> tuple[Tensor, ...]:
            out = ops.attention_qkv(qkv, H)
            return out, *torch.autograd.grad(out, qkv, dout)

        def peer() -> tuple[Tensor, ...]:
            q, k, v = (x.view(B, T, H, D).transpose(1, 2) for x in qkv.split(H * D, dim=2))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
            out = out.transpose(1, 2).reshape(B, T, H * D)
            return out, *torch.autograd.grad(out, qkv, dout)

        return pair_of(ours, peer, tolerance_of(dtype))

    return build


def _decode(shape: Shape, dtype: torch.dtype) -> Callable[[], Pair]:
    def build() -> Pair:
        B, H, T, D = shape
        torch.manual_seed(0)
        q = torch.randn(B, 1, 3, H, D, dtype=dtype)[:, :, 0].transpose(1, 2)  # (B, H, 1, D)
        k, v = torch.randn(2, B, H, T + 64, D, dtype=dtype)[:, :, :, :T]  # a cache with room

        @torch.inference_mode()
        def ours() -> tuple[Tensor]:
            return (ops.attention(q, k, v),)

        @torch.inference_mode()
        def peer() -> tuple[Tensor]:
            return (F.scaled_dot_product_attention(q, k, v),)

        return pair_of(ours, peer, tolerance_of(dtype))

    return build


def _case(
    name: str, shape: Shape, dtype: torch.dtype, build: Callable[[], Pair], target: float = 0.0
) -> Case:
    B, H, T, D = shape
    flops = 14 * D * B * H * T * (T + 1) / 2
    label = f"{name} {dtype_name(dtype)}"
    return Case(
        "attention",
        label,
        str(shape),
        "SDPA",
        build,
        flops=flops,
        target=target,
        products=dtype_name(dtype),
    )


TARGETS = {256: 2.4, 1024: 1.8, 2048: 1.6}
"""The ratio to reach in fp32, forward and backward, by T."""
BF16_TARGET, DROPOUT_TARGET = 2.0, 3.0


def cases(quick: bool) -> Iterator[Case]:
    """Yield training (forward and backward; plain, packed, with dropout) and decoding a token."""
    fp32, bf16 = torch.float32, torch.bfloat16
    short, long = (4, 12, 256, 64), (1, 12, 1024 if quick else 2048, 64)
    plain = [(short, fp32), (long, fp32), (short, bf16)]
    main = short if quick else (4, 12, 1024, 64)
    if not quick:
        plain = [(main, fp32), *plain, (main, bf16), (long, bf16)]
    for shape, dtype in plain:
        target = TARGETS[shape[2]] if dtype == fp32 else BF16_TARGET
        yield _case("fwd+bwd", shape, dtype, _training(shape, dtype, 0.0), target)
    yield _case("packed fwd+bwd", main, fp32, _packed(main, fp32), TARGETS[main[2]])
    for shape in [short] if quick else [main, short]:
        yield _case("dropout 0.1 fwd+bwd", shape, fp32, _training(shape, fp32, 0.1), DROPOUT_TARGET)
    for dtype in (fp32, bf16):
        B, H, T, D = shape = (1, 12, 1024, 64)
        n_bytes = 2 * B * H * T * D * dtype.itemsize
        yield Case(
            "attention",
            f"decode {dtype_name(dtype)}",
            f"(1, 12, 1, 64) on {T} keys",
            "SDPA",
            _decode(shape, dtype),
            n_bytes=n_bytes,
            reads_only=True,
        )


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_attention(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
