"""Test sampling: the kept sets, the distribution, the same tokens on every backend, errors.

Triton's interpreter takes a tenth of a second per row, so it gets fewer rows.
"""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from unittest import mock

import pytest
import torch
from conftest import GPU, TRITON_MISSING
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import DTYPES
from scipy.stats import chisquare
from seeds import torch_generator
from torch import Tensor

from gptfast import ops
from gptfast.kernels.reference import sampling as reference
from gptfast.ops.backend import use_backend

PARAMETERS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 5.0},
    "top_k": {"top_k": 50},
    "top_k 1000": {"top_k": 1000},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
}


def kept_weights(logits: Tensor, **parameters: float) -> Tensor:
    """Return the reference's integer weights (B, V)."""
    B, V = logits.shape
    values = {"temperature": 1.0, "top_k": V, "top_p": 1.0, "min_p": 0.0, **parameters}
    dtypes = {"top_k": torch.int64}
    rows = [torch.full((B,), x, dtype=dtypes.get(n, torch.float32)) for n, x in values.items()]
    return reference.kept_weights(logits, *rows)


def expected_draws(logits: Tensor, seed: int, position: Tensor, **parameters: float) -> Tensor:
    """Return the reference's tokens from one row of logits (V,), whose weights serve all draws."""
    mass = kept_weights(logits[None], **parameters)[0].cumsum(-1)
    u = reference.draw_uniform(torch.full_like(position, seed), position)
    return torch.searchsorted(mass, (u.double() * mass[-1].double()).long(), right=True)


def slow(backend: str) -> bool:
    return backend == "triton" and not GPU


Draws = Callable[..., Tensor]


@pytest.fixture
def draws(backend: str) -> Draws:
    """Draw n tokens from one row of logits (V,), at positions 0 .. n - 1.

    The interpreter draws only three, among them the first and the last of the kept ids. They equal
    the reference's, whose tokens then stand for the others.
    """

    def draw(logits: Tensor, n: int, seed: int = 0, **parameters: float) -> Tensor:
        position = torch.arange(n)
        if not slow(backend):
            return ops.sample(logits.expand(n, -1), seed=seed, position=position, **parameters)
        expected = expected_draws(logits, seed, position, **parameters)
        few = reference.draw_uniform(torch.full((n,), seed), position).argsort()
        few = few[torch.linspace(0, n - 1, 3).long()]
        drawn = ops.sample(logits.expand(3, -1), seed=seed, position=few, **parameters)
        assert torch.equal(drawn, expected[few])
        return expected

    return draw


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("V", [1, 2, 15, 17, 1009, 50257], ids=lambda V: f"V{V}")
def test_greedy_is_the_first_maximum(backend: str, V: int, dtype: torch.dtype) -> None:
    logits = torch.randn(3 if slow(backend) else 8, V).to(dtype)
    logits[0] = 0.0
    logits[1, V // 2 :] = logits[1].max() + 1
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    # In the interpreter, wide slices take less time.
    wide = {"split_tile": lambda: (16384, 1, 1)} if slow(backend) else {}
    with mock.patch.multiple(triton_sampling(), **wide) if wide else nullcontext():
        assert ops.sample(logits, temperature=0).tolist() == expected
        drawn = ops.sample(logits, temperature=0, top_k=3, top_p=0.1, min_p=0.9)
    assert drawn.tolist() == expected


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.parametrize(("V", "rows", "n"), [(50257, 8, 100), (1009, 40, 100)])
def test_same_tokens_as_the_reference(
    backend: str, V: int, rows: int, n: int, parameters: dict
) -> None:
    # This makes 38,400 draws per level.
    if backend == "reference":
        pytest.skip("is what the others are compared with")
    if slow(backend):
        rows, n = 1, 1 if V > 5000 else 3
    exceptions = 0
    for row in range(rows):
        logits = torch.randn(V) * (1 + row % 4)
        position = torch.arange(n) + 2**row
        drawn = ops.sample(logits.expand(n, V), seed=row, position=position, **parameters)
        exceptions += int((drawn != expected_draws(logits, row, position, **parameters)).sum())
    assert exceptions <= rows * n // 10_000, f"{exceptions} of {rows * n} draws differ"


def mixed_rows(V: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Return 24 rows of logits and parameters that differ from row to row."""
    B = 24
    return torch.randn(B, V).mul(2).to(dtype), {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(6),
        "top_k": torch.tensor([1, 2, V // 2 + 1, V, V + 7, 10**12]).repeat(4),
        "top_p": torch.tensor([1e-6, 0.3, 1.0]).repeat(8),
        "min_p": torch.tensor([0.0, 1.0, 0.2, 0.01, 0.0, 0.0, 0.5, 0.0]).repeat(3),
        "seed": torch.arange(B) * 7 - 50,
        "position": torch.arange(B) + 3,
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("V", [1, 2, 3, 15, 16, 17, 33, 63, 257, 513, 4099], ids=lambda V: f"V{V}")
def test_same_tokens_at_odd_sizes(backend: str, V: int, dtype: torch.dtype) -> None:
    # 16-bit logits have many ties.
    logits, parameters = mixed_rows(V, dtype)
    if slow(backend):
        some = slice(V % 5, None, 5)
        logits = logits[some]
        parameters = {name: value[some] for name, value in parameters.items()}
    drawn = ops.sample(logits, **parameters)
    with use_backend("reference"):
        assert torch.equal(drawn, ops.sample(logits, **parameters))


TIES = {
    "logits": st.lists(
        st.sampled_from([-torch.inf, -1e4, -1.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=70
    ),
    "temperature": st.sampled_from([0.0, 1e-3, 0.7, 1.0, 1e6]),
    "top_k": st.integers(1, 80),
    "top_p": st.floats(2**-10, 1.0, width=32),
    "min_p": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "seed": st.integers(-(2**63), 2**63 - 1),
}


def check_ties(B: int, logits: list[float], seed: int, **options: float) -> None:
    rows = torch.tensor([[0.0, *logits]]).expand(B, -1)
    drawn = ops.sample(rows, **options, seed=seed, position=torch.arange(B))
    with use_backend("reference"):
        assert torch.equal(drawn, ops.sample(rows, **options, seed=seed, position=torch.arange(B)))


@settings(max_examples=150, deadline=None)
@given(**TIES)
def test_same_tokens_with_ties(**drawn: object) -> None:
    check_ties(16, **drawn)


# The fixture sets the backend once for all examples, which is right.
@settings(
    max_examples=150 if GPU else 8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(**TIES)
def test_same_tokens_with_ties_in_triton(triton: str, **drawn: object) -> None:
    # With lists of 16 tokens, most rows are searched and drawn from in blocks, like long rows.
    with mock.patch.multiple(triton_sampling(), LIST_SIZE=16, tile=lambda V: (32, 2, 1)):
        check_ties(16 if GPU else 2, **drawn)


def triton_sampling() -> ModuleType:
    return importlib.import_module("gptfast.kernels.triton.sampling")


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 60, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_distribution(isa: str, parameters: dict) -> None:
    # The probabilities here come from a sort and a softmax in float64, not from the reference.
    V, n = 203, 50_000
    # The logits are evenly spread and shuffled, so that every limit keeps several.
    logits = torch.linspace(-6, 6, V)[torch.randperm(V, generator=torch_generator(3))]
    p = (logits.double() / parameters.get("temperature", 1.0)).softmax(-1)
    order = p.argsort(descending=True)
    kept = torch.zeros(V, dtype=torch.bool)
    kept[order[: parameters.get("top_k", V)]] = True
    p = p * kept / (p * kept).sum()
    before = p[order].cumsum(-1) - p[order]
    kept[order] &= before < parameters.get("top_p", 1.0)
    kept &= p >= parameters.get("min_p", 0.0) * p.max()
    p = p * kept / (p * kept).sum()

    drawn = ops.sample(logits.expand(n, V), seed=11, position=torch.arange(n), **parameters)
    counts = torch.bincount(drawn, minlength=V).double()
    assert not counts[~kept].any()
    rare = p * n < 5  # the chi-squared test needs rare tokens pooled
    observed = [*counts[~rare].tolist(), counts[rare].sum().item()]
    expected = [*(p[~rare] * n).tolist(), (p[rare] * n).sum().item()]
    if expected[-1] == 0:
        observed.pop(), expected.pop()
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("k", [1, 5, 31, 130, 600], ids=lambda k: f"k{k}")
def test_top_k_is_exact_and_ties_go_to_the_lowest_id(draws: Draws, k: int) -> None:
    # Shuffle ten levels of equal logits; the temperature is high, so every kept token turns up.
    V = 640
    logits = torch.randint(10, (V,)).float()
    order = torch.sort(logits, descending=True, stable=True).indices
    seen = draws(logits, 20_000 if k < 600 else 40_000, temperature=1e3, top_k=k).unique()
    assert seen.tolist() == sorted(order[:k].tolist())


@pytest.mark.parametrize("top_k", [64, 65, 10**9])
def test_top_k_of_all_is_off(draws: Draws, top_k: int) -> None:
    logits = torch.randn(64)
    assert torch.equal(draws(logits, 500, top_k=top_k), draws(logits, 500))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-60, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.89, 3), (0.91, 4), (1.0, 4)],
)
def test_top_p_is_the_smallest_set(draws: Draws, top_p: float, kept: int) -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    ranked = [1, 3, 2, 0]
    assert draws(p.log(), 2_000, top_p=top_p).unique().tolist() == sorted(ranked[:kept])


def test_top_p_is_renormalised_after_top_k(draws: Draws) -> None:
    # Of the first two, 0.4 and 0.3, the first alone has 0.57 of the mass.
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert draws(p.log(), 2_000, top_k=2, top_p=0.56).unique().tolist() == [1]
    assert draws(p.log(), 2_000, top_k=2, top_p=0.58).unique().tolist() == [1, 3]


def test_top_p_ties_go_to_the_lowest_id(draws: Draws) -> None:
    # 100 equal logits: a mass of 0.255 needs 26 of them.
    assert draws(torch.zeros(100), 4_000, top_p=0.255).unique().tolist() == list(range(26))


@pytest.mark.parametrize("below", [9.0, 12.0, 14.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_top_p_of_many_unlikely_tokens(isa: str, below: float, temperature: float) -> None:
    """All but one token are unlikely, and only together do they have some of the mass to keep."""
    logits = torch.full((20000,), -below * temperature)
    logits[777], position = 0.0, torch.arange(200)
    options = {"top_p": 0.99, "temperature": temperature}
    drawn = ops.sample(logits.expand(200, -1), seed=3, position=position, **options)
    assert torch.equal(drawn, expected_draws(logits, 3, position, **options))
    assert below > 13 or (drawn != 777).any()


@pytest.mark.parametrize(("min_p", "kept"), [(0.2, 4), (0.26, 3), (0.51, 2), (0.76, 1), (1.0, 1)])
def test_min_p_is_relative_to_the_largest(draws: Draws, min_p: float, kept: int) -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    ranked = [1, 3, 2, 0]
    assert draws(p.log(), 2_000, min_p=min_p).unique().tolist() == sorted(ranked[:kept])


def test_equal_logits_are_uniform(isa: str) -> None:
    drawn = ops.sample(torch.full((50_000, 50), 7.5), position=torch.arange(50_000))
    counts = torch.bincount(drawn, minlength=50)
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_minus_infinity_is_never_drawn(draws: Draws, parameters: dict) -> None:
    logits = torch.randn(300)
    logits[::2] = -torch.inf
    assert (draws(logits, 3_000, **parameters) % 2 == 1).all()
    only = torch.full((2, 300), -torch.inf)
    only[:, 299] = -5.0
    assert ops.sample(only, **parameters).tolist() == [299] * 2


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6, 3e38])
def test_extreme_temperatures(draws: Draws, temperature: float) -> None:
    logits = torch.tensor([-torch.inf, 1.0, 2.0, -3e38, 1.5])
    drawn = draws(logits, 3_000, temperature=temperature)
    expected = expected_draws(logits, 0, torch.arange(3_000), temperature=temperature)
    assert torch.equal(drawn, expected)
    assert (drawn == 2).all() if temperature < 1 else {1, 2, 4} <= set(drawn.tolist())
    assert not (drawn == 0).any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_do_not_depend_on_their_batch(backend: str, dtype: torch.dtype) -> None:
    B, V = 3 if slow(backend) else 12, 1009
    logits = torch.randn(B, V).mul(3).to(dtype)
    parameters = {
        "temperature": torch.rand(B) + 0.3,
        "top_k": torch.randint(1, 200, (B,)),
        "top_p": torch.rand(B).clamp(min=0.1),
        "min_p": torch.rand(B) * 0.05,
        "seed": torch.randint(2**60, (B,)),
        "position": torch.randint(2**40, (B,)),
    }
    together = ops.sample(logits, **parameters)
    for b in range(B):
        alone = {name: value[b].item() for name, value in parameters.items()}
        assert ops.sample(logits[b : b + 1], **alone).item() == together[b]
    torch.set_num_threads(1)
    assert torch.equal(ops.sample(logits, **parameters), together)


@pytest.mark.parametrize(
    "kind", ["transposed", "every other column", "rows of a wider matrix", "expanded", "padded"]
)
def test_layouts(backend: str, kind: str) -> None:
    B = 3 if slow(backend) else 9
    logits = {
        "transposed": torch.randn(333, B).T,
        "every other column": torch.randn(B, 666)[:, ::2],
        "rows of a wider matrix": torch.randn(B, 400)[:, 5:338],
        "expanded": torch.randn(1, 333).expand(B, -1),
        # The padding of a vocabulary may hold anything.
        "padded": torch.full((B, 344), torch.nan)[:, :333].copy_(torch.randn(B, 333)),
    }[kind]
    before = logits.clone()
    options = {"top_k": 20, "seed": 3, "position": torch.arange(B)}
    drawn = ops.sample(logits, **options)
    with use_backend("reference"):
        assert torch.equal(drawn, ops.sample(before.contiguous(), **options))
    assert torch.equal(logits, before)


def test_seed_and_position_matter(isa: str) -> None:
    def drawn(seed: int) -> Tensor:
        return ops.sample(torch.zeros(1000, 1000), seed=seed, position=torch.arange(1000))

    base = drawn(0)
    assert torch.equal(base, drawn(0))
    assert (base == drawn(1)).float().mean() < 0.02
    assert (base[1:] == base[:-1]).float().mean() < 0.02


def test_seeds_and_positions_have_64_bits(backend: str) -> None:
    seed = torch.tensor([0, 2**32, -1, 2**62 + 5, -(2**63)])
    position = torch.tensor([2**32 + 1, 1, 2**63 - 1, 2**40, 2**32])
    logits = torch.zeros(5, 4001)
    drawn = ops.sample(logits, seed=seed, position=position)
    with use_backend("reference"):
        assert torch.equal(drawn, ops.sample(logits, seed=seed, position=position))


TILES = [] if TRITON_MISSING else sorted({*sum(triton_sampling().TILES.values(), ())})
if not GPU:
    # The interpreter has no warps.
    TILES = list({tile[:2]: tile for tile in TILES}.values())


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(
    triton: str, tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    V = 5001
    monkeypatch.setattr(triton_sampling(), "tile", lambda V: tile)
    logits = torch.randn(5, V).mul(2).half()
    parameters = {
        "temperature": torch.tensor([0.0, 0.8, 1.0, 2.0, 1.0]),
        "top_k": torch.tensor([V, 50, 700, V, V - 1]),
        "top_p": torch.tensor([1.0, 0.9, 0.9, 0.5, 1.0]),
        "min_p": torch.tensor([0.0, 0.01, 0.0, 0.0, 0.001]),
    }
    drawn = ops.sample(logits, **parameters, seed=5)
    with use_backend("reference"):
        assert torch.equal(drawn, ops.sample(logits, **parameters, seed=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_misaligned_rows_keep_exactly_k(triton: str, dtype: torch.dtype) -> None:
    # With nearly equal weights, one token more or less would move the draws. V is odd, so each row
    # has another misalignment; all rows are searched in blocks.
    B, V = 4, 333
    logits = torch.randn(B, V).mul(0.01).to(dtype)
    options = {
        "top_k": torch.tensor([300, 200, 100, V]),
        "top_p": torch.tensor([1.0, 1.0, 0.5, 0.9]),
        "position": torch.arange(B),
    }
    with mock.patch.multiple(triton_sampling(), LIST_SIZE=32, tile=lambda V: (256, 1, 1)):
        drawn = ops.sample(logits, **options)
    with use_backend("reference"):
        assert torch.equal(drawn, ops.sample(logits, **options))


@pytest.mark.parametrize("small", [16, 256])
def test_a_gpu_reports_rows_by_minus_one(triton: str, small: int) -> None:
    V = 70
    kinds = [torch.nan, torch.inf]
    logits = torch.randn(11, V)
    for row, (bad, column) in enumerate((b, c) for b in kinds for c in (0, V // 2, V - 1)):
        logits[row, column] = bad
    logits[6] = -torch.inf
    logits[7] = torch.nan
    logits[8] = -torch.nan
    options = ops.sampling.per_row(
        len(logits),
        logits.device,
        temperature=0.9,
        top_k=40,
        top_p=0.8,
        min_p=0.01,
        seed=3,
        position=0,
    )
    with use_backend("reference"):
        good = ops.sample(logits[9:], **{name: value[9:] for name, value in options.items()})
    with mock.patch.multiple(triton_sampling(), LIST_SIZE=small, tile=lambda V: (32, 2, 1)):
        ids = triton_sampling().sample_fwd(logits, *options.values())
        assert ids.tolist() == [-1] * 9 + good.tolist()
        options["temperature"] = torch.zeros(11)
        ids = triton_sampling().sample_fwd(logits, *options.values())
        assert ids.tolist() == [-1] * 9 + logits[9:].argmax(-1).tolist()


@pytest.mark.parametrize("small", [16, 256])
def test_parameters_a_gpu_does_not_check(triton: str, small: int) -> None:
    # With any values, the kernel ends with an id of the row or -1.
    nan, inf, V = torch.nan, torch.inf, 40
    nonsense = {
        "temperature": [nan, -1.0, inf, -inf],
        "top_k": [0, -5, -(2**63), 2**63 - 1],
        "top_p": [nan, -1.0, 2.0],
        "min_p": [nan, -1.0, 2.0],
    }
    rows = [(name, value) for name, values in nonsense.items() for value in values]
    logits = torch.randn(len(rows), V)
    options = ops.sampling.per_row(
        len(logits),
        logits.device,
        temperature=1.0,
        top_k=30,
        top_p=0.8,
        min_p=0.01,
        seed=0,
        position=0,
    )
    for row, (name, value) in enumerate(rows):
        options[name][row] = value
    with mock.patch.multiple(triton_sampling(), LIST_SIZE=small, tile=lambda V: (64, 1, 1)):
        ids = triton_sampling().sample_fwd(logits, *options.values())
    assert ((ids >= -1) & (ids < V)).all()


def test_offsets_past_32_bits(triton: str) -> None:
    # There are 2^31 elements, but only those of three rows are touched.
    V, stride = 300, 2**30 + 3
    logits = torch.empty(2 * stride + V, dtype=torch.float16).as_strided((3, V), (stride, 1))
    logits.copy_(torch.randn(3, V))
    options = {"top_k": 20, "seed": 3, "position": torch.arange(3)}
    drawn = ops.sample(logits, **options)
    with use_backend("reference"):
        assert torch.equal(drawn, ops.sample(logits.clone(), **options))


def test_empty_batch(backend: str) -> None:
    assert ops.sample(torch.zeros(0, 5)).shape == (0,)


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"position": -1}, "position"),
        ({"seed": 0.5}, "seed"),
        ({"temperature": tensor(1, -1)}, "temperature"),
        ({"temperature": tensor(1, float("nan"))}, "temperature"),
        ({"top_k": tensor(1, 0, dtype=torch.int64)}, "top_k"),
        ({"top_k": tensor(1, 2)}, "top_k"),
        ({"top_p": tensor(0, 1)}, "top_p"),
        ({"top_p": tensor(1, 1.5)}, "top_p"),
        ({"min_p": tensor(0, 2)}, "min_p"),
        ({"position": tensor(0, -1, dtype=torch.int64)}, "position"),
        ({"temperature": tensor(1)}, "temperature"),
        ({"top_k": tensor(1, 1, 1, dtype=torch.int64)}, "top_k"),
        ({"top_p": torch.ones(2, 1)}, "top_p"),
        ({"seed": torch.zeros((), dtype=torch.int64)}, "seed"),
        ({"seed": torch.zeros(2, dtype=torch.int64, device="meta")}, "seed"),
    ],
    ids=lambda x: str(x).replace("\n", ""),
)
def test_bad_parameters(parameters: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ops.sample(torch.zeros(2, 5), **parameters)


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(5), torch.zeros(1, 2, 3), torch.zeros(2, 5).long(), torch.zeros(2, 0)],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)}",
)
def test_bad_logits_shape(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="logits must be"):
        ops.sample(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("V", [3, 64, 1009])
@pytest.mark.parametrize("bad", ["one NaN", "one inf", "all -inf", "all NaN"])
def test_rows_that_cannot_be_sampled(backend: str, bad: str, V: int, temperature: float) -> None:
    if slow(backend) and V != 64:
        pytest.skip("test_a_gpu_reports_rows_by_minus_one tries more")
    for column in {V // 2} if slow(backend) else {0, V // 2, V - 1}:
        logits = torch.randn(3, V)
        if bad.startswith("one"):
            logits[1, column] = float(bad.split()[1])
        else:
            logits[1] = float(bad.split()[1])
        if logits.is_cuda:  # a check would synchronise
            drawn = ops.sample(logits, temperature=temperature)
            assert drawn[1] == -1 and drawn[0] >= 0 and drawn[2] >= 0
            continue
        with pytest.raises(ValueError, match="row 1 has NaN"):
            ops.sample(logits, temperature=temperature)


def test_parameters_may_be_expanded_or_strided() -> None:
    logits = torch.randn(4, 101)
    seeds = torch.arange(8)[::2]
    drawn = ops.sample(logits, temperature=torch.tensor(0.7).expand(4), seed=seeds)
    assert torch.equal(drawn, ops.sample(logits, temperature=0.7, seed=seeds.contiguous()))
