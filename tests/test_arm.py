"""The loops as compiled for aarch64, on the CPUs of qemu, by the parity rule: they are at most
twice as far from float64 as this machine's lowest level is.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from arm.program import CPUS, DTYPES, call, emulated, levels, setup
from conftest import at_level
from parity import assert_parity
from torch import Tensor

from gptfast.kernels.reference.linear import norm_bwd, norm_fwd
from gptfast.ops.adamw import adamw
from gptfast.ops.backend import EXTENSION

BASE = "neon"
"""The level whose loops the others run where they have none of their own."""
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ops = torch.ops.gptfast


def lowest_level() -> str:
    return EXTENSION.build_info()["isa_supported"][0]


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def results(op: Callable, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return what this machine's kernel gives at its lowest level, and what fp64 gives."""
    with at_level(lowest_level()):
        host = op(*inputs)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    return as_tuple(host), as_tuple(op(*wide))


def unwritten(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full_like(like, float("nan"), dtype=dtype or like.dtype)


def compare(name: str, found: Tensor, exact: Tensor, host: Tensor, wider: bool = False) -> None:
    """Apply the parity rule with this machine's result in the place of PyTorch's."""
    assert_parity(name, found, exact, host, 3.0 if wider and host.dtype == torch.bfloat16 else 2.0)


def test_no_machine_gets_the_flags_of_another() -> None:
    levels_of = setup()["levels_of"]
    machines = ("x86_64", "AMD64", "aarch64", "arm64", "riscv64")
    flags = {name: " ".join(level.flags for level in levels_of(name)) for name in machines}
    assert flags["x86_64"] == flags["AMD64"] and "-mavx512f" in flags["x86_64"]
    assert flags["aarch64"] == flags["arm64"] and "armv8.2-a+dotprod+bf16" in flags["aarch64"]
    assert "-march" not in flags["x86_64"] and "-mavx" not in flags["aarch64"]
    assert "-m" not in flags["riscv64"]
    assert [level.namespace for level in levels_of("riscv64")] == ["generic", "amx_emulated"]


@emulated
@pytest.mark.parametrize("level", CPUS)
def test_a_cpu_gets_the_best_level_it_has(level: str) -> None:
    assert levels(CPUS[level]) == list(CPUS)[: list(CPUS).index(level) + 1]


def attention(
    q: Tensor, k: Tensor, v: Tensor, options: tuple, *of_backward: Tensor
) -> list[Tensor]:
    """Return out and lse, or dq, dk and dv where dout, out and lse are given."""
    (B, H, Tq, D), Tk = q.shape, k.shape[2]
    scale, dropout_p, seed, kv_len = options
    numbers = [DTYPES[q.dtype], B, H, Tq, Tk, D, scale, dropout_p, int(seed)]
    if not of_backward:
        out, lse = unwritten(q), unwritten(q[..., 0], torch.float64)
        arrays = [kv_len, q, k, v, out, lse, None, None, None, None]
        return call(BASE, "attention", numbers, arrays)[-2:]
    dout, out, lse = of_backward
    arrays = [kv_len, q, k, v, out, lse, dout, *map(unwritten, (q, k, v))]
    return call(BASE, "attention", numbers, arrays)[-3:]


# The last two are beyond what fp32 inputs are computed in fp64 for.
SHAPES = [(2, 2, 70, 70, 24), (2, 3, 1, 40, 20), (1, 2, 5, 90, 64), (1, 1, 150, 270, 64)]
SHAPES += [(1, 2, 200, 200, 72)]


@emulated
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "dropout", "kv_len"])
@each_dtype
def test_attention(dtype: torch.dtype, shape: tuple, kind: str) -> None:
    B, H, Tq, Tk, D = shape
    q, dout = (torch.randn(B, H, Tq, D, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(B, H, Tk, D, dtype=dtype) for _ in range(2))
    kv_len = torch.tensor([Tk - 3, Tk][:B]) if kind == "kv_len" else None
    options = (D**-0.5, 0.2 if kind == "dropout" else 0.0, torch.tensor(7), kv_len)
    host, exact = results(ops.attention_fwd, q, k, v, *options)
    out, lse = attention(q, k, v, options)
    compare("out", out, exact[0], host[0])
    torch.testing.assert_close(lse, exact[1], rtol=1e-6, atol=1e-6)
    grads = attention(q, k, v, options, dout, out, lse)
    host, exact = results(ops.attention_bwd, dout, q, k, v, out, lse, *options)
    for name, grad, *others in zip(("dq", "dk", "dv"), grads, exact, host, strict=True):
        compare(name, grad, *others, wider=True)


@emulated
@pytest.mark.parametrize("V", [37, 1003])
@each_dtype
def test_cross_entropy(dtype: torch.dtype, V: int) -> None:
    N, options = 19, (-1, 0.1, 0.01)
    logits, dloss = 3 * torch.randn(N, V, dtype=dtype), torch.rand(N)
    target = torch.randint(V, (N,))
    target[4] = -1
    host, exact = results(ops.cross_entropy_fwd, logits, target, *options)
    numbers = [N, DTYPES[dtype], V, *options]
    loss, stats = unwritten(dloss), unwritten(host[1])
    arrays = [logits, target, loss, stats, None, None]
    loss, stats = call(BASE, "cross_entropy", numbers, arrays)[-2:]
    compare("loss", loss, exact[0], host[0])
    arrays = [logits, target, None, stats, dloss, unwritten(logits)]
    dlogits = call(BASE, "cross_entropy", numbers, arrays)[-1]
    host, exact = results(ops.cross_entropy_bwd, dloss, logits, target, stats, *options)
    compare("dlogits", dlogits, exact[0], host[0], wider=True)
    arrays = [logits, target, unwritten(loss), unwritten(stats), dloss, unwritten(logits)]
    _, _, *at_once, _, together = call(BASE, "cross_entropy", numbers, arrays)
    assert all(map(torch.equal, [*at_once, together], [loss, stats, dlogits]))


@emulated
@each_dtype
def test_mark_columns(dtype: torch.dtype) -> None:
    x, limits = torch.randn(5, 83, dtype=dtype), 1.5 + torch.rand(5)
    marks = torch.full((83,), 9, dtype=torch.uint8)
    found = call(BASE, "mark_columns", [DTYPES[dtype], 5, 83], [x, limits, marks])[-1]
    wanted = (x.float().abs() > limits[:, None]).any(0)
    assert wanted.any() and not wanted.all() and torch.equal(found, wanted.to(torch.uint8))


BETA1, BETA2, EPS, DECAY, LR, STEP, MAX_NORM = 0.9, 0.95, 1e-8, 0.1, 1e-3, 3, 2.0
# The dtypes of parameter and moments, whether there is a master, whether rounding is stochastic.
KINDS = {
    "fp32": (torch.float32, torch.float32, False, False),
    "fp16, master": (torch.float16, torch.float32, True, False),
    "bf16, master": (torch.bfloat16, torch.float32, True, False),
    "bf16": (torch.bfloat16, torch.float32, False, False),
    "bf16, stochastic": (torch.bfloat16, torch.float32, False, True),
    "bf16 moments": (torch.bfloat16, torch.bfloat16, False, False),
    "bf16 moments, stochastic": (torch.bfloat16, torch.bfloat16, False, True),
}


@emulated
@pytest.mark.parametrize("kind", KINDS)
def test_adamw(kind: str) -> None:
    dtype, moment_dtype, has_master, stochastic = KINDS[kind]
    n = 1003
    master = torch.randn(n) if has_master else None
    param = (torch.randn(n) if master is None else master).to(dtype)
    grad, m = torch.randn(n).to(dtype), torch.randn(n).to(moment_dtype)
    v = torch.rand(n).to(moment_dtype)
    norm = grad.double().square().sum().sqrt().float()
    clip = min(1.0, MAX_NORM / (norm.item() + 1e-6))
    bias1, bias2 = 1 - BETA1**STEP, 1 - BETA2**STEP
    numbers = [n, DTYPES[dtype], DTYPES[moment_dtype], LR / bias1, bias2**-0.5, 5, STEP, clip]
    numbers += [1 - LR * DECAY, BETA1, 1 - BETA1, BETA2, 1 - BETA2, EPS, int(stochastic), 11]
    state = [param, m, v, *([] if master is None else [master])]
    found = call(BASE, "adamw", numbers, [param, grad, m, v, master])
    del found[1]
    host = [x.clone() for x in state]
    masters, step = host[3:], torch.tensor(STEP - 1, dtype=torch.float32)
    lists = [[host[0]], [grad], [host[1]], [host[2]], masters, [step]]
    with at_level(lowest_level()):
        rate = torch.tensor(LR, dtype=torch.float64)
        options = [rate, norm, MAX_NORM, BETA1, BETA2, EPS, DECAY, [5], stochastic, 11]
        adamw(*lists, *options)
    for one, other, before in zip(found, host, state, strict=True):
        assert not torch.equal(one, before)
        size = other.float().abs() + LR
        # Single roundings differ; so does a draw whose distance to a random number they decide.
        assert ((one.float() - other.float()).abs() <= 2 * torch.finfo(one.dtype).eps * size).all()
        assert one.dtype == torch.float32 or (one != other).sum() <= n // 100


@emulated
@each_dtype
def test_square_sum(dtype: torch.dtype) -> None:
    grad = torch.randn(70_001).to(dtype)
    total = unwritten(grad[:1], torch.float64)
    found = call(BASE, "square_sum", [DTYPES[dtype], len(grad)], [grad, total])[-1]
    torch.testing.assert_close(found[0], grad.double().square().sum(), rtol=1e-6, atol=0)


@emulated
@each_dtype
def test_sample(dtype: torch.dtype) -> None:
    B, V = 128, 1003
    logits = (4 * torch.randn(B, V)).to(dtype)
    temperature = torch.rand(B) + 0.5
    temperature[::9] = 0
    top_k = torch.randint(1, 60, (B,))
    top_k[::3] = V
    top_p, min_p = 0.5 + torch.rand(B) / 2, torch.rand(B) / 10
    top_p[::4], min_p[::2] = 1.0, 0.0
    seed, position = torch.randint(2**62, (B,)), torch.randint(2**40, (B,))
    parameters = [logits, temperature, top_k, top_p, min_p, seed, position]
    ids = torch.full((B,), -7)
    found = call(BASE, "sample", [B, DTYPES[dtype], V], [*parameters, ids])[-1]
    with at_level(lowest_level()):
        host = ops.sample(*parameters)
    # The weight of a token may differ by a rounding of exp.
    assert (found != host).sum() <= 1 and found.unique().numel() > B // 2


PRODUCTS = {"small": (33, 40, 70), "tall": (130, 50, 300), "blocks": (37, 100, 600)}


def operands(size: tuple[int, int, int], transposed: bool) -> tuple[Tensor, Tensor, list, list]:
    """Return a (M, K) and b (K, N), the storage of each, and their strides."""
    M, N, K = size
    a, b = torch.randn(M, K), torch.randn(K, N)
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    return a, b, [*a.stride(), *b.stride()], [a.T if transposed else a, b.T if transposed else b]


@emulated
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", PRODUCTS)
def test_matmul(size: str, transposed: bool) -> None:
    M, N, K = PRODUCTS[size]
    a, b, strides, stored = operands((M, N, K), transposed)
    bias, before = torch.randn(N), torch.randn(M, N)
    c = call(BASE, "matmul", [M, N, K, *strides, 0], [*stored, unwritten(before), bias])[2]
    compare("c", c, a.double() @ b.double() + bias.double(), a @ b + bias)
    c = call(BASE, "matmul", [M, N, K, *strides, 1], [*stored, before, None])[2]
    compare("c", c, a.double() @ b.double() + before.double(), a @ b + before)


@emulated
@pytest.mark.parametrize("b_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", PRODUCTS)
@pytest.mark.parametrize("level", ["neon", "neon_bf16"])
def test_matmul_bf16(
    level: str, size: str, transposed: bool, c_dtype: torch.dtype, b_dtype: torch.dtype
) -> None:
    """A b of fp32 counts as what it is in bf16."""
    M, N, K = PRODUCTS[size]
    a, b, strides, stored = operands((M, N, K), transposed)
    a, b = a.bfloat16(), b.bfloat16()
    bias, residual = torch.randn(N).bfloat16(), torch.randn(M, N).to(c_dtype)
    numbers = [M, N, K, *strides, DTYPES[b_dtype], DTYPES[c_dtype], 0]
    given = [stored[0].bfloat16(), stored[1].to(b_dtype)]
    arrays = [*given, unwritten(residual), bias, residual]
    c = call(level, "matmul_bf16", numbers, arrays)[2]
    exact = a.double() @ b.double() + bias.double() + residual.double()
    plain = (a.float() @ b.float() + bias.float() + residual.float()).to(c_dtype)
    compare("c", c, exact, plain)


@emulated
@pytest.mark.parametrize("size", PRODUCTS)
def test_matmul_of_one_part(size: str) -> None:
    """An fp32 product of numbers that count as what they are in bf16."""
    M, N, K = PRODUCTS[size]
    a, b, strides, stored = operands((M, N, K), False)
    bias, residual = torch.randn(N), torch.randn(M, N)
    arrays = [*stored, unwritten(residual), bias, residual]
    c = call("neon_bf16", "matmul_parts", [M, N, K, *strides, 0, 1], arrays)[2]
    a, b = a.bfloat16(), b.bfloat16()
    exact = a.double() @ b.double() + bias.double() + residual.double()
    compare("c", c, exact, a.float() @ b.float() + bias + residual)


@emulated
@pytest.mark.parametrize("C", [50, 384])
@each_dtype
def test_norm(dtype: torch.dtype, C: int) -> None:
    N, eps = 37, 1e-5
    x, dy, residual = (torch.randn(N, C).to(dtype) for _ in range(3))
    weight, bias = torch.randn(C), torch.randn(C)
    numbers = [DTYPES[dtype], DTYPES[dtype], N, C, eps, 1]
    arrays = [x, weight, bias, torch.full((N, 2), torch.nan), unwritten(x)]
    stats, y = call(BASE, "norm", numbers, [*arrays, None, None, None, None])[3:5]
    wide = [t.double() for t in (x, weight, bias)]
    exact, exact_stats = norm_fwd(*wide, eps, torch.float64)
    compare("y", y, exact, norm_fwd(x, weight, bias, eps, dtype)[0])
    torch.testing.assert_close(stats.double(), exact_stats, rtol=1e-6, atol=1e-7)
    arrays = [x, weight, bias, stats, dy, unwritten(x), residual, unwritten(bias), unwritten(bias)]
    dx, _, dweight, dbias = call(BASE, "norm", numbers, arrays)[5:]
    exact = norm_bwd(dy.double(), *wide, exact_stats)
    plain = norm_bwd(dy.float(), x.float(), weight, bias, stats)
    compare("dx", dx, exact[0] + residual.double(), (plain[0] + residual.float()).to(dtype))
    compare("dweight", dweight, exact[1], plain[1])
    compare("dbias", dbias, exact[2], plain[2])


@emulated
@each_dtype
def test_sum_columns(dtype: torch.dtype) -> None:
    x = torch.randn(300, 83).to(dtype)
    sums = unwritten(x[0], torch.float32)
    found = call(BASE, "sum_columns", [DTYPES[dtype], 300, 83], [x, sums])[-1]
    compare("sums", found, x.double().sum(0), x.float().sum(0))


@emulated
@each_dtype
def test_gelu(dtype: torch.dtype) -> None:
    n = 4003
    x, dy = (2 * torch.randn(n)).to(dtype), torch.randn(n).to(dtype)
    y = call(BASE, "gelu", [DTYPES[dtype], n], [x, unwritten(x), None])[1]
    exact = F.gelu(x.double(), approximate="tanh")
    compare("y", y, exact, F.gelu(x, approximate="tanh"))
    _, again, dx = call(BASE, "gelu", [DTYPES[dtype], n], [x, unwritten(x), dy])
    assert torch.equal(again, y)
    backward = torch.ops.aten.gelu_backward
    exact = backward(dy.double(), x.double(), approximate="tanh")
    compare("dx", dx, exact, backward(dy, x, approximate="tanh"), wider=True)
