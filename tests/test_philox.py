"""Compare Philox-4x32-10 with Random123's known answers, and the C++ ops with Philox."""

import pytest
import torch

from gptfast import ops
from gptfast.kernels.reference import sampling as sampling_reference
from gptfast.kernels.reference.attention import dropout_scale
from gptfast.kernels.reference.philox import philox, uniform
from gptfast.ops.adamw import adamw
from gptfast.ops.backend import use_backend

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822]


def as_int64(word: int) -> torch.Tensor:
    return torch.tensor(word - 2**64 if word >= 2**63 else word)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter: tuple, key: int, answer: tuple) -> None:
    words = philox(*(torch.tensor(c) for c in counter), as_int64(key))
    assert tuple(int(word) for word in words) == answer


def test_uniform_is_tritons_mapping() -> None:
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    expected = [0.0, 4.6566127342e-10, 0.99999994, 0.99999994, 0.0]
    torch.testing.assert_close(uniform(words), torch.tensor(expected), rtol=1e-7, atol=0)
    assert uniform(words).max() < 1


@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_mask_equals_reference(isa: str, seed: int) -> None:
    # With equal scores and v = identity, row i of the output is mask / (i + 1) / (1 - p).
    B, H, T, p = 2, 3, 70, 0.3
    q, k = torch.zeros(B, H, T, 8), torch.zeros(B, H, T, 8)
    v = torch.eye(T).expand(B, H, T, T)
    q, k = (torch.nn.functional.pad(x, (0, T - 8)) for x in (q, k))
    kept = ops.attention(q, k, v, dropout_p=p, seed=seed) != 0
    expected = dropout_scale(q, k, p, torch.tensor(seed)).ne(0).tril()
    assert torch.equal(kept, expected)


def test_dropout_mask_of_a_suffix_of_queries(isa: str) -> None:
    # Queries are numbered by their key, so that a decode step draws what training drew.
    Tq, Tk, p = 17, 61, 0.5
    q, k = torch.zeros(1, 2, Tq, Tk), torch.zeros(1, 2, Tk, Tk)
    v = torch.eye(Tk).expand(1, 2, Tk, Tk)
    whole = torch.zeros(1, 2, Tk, Tk)
    kept = ops.attention(q, k, v, dropout_p=p, seed=5) != 0
    assert torch.equal(kept, (ops.attention(whole, k, v, dropout_p=p, seed=5) != 0)[:, :, -Tq:])
    assert torch.equal(kept, dropout_scale(q, k, p, torch.tensor(5)).ne(0).tril(Tk - Tq))


@pytest.mark.parametrize("seed", SEEDS)
def test_sampling_uniform_equals_reference(isa: str, seed: int) -> None:
    # With equal logits the token is floor(u * V), which shows 16 bits of u.
    V = 2**16
    position = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62 + 12345])
    seeds = torch.full_like(position, seed)
    u = sampling_reference.draw_uniform(seeds, position)
    drawn = ops.sample(torch.zeros(len(position), V), seed=seed, position=position)
    assert torch.equal(drawn, (u.double() * V).long())


@pytest.mark.parametrize("numel", [1, 15, 33, 70_001])
@pytest.mark.parametrize("seed", [0, -1, 2**40 + 7])
def test_stochastic_rounding_equals_reference(isa: str, numel: int, seed: int) -> None:
    # beta1 = beta2 = eps = 0 make the update p - lr * sign(g), which is exact in fp32: only the
    # rounding with 16 random bits can differ.
    start = torch.rand(numel).add(1).bfloat16()
    lr = torch.tensor(1234567 * 2.0**-30, dtype=torch.float64)
    rounded = {}
    for name in ("cpp", "reference"):
        param, m, v = start.clone(), torch.zeros(numel), torch.zeros(numel)
        grad = torch.ones(numel).bfloat16()
        step = torch.tensor(41.0)
        with use_backend(name):
            adamw(
                [param],
                [grad],
                [m],
                [v],
                [],
                [step],
                lr,
                None,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                [7],
                True,
                seed,
            )
        rounded[name] = param
    exact = start.double() - lr
    assert torch.equal(rounded["cpp"].view(torch.int16), rounded["reference"].view(torch.int16))
    assert (rounded["cpp"].double() - exact).abs().max() < 2**-7  # one bf16 step in [1, 2)
    if numel > 1000:
        # Unbiased: this bounds the mean error of roundings with a step of 2^-7 or finer.
        assert (rounded["cpp"].double() - exact).mean().abs() < 4 * 2**-7 * (12 * numel) ** -0.5
