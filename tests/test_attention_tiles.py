"""bf16 attention on the tiles of a CPU's matrix engine, emulated where the CPU has none."""

import pytest
import torch
from parity import check, forward_backward
from test_attention import (
    BEYOND_FP32,
    SMALL,
    check_scores_beyond_fp32,
    defined,
    layout,
    make,
    plain,
    shape_id,
    term_by_term,
)

from gptfast import ops
from gptfast.kernels.reference import attention as reference

BF16 = torch.bfloat16


@pytest.mark.parametrize("shape", SMALL, ids=shape_id)
def test_parity(tiles_isa: str, shape: tuple) -> None:
    cases = (make(shape, BF16) for _ in range(8 if shape[2] < 50 else 2))
    check(ops.attention, defined, plain, *cases, reordered=shape[-1])


@pytest.mark.parametrize("scale", [0.0, 0.7, -0.3])
def test_scale(tiles_isa: str, scale: float) -> None:
    check(
        lambda q, k, v: ops.attention(q, k, v, scale=scale),
        lambda q, k, v: defined(q, k, v, scale),
        lambda q, k, v: plain(q, k, v, scale),
        *(make((1, 2, 37, 70, 20), BF16) for _ in range(4)),
        reordered=20,
    )


@pytest.mark.parametrize("Tq", [9, 63], ids=lambda Tq: f"Tq{Tq}")
def test_kv_len(tiles_isa: str, Tq: int) -> None:
    # The rows have no key, fewer keys than queries, some keys, and all of them.
    kv_len = torch.tensor([0, 3, 77, 130])
    cases = [make((4, 2, Tq, 130, 16), BF16) for _ in range(2)]
    functions = [
        lambda q, k, v: ops.attention(q, k, v, kv_len=kv_len),
        lambda q, k, v: defined(q, k, v, kv_len=kv_len),
        lambda q, k, v: plain(q, k, v, kv_len=kv_len),
    ]
    check(*functions, *cases, reordered=16)
    inputs, dout = cases[0]
    clean, grads = forward_backward(functions[0], list(inputs.values()), dout)
    assert not clean[0].any() and not grads[0][0].any()
    for b, length in enumerate(kv_len):
        assert not grads[1][b, :, length:].any() and not grads[2][b, :, length:].any()
        inputs["k"][b, :, length:], inputs["v"][b, :, length:] = 1e30, torch.nan
    unread, unread_grads = forward_backward(functions[0], list(inputs.values()), dout)
    assert torch.equal(unread, clean)
    assert all(torch.equal(x, y) for x, y in zip(unread_grads, grads, strict=True))


@pytest.mark.parametrize("T", [5, 129], ids=lambda T: f"T{T}")
def test_dropout(tiles_isa: str, T: int) -> None:
    cases = [make((6 if T < 100 else 1, 2, T, T + 6, 16), BF16) for _ in range(8 if T < 100 else 2)]
    p, seed = 0.25, 2**35 + 3
    keep = reference.dropout_scale(cases[0][0]["q"], cases[0][0]["k"], p, torch.tensor(seed))
    check(
        lambda q, k, v: ops.attention(q, k, v, dropout_p=p, seed=seed),
        lambda q, k, v: defined(q, k, v, None, p, seed),
        lambda q, k, v: plain(q, k, v, None, keep),
        *cases,
        reordered=16,
    )


@pytest.mark.parametrize("kind", ["packed", "every other"])
def test_layouts(tiles_isa: str, kind: str) -> None:
    check(ops.attention, defined, plain, (layout(kind, BF16), None), reordered=16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_nonfinite_reaches_only_visible_pairs(tiles_isa: str, name: str, value: float) -> None:
    inputs, dout = make((1, 1, 40, 45, 16), BF16)
    {**inputs, "dout": dout}[name][0, 0, 20, 3] = value
    out, grads = forward_backward(ops.attention, list(inputs.values()), dout)
    exact = [x.double() for x in inputs.values()]
    expected, exact_grads = forward_backward(term_by_term, exact, dout)
    for ours, expect in zip([out, *grads], [expected, *exact_grads], strict=True):
        assert torch.equal(ours.isfinite(), expect.isfinite())
        torch.testing.assert_close(
            ours.double().nan_to_num(0, 0, 0), expect.nan_to_num(0, 0, 0), rtol=2e-2, atol=5e-2
        )


@pytest.mark.parametrize("kind", ["overflow", "minus"])
def test_scores_beyond_fp32(tiles_isa: str, kind: str) -> None:
    assert kind in BEYOND_FP32
    check_scores_beyond_fp32(torch.ops.gptfast, (33, 40, 16), BF16, kind)


def test_same_bits_twice_and_with_any_threads(tiles_isa: str) -> None:
    inputs, dout = make((2, 3, 70, 70, 64), BF16)
    runs = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        out, grads = forward_backward(ops.attention, list(inputs.values()), dout)
        runs.append([out, *grads])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_fp32_runs_beside_tiles(tiles_isa: str) -> None:
    check(ops.attention, defined, plain, make((1, 2, 63, 129, 64), torch.float32), reordered=64)
