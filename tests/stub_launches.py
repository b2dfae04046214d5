"""Launch every Triton kernel over a stub driver, Triton's way and from plans; print what differs.

test_launch.py runs this file in a process of its own: here Triton compiles, in the tests it
interprets. Each case runs with Triton's own launches, whose arguments are compared with the
parameters that reached the driver; then it runs with plans, and the driver must see the same bytes.
For this, every allocation of a case comes from one arena, which starts anew for each run.
"""

import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# ptxas need not optimise what is not run.
os.environ |= {"TRITON_INTERPRET": "0", "DISABLE_PTXAS_OPT": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import stub_cuda  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

STUB = stub_cuda.install(Path(tempfile.mkdtemp()))

from triton.runtime import JITFunction  # noqa: E402

from gptfast.kernels.triton import (  # noqa: E402
    adamw,
    adamw_tables,
    attention,
    cross_entropy,
    decode_linear,
    embedding,
    launch,
    launch_series,
    linear,
    mlp,
    sampling,
)

BF16, FP32 = torch.bfloat16, torch.float32
Case = Callable[[], object]


class Arena(TorchDispatchMode):
    """New tensors get their memory from one buffer, at the same addresses after each `clear`."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.memory = bytearray(n_bytes)
        self.start = -torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr() % 512

    def clear(self, skip: int = 0) -> None:
        """Begin again, `skip` times 512 bytes after the first address."""
        self.at = self.start + 512 * skip

    def take(self, shape: Any, dtype: torch.dtype) -> Tensor:
        count = max(1, torch.Size(shape).numel())
        flat = torch.frombuffer(self.memory, dtype=dtype, count=count, offset=self.at)
        self.at += -(-count * dtype.itemsize // 512) * 512
        return flat[: torch.Size(shape).numel()].view(shape)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if type(t) is Tensor}
        return tree_map_only(Tensor, lambda t: self._moved(t, given), out)

    def _moved(self, t: Tensor, given: set[int]) -> Tensor:
        """Return a copy of a new tensor in the arena; views and outputs in place stay."""
        if t.untyped_storage().data_ptr() in given:
            return t
        return self.take(t.shape, t.dtype).copy_(t)


ARENA = Arena(1 << 24)


def attention_cases() -> Iterator[tuple[str, Case]]:
    def packed(seed: Tensor | None, kv_len: Tensor | None, scale: float) -> None:
        H, T, C = 3, 20, 48
        qkv, dout = torch.empty(2, T, 3 * C, dtype=BF16), torch.empty(2, T, C, dtype=BF16)
        options = (scale, 0.25 if seed is not None else 0.0, seed, kv_len)
        out, lse = attention.attention_qkv_fwd(qkv, H, *options)
        attention.attention_qkv_bwd(dout, qkv, out, lse, H, *options)

    def apart(Tq: int, Tk: int) -> None:
        q, k, v = (torch.empty(2, 3, T, 16) for T in (Tq, Tk, Tk))
        out, lse = attention.attention_fwd(q, k, v, 0.25, 0.0, None, None)
        if Tq > 1:
            attention.attention_bwd(out, q, k, v, out, lse, 0.25, 0.0, None, None)

    lengths, seed = torch.tensor([3, 20]), torch.tensor(7)
    yield "attention packed", lambda: packed(None, None, 0.25)
    yield "attention dropout kv_len", lambda: packed(seed, lengths, -0.5)
    yield "attention decode", lambda: apart(1, 17)
    yield "attention decode combine", lambda: apart(1, 1000)


def cross_entropy_cases() -> Iterator[tuple[str, Case]]:
    options = (-100, 0.1, 1e-4)

    def alone(N: int, V: int, begin: int) -> None:
        rows = torch.empty(N, V + begin, dtype=BF16)[:, begin:]
        target = torch.zeros(N, dtype=torch.int64)
        loss, stats = cross_entropy.cross_entropy_fwd(rows, target, *options)
        cross_entropy.cross_entropy_bwd(loss.sum().expand(N), rows, target, stats, *options)

    def head(N: int) -> None:
        x, w = torch.empty(N, 24, dtype=BF16), torch.empty(37, 24, dtype=BF16)
        target, dloss = torch.zeros(N, dtype=torch.int64), torch.empty(N)
        cross_entropy.linear_cross_entropy_fwd(x, w, target, *options)
        _, dx, dw = cross_entropy.linear_cross_entropy_fwd_bwd(x, w, target, dloss, *options)
        cross_entropy.scale_(dx, dw, target, torch.ones(()), -100)

    cross_entropy.CHUNK_BYTES = 64 * cross_entropy.PAD * 2
    yield "cross_entropy", lambda: alone(5, 48, 0)
    yield "cross_entropy unaligned", lambda: alone(5, 48, 3)
    yield "cross_entropy one", lambda: alone(1, 16, 0)
    yield "linear_cross_entropy", lambda: head(150)


def adamw_cases() -> Iterator[tuple[str, Case]]:
    shapes = ((3, 5), (2000,), ())
    states = [[torch.zeros(s) for s in shapes] for _ in range(3)]
    params, steps = [torch.zeros(s) for s in shapes], [torch.zeros(()) for _ in shapes]
    halves = [p.bfloat16() for p in params]

    def step(params: list[Tensor], masters: list[Tensor], lr: Tensor) -> None:
        grads = [torch.empty(s, dtype=params[0].dtype) for s in shapes]
        norm = adamw.grad_norm(grads)
        numbers = (1.0, 0.9, 0.95, 1e-8, 0.1, [4, 5, 6], False, 11)
        adamw.adamw(params, grads, *states[:2], masters, steps, lr, norm, *numbers)

    lr = torch.tensor(1e-3, dtype=torch.float64)
    yield "adamw fp32", lambda: step(params, [], lr)
    yield "adamw bf16 master", lambda: step(halves, states[2], lr)


def other_cases() -> Iterator[tuple[str, Case]]:
    def embed(C: int, N: int) -> None:
        weight, idx = torch.empty(50, C), torch.zeros(N, dtype=torch.int64)
        embedding.embedding_bwd(weight, embedding.embedding_fwd(weight, idx), idx)

    def sample() -> None:
        numbers = (torch.ones(3), torch.full((3,), 9), torch.ones(3), torch.zeros(3))
        seeds = torch.zeros(2, 3, dtype=torch.int64)
        sampling.sample(torch.empty(3, 40), *numbers, *seeds)

    def few_rows(V: int, begin: int) -> None:
        numbers = (torch.ones(2), torch.full((2,), 9), torch.ones(2), torch.zeros(2))
        logits = torch.empty(2, V + begin, dtype=BF16)[:, begin:]
        sampling.sample(logits, *numbers, *torch.zeros(2, 2, dtype=torch.int64))

    def decode(N: int) -> None:
        x, weight = torch.empty(N, 32, dtype=BF16), torch.empty(48, 32, dtype=torch.int8)
        layer = (weight, torch.ones(48), None, None, True, False)
        decode_linear.decode_linear(x, None, None, 0.0, *layer)

    yield "embedding", lambda: embed(64, 300)
    yield "embedding one", lambda: embed(1, 1)
    yield "sampling", sample
    yield "sampling by slices", lambda: few_rows(9000, 0)
    yield "sampling by slices unaligned", lambda: few_rows(9000, 3)
    yield "decode_linear rows", lambda: decode(1)
    yield "decode_linear tiles", lambda: decode(100)


def layer_cases() -> Iterator[tuple[str, Case]]:
    def layers(N: int, C: int, dtype: torch.dtype) -> None:
        """Run linear and mlp with all their parts; x is fp32, as under autocast."""
        x, ones, dx = torch.ones(N, C), torch.ones(C), torch.ones(N, C, dtype=dtype)
        weight, bias = torch.ones(2 * C, C, dtype=dtype), torch.ones(2 * C, dtype=dtype)
        norm, layer = (ones, ones, 1e-5), (weight, bias)
        y, stats = linear.linear_fwd(x, *norm, *layer, None)
        linear.linear_bwd(y, x, *norm, *layer, stats, True, True)
        linear.linear_bwd(y, x, *norm, *layer, stats, False, True)
        back = (weight.t(), torch.ones(C, dtype=dtype))
        _, h, stats = mlp.mlp_fwd(x, *norm, *layer, *back, True)
        for needs in ((True, True, True), (True, False, False), (False, False, True)):
            mlp.mlp_bwd(dx, x, h, stats, *norm, *layer, *back, True, *needs)

    yield "layers bf16", lambda: layers(200, 48, BF16)
    yield "layers fp32", lambda: layers(3, 7, FP32)
    yield "layers one", lambda: layers(1, 1, BF16)
    yield "layers without rows", lambda: layers(0, 16, BF16)


def leaves(kernel: JITFunction, args: tuple, options: dict[str, Any]) -> Iterator[Any]:
    """Yield the arguments that Triton passes to the compiled kernel, by its rules."""
    for i, param in enumerate(kernel.params):
        arg = args[i] if i < len(args) else options[param.name]
        if param.is_constexpr:
            continue
        for leaf in arg if type(arg) is tuple else (arg,):
            constant = type(leaf) is int and leaf == 1 and not param.do_not_specialize
            if leaf is not None and not constant:
                yield leaf


def packed_as(leaf: Any, kind: str, size: int) -> bytes:
    """Return the bytes of an argument for a parameter that the PTX declares."""
    if isinstance(leaf, Tensor):
        assert (kind, size) == ("u", 8), f"a pointer for a .{kind}{8 * size}"
        return struct.pack("<Q", leaf.data_ptr())
    if isinstance(leaf, float):
        assert size == 4, f"a float for a .{kind}{8 * size}"
        return struct.pack("<f", leaf)
    wide = not -(2**31) <= leaf < 2**31
    assert kind in "ubs" and size == (8 if wide else 4), f"{leaf} for a .{kind}{8 * size}"
    return leaf.to_bytes(size, "little", signed=True)


def check(kernel: JITFunction, args: tuple, options: dict, seen: stub_cuda.Launch) -> list[str]:
    """Return what is wrong with the parameters of one of Triton's launches."""
    declared = STUB.params[seen.function]
    given = list(leaves(kernel, args, options))
    # Triton adds the addresses of its scratch memory, which no kernel here has.
    if len(declared) != len(given) + 2 or seen.params[-2:] != (bytes(8), bytes(8)):
        return [f"{kernel.__name__}: {len(given)} arguments for {len(declared)} parameters"]
    wrong = []
    for i, (leaf, (kind, size)) in enumerate(zip(given, declared, strict=False)):
        if packed_as(leaf, kind, size) != seen.params[i]:
            wrong.append(f"{kernel.__name__}: parameter {i} is {seen.params[i].hex()}, not {leaf}")
    return wrong


def ordinary(case: Case) -> tuple[list[stub_cuda.Launch], list[str], set[str]]:
    """Run a case with Triton's own launches; return them, what is wrong, and the kernels' names."""
    calls: list[tuple[JITFunction, tuple, dict]] = []
    real = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        calls.append((self, args, options))
        return real(self, *args, grid=grid, warmup=warmup, **options)

    begin = STUB.count()
    JITFunction.run = run
    case()
    JITFunction.run = real
    seen = STUB.launches(begin)
    if len(seen) != len(calls):
        return seen, [f"{len(calls)} launches, of which {len(seen)} arrived"], set()
    wrong = [text for call, s in zip(calls, seen, strict=True) for text in check(*call, s)]
    return seen, wrong, {kernel.__name__ for kernel, *_ in calls}


def planned(case: Case) -> tuple[list[stub_cuda.Launch], int]:
    """Run a case with plans; return its launches and how many of them Triton made itself."""
    by_triton = []
    real = launch._Form.keep
    launch._Form.keep = lambda *args: by_triton.append(1) or real(*args)
    begin = STUB.count()
    case()
    launch._Form.keep = real
    return STUB.launches(begin), len(by_triton)


def run(name: str, case: Case) -> tuple[dict[str, Any], set[str]]:
    """Compare a case's launches in both ways, at two places of the arena."""
    wrong, n, late = [], 0, 0
    # Tables would else be kept from one run to the next and need no new memory.
    fresh = adamw_tables._Plans
    for skip in (0, 0, 1):
        runs = []
        for way in (ordinary, planned):
            ARENA.clear(skip)
            adamw_tables._plans = fresh()
            with ARENA:
                runs.append(way(case))
        (by_triton, faults, names), (by_plan, missing) = runs
        wrong += faults
        if by_triton != by_plan:
            wrong.append(f"{name}: a plan's launch differs: {by_plan} from {by_triton}")
        n += len(by_plan)
        late += missing
    return {"wrong": wrong, "launches": n, "misses": late}, names


def main() -> None:
    """Run all cases and print the results as JSON."""
    results, names = {}, set()
    # Page-locked memory is taken once for all.
    adamw_tables._staging.reserve(torch.device("cpu"), 100)
    with torch.no_grad():
        cases = (attention_cases, cross_entropy_cases, adamw_cases, layer_cases, other_cases)
        for kind in cases:
            for name, case in kind():
                results[name], found = run(name, case)
                names |= found
    repeated = [series is not None for series in launch_series._series.values()]
    print(json.dumps({"cases": results, "kernels": sorted(names), "repeated": repeated}))


if __name__ == "__main__":
    main()
