"""The calls that bench/compare.py times, and the process that times them in one checkout.

python bench/compare_cases.py DIR CASE quick|full     (started by bench/compare.py)
"""

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

import gptfast
from gptfast import GPT, AdamW, Engine, GPTConfig, ops

MIN_SAMPLE_S = 0.2

Run = Callable[[], object]


def _attention(quick: bool, dtype: str = "float32", B: int = 4, T: int = 1024) -> Run:
    B, H, T = (1, 2, 64) if quick else (B, 12, T)
    qkv = torch.randn(B, T, 3 * H * 64, dtype=getattr(torch, dtype), requires_grad=True)
    dout = torch.randn(B, T, H * 64, dtype=qkv.dtype)
    return lambda: torch.autograd.grad(ops.attention_qkv(qkv, H), qkv, dout)


def _attention_bf16(quick: bool) -> Run:
    return _attention(quick, "bfloat16")


def _attention_128(quick: bool) -> Run:
    return _attention(quick, B=8, T=128)


def _attention_64(quick: bool) -> Run:
    return _attention(quick, B=16, T=64)


def _attention_decode(quick: bool) -> Run:
    q, kv = torch.randn(1, 12, 1, 64), torch.randn(2, 1, 12, 64 if quick else 1024, 64)
    return torch.inference_mode()(lambda: ops.attention(q, *kv))


def _cross_entropy(quick: bool, dtype: str = "float32") -> Run:
    N, V = (8, 1009) if quick else (2048, 50257)
    logits = torch.randn(N, V).to(getattr(torch, dtype)).requires_grad_()
    target = torch.randint(V, (N,))
    return lambda: torch.autograd.grad(ops.cross_entropy(logits, target), logits)


def _cross_entropy_bf16(quick: bool) -> Run:
    return _cross_entropy(quick, "bfloat16")


def _linear_cross_entropy(quick: bool) -> Run:
    N, C, V = (8, 32, 1009) if quick else (1024, 768, 50257)
    x, weight = (torch.randn(n, C, requires_grad=True) for n in (N, V))
    target = torch.randint(V, (N,))
    return lambda: torch.autograd.grad(ops.linear_cross_entropy(x, weight, target), (x, weight))


def _mlp(quick: bool) -> Run:
    N, C = (8, 32) if quick else (1024, 768)
    shapes = (N, C), (4 * C, C), (4 * C,), (C, 4 * C), (C,)
    leaves = [torch.randn(*shape).mul_(0.02).requires_grad_() for shape in shapes]
    dout = torch.randn(N, C)
    return lambda: torch.autograd.grad(ops.mlp(*leaves), leaves, dout)


def _embedding(quick: bool) -> Run:
    N, C, V = (8, 32, 1009) if quick else (1024, 768, 50257)
    idx, weight = torch.randint(V, (N,)), torch.randn(V, C)
    return torch.inference_mode()(lambda: ops.embedding(idx, weight))


def _adamw(quick: bool) -> Run:
    param = torch.randn(2**10 if quick else 2**26, requires_grad=True)
    param.grad = torch.randn_like(param)
    return AdamW([param], max_norm=1.0).step


def _sampling(quick: bool) -> Run:
    B, V = (2, 1009) if quick else (64, 50257)
    logits = torch.randn(B, V) * 3
    return lambda: ops.sample(logits, top_k=50, top_p=0.9)


def _model(quick: bool) -> object:
    small = GPTConfig(vocab_size=1009, block_size=64, n_layer=1, n_head=2, n_embd=32)
    return GPT(small if quick else GPTConfig())


def _train(quick: bool) -> Run:
    model = _model(quick)
    B, T = (1, 32) if quick else (2, 1024)
    idx, target = torch.randint(model.config.vocab_size, (2, B, T))
    optimizer = AdamW(model.parameters(), lr=1e-4, max_norm=1.0)

    def step() -> None:
        optimizer.zero_grad()
        model(idx, target).backward()
        optimizer.step()

    return step


def _generate(quick: bool) -> Run:
    engine = Engine(_model(quick).eval(), dtype="int8")
    n, prompt = 4 if quick else 64, list(range(1, 33 if not quick else 5))
    return lambda: engine.generate([prompt], n, temperature=0.0)


CASES: dict[str, Callable[[bool], Run]] = {
    "attention": _attention,
    "attention_bf16": _attention_bf16,
    "attention_128": _attention_128,
    "attention_64": _attention_64,
    "attention_decode": _attention_decode,
    "cross_entropy": _cross_entropy,
    "cross_entropy_bf16": _cross_entropy_bf16,
    "linear_cross_entropy": _linear_cross_entropy,
    "mlp": _mlp,
    "embedding": _embedding,
    "adamw": _adamw,
    "sampling": _sampling,
    "train": _train,
    "generate_int8": _generate,
}
"""Calls of the public API alone, which both checkouts have."""


def _require_checkout(directory: Path) -> None:
    """Raise ImportError if a part of gptfast does not come from `directory`."""
    modules = [gptfast, import_module("gptfast.kernels.reference.attention")]
    modules += [sys.modules[name] for name in ("gptfast._C",) if name in sys.modules]
    for module in modules:
        if directory.resolve() not in Path(module.__file__).resolve().parents:
            raise ImportError(
                f"{module.__name__} comes from {module.__file__}, not from {directory}; "
                "build that checkout in place (see Makefile) and link gptfast/kernels to ../kernels"
            )


def serve(directory: Path, name: str, quick: bool) -> None:
    """Print the seconds per call of a case for each line of stdin."""
    _require_checkout(directory)
    torch.manual_seed(0)
    run = CASES[name](quick)
    run()
    start = time.perf_counter()
    run()
    calls = max(1, round(MIN_SAMPLE_S / (time.perf_counter() - start)))
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        print(json.dumps((time.perf_counter() - start) / calls), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "quick")
