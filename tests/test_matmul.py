"""Test the product of bf16 matrices at every level, through the operations that it serves."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import ENGINE_LEVELS, PRODUCTS, _at_level
from parity import cases_of, check, poisoned
from torch import Tensor

from gptfast import ops
from gptfast.kernels.reference.matmul import tile_product
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
    yield from _at_level(request.param)
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


def operations() -> list[Tensor]:
    """Return a result of each product: forward, with a bias and a residual, and two gradients."""
    generator = torch.Generator().manual_seed(1)
    shapes = (131, 300), (97, 300), (97,), (131, 97)
    x, weight, bias, residual = (
        torch.randn(*shape, generator=generator).to(BF16) for shape in shapes
    )
    dy, stats = residual, torch.empty(0, 2)
    backward = torch.ops.gptfast.linear_bwd(dy, x, None, None, 0.0, weight, None, stats, True, True)
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
