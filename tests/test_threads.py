"""Results have the same bits with any number of threads, in several callers, and after a fork."""

import multiprocessing
import multiprocessing.connection
import threading
from collections.abc import Callable

import pytest
import torch
from conftest import PRODUCTS
from seeds import torch_generator
from torch import Tensor

from gptfast import AdamW, ops, use_backend
from gptfast.ops.backend import EXTENSION

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch_generator(seed))


def with_gradients(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = f(*leaves)
    out.backward(randn(*out.shape, seed=9))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def attention() -> list[Tensor]:
    q, k, v = (randn(2, 3, 133, 40, seed=i) for i in range(3))
    return with_gradients(lambda q, k, v: ops.attention(q, k, v, dropout_p=0.1, seed=3), q, k, v)


def attention_decode() -> list[Tensor]:
    q, k, v = (randn(3, 5, n, 64, seed=n) for n in (1, 301, 302))
    return [ops.attention(q, k, v[:, :, :301], kv_len=torch.tensor([301, 5, 77]))]


def attention_qkv() -> list[Tensor]:
    return with_gradients(lambda x: ops.attention_qkv(x, 3), randn(2, 200, 3 * 48))


def cross_entropy() -> list[Tensor]:
    target = torch.arange(37) * 20
    return with_gradients(lambda x: ops.cross_entropy(x, target), randn(37, 1009))


def linear_cross_entropy() -> list[Tensor]:
    target = torch.arange(37) * 20
    return with_gradients(
        lambda x, w: ops.linear_cross_entropy(x, w, target), randn(37, 48), randn(1009, 48, seed=1)
    )


def linear() -> list[Tensor]:
    norm = 1 + randn(100, seed=3), randn(100, seed=4)
    return with_gradients(
        lambda x, w, b, g, c: ops.linear(x, w, b, norm=(g, c, 1e-5)),
        *(randn(150, 100), randn(131, 100, seed=1), randn(131, seed=2), *norm),
    )


def mlp() -> list[Tensor]:
    layers = randn(210, 50, seed=1), randn(210, seed=2), randn(50, 210, seed=3), randn(50, seed=4)
    return with_gradients(lambda x, *rest: ops.mlp(x, *rest, residual=True), randn(90, 50), *layers)


def embedding() -> list[Tensor]:
    idx = torch.arange(600) ** 2 % 91
    return with_gradients(lambda w: ops.embedding(idx, w)[0], randn(100, 70))


def adamw() -> list[Tensor]:
    params = [randn(70_001, seed=1).requires_grad_(), randn(33, 50, seed=2).requires_grad_()]
    optimizer = AdamW(params, lr=1e-2, max_norm=0.5)
    for step in range(3):
        for p in params:
            p.grad = randn(*p.shape, seed=step)
        optimizer.step()
    return [*(p.detach() for p in params), optimizer.grad_norm]


def sample() -> list[Tensor]:
    rows = randn(9, 5003)
    kinds = [{}, {"top_k": 40}, {"top_p": 0.9}, {"temperature": 0.0}]
    return [ops.sample(rows, seed=5, position=torch.arange(9), **kind) for kind in kinds]


OPERATIONS = {
    f.__name__: f
    for f in (
        *(attention, attention_decode, attention_qkv, cross_entropy, linear_cross_entropy),
        *(linear, mlp, embedding, adamw, sample),
    )
}
# The library computes these products, and it does not promise the same bits.
WITH_PRODUCTS = ("linear_cross_entropy", "linear", "mlp")


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def our_products() -> None:
    EXTENSION.set_matmul_provider("gptfast")
    yield
    EXTENSION.set_matmul_provider(PRODUCTS)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.usefixtures("our_products")
def test_number_of_threads_changes_no_bit(name: str, isa: str) -> None:
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(OPERATIONS[name]())
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_number_of_threads_with_the_librarys_products(name: str) -> None:
    """Results differ only by the rounding of sums, whose order in MKL may depend on the threads."""
    EXTENSION.set_matmul_provider("library")
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append(OPERATIONS[name]())
    EXTENSION.set_matmul_provider(PRODUCTS)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * a.abs().max().item())


@pytest.mark.usefixtures("our_products")
def test_eight_threads_agree_with_one() -> None:
    expected = {name: f() for name, f in OPERATIONS.items()}
    names = list(OPERATIONS)
    wrong: list[str] = []
    start = threading.Barrier(8)

    def work(first: int) -> None:
        start.wait()
        for i in range(3 * len(names)):
            name = names[(first + i) % len(names)]
            try:
                assert_same(OPERATIONS[name](), expected[name])
            except Exception as error:
                wrong.append(f"{name}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_use_backend_is_one_threads() -> None:
    seen = []

    def other() -> None:
        seen.append(attention())

    expected = attention()
    with use_backend("reference"):
        inside = attention()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert_same(seen[0], expected)
    assert not all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


def _in_child(name: str, end: multiprocessing.connection.Connection) -> None:
    # Send numbers, because a tensor would go through a file of shared memory.
    end.send([t.tolist() for t in OPERATIONS[name]()] + [torch.get_num_threads()])


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("our_products")
def test_a_fork_after_a_parallel_region(name: str) -> None:
    """The child does not wait for threads that it lacks, and computes the same."""
    torch.set_num_threads(2)
    large = torch.ones(512, 512)
    (large @ large).exp()  # starts PyTorch's and MKL's parallel regions too
    expected = OPERATIONS[name]()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_child, args=(name, there))
    child.start()
    answered = here.poll(300)
    results = here.recv() if answered else None
    child.kill()
    child.join()
    assert answered, "the child hangs"
    *numbers, threads = results
    assert threads == 1
    in_child = [torch.tensor(x, dtype=t.dtype) for x, t in zip(numbers, expected, strict=True)]
    assert_same(in_child, expected)
    assert torch.get_num_threads() == 2
