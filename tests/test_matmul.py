"""Test the product of bf16 matrices at every level, through the operations that it serves."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import ENGINE_LEVELS, PRODUCTS, at_level
from helpers import tiny_config
from parity import cases_of, check, poisoned
from torch import Tensor

from gptfast import GPT, AdamW, ops, use_backend
from gptfast.kernels.reference.matmul import PASSES, tile_parts_product, tile_product
from gptfast.ops.backend import EXTENSION

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
LEVELS = [*ENGINE_LEVELS, *(EXTENSION.build_info()["isa_emulated"] if EXTENSION else [])]
TILES = [level for level in LEVELS if level.startswith("amx")]
BF16 = torch.bfloat16

# (N, C, outputs): at the borders of tiles, with one block of terms, several, and more than are
# packed at once.
SIZES = [(32, 32, 32), (33, 40, 50), (97, 300, 145), (64, 257, 96), (40, 2100, 33)]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with our own products at each level, also at those that are emulated."""
    EXTENSION.set_matmul_provider("gptfast")
    with at_level(request.param):
        yield request.param
    EXTENSION.set_matmul_provider(PRODUCTS)


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None):  # type: ignore[no-untyped-def]
    return ops.linear(x, weight, bias, residual=residual)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None):  # type: ignore[no-untyped-def]
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(level: str, size: tuple[int, int, int]) -> None:
    """The gradients are products with other operands transposed."""
    N, C, n_out = size

    def case() -> tuple[dict[str, Tensor], Tensor]:
        parts = {"x": bf16(N, C), "weight": bf16(n_out, C), "bias": bf16(n_out)}
        return {**parts, "residual": bf16(N, n_out)}, bf16(N, n_out)

    cases = [case() for _ in range(cases_of(n_out, at_least=1))]
    check(ours, plain, plain, *cases)


def test_more_columns_than_are_packed_at_once(level: str) -> None:
    x, weight = bf16(32, 1040), bf16(1100, 1040)
    with poisoned():
        y = ours(x, weight)
    exact = F.linear(x.double(), weight.double())
    # One rounding to bf16, and sums in fp32 whose terms have about exact's size together.
    assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-3).all()


STRIDED = {
    "transposed": lambda n, m: bf16(m, n).T,
    "every other": lambda n, m: bf16(n, 2 * m)[:, ::2],
    "every other row and column": lambda n, m: bf16(2 * n, 2 * m)[::2, ::2],
    "expanded row": lambda n, m: bf16(1, m).expand(n, m),
    "expanded column": lambda n, m: bf16(n, 1).expand(n, m),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_layouts(level: str, kind: str) -> None:
    """An operand's strides change no bit."""
    make = STRIDED[kind]
    x, weight, residual = make(50, 70), make(61, 70), make(50, 61)
    bias = bf16(1).expand(61)
    parts = x, weight, bias, residual
    assert torch.equal(ours(*parts), ours(*(part.contiguous() for part in parts)))


@pytest.mark.parametrize("size", [(33, 40, 50), (50, 770, 61)], ids=str)
@pytest.mark.parametrize("kind", STRIDED)
def test_fp32_weights_count_as_rounded_ones(
    level: str, kind: str, size: tuple[int, int, int]
) -> None:
    """Under autocast a product rounds its weight as it reads it, in whatever layout, to the bit."""
    N, C, n_out = size
    x, bias, dy = torch.randn(N, C), torch.randn(n_out), torch.randn(N, n_out)
    weight = STRIDED[kind](n_out, C).float() * (1 + 2.0**-9)
    if kind in ("transposed", "every other"):
        weight[3, 5], weight[7, 2], weight[8, 9] = torch.nan, torch.inf, 3.4e38
    rounded = [t.to(BF16) for t in (x, weight, bias)]
    assert not torch.equal(rounded[1].float().nan_to_num(), weight.nan_to_num())
    with torch.autocast("cpu", BF16):
        y = ours(x, weight, bias)
    assert torch.equal(y.nan_to_num(), ours(*rounded).nan_to_num())
    norm, stats, op = (None, None, 0.0), torch.empty(0, 2), torch.ops.gptfast.linear_bwd
    grads = op(dy, x, *norm, weight, bias, stats, True, True, BF16)
    low = op(dy.to(BF16), rounded[0], *norm, *rounded[1:], stats, True, True, None)
    for grad, other in zip((grads[0], *grads[3:]), (low[0], *low[3:]), strict=True):
        assert grad.dtype == torch.float32 and other.dtype == BF16
        assert torch.equal(grad.to(BF16).nan_to_num(), other.nan_to_num())


def operations() -> list[Tensor]:
    """Return a result of each product: forward, with a bias and a residual, and two gradients."""
    generator = torch.Generator().manual_seed(1)
    shapes = (131, 300), (97, 300), (97,), (131, 97)
    x, weight, bias, residual = (
        torch.randn(*shape, generator=generator).to(BF16) for shape in shapes
    )
    dy, stats = residual, torch.empty(0, 2)
    norm, needs = (None, None, 0.0), (True, True)
    backward = torch.ops.gptfast.linear_bwd(dy, x, *norm, weight, None, stats, *needs, None)
    return [ours(x, weight, bias, residual), backward[0], backward[3]]


def test_number_of_threads_changes_no_bit(level: str) -> None:
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append(operations())
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("level", TILES, indirect=True)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_add_in_their_order(level: str, size: tuple[int, int, int]) -> None:
    N, C, n_out = size
    x, weight = bf16(N, C), bf16(n_out, C)
    assert torch.equal(ours(x, weight), tile_product(x, weight.T).to(BF16))


@pytest.mark.parametrize("level", TILES, indirect=True)
def test_tiles_in_new_threads_after_a_fork_and_beside_onednn(level: str) -> None:
    """Each of them has, or makes, shapes of tiles that are not ours."""
    wanted = operations()
    torch.set_num_threads(2)
    found = []
    for _ in range(2):
        F.linear(bf16(64, 64), bf16(64, 64))
        found.append(operations())
    with ThreadPoolExecutor(1) as pool:
        found.append(pool.submit(operations).result())
    assert all(all(map(torch.equal, one, wanted)) for one in found)
    torch.set_num_threads(1)
    child = os.fork()
    if not child:
        os._exit(0 if all(map(torch.equal, operations(), wanted)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_nan_and_inf_stay_in_their_rows_and_columns(level: str) -> None:
    x, weight, bias = bf16(65, 70), bf16(49, 70), bf16(49)
    before = ours(x, weight, bias)
    x[64, 69], x[3, 0], weight[48, 2] = float("nan"), float("inf"), float("-inf")
    y, wanted = ours(x, weight, bias), F.linear(x.float(), weight.float(), bias.float())
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.isinf(), wanted.isinf())
    assert torch.equal(y.float()[wanted.isinf()], wanted[wanted.isinf()])
    assert torch.equal(y[wanted.isfinite()], before[wanted.isfinite()])


@pytest.mark.parametrize("size", [(0, 40, 33), (40, 1, 33), (40, 33, 1), (1, 40, 33)], ids=str)
def test_empty_and_small(level: str, size: tuple[int, int, int]) -> None:
    N, C, n_out = size
    x, weight, bias, residual = bf16(N, C), bf16(n_out, C), bf16(n_out), bf16(N, n_out)
    y = ours(x, weight, bias, residual)
    exact = plain(x.double(), weight.double(), bias.double(), residual.double())
    assert y.dtype == BF16 and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= 2.0**-6 * (1 + exact.abs())).all()


@pytest.fixture(params=PASSES)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with each of PyTorch's settings for fp32 products."""
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("level", TILES, indirect=True)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fp32_by_parts_is_the_reference(
    level: str, precision: str, size: tuple[int, int, int]
) -> None:
    N, C, n_out = size
    x, weight, bias = torch.randn(N, C), torch.randn(n_out, C), torch.randn(n_out)
    product = tile_parts_product(x, weight.T, precision)
    assert torch.equal(ours(x, weight), product)
    assert torch.equal(ours(x, weight, bias, product), product + bias + product)
    for dy in (torch.randn(N, n_out), torch.randn(n_out, N).T):
        dx, _, _, dweight, _ = torch.ops.gptfast.linear_bwd(
            dy, x, None, None, 0.0, weight, None, torch.empty(0, 2), True, True, None
        )
        assert torch.equal(dx, tile_parts_product(dy, weight, precision))
        assert torch.equal(dweight, tile_parts_product(dy.T, x, precision))


def mlp_of(x: Tensor, *layers: Tensor) -> Tensor:
    return ops.mlp(x, *layers)


def plain_mlp(x: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor, proj_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, fc, fc_bias), approximate="tanh"), proj, proj_bias)


@pytest.mark.parametrize("level", TILES, indirect=True)
def test_three_parts_keep_the_parity_of_fp32(level: str) -> None:
    x, target = torch.randn(70, 40), torch.randint(65, (70,))
    head = torch.randn(65, 40)
    linear = {"x": x, "weight": torch.randn(50, 40), "bias": torch.randn(50)}
    check(ours, plain, plain, ({**linear, "residual": torch.randn(70, 50)}, torch.randn(70, 50)))
    mlp = torch.randn(80, 40) / 6, torch.randn(80), torch.randn(40, 80) / 9, torch.randn(40)
    named = dict(zip(("x", "fc", "fc_bias", "proj", "proj_bias"), (x, *mlp), strict=True))
    check(mlp_of, plain_mlp, plain_mlp, (named, torch.randn(70, 40)))

    def losses(x: Tensor, head: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, head, target, reduction="none")

    def plain_losses(x: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy(x @ head.T, target, reduction="none")

    check(losses, plain_losses, plain_losses, ({"x": x, "head": head}, torch.randn(70)))


# Of |a| |b|: three products of 2^-18, or the rounding of both factors to bf16. Sums round in fp32.
LEFT_OUT = {"highest": 0.0, "high": 3 * 2.0**-18, "medium": 2.0**-8 + 2.0**-18}
ROUNDING = 2.0**-21


def test_fp32_products_are_as_exact_as_asked_for(level: str, precision: str) -> None:
    x, weight = torch.randn(70, 300), torch.randn(50, 300)
    exact = F.linear(x.double(), weight.double())
    sizes = F.linear(x.double().abs(), weight.double().abs())
    error = ((ours(x, weight).double() - exact).abs() / sizes).max()
    assert error <= LEFT_OUT[precision] + ROUNDING
    if level in TILES:
        assert error >= LEFT_OUT[precision] / 2**6  # no time is spent on more than was asked for


@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_fp32_products_where_bf16_is_not_faster(level: str, precision: str) -> None:
    """On such CPUs every setting gives the bits of the highest one."""
    if level in (*TILES, "avx512_bf16"):
        pytest.skip("bf16 is faster here")
    found = fp32_operations()
    torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, found, fp32_operations()))


def test_the_librarys_fp32_products_stay_fp32(precision: str) -> None:
    """PyTorch's own ones would be bf16 with "medium", and slower where the CPU lacks bf16."""
    EXTENSION.set_matmul_provider("library")
    try:
        found = fp32_operations()
    finally:
        EXTENSION.set_matmul_provider(PRODUCTS)
    x, weight, bias, residual = (t.double() for t in fp32_tensors())
    wanted = [plain(x, weight, bias), plain(x, weight, bias, residual)]
    wanted += [plain(x[:, ::2], weight[:, ::2]), plain(x[:1].expand(70, 40), weight)]
    wanted += [plain(x[:, :1], weight[:, :1])]
    wanted += [residual @ weight, residual.T @ x]
    for one, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, exact.float(), rtol=0, atol=2e-5)


def fp32_tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = (70, 40), (50, 40), (50,), (70, 50)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def fp32_operations() -> list[Tensor]:
    """Return results of products with each kind of operands: apart, expanded, transposed."""
    x, weight, bias, residual = fp32_tensors()
    backward = torch.ops.gptfast.linear_bwd(
        residual, x, None, None, 0.0, weight, None, torch.empty(0, 2), True, True, None
    )
    found = [ours(x, weight, bias), ours(x, weight, bias, residual)]
    found += [ours(x[:, ::2], weight[:, ::2]), ours(x[:1].expand(70, 40), weight)]
    column = x[:, 0].contiguous().as_strided((70, 1), (1, 7))  # PyTorch calls it contiguous
    found += [ours(column, weight[:, :1])]
    return [*found, backward[0], backward[3]]


@pytest.mark.parametrize("level", TILES, indirect=True)
@pytest.mark.parametrize("exponent", [-100, -50, 30])
def test_a_power_of_two_changes_no_other_bit(level: str, precision: str, exponent: int) -> None:
    """Below 2^-100, the parts of unscaled numbers would underflow."""
    x, weight = torch.randn(40, 70), torch.randn(50, 70)
    scaled = ours(x * 2.0**exponent, weight)
    assert torch.equal(scaled, ours(x, weight) * 2.0**exponent)
    assert torch.equal(ours(weight, x * 2.0**exponent), ours(weight, x) * 2.0**exponent)


@pytest.mark.parametrize("level", TILES, indirect=True)
@pytest.mark.parametrize("exponents", [(-135, 100), (100, -20), (125, -125), (60, 60)], ids=str)
def test_very_small_and_very_large_numbers(level: str, exponents: tuple[int, int]) -> None:
    a, b = exponents
    x, weight = torch.randn(40, 70) * 2.0**a, torch.randn(50, 70) * 2.0**b
    y, exact = ours(x, weight), F.linear(x.double(), weight.double())
    plain_error = (F.linear(x, weight).double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 2 * plain_error


@pytest.mark.parametrize("level", TILES, indirect=True)
def test_fp32_numbers_without_parts(level: str, precision: str) -> None:
    """Inf, NaN and the largest numbers, which round up to inf, give what fp32 products give."""
    x, weight, bias = torch.randn(70, 70), torch.randn(49, 70), torch.randn(49)
    x[64, 69], x[3, 0], weight[48, 2] = float("nan"), float("inf"), float("-inf")
    x[5, 7], weight[:, 7] = torch.finfo(torch.float32).max, 2.0**-100
    weight[11, 0] = 0.0
    y, wanted = ours(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.isinf(), wanted.isinf())
    assert torch.equal(y[wanted.isinf()], wanted[wanted.isinf()])
    finite = wanted.isfinite()
    torch.testing.assert_close(y[finite], wanted[finite], rtol=0, atol=0.2)
    torch.testing.assert_close(y[5], wanted[5], rtol=1e-5, atol=0)


@pytest.mark.parametrize("level", TILES, indirect=True)
def test_a_number_without_parts_changes_only_its_row_or_column(level: str, precision: str) -> None:
    x, weight = torch.randn(40, 70), torch.randn(50, 70)
    before = ours(x, weight)
    x[3, 5], weight[20, 9] = 3e38, -3e38
    y, exact = ours(x, weight), F.linear(x.double(), weight.double())
    others = torch.ones_like(y, dtype=torch.bool)
    others[3], others[:, 20] = False, False
    assert torch.equal(y[others], before[others])
    torch.testing.assert_close(y[~others], exact[~others].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("level", TILES[:1], indirect=True)
@pytest.mark.parametrize(("setting", "smallest"), [("highest", 256), ("high", 64), ("medium", 32)])
def test_small_products_are_not_by_parts(level: str, setting: str, smallest: int) -> None:
    """By itself, the choice between parts and fp32 depends on the sizes."""

    def is_by_parts(n: int) -> bool:
        x, weight = torch.randn(n, 256), torch.randn(256, 256)
        return torch.equal(ours(x, weight), tile_parts_product(x, weight.T, setting))

    EXTENSION.set_matmul_provider("")
    torch.set_float32_matmul_precision(setting)
    found = is_by_parts(smallest - 1), is_by_parts(smallest)
    torch.set_float32_matmul_precision("highest")
    assert found == (False, True)


@pytest.mark.parametrize("level", TILES, indirect=True)
def test_fp32_by_parts_on_any_number_of_threads(level: str) -> None:
    x, weight = torch.randn(131, 300), torch.randn(97, 300)
    x[100, 7] = float("inf")
    found = []
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        found.append(ours(x, weight))
    assert all(torch.equal(found[0], y) for y in found[1:])


def test_the_reference_multiplies_by_parts(precision: str) -> None:
    """The sums of its fp32 products are in another order than the matrix engine's."""
    x, weight, bias = torch.randn(40, 70), torch.randn(50, 70), torch.randn(50)
    with use_backend("reference"):
        y = ours(x, weight, bias)
    parts = tile_parts_product(x, weight.T, precision) + bias
    torch.testing.assert_close(y, parts, rtol=0, atol=2e-5)
    in_fp32 = F.linear(x.double(), weight.double(), bias.double())
    assert ((y.double() - in_fp32).abs().max() <= 2e-5) == (precision == "highest")


@pytest.mark.parametrize("level", TILES[:1], indirect=True)
def test_a_gpt_learns_the_same_with_two_parts(level: str) -> None:
    def losses(precision: str) -> list[float]:
        torch.set_float32_matmul_precision(precision)
        torch.manual_seed(1)
        model = GPT(tiny_config(n_embd=32, vocab_size=33))
        optimizer = AdamW(model.parameters(), lr=3e-3)
        found = []
        for step in range(30):
            idx = (torch.arange(34) * (1 + step % 2) % 33).view(2, 17)
            loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        torch.set_float32_matmul_precision("highest")
        return found

    high = losses("high")
    EXTENSION.set_isa(ENGINE_LEVELS[-1])
    EXTENSION.set_matmul_provider("library")
    fp32 = losses("highest")
    assert fp32[-1] < fp32[0] - 1
    assert high != fp32
    assert high == pytest.approx(fp32, abs=1e-4)
