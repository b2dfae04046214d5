"""Causal attention against `F.scaled_dot_product_attention`.

FLOPs counted: 4 D per (query, visible key) and head forward (two products), 10 D backward (five).
Bytes counted: keys and values once, which is what decoding one token waits for.
Both sides read strided views of one packed (B, T, 3C) projection; "packed" adds on the peer's side
the split, the merge of heads and the packing of the gradient that `ops.attention_qkv` spares.
With dropout the masks differ by design: ours is checked against the reference.
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
    return Case("attention", label, str(shape), "SDPA", build, flops=flops, target=target)


# By time, in fp32: what is asked of forward and backward against SDPA.
TARGETS = {256: 2.4, 1024: 1.8, 2048: 1.6}
BF16, DROPOUT = 2.0, 3.0


def cases(quick: bool) -> Iterator[Case]:
    """Training (forward and backward, plain, packed and with dropout) and decoding one token."""
    fp32, bf16 = torch.float32, torch.bfloat16
    batch, long = (4, 12, 256, 64), (1, 12, 1024 if quick else 2048, 64)
    plain = [(batch, fp32), (long, fp32), (batch, bf16)]
    main = batch if quick else (4, 12, 1024, 64)
    if not quick:
        plain = [(main, fp32), *plain, (main, bf16), (long, bf16)]
    for shape, dtype in plain:
        target = TARGETS[shape[2]] if dtype == fp32 else BF16
        yield _case("fwd+bwd", shape, dtype, _training(shape, dtype, 0.0), target)
    yield _case("packed fwd+bwd", main, fp32, _packed(main, fp32), TARGETS[main[2]])
    for shape in [batch] if quick else [main, batch]:
        yield _case("dropout 0.1 fwd+bwd", shape, fp32, _training(shape, fp32, 0.1), DROPOUT)
    for dtype in (fp32, bf16):
        B, H, T, D = shape = (1, 12, 1024, 64)
        n_bytes = 2 * B * H * T * D * dtype.itemsize
        name, text = f"decode {dtype_name(dtype)}", f"(1, 12, 1, 64) on {T} keys"
        yield Case("attention", name, text, "SDPA", _decode(shape, dtype), n_bytes=n_bytes)


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_attention(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
