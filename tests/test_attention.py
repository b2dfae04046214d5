"""Attention: parity of output and gradients, masks, dropout, layouts, errors."""

import importlib
import os

import pytest
import torch
from conftest import GPU, PTX
from parity import DTYPES, assert_parity, check, forward_backward, poisoned
from torch import Tensor

from gptfast import ops
from gptfast.kernels.reference import attention as reference
from gptfast.ops.backend import TRITON_MISSING, use_backend

# (B, H, Tq, Tk, D)
SMALL = [
    (1, 1, 1, 1, 16),
    (2, 3, 2, 2, 16),
    (1, 2, 63, 63, 64),
    (2, 1, 100, 100, 80),
    (1, 2, 129, 129, 128),
    (1, 2, 33, 33, 7),
    (3, 2, 1, 65, 64),
    (1, 2, 8, 77, 80),
    (1, 2, 9, 300, 20),
    (1, 2, 63, 129, 64),
    (1, 1, 100, 129, 16),
    (1, 1, 5, 9, 300),
]


def shape_id(shape: tuple) -> str:
    B, H, Tq, Tk, D = shape
    return f"B{B}-H{H}-Tq{Tq}-Tk{Tk}-D{D}"


def visible(Tq: int, Tk: int, kv_len: Tensor | None) -> Tensor:
    length = torch.tensor([Tk]) if kv_len is None else kv_len
    limit = length[:, None, None, None] - Tq + torch.arange(Tq)[:, None]
    return torch.arange(Tk) <= limit  # (1 or B, 1, Tq, Tk)


def plain(q: Tensor, k: Tensor, v: Tensor, scale=None, keep=None, kv_len=None) -> Tensor:  # type: ignore[no-untyped-def]
    """Return softmax(QK^T) V in the inputs' dtype, with dropout factors `keep`."""
    mask = visible(q.shape[2], k.shape[2], kv_len)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    # The mask is finite, so that a row which sees nothing has no NaN in its gradient.
    p = scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) * mask.any(-1, keepdim=True)
    return (p if keep is None else p * keep.to(p.dtype)) @ v


def defined(q: Tensor, k: Tensor, v: Tensor, scale=None, dropout_p=0.0, seed=0, kv_len=None):  # type: ignore[no-untyped-def]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.attention_fwd(q, k, v, scale, dropout_p, torch.tensor(seed), kv_len)[0]


def through(f, H: int):  # type: ignore[no-untyped-def]
    """Return f of packed (B, T, 3C)."""

    def run(qkv: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
        return f(q, k, v).transpose(1, 2).flatten(2)

    return run


def make(shape: tuple, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    B, H, Tq, Tk, D = shape
    q, dout = (torch.randn(B, H, Tq, D).to(dtype) for _ in range(2))
    k, v = (torch.randn(B, H, Tk, D).to(dtype) for _ in range(2))
    return {"q": q, "k": k, "v": v}, dout


def interpreted(backend: str) -> bool:
    """Return whether kernels run in Triton's interpreter, which is slow: cases must be small."""
    return backend == "triton" and not GPU


def skip_in_the_interpreter(backend: str, Tq: int) -> None:
    """Skip a test of numbers that are not finite, whose sums are computed term by term."""
    if interpreted(backend) and not PTX and Tq > 20:
        pytest.skip("the interpreter takes long over sums that are computed term by term")


def repeats(backend: str, Tq: int, Tk: int) -> range:
    """Return how many cases to compare together: a few queries decide the largest error."""
    if interpreted(backend):
        return range(1 if Tq * Tk > 100 else 4)
    return range(8)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SMALL, ids=shape_id)
def test_parity(backend: str, shape: tuple, dtype: torch.dtype) -> None:
    cases = (make(shape, dtype) for _ in repeats(backend, *shape[2:4]))
    check(ops.attention, defined, plain, *cases, reordered=shape[-1])


# A sanitizer looks at addresses, which no seed changes.
SEEDS = 4 if os.environ.get("GPTFAST_SANITIZE") == "1" else 300
MANY_SEEDS = [
    (1, 1, 1, 7, 16),
    (2, 3, 1, 129, 64),
    (1, 1, 1, 300, 64),
    (1, 1, 2, 2, 64),
    (1, 1, 2, 5, 7),
    (1, 1, 3, 64, 80),
    (1, 1, 8, 77, 80),
    (1, 1, 9, 9, 64),
    (1, 1, 9, 300, 20),
    (1, 2, 17, 40, 16),
    (1, 2, 33, 33, 7),
    (1, 1, 33, 33, 128),
    (1, 2, 63, 129, 64),
    (1, 1, 65, 65, 64),
    (1, 1, 100, 129, 16),
]


@pytest.fixture
def kernels(backend: str) -> str:
    """Run the test on the kernels. The reference rounds as plain PyTorch does, in another order."""
    if backend == "reference":
        pytest.skip("one seed's largest error is luck in two equally exact orders of summation")
    return backend


def check_each_seed(ours, reference, plain, size: int, inputs: dict[str, Tensor], dout: Tensor):  # type: ignore[no-untyped-def]
    """Apply the parity rule to each group of `size` rows of the batch alone."""
    values = list(inputs.values())
    results = [forward_backward(f, values, dout) for f in (ours, plain)]
    results.insert(1, forward_backward(reference, [x.double() for x in values], dout))
    tensors = zip(*([out, *grads] for out, grads in results), strict=True)
    for name, kinds in zip(["out", *inputs], tensors, strict=True):
        for seed, (x, ref, pt) in enumerate(zip(*(x.split(size) for x in kinds), strict=True)):
            assert_parity(f"{name} of seed {seed}", x, ref, pt)


@pytest.mark.parametrize("shape", MANY_SEEDS, ids=shape_id)
def test_parity_of_each_of_many_seeds(kernels: str, shape: tuple) -> None:
    # One case a seed: nothing hides in the maximum over several cases.
    seeds = 1 if interpreted(kernels) else SEEDS
    inputs, dout = make((seeds * shape[0], *shape[1:]), torch.float32)
    check_each_seed(ops.attention, defined, plain, shape[0], inputs, dout)


@pytest.mark.parametrize(("T", "D"), [(1, 8), (7, 64), (65, 64)], ids=str)
def test_packed_parity_of_each_of_many_seeds(kernels: str, T: int, D: int) -> None:
    seeds, H = 1 if interpreted(kernels) else SEEDS, 2
    inputs, dout = {"qkv": torch.randn(seeds, T, 3 * H * D)}, torch.randn(seeds, T, H * D)
    functions = lambda qkv: ops.attention_qkv(qkv, H), through(defined, H), through(plain, H)
    check_each_seed(*functions, 1, inputs, dout)


LONG = [(1, 2, 1000, 1000, 64), (1, 1, 200, 1000, 128), (1, 1, 1, 1000, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", LONG, ids=shape_id)
def test_parity_long(shape: tuple, dtype: torch.dtype) -> None:
    check(ops.attention, defined, plain, make(shape, dtype), reordered=shape[-1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", LONG if GPU else [(1, 1, 280, 300, 64)], ids=shape_id)
def test_triton_over_many_blocks(triton: str, shape: tuple, dtype: torch.dtype) -> None:
    check(ops.attention, defined, plain, make(shape, dtype), reordered=shape[-1])


def test_parity_long_at_each_level(isa: str) -> None:
    case = make((1, 1, 1000, 1000, 64), torch.float32)
    check(ops.attention, defined, plain, case, reordered=64)


def test_equals_sdpa() -> None:
    inputs, _ = make((2, 3, 100, 100, 64), torch.float32)
    q, k, v = inputs.values()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ops.attention(q, k, v), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.7, -0.3])
def test_scale(backend: str, scale: float) -> None:
    check(
        lambda q, k, v: ops.attention(q, k, v, scale=scale),
        lambda q, k, v: defined(q, k, v, scale),
        lambda q, k, v: plain(q, k, v, scale),
        *(make((1, 2, 37, 70, 20), torch.float32) for _ in repeats(backend, 37, 70)),
        reordered=20,
    )


@pytest.mark.parametrize("Tq", [1, 5, 63], ids=lambda Tq: f"Tq{Tq}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kv_len(backend: str, Tq: int, dtype: torch.dtype) -> None:
    # The rows have no key, fewer keys than queries, some keys, and all of them.
    H, cases = (1, 1) if interpreted(backend) else (2, 4)
    inputs, dout = make((4, H, Tq, 130, 16), dtype)
    kv_len = torch.tensor([0, 3, 77, 130])
    functions = [
        lambda q, k, v: ops.attention(q, k, v, kv_len=kv_len),
        lambda q, k, v: defined(q, k, v, kv_len=kv_len),
        lambda q, k, v: plain(q, k, v, kv_len=kv_len),
    ]
    others = [make((4, H, Tq, 130, 16), dtype) for _ in range(cases - 1)]
    check(*functions, (inputs, dout), *others, reordered=16)
    out, (dq, dk, dv) = forward_backward(functions[0], list(inputs.values()), dout)
    assert not out[0].any() and not dq[0].any()
    for b, length in enumerate(kv_len):
        assert not dk[b, :, length:].any() and not dv[b, :, length:].any()


@pytest.mark.parametrize("Tq", [1, 5], ids=lambda Tq: f"Tq{Tq}")
def test_kv_len_beyond_32_bits(backend: str, Tq: int) -> None:
    inputs, _ = make((2, 1, Tq, 9, 16), torch.float32)
    out = ops.attention(*inputs.values(), kv_len=torch.tensor([2**62, -(2**62)]))
    # Each query sees every key, or none.
    expected = ops.attention(*inputs.values(), kv_len=torch.tensor([9 + Tq, 0]))
    assert torch.equal(out, expected) and out[0].any() and not out[1].any()


@pytest.mark.parametrize("Tq", [1, 20], ids=lambda Tq: f"Tq{Tq}")
def test_keys_past_kv_len_are_never_read(backend: str, Tq: int) -> None:
    inputs, _ = make((2, 2, Tq, 90, 16), torch.float32)
    q, k, v = inputs.values()
    kv_len = torch.tensor([50, 90])
    clean = ops.attention(q, k, v, kv_len=kv_len)
    k[0, :, 50:], v[0, :, 50:] = 1e30, 1e30
    assert torch.equal(ops.attention(q, k, v, kv_len=kv_len), clean)


@pytest.mark.parametrize("T", [20, 129], ids=lambda T: f"T{T}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dropout(backend: str, T: int, dtype: torch.dtype) -> None:
    B = 6 if T < 100 else 1  # with few outputs the largest error is luck
    cases = [make((B, 2, T, T + 6, 16), dtype) for _ in repeats(backend, T, T)]
    p, seed = 0.25, 2**35 + 3
    keep = reference.dropout_scale(cases[0][0]["q"], cases[0][0]["k"], p, torch.tensor(seed))
    check(
        lambda q, k, v: ops.attention(q, k, v, dropout_p=p, seed=seed),
        lambda q, k, v: defined(q, k, v, None, p, seed),
        lambda q, k, v: plain(q, k, v, None, keep),
        *cases,
        reordered=16,
    )


def test_dropout_seed(backend: str) -> None:
    inputs, _ = make((1, 2, 40, 40, 16), torch.float32)
    first = ops.attention(*inputs.values(), dropout_p=0.5, seed=3)
    assert torch.equal(ops.attention(*inputs.values(), dropout_p=0.5, seed=torch.tensor(3)), first)
    assert not torch.equal(ops.attention(*inputs.values(), dropout_p=0.5, seed=4), first)


def packed(B: int, H: int, T: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    qkv = torch.randn(B, T, 3 * H * D).to(dtype)
    return [x.unflatten(-1, (H, D)).transpose(1, 2) for x in qkv.chunk(3, -1)]


def layout(kind: str, dtype: torch.dtype, T: int = 70) -> dict[str, Tensor]:
    B, H, D = 2, 3, 16
    if kind == "packed":
        tensors = packed(B, H, T, D, dtype)
    elif kind == "last dimension strided":
        tensors = [torch.randn(B, H, D, T).to(dtype).mT for _ in range(3)]
    elif kind == "every other":
        tensors = [torch.randn(B, H, T, 2 * D).to(dtype)[..., ::2] for _ in range(3)]
    elif kind == "expanded":
        tensors = [torch.randn(B, 1, T, D).to(dtype).expand(B, H, T, D) for _ in range(3)]
    else:
        tensors = [torch.randn(T, B, D, H).to(dtype).permute(1, 3, 0, 2) for _ in range(3)]
    return dict(zip("qkv", tensors, strict=True))


@pytest.mark.parametrize("gradient", ["dense", "expanded", "transposed"])
@pytest.mark.parametrize(
    "kind", ["packed", "last dimension strided", "every other", "expanded", "permuted"]
)
def test_layouts(backend: str, kind: str, gradient: str) -> None:
    cases = []
    for _ in range(1 if interpreted(backend) else 2):
        inputs = layout(kind, torch.float32, 20 if interpreted(backend) else 70)
        shape = inputs["q"].shape
        dout = {
            "dense": torch.randn(shape),
            "expanded": None,
            "transposed": torch.randn(*shape[:2], shape[3], shape[2]).mT,
        }[gradient]
        cases.append((inputs, dout))
    check(ops.attention, defined, plain, *cases, reordered=16)


@pytest.mark.parametrize("kind", ["packed", "every other"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_layouts_in_16_bits(isa: str, kind: str, dtype: torch.dtype) -> None:
    check(ops.attention, defined, plain, (layout(kind, dtype), None), reordered=16)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 8), (2, 63, 3, 16), (1, 129, 2, 80)],
    ids=lambda s: "B{}-T{}-H{}-D{}".format(*s),
)
def test_packed_parity(backend: str, shape: tuple, dtype: torch.dtype) -> None:
    B, T, H, D = shape
    cases = [
        ({"qkv": torch.randn(B, T, 3 * H * D).to(dtype)}, torch.randn(B, T, H * D).to(dtype))
        for _ in repeats(backend, T, T)
    ]
    functions = lambda qkv: ops.attention_qkv(qkv, H), through(defined, H), through(plain, H)
    check(*functions, *cases, reordered=D)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2, "seed": 9}, {"scale": 0.3}], ids=str)
def test_packed_equals_unpacked(backend: str, options: dict) -> None:
    B, T, H, D = 2, 20 if interpreted(backend) else 70, 3, 16
    qkv = torch.randn(T, B, 3 * H * D).transpose(0, 1)
    dout = torch.randn(B, T, H * D)

    def unpacked(qkv: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (H, D)).transpose(1, 2) for x in qkv.chunk(3, -1))
        return ops.attention(q, k, v, **options).transpose(1, 2).flatten(2)

    with poisoned():
        out, (dqkv,) = forward_backward(lambda x: ops.attention_qkv(x, H, **options), [qkv], dout)
    expected, (dexpected,) = forward_backward(unpacked, [qkv], dout)
    assert torch.equal(out, expected)
    assert torch.equal(dqkv, dexpected)


def test_packed_kv_len(backend: str) -> None:
    qkv, kv_len = torch.randn(2, 30, 3 * 32), torch.tensor([30, 11])
    q, k, v = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in qkv.chunk(3, -1))
    expected = ops.attention(q, k, v, kv_len=kv_len).transpose(1, 2).flatten(2)
    assert torch.equal(ops.attention_qkv(qkv, 2, kv_len=kv_len), expected)


def check_large_scores(T: int, n: int) -> None:
    # Scores go up to 1e6 and grow from key to key, so the running maximum moves at each block. They
    # are whole numbers, so that no sum is rounded: at this size a rounding is a large error.
    cases = [make((1, 1, T, T, 16), torch.float32) for _ in range(n)]
    for inputs, _ in cases:
        inputs["k"] = (2 * inputs["k"]).round() * torch.arange(1, T + 1)[:, None]
        inputs["q"] = (50 * inputs["q"]).round()
    check(ops.attention, defined, plain, *cases)


@pytest.mark.parametrize("T", [1, 7, 300], ids=lambda T: f"T{T}")
def test_large_scores(isa: str, T: int) -> None:
    check_large_scores(T, max(8, 600 // T))  # few queries have two keys near their maximum


@pytest.mark.parametrize("T", [1, 7, 300], ids=lambda T: f"T{T}")
def test_triton_large_scores(triton: str, T: int) -> None:
    check_large_scores(T, 8)


def test_equal_scores_give_the_mean(backend: str) -> None:
    T = 100
    v = torch.randn(1, 2, T, 16)
    out = ops.attention(torch.zeros_like(v), torch.randn_like(v), v)
    mean = v.double().cumsum(2) / torch.arange(1, T + 1)[:, None]
    torch.testing.assert_close(out.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("T", [4, 70], ids=lambda T: f"T{T}")
def test_nan_reaches_only_queries_that_see_it(backend: str, T: int, poison: float) -> None:
    inputs, _ = make((1, 1, T, T, 16), torch.float32)
    inputs["k"][0, 0, T // 2] = poison
    out = ops.attention(*inputs.values())[0, 0]
    assert out[: T // 2].isfinite().all()
    assert out[T // 2 :].isnan().any(-1).all()


def term_by_term(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention of each query with slices of what it sees: nothing else has a term."""
    Tq, Tk, D = q.shape[2], k.shape[2], q.shape[3]
    rows = []
    for i in range(Tq):
        n = Tk - Tq + i + 1
        scores = q[:, :, i : i + 1] @ k[:, :, :n].mT * D**-0.5
        rows.append(scores.softmax(-1) @ v[:, :, :n])
    return torch.cat(rows, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize(("Tq", "Tk", "at"), [(1, 7, 3), (5, 9, 8), (20, 23, 12), (70, 75, 74)])
def test_nonfinite_reaches_only_visible_pairs(
    backend: str, Tq: int, Tk: int, at: int, name: str, value: float
) -> None:
    skip_in_the_interpreter(backend, Tq)
    inputs, dout = make((1, 1, Tq, Tk, 16), torch.float32)
    poisoned_at = min(at, Tq // 2) if name in ("q", "dout") else at
    {**inputs, "dout": dout}[name][0, 0, poisoned_at, 3] = value
    results = [forward_backward(ops.attention, list(inputs.values()), dout)]
    exact = [x.double() for x in inputs.values()]
    results.append(forward_backward(term_by_term, exact, dout))
    for ours, expected in zip(*([out, *grads] for out, grads in results), strict=True):
        assert torch.equal(ours.isfinite(), expected.isfinite())
        torch.testing.assert_close(
            ours.nan_to_num(0, 0, 0), expected.float().nan_to_num(0, 0, 0), rtol=1e-4, atol=1e-5
        )
    out, expected = results[0][0], results[1][0]
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(0).sign(), expected.nan_to_num(0).sign().float())


@pytest.mark.parametrize("Tq", [1, 8, 9, 70], ids=lambda Tq: f"Tq{Tq}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_scores_of_minus_infinity_give_zeros(
    backend: str, Tq: int, dtype: torch.dtype, dropout_p: float
) -> None:
    skip_in_the_interpreter(backend, Tq)
    # Every other query has only scores of -inf. Those of the others are finite.
    inputs, dout = make((1, 2, Tq, Tq + 3, 16), dtype)
    empty = torch.arange(Tq) % 2 == 0
    inputs["k"][..., 0] = 1.0
    inputs["q"][..., 0] = torch.where(empty, -torch.inf, 0.0).to(dtype)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, dropout_p=dropout_p, seed=4)

    out, (dq, dk, dv) = forward_backward(run, list(inputs.values()), dout)
    assert not out[:, :, empty].any() and not dq[:, :, empty].any()
    lse = torch.ops.gptfast.attention_fwd(*inputs.values(), 0.25, 0.0, None, None)[1]
    assert (lse[:, :, empty] == -torch.inf).all() and lse[:, :, ~empty].isfinite().all()
    # 0 * -inf in dk's column 0 is no number in PyTorch either.
    inputs["q"][:, :, empty] = 0.0
    dout[:, :, empty] = 0.0
    _, expected = forward_backward(run, list(inputs.values()), dout)
    close = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(dk[..., 1:], expected[1][..., 1:], **close)
    torch.testing.assert_close(dv, expected[2], **close)
    assert out[:, :, ~empty].isfinite().all() and dq[:, :, ~empty].isfinite().all()


def only_minus_infinity(qkv: Tensor) -> Tensor:
    """Make every score of packed (B, T, 3 * 32), two heads, -inf."""
    qkv[..., :64] = 0.0
    qkv[..., 0:32:16], qkv[..., 32:64:16] = 1.0, -torch.inf
    return qkv


def check_zeros(qkv: Tensor) -> None:
    out, (dqkv,) = forward_backward(lambda x: ops.attention_qkv(x, 2), [qkv], None)
    assert not out.any()
    # 0 * -inf in dq is no number in PyTorch either.
    dqkv[..., 0:32:16] = 0.0
    assert not dqkv.any()


@pytest.mark.parametrize("T", [1, 8, 9, 70], ids=lambda T: f"T{T}")
def test_packed_scores_of_minus_infinity_give_zeros(backend: str, T: int) -> None:
    skip_in_the_interpreter(backend, T)
    check_zeros(only_minus_infinity(torch.randn(2, T, 96)))


@pytest.mark.parametrize("T", [1, 8, 9, 70], ids=lambda T: f"T{T}")
def test_scores_of_minus_infinity_at_each_level(isa: str, T: int) -> None:
    check_zeros(only_minus_infinity(torch.randn(2, T, 96)))


HUGE = {
    "scores": {"q": 1e20, "k": 1e30},
    "scores of one query": {"k": 1e38},
    "values": {"v": 3e37},
    "gradients of scores": {"q": 1e-10, "k": 1e-10, "v": 1e20, "dout": 1e20},
}


@pytest.mark.parametrize("huge", HUGE.values(), ids=HUGE.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 20, 64), (9, 12, 5), (40, 45, 16), (100, 130, 64)], ids=str)
def test_overflow_at_each_level(isa: str, shape: tuple, dtype: torch.dtype, huge: dict) -> None:
    """What fp64 can hold is right, also where the scores or the sums of fp32 overflow."""
    inputs, dout = make((1, 2, shape[0], *shape[1:]), dtype)
    leaves = {**inputs, "dout": dout}
    for name, size in huge.items():
        leaves[name].mul_(size)
    ours, grads = forward_backward(ops.attention, list(inputs.values()), dout)
    exact = [x.double() for x in inputs.values()]
    expected, exact_grads = forward_backward(term_by_term, exact, dout.double())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for x, y in zip([ours, *grads], [expected, *exact_grads], strict=True):
        assert torch.equal(x.isfinite(), y.to(dtype).isfinite())
        size = y.abs().max()
        torch.testing.assert_close(
            (x.double() / size).nan_to_num(0, 0, 0), (y / size).nan_to_num(0, 0, 0),
            rtol=tolerance, atol=tolerance,
        )  # fmt: skip


def results_of(launchers, inputs: dict[str, Tensor], dout: Tensor, scale: float, p: float):  # type: ignore[no-untyped-def]
    """Return out, lse and the gradients of q, k and v."""
    q, k, v = inputs.values()
    options = scale, p, torch.tensor(7), None
    out, lse = launchers.attention_fwd(q, k, v, *options)
    return out, lse, *launchers.attention_bwd(dout, q, k, v, out, lse, *options)


# Sizes of q and k, which have random signs, or "-" for scores that are all negative.
BEYOND_FP32 = {"overflow": (1.0, 1e38, ""), "minus": (1e20, 1e30, "-"), "large": (6e4, 6e4, "")}


def check_scores_beyond_fp32(launchers, shape: tuple, dtype: torch.dtype, kind: str, p=0.0):  # type: ignore[no-untyped-def]
    """Compare with fp64, which holds the scores: each number, and where inf and NaN are."""
    inputs, dout = make((1, 2, *shape), torch.float32)
    q_size, k_size, signs = BEYOND_FP32[kind]
    inputs["q"], inputs["k"] = inputs["q"] * q_size, inputs["k"] * k_size
    if signs:
        inputs["q"], inputs["k"] = inputs["q"].abs(), -inputs["k"].abs()
    most = torch.finfo(dtype).max
    inputs = {name: x.clamp(-most, most).to(dtype) for name, x in inputs.items()}
    dout, scale = dout.to(dtype), 0.4 if shape[0] % 2 or signs else -0.4
    ours = results_of(launchers, inputs, dout, scale, p)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = results_of(reference, exact, dout.double(), scale, p)
    assert (p or expected[0].any(-1).all()) and expected[1].isfinite().all()
    for x, exactly in zip(ours, expected, strict=True):
        eps = torch.finfo(x.dtype).eps if x is not ours[1] else 1e-6
        close = {"rtol": 4 * eps, "atol": 4 * eps * exactly.nan_to_num(0, 0, 0).abs().max().item()}
        torch.testing.assert_close(x, exactly.to(x.dtype), equal_nan=True, **close)


@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "p"),
    [
        ((9, 9, 5), torch.float32, "overflow", 0.0),
        ((9, 9, 5), torch.float32, "minus", 0.5),
        ((6, 9, 5), torch.float16, "large", 0.0),
        ((1, 9, 5), torch.float16, "large", 0.0),
        ((9, 9, 5), torch.bfloat16, "overflow", 0.0),
        ((6, 20, 16), torch.bfloat16, "minus", 0.0),
        ((1, 9, 5), torch.bfloat16, "overflow", 0.0),
        ((1, 9, 5), torch.bfloat16, "minus", 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("number", ["few", "many"])
def test_triton_scores_beyond_fp32(
    triton: str,
    monkeypatch: pytest.MonkeyPatch,
    number: str,
    shape: tuple,
    dtype: torch.dtype,
    kind: str,
    p: float,
) -> None:
    if number == "many":  # compute as for many queries, in fp32; decode in several chunks
        monkeypatch.setattr(load("attention_tiles"), "FP64_QUERIES", 0)
        monkeypatch.setattr(load("attention_tiles"), "FP64_WORK", 0)
        monkeypatch.setattr(load("attention_decode"), "CHUNK", 4)
    elif dtype != torch.float32 and shape[0] > 1:
        pytest.skip("16 bits compute as for many queries anyway")
    check_scores_beyond_fp32(load("attention"), shape, dtype, kind, p)


@pytest.mark.parametrize("shape", [(5, 9, 3), (64, 64, 16), (1, 50, 8)], ids=str)
def test_dropout_of_nearly_everything(backend: str, shape: tuple) -> None:
    p, seed = 0.99, 2**63 - 1
    B = 2 if interpreted(backend) else 40
    case = make((B, 2, *shape), torch.float32)
    keep = reference.dropout_scale(case[0]["q"], case[0]["k"], p, torch.tensor(seed))
    check(
        lambda q, k, v: ops.attention(q, k, v, dropout_p=p, seed=seed),
        lambda q, k, v: defined(q, k, v, None, p, seed),
        lambda q, k, v: plain(q, k, v, None, keep),
        case,
    )


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_heads_without_dimensions(backend: str, p: float) -> None:
    q, k = torch.randn(2, 3, 4, 0), torch.randn(2, 3, 5, 0)
    inputs = [x.requires_grad_() for x in (q, k, torch.randn(2, 3, 5, 0))]
    out = ops.attention(*inputs, dropout_p=p)
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]
    qkv = torch.randn(2, 4, 0, requires_grad=True)
    packed_out = ops.attention_qkv(qkv, 3, dropout_p=p)
    (dqkv,) = torch.autograd.grad(packed_out.sum(), qkv)
    assert packed_out.shape == dqkv.shape == (2, 4, 0)


@pytest.mark.parametrize(
    "shape", [(0, 2, 4, 4, 16), (2, 2, 0, 5, 16), (2, 2, 0, 0, 16)], ids=shape_id
)
def test_empty(backend: str, shape: tuple) -> None:
    inputs, dout = make(shape, torch.float32)
    out, (dq, dk, dv) = forward_backward(ops.attention, list(inputs.values()), dout)
    assert out.shape == dq.shape == inputs["q"].shape
    assert not dk.any() and not dv.any()


@pytest.mark.parametrize("Tq", [1, 129], ids=lambda Tq: f"Tq{Tq}")
def test_triton_same_bits_twice(triton: str, Tq: int) -> None:
    inputs, dout = make((2, 1, Tq, 129, 64), torch.float16)
    first, second = (forward_backward(ops.attention, list(inputs.values()), dout) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_same_bits_twice_and_with_any_threads(isa: str) -> None:
    inputs, dout = make((2, 3, 129, 129, 64), torch.float32)
    runs = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        out, grads = forward_backward(ops.attention, list(inputs.values()), dout)
        runs.append([out, *grads])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("Tq", [1, 40], ids=lambda Tq: f"Tq{Tq}")
def test_a_row_does_not_depend_on_its_batch(backend: str, Tq: int) -> None:
    inputs, _ = make((3, 2, Tq, 70, 16), torch.float32)
    alone = ops.attention(*(x[1:2] for x in inputs.values()))
    assert torch.equal(ops.attention(*inputs.values())[1:2], alone)


def test_inputs_unchanged(backend: str) -> None:
    inputs, dout = make((1, 2, 40, 40, 20), torch.float32)
    before = [x.clone() for x in (*inputs.values(), dout)]
    forward_backward(ops.attention, list(inputs.values()), dout)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs.values(), dout), strict=True))


def bad(**changed: object) -> dict:
    x = torch.zeros(2, 3, 4, 8)
    return {"q": x, "k": x, "v": x, **changed}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(q=torch.zeros(2, 3, 5, 8)), "Tq <= Tk"),
        (bad(k=torch.zeros(2, 3, 4, 9)), "attention needs"),
        (bad(v=torch.zeros(2, 3, 5, 8)), "attention needs"),
        (bad(q=torch.zeros(1, 3, 4, 8)), "attention needs"),
        (bad(q=torch.zeros(3, 4, 8)), "dimensions"),
        (bad(k=torch.zeros(2, 3, 4, 8).bfloat16()), "one dtype"),
        (bad(v=torch.zeros(2, 3, 4, 8, device="meta")), "one device"),
        (bad(q=torch.zeros(2, 3, 4, 8).long()), "floating-point"),
        (bad(dropout_p=1.0), "dropout_p"),
        (bad(dropout_p=-0.1), "dropout_p"),
        (bad(dropout_p=float("nan")), "dropout_p"),
        (bad(kv_len=torch.tensor([1])), "kv_len"),
        (bad(kv_len=torch.tensor([1.0, 2.0])), "kv_len"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        ops.attention(q, k, v, **arguments)
    arguments.update(zip("qkv", (q, k, v), strict=True))


@pytest.mark.parametrize(
    ("shape", "n_head"), [((2, 4, 25), 2), ((2, 4, 24), 3), ((2, 24), 2), ((2, 4, 24), 0)], ids=str
)
def test_bad_packed_input(shape: tuple, n_head: int) -> None:
    with pytest.raises(ValueError, match="attention_qkv needs"):
        ops.attention_qkv(torch.zeros(shape), n_head)


@pytest.mark.parametrize("Tq", [1, 70], ids=lambda Tq: f"Tq{Tq}")
def test_saves_what_the_reference_saves(backend: str, Tq: int) -> None:
    # The first queries see no key: out is 0 and lse is -inf.
    inputs, _ = make((2, 2, Tq, 90, 16), torch.float32)
    kv_len = torch.tensor([80, 60 if Tq > 1 else 0])
    arguments = (*inputs.values(), 0.25, 0.0, None, kv_len)
    out, lse = torch.ops.gptfast.attention_fwd(*arguments)
    with use_backend("reference"):
        out_reference, lse_reference = torch.ops.gptfast.attention_fwd(*arguments)
    torch.testing.assert_close(out, out_reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, lse_reference, rtol=1e-6, atol=1e-6)


# The tests below are of what only the Triton kernels have: tiles, chunks of keys, groups of heads.


def load(name: str):  # type: ignore[no-untyped-def]
    """Import a module of kernels/triton here, not at the top: Triton may not be installed."""
    return importlib.import_module(f"gptfast.kernels.triton.{name}")


def configurations() -> list[tuple[str, str, int]]:
    """Return (architecture, kind, head dim) once for each tile shape of the three kernels."""
    if TRITON_MISSING:
        return []
    tiles, seen = load("attention_tiles"), {}
    for arch in [tiles.target.arch()] if GPU else tiles.FWD:
        for kind, rows in tiles.FWD[arch].items():
            for D in rows:
                tables = (tiles.FWD, tiles.BWD_DQ, tiles.BWD_DK_DV)
                blocks = tuple(table[arch][kind][D][:2] for table in tables)
                # Of the head dims up to 64 that share a tile, the largest stands for all.
                seen[kind, blocks, max(D, 64)] = arch, kind, D
    return list(seen.values())


@pytest.mark.parametrize(("arch", "kind", "BLOCK_D"), configurations())
def test_triton_every_tile(
    triton: str, monkeypatch: pytest.MonkeyPatch, arch: str, kind: str, BLOCK_D: int
) -> None:
    tiles = load("attention_tiles")
    monkeypatch.setattr(tiles.target, "arch", lambda: arch)
    # There are two blocks of queries and of keys, and the last of each is partial. Inputs in fp32
    # are summed in fp64 if there are few queries.
    rows = [t[arch][kind][BLOCK_D] for t in (tiles.FWD, tiles.BWD_DQ, tiles.BWD_DK_DV)]
    Tq = max(row[0] for row in rows) + 3
    if kind == "fp32":
        Tq = max(Tq, 48)
    elif kind == "fp64":
        Tq = min(Tq, tiles.FP64_QUERIES - 1)
    Tk = Tq + 5
    dtype = torch.float32 if kind in ("fp32", "fp64") else torch.float16
    number = tiles.number(torch.empty(1, 1, Tq, BLOCK_D - 2, dtype=dtype), Tk)
    assert number == (tiles.tl.float64 if kind == "fp64" else tiles.tl.float32)
    case = make((1, 1, Tq, Tk, BLOCK_D - 2), dtype)
    p = 0.2 if "dropout" in kind else 0.0
    keep = reference.dropout_scale(case[0]["q"], case[0]["k"], p, torch.tensor(5))
    check(
        lambda q, k, v: ops.attention(q, k, v, dropout_p=p, seed=5),
        lambda q, k, v: defined(q, k, v, None, p, 5),
        lambda q, k, v: plain(q, k, v, None, keep),
        case,
    )


@pytest.mark.parametrize(("Tq", "Tk"), [(64, 64), (37, 51)])
def test_triton_dropout_mask_is_the_references(triton: str, Tq: int, Tk: int) -> None:
    # With equal scores and the unit matrix for V, out is the mask / (number of keys a query sees).
    shape, p, seed = (2, 2, Tq, 64), 0.3, -7
    q, k = torch.zeros(shape), torch.zeros(2, 2, Tk, 64)
    v = torch.eye(Tk, 64).expand(2, 2, Tk, 64)
    expected = (reference.dropout_scale(q, k, p, torch.tensor(seed)) > 0) & visible(Tq, Tk, None)
    out = ops.attention(q, k, v, dropout_p=p, seed=seed)
    assert torch.equal(out[..., :Tk] > 0, expected)
    # In the backward of V, dO is the unit matrix: dV = P^T dO.
    dout = torch.eye(Tq, 64).expand(shape)
    _, (_, _, dv) = forward_backward(
        lambda *x: ops.attention(*x, dropout_p=p, seed=seed), [q, k, v], dout
    )
    assert torch.equal(dv[..., :Tq].mT > 0, expected)


# (size, strides) that put the last element past 2^31: by batch, head, row of a tile, tile.
WIDE = {
    "batch": ((3, 1, 20), (2**30, 0, 128)),
    "head": ((1, 3, 20), (0, 2**30, 128)),
    "row": ((1, 1, 34), (0, 0, 2**26)),
    "block": ((1, 1, 70), (0, 0, 2**25)),
}


@pytest.mark.parametrize(("size", "strides"), WIDE.values(), ids=WIDE)
def test_triton_offsets_past_2_to_the_31(triton: str, size: tuple, strides: tuple) -> None:
    # The tensor takes 5 GB of address space, but only one page per row is touched.
    T, D = size[2], 16
    numel = sum((n - 1) * s for n, s in zip(size, strides, strict=True)) + 8 * D
    store = torch.empty(numel, dtype=torch.float16)
    q, k, v, dout, out, dq, dk, dv = (
        store[i * D :].as_strided((*size, D), (*strides, 1)) for i in range(8)
    )
    for x in (q, k, v, dout):
        x.copy_(torch.randn(*size, D))
    attention, options = load("attention"), (0.25, 0.0, None, None)
    dense = [x.contiguous() for x in (q, k, v, dout)]
    expected, lse = attention.attention_fwd(*dense[:3], *options)
    load("attention_fwd").fill_fwd(q, k, v, out, torch.empty_like(lse), *options)
    assert torch.equal(out, expected)
    grads = attention.attention_bwd(dense[3], *dense[:3], expected, lse, *options)
    load("attention_bwd").fill_bwd(dout, q, k, v, out, lse, (dq, dk, dv), *options)
    assert all(torch.equal(a, b) for a, b in zip((dq, dk, dv), grads, strict=True))
    one = attention.attention_fwd(q[:, :, T - 1 :], k, v, *options)[0]
    assert torch.equal(
        one, attention.attention_fwd(dense[0][:, :, T - 1 :], *dense[1:3], *options)[0]
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_triton_decoding_in_chunks_of_keys(triton: str, dtype: torch.dtype) -> None:
    chunk = load("attention_decode").CHUNK
    inputs, _ = make((5, 2, 1, 2 * chunk + 70, 20), dtype)
    q, k, v = inputs.values()
    lengths = [0, 1, chunk, chunk + 1, 2 * chunk + 70]
    kv_len = torch.tensor(lengths)
    out = ops.attention(q, k, v, kv_len=kv_len)
    ref = defined(*(x.double() for x in (q, k, v)), kv_len=kv_len)
    assert_parity("out", out, ref, plain(q, k, v, kv_len=kv_len))
    for b, length in enumerate(lengths):
        if length:
            # A row alone gives the same bits, also from a cache that is only as long as it must be.
            alone = [x[b : b + 1] for x in (q, k[:, :, :length], v[:, :, :length])]
            assert torch.equal(ops.attention(*alone), out[b : b + 1])


def test_triton_decoding_over_many_chunks(triton: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # There are more chunks than the combining kernel takes at a time.
    monkeypatch.setattr(load("attention_decode"), "CHUNK", 64)
    load("launch_series").forget()
    inputs, _ = make((1, 1, 1, 64 * 18 + 5, 16), torch.float32)
    q, k, v = inputs.values()
    out = ops.attention(q, k, v)
    assert_parity("out", out, defined(*(x.double() for x in (q, k, v))), plain(q, k, v))


@pytest.mark.parametrize("group", [1, 2])
def test_triton_groups_of_heads(triton: str, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    inputs, dout = make((1, 3, 130, 130, 16), torch.float16)
    expected, grads = forward_backward(ops.attention, list(inputs.values()), dout)
    monkeypatch.setattr(load("attention_fwd"), "GROUP_BYTES", group * 2 * 130 * 16 * 2)
    load("launch_series").forget()
    with poisoned():
        out, regrouped = forward_backward(ops.attention, list(inputs.values()), dout)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, regrouped, strict=True))
