"""The launches that bench/compile_audit.py compiles: every launcher in every tile configuration.

Each case runs launchers on tensors without storage. The first word of its name is the operation.
"""

from collections.abc import Callable, Iterator
from importlib import import_module

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.int8: "int8"}


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launchers(op: str):  # type: ignore[no-untyped-def]
    return import_module(f"gptfast.kernels.triton.{op}")


Case = tuple[str, Callable[[], object]]


def attention_cases() -> Iterator[Case]:
    attention = _launchers("attention")
    seed, B, T, H = empty(dtype=torch.int64), 16, 1024, 12

    def training(dtype: torch.dtype, D: int, p: float, kv_len: Tensor | None, T: int = T) -> None:
        qkv, dout = empty(B, T, 3 * H * D, dtype=dtype), empty(B, T, H * D, dtype=dtype)
        options = (D**-0.5, p, seed if p else None, kv_len)
        out, lse = attention.attention_qkv_fwd(qkv, H, *options)
        attention.attention_qkv_bwd(dout, qkv, out, lse, H, *options)

    def decode(dtype: torch.dtype, D: int, Tk: int, kv_len: Tensor | None) -> None:
        q, k = empty(B, H, 1, D, dtype=dtype), empty(B, H, Tk, D, dtype=dtype)
        attention.attention_fwd(q, k, k, D**-0.5, 0.0, None, kv_len)

    lengths = empty(B, dtype=torch.int64)
    dims = (16, 32, 64, 128, 256)
    variants = [(dtype, D, 0.0, None) for dtype in (BF16, FP32) for D in dims]
    variants += [(BF16, D, 0.1, None) for D in dims]
    variants += [(BF16, 80, 0.0, None), (FP16, 64, 0.0, None), (BF16, 64, 0.0, lengths)]
    variants += [(FP32, 64, 0.1, None)]
    for dtype, D, p, kv_len in variants:
        name = f"attention {NAMES[dtype]} D={D}{' dropout' if p else ''}"
        name += "" if kv_len is None else " kv_len"
        yield name, lambda v=(dtype, D, p, kv_len): training(*v)
    for D in dims:
        # So few queries are computed in fp64.
        yield f"attention fp32 D={D} T=32", lambda D=D: training(FP32, D, 0.0, None, 32)
    yield "attention fp32 D=64 T=32 dropout", lambda: training(FP32, 64, 0.1, None, 32)
    for dtype, D in (*((BF16, D) for D in (*dims, 80)), (FP32, 64)):
        for Tk in (128, 1024):
            name = f"attention decode {NAMES[dtype]} D={D} Tk={Tk}"
            yield name, lambda v=(dtype, D, Tk, lengths): decode(*v)


def cross_entropy_cases() -> Iterator[Case]:
    cross_entropy = _launchers("cross_entropy")
    N = 16384

    def alone(dtype: torch.dtype, V: int, options: tuple) -> None:
        logits, target = empty(N, V, dtype=dtype), empty(N, dtype=torch.int64)
        loss, stats = cross_entropy.cross_entropy_fwd(logits, target, *options)
        cross_entropy.cross_entropy_bwd(loss, logits, target, stats, *options)

    def linear(dtype: torch.dtype, weight_dtype: torch.dtype, options: tuple) -> None:
        x, w = empty(N, 768, dtype=dtype), empty(50257, 768, dtype=weight_dtype)
        target, dloss = empty(N, dtype=torch.int64), empty(N, dtype=FP32)
        cross_entropy.linear_cross_entropy_fwd(x, w, target, *options)
        _, *grads = cross_entropy.linear_cross_entropy_fwd_bwd(x, w, target, dloss, *options)
        cross_entropy.scale_(*grads, target, empty(dtype=FP32), options[0])

    plain, every = (-100, 0.0, 0.0), (-100, 0.1, 1e-4)
    for dtype in (BF16, FP16, FP32):
        for V in (50257, 50304):
            name = f"cross_entropy {NAMES[dtype]} V={V}"
            yield name, lambda v=(dtype, V, plain): alone(*v)
        name = f"linear_cross_entropy {NAMES[dtype]}"
        yield name, lambda v=(dtype, dtype, plain): linear(*v)
    yield "cross_entropy bf16 smoothing z_loss", lambda: alone(BF16, 50257, every)
    yield "linear_cross_entropy bf16 smoothing z_loss", lambda: linear(BF16, BF16, every)
    for dtype in (BF16, FP16):
        name = f"linear_cross_entropy {NAMES[dtype]} autocast"
        yield name, lambda v=(dtype, FP32, plain): linear(*v)


def adamw_cases() -> Iterator[Case]:
    adamw = _launchers("adamw")
    shapes = ((50257, 768), (768,))

    def step(dtype: torch.dtype, masters: bool, stochastic: bool, lr: Tensor) -> None:
        params, grads = ([empty(*s, dtype=dtype) for s in shapes] for _ in range(2))
        m, v, master = ([empty(*s, dtype=FP32) for s in shapes] for _ in range(3))
        norm = adamw.grad_norm(grads)
        steps = [empty(dtype=FP32) for _ in shapes]
        numbers = (1.0, 0.9, 0.95, 1e-8, 0.1, [0, 1], stochastic, 0)
        adamw.adamw(params, grads, m, v, master if masters else [], steps, lr, norm, *numbers)

    number, tensor = torch.tensor(1e-3, dtype=torch.float64), empty(dtype=torch.float64)
    for name, *v in (
        ("fp32", FP32, False, False, number),
        ("fp32 lr on device", FP32, False, False, tensor),
        ("bf16 master", BF16, True, False, number),
        ("fp16 master", FP16, True, False, number),
        ("bf16 stochastic", BF16, False, True, number),
    ):
        yield f"adamw {name}", lambda v=v: step(*v)


def sampling_cases() -> Iterator[Case]:
    sampling = _launchers("sampling")

    def sample(dtype: torch.dtype, B: int, V: int) -> None:
        numbers = [empty(B, dtype=d) for d in (FP32, torch.int64, FP32, FP32)]
        at = [empty(B, dtype=torch.int64) for _ in range(2)]
        sampling.sample(empty(B, V, dtype=dtype), *numbers, *at)

    for dtype in (BF16, FP16, FP32):
        for B, V in ((128, 50257), (128, 1009), (1, 50257), (16, 50257)):
            name = f"sampling {NAMES[dtype]} B={B} V={V}"
            yield name, lambda v=(dtype, B, V): sample(*v)


def embedding_cases() -> Iterator[Case]:
    embedding = _launchers("embedding")

    def backward(dtype: torch.dtype, C: int) -> None:
        dx, idx = empty(16, 1024, C, dtype=dtype), empty(16, 1024, dtype=torch.int64)
        weight = empty(50257, C, dtype=dtype)
        embedding.embedding_fwd(weight, idx)
        embedding.embedding_bwd(weight, dx, idx)

    for dtype in (BF16, FP16, FP32):
        for C in (64, 128, 768):
            yield f"embedding {NAMES[dtype]} C={C}", lambda v=(dtype, C): backward(*v)


def decode_linear_cases() -> Iterator[Case]:
    decode_linear = _launchers("decode_linear")

    def layer(dtype: torch.dtype, weight_dtype: torch.dtype, N: int, layer: str) -> None:
        sizes = {"qkv": (768, 2304), "fc": (768, 3072), "proj": (3072, 768), "head": (768, 50257)}
        C, n_out = sizes[layer]
        norm = (None, None, 0.0)
        if layer != "proj":
            norm = (empty(C, dtype=dtype), empty(C, dtype=dtype), 1e-5)
        weight = empty(n_out, C, dtype=weight_dtype)
        scale = empty(n_out, dtype=FP32) if weight_dtype == torch.int8 else None
        bias = None if layer == "head" else empty(n_out, dtype=dtype)
        residual = empty(N, n_out, dtype=dtype) if layer == "proj" else None
        options = (scale, bias, residual, layer == "fc", layer == "head")
        decode_linear.decode_linear(empty(N, C, dtype=dtype), *norm, weight, *options)

    for dtype, weight_dtype in ((BF16, BF16), (BF16, torch.int8), (FP32, FP32), (FP16, torch.int8)):
        for name, N in (("qkv", 1), ("fc", 1), ("proj", 1), ("head", 1), ("fc", 4), ("proj", 4)):
            case = f"decode_linear {NAMES[dtype]} {NAMES[weight_dtype]} {name} N={N}"
            yield case, lambda v=(dtype, weight_dtype, N, name): layer(*v)
    for dtype in (BF16, FP16):
        case = f"decode_linear {NAMES[dtype]} {NAMES[dtype]} head N=64"
        yield case, lambda v=(dtype, dtype, 64, "head"): layer(*v)
    for dtype in (BF16, FP16, FP32):
        for N in (16, 512):
            for name in ("fc", "proj", "head"):
                case = f"decode_linear {NAMES[dtype]} int8 {name} N={N}"
                yield case, lambda v=(dtype, torch.int8, N, name): layer(*v)


# (x's dtype, the weights' dtype): under autocast, the residual stream and the norm stay in fp32.
LAYER_DTYPES = {"bf16": (BF16, BF16), "fp16": (FP16, FP16), "fp32": (FP32, FP32)}
LAYER_DTYPES |= {"bf16 autocast": (FP32, BF16), "fp16 autocast": (FP32, FP16)}


def _norm(C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    return empty(C, dtype=dtype), empty(C, dtype=dtype), 1e-5


def linear_cases() -> Iterator[Case]:
    launchers, N = _launchers("linear"), 16384

    def layer(x_dtype: torch.dtype, dtype: torch.dtype, C: int, with_norm: bool) -> None:
        x, weight = empty(N, C, dtype=x_dtype), empty(3 * C, C, dtype=dtype)
        norm = _norm(C, x_dtype) if with_norm else (None, None, 0.0)
        bias = empty(3 * C, dtype=dtype)
        y, stats = launchers.linear_fwd(x, *norm, weight, bias, None)
        for need_dweight in (True, False):
            launchers.linear_bwd(y, x, *norm, weight, bias, stats, True, need_dweight)

    for name, dtypes in LAYER_DTYPES.items():
        for C in (768, 1600) if name == "bf16" else (768,):
            yield f"linear {name} C={C}", lambda v=(*dtypes, C, True): layer(*v)
    # The smallest and the largest tiles of a norm.
    for C in (16, 256, 4096):
        yield f"linear fp32 C={C}", lambda v=(FP32, FP32, C, True): layer(*v)
    yield "linear bf16 C=4096", lambda: layer(BF16, BF16, 4096, True)
    yield "linear bf16 without norm", lambda: layer(BF16, BF16, 768, False)


def mlp_cases() -> Iterator[Case]:
    launchers, N, C = _launchers("mlp"), 16384, 768

    def perceptron(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
        x, dy, norm = empty(N, C, dtype=x_dtype), empty(N, C, dtype=dtype), _norm(C, x_dtype)
        layers = [empty(*s, dtype=dtype) for s in ((4 * C, C), (4 * C,), (C, 4 * C), (C,))]
        residual = x_dtype == dtype
        _, h, stats = launchers.mlp_fwd(x, *norm, *layers, residual)
        for needs in ((True, True, True), (True, False, False), (False, False, True)):
            launchers.mlp_bwd(dy, x, h, stats, *norm, *layers, residual, *needs)

    for name, dtypes in LAYER_DTYPES.items():
        yield f"mlp {name}", lambda v=dtypes: perceptron(*v)


def all_cases() -> Iterator[Case]:
    yield from attention_cases()
    yield from cross_entropy_cases()
    yield from adamw_cases()
    yield from sampling_cases()
    yield from embedding_cases()
    yield from decode_linear_cases()
    yield from linear_cases()
    yield from mlp_cases()
