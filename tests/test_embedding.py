"""Test the token embedding: parity, uses of the head's gradient, compilation, ids out of range."""

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, check, poisoned
from seeds import shifted
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptfast import ops, use_backend
from gptfast.kernels.reference import embedding as reference

gptfast_ops = torch.ops.gptfast
Embed = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def plain(idx: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return F.embedding(idx, weight), weight


def defined(idx: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return reference.embedding_fwd(weight, idx), weight


def tied(embed: Embed, idx: Tensor, weight: Tensor) -> Tensor:
    """Return every row of x, then every row of the head; nothing else holds the head's gradient."""
    x, head = embed(idx, weight)
    return torch.cat([x.flatten(0, -2), head * 1.0])


def check_embedding(idx: Tensor, V: int, C: int, dtype: torch.dtype) -> None:
    # One gradient is of order one, the other is expanded.
    douts = [torch.randn(idx.numel() + V, C), None]
    weights = [{"weight": torch.randn(V, C).to(dtype)} for _ in douts]
    check(
        lambda w: tied(ops.embedding, idx, w),
        lambda w: tied(defined, idx, w),
        lambda w: tied(plain, idx, w),
        *zip(weights, douts, strict=True),
    )


# (shape of idx, V, C): the sizes need every tile of the Triton kernels, runs over none, one and
# many of their segments, and more columns than a block.
SIZES = [
    ((1,), 1, 1),
    ((2, 3), 5, 3),
    ((130,), 11, 40),
    ((2, 70), 2, 100),
    ((31,), 7, 257),
    ((1, 2, 4), 1009, 64),
    ((300,), 1, 16),
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("shape", "V", "C"), SIZES, ids=str)
def test_parity(backend: str, shape: tuple, V: int, C: int, dtype: torch.dtype) -> None:
    check_embedding(torch.randint(V, shape), V, C, dtype)


def bwd(dweight: Tensor, dx: Tensor, idx: Tensor) -> Tensor:
    dweight = dweight.clone()
    gptfast_ops.embedding_bwd(dweight, dx, idx)
    return dweight


def test_runs_at_the_edges_of_segments(triton: str) -> None:
    kernels = importlib.import_module("gptfast.kernels.triton.embedding")
    assert kernels.SEGMENT == 128
    for lengths in ([128, 1, 127], [127, 130], [1, 255, 1], [100, 28, 257]):
        idx = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        # Small integers add up exactly, so a row that is lost or counted twice shows.
        dx, dweight = torch.randint(-4, 5, (len(idx), 5)).float(), torch.ones(len(lengths) + 1, 5)
        with poisoned():
            out = bwd(dweight, dx, idx)
        assert torch.equal(out, dweight.index_add(0, idx, dx)), lengths


def test_rows_without_a_token_keep_their_bits(backend: str) -> None:
    idx, dweight = torch.tensor([[3, 5, 3]]), torch.randn(9, 40)
    dweight[4] = torch.nan
    out = bwd(dweight, torch.randn(1, 3, 40), idx)
    rest = [0, 1, 2, 4, 6, 7, 8]
    assert torch.equal(out[rest].view(torch.int32), dweight[rest].view(torch.int32))
    assert (out[[3, 5]] != dweight[[3, 5]]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_many_equal_tokens_are_summed_in_fp32(backend: str, dtype: torch.dtype) -> None:
    dx = torch.rand(800, 24).to(dtype)
    out = bwd(torch.ones(3, 24, dtype=dtype), dx, torch.ones(800, dtype=torch.int64))
    exact = 1 + dx.double().sum(0)
    # The error is one rounding to nearest, and 800 roundings in fp32.
    assert ((out[1].double() - exact) / exact).abs().max() < torch.finfo(dtype).eps * 0.51
    assert torch.equal(out[[0, 2]], torch.ones(2, 24, dtype=dtype))


def test_same_bits_with_any_number_of_threads(isa: str) -> None:
    idx, dx = torch.randint(50, (700,)), torch.randn(700, 300)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(bwd(torch.zeros(50, 300), dx, idx))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_same_bits_twice(triton: str) -> None:
    idx, dx = torch.randint(3, (300,)), torch.randn(300, 70)
    assert torch.equal(bwd(torch.zeros(3, 70), dx, idx), bwd(torch.zeros(3, 70), dx, idx))


@pytest.mark.parametrize("kind", ["expanded", "transposed", "every other row"])
def test_layouts_of_dx_and_idx(backend: str, kind: str) -> None:
    dx = {
        "expanded": torch.randn(()).expand(4, 6, 8),
        "transposed": torch.randn(8, 6, 4).transpose(0, 2),
        "every other row": torch.randn(8, 6, 8)[::2],
    }[kind]
    idx, dweight = torch.randint(5, (6, 4)).T, torch.randn(5, 8)
    expected = dweight.index_add(0, idx.flatten(), dx.flatten(0, 1))
    torch.testing.assert_close(bwd(dweight, dx, idx), expected)


def check_past_int32() -> None:
    # The tensor has 4 GB, but only the pages that are written ever exist.
    V, C = 2**21 + 3, 1024
    weight, last = torch.empty(V, C, dtype=torch.float16), torch.tensor([V - 1, V - 1])
    weight[-1] = 1
    gptfast_ops.embedding_bwd(weight, torch.ones(2, C, dtype=torch.float16), last)
    assert (weight[-1] == 3).all()
    assert (gptfast_ops.embedding_fwd(weight, last) == 3).all()


def test_past_int32(isa: str) -> None:
    check_past_int32()


def test_past_int32_triton(triton: str) -> None:
    check_past_int32()


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_ids_out_of_range(backend: str, bad: int) -> None:
    idx, weight = torch.tensor([1, bad, 4]), torch.randn(5, 4)
    if idx.is_cuda:
        out = ops.embedding(idx, weight)[0]
        assert out[1].isnan().all() and torch.equal(out[[0, 2]], weight[[1, 4]])
        return
    with pytest.raises(IndexError, match=rf"\[0, 5\), got .*{bad}"):
        ops.embedding(idx, weight)
    with pytest.raises(IndexError, match=rf"\[0, 5\), got .*{bad}"):
        bwd(weight, torch.randn(3, 4), idx)


def test_ids_out_of_range_write_nothing(triton: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of ids, as on a GPU, ids out of range give NaN and write nothing."""
    kernels = importlib.import_module("gptfast.kernels.triton.embedding")
    monkeypatch.setattr(kernels, "check_ids", lambda idx, V: None)
    idx = torch.cat([torch.tensor([4, -1, 5, 2**40, -(2**40), 1]), torch.full((300,), 7)])
    weight = torch.randn(5, 4)
    x = gptfast_ops.embedding_fwd(weight, idx)
    assert torch.equal(x[[0, 5]], weight[[4, 1]])
    assert x[1:5].isnan().all() and x[6:].isnan().all()
    guarded = torch.zeros(5 + 2 * 4, 4)
    gptfast_ops.embedding_bwd(guarded[4:9], torch.ones(len(idx), 4), idx)
    assert guarded.nonzero()[:, 0].unique().tolist() == [5, 8]


IDX = torch.tensor([[3, 1, 3], [0, 3, 11]])
TARGET = torch.tensor([1, 4, -100, 3, 0, 3])


def loss_of(x: Tensor, head: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x.sin().flatten(0, 1), head, TARGET)


def test_the_gradient_is_the_heads_own_buffer() -> None:
    """The op adds to the head's gradient in place, without a second (V, C) buffer."""
    for use in (
        loss_of,
        lambda x, head: 2 * loss_of(x, head),
        lambda x, head: x.sum() + (x @ head.square().T).sum(),
        lambda x, head: loss_of(x, head) + loss_of(x.cos(), head),
    ):
        weight, seen = torch.randn(12, 8, requires_grad=True), []
        x, head = ops.embedding(IDX, weight)
        assert head.data_ptr() == weight.data_ptr()
        head.register_hook(lambda dhead, seen=seen: seen.append(dhead.data_ptr()))
        use(x, head).backward()
        assert seen == [weight.grad.data_ptr()]


def keep_in_hook(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    kept = []
    head.register_hook(kept.append)
    (x.sin().sum() + head.sin().sum()).backward()
    return kept


def keep_view_in_hook(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    kept = []
    head.register_hook(lambda dhead: kept.append(dhead[2:].detach()))
    (x.sin().sum() + head.sin().sum()).backward()
    return kept


def keep_array_in_hook(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    kept = []
    head.register_hook(lambda dhead: kept.append(dhead.numpy()))
    (x.sin().sum() + head.sin().sum()).backward()
    return [torch.from_numpy(kept[0])]


def keep_storage_in_hook(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    kept = []
    head.register_hook(lambda dhead: kept.append(dhead.untyped_storage()))
    (x.sin().sum() + head.sin().sum()).backward()
    return [torch.tensor([], dtype=head.dtype).set_(kept[0])]


def change_in_hook(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    head.register_hook(lambda dhead: dhead * 3)
    (x.sin().sum() + head.sin().sum()).backward()
    return []


def retain_grad(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    # With F.embedding, the head is a leaf whose .grad is the whole gradient: view it as a non-leaf.
    middle = head if head is not weight else weight.view_as(weight)
    middle.retain_grad()
    (x.sin().sum() + middle.sin().sum()).backward()
    return [middle.grad]


def grad_of_both(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    middle = head if head is not weight else weight.view_as(weight)
    grads = torch.autograd.grad(x.sin().sum() + middle.sin().sum(), [middle, weight])
    weight.grad = grads[1]
    return [grads[0]]


def given_gradient(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    dhead = torch.ones(12, 8)
    torch.autograd.backward([x, head.view_as(head)], [torch.ones(2, 3, 8), dhead])
    return [dhead]


def anomaly(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    with torch.autograd.detect_anomaly(check_nan=True):
        (x.sin().sum() + head.sin().sum()).backward()
    return []


def twice(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    loss = loss_of(x, head)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    return [first]


def expanded(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    (x.sin().sum() + head.sum()).backward()
    return []


def transposed(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    (x.sin().sum() + (head.T.contiguous() * torch.randn(8, 12)).sum()).backward()
    return []


def logits(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    F.linear(x, head).sin().sum().backward()
    return []


def only_x(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    x.sin().sum().backward()
    return []


def only_head(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    head.sin().sum().backward()
    return []


def weight_too(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    (loss_of(x, head) + weight.sin().sum()).backward()
    return []


def checkpointed(x: Tensor, head: Tensor, weight: Tensor) -> list[Tensor]:
    for reentrant in (False, True):
        checkpoint(loss_of, x, head, use_reentrant=reentrant).backward(retain_graph=True)
    return []


USES = [
    keep_in_hook,
    keep_view_in_hook,
    keep_array_in_hook,
    keep_storage_in_hook,
    change_in_hook,
    retain_grad,
    grad_of_both,
    given_gradient,
    anomaly,
    twice,
    expanded,
    transposed,
    logits,
    only_x,
    only_head,
    weight_too,
    checkpointed,
]


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_equals_autograds_own(use: Callable) -> None:
    """The gradient equals autograd's, and so do copies of the head's gradient that others kept."""
    results = []
    for embed in (plain, ops.embedding):
        torch.manual_seed(shifted(1))
        weight = torch.randn(12, 8, requires_grad=True)
        x, head = embed(IDX, weight)
        if embed is plain and use.__name__.endswith("in_hook"):
            head = head.view_as(head)
        kept = use(x, head, weight)
        results.append([weight.grad, *kept])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_node_that_waits_for_the_same_gradient() -> None:
    # Addition passes one tensor to both; `delta` is older than the embedding, so it is read later.
    results = []
    for embed in (plain, ops.embedding):
        torch.manual_seed(shifted(1))
        weight, a = torch.randn(12, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
        delta = a.sin()
        x, head = embed(IDX, weight)
        loss_of(x, head + delta).backward()
        results.append((weight.grad, a.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_accumulate_over_batches() -> None:
    grads = []
    for embed in (plain, ops.embedding):
        torch.manual_seed(shifted(1))
        weight = torch.randn(12, 8, requires_grad=True)
        for shift in range(3):
            loss_of(*embed((IDX + shift) % 12, weight)).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


def test_differentiated_twice() -> None:
    weight = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    for use in (lambda x, head: x.sin().sum() + head.sin().sum(), lambda x, head: x.sin().sum()):
        assert torch.autograd.gradgradcheck(lambda w, u=use: u(*ops.embedding(IDX, w)), weight)


def test_nothing_to_differentiate() -> None:
    frozen, weight = torch.randn(12, 8), torch.randn(12, 8, requires_grad=True)
    x, head = ops.embedding(IDX, frozen)
    assert head is frozen and not x.requires_grad and torch.equal(x, frozen[IDX])
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            x, head = ops.embedding(IDX, weight)
            assert head is weight and not x.requires_grad and torch.equal(x, weight[IDX])


def test_autocast() -> None:
    weight = torch.randn(12, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        x, head = ops.embedding(IDX, weight)
        loss = F.linear(x, head).float().sin().sum() + loss_of(x, head)
    loss.backward()
    assert x.dtype == head.dtype == weight.grad.dtype == torch.float32
    fp32, weight.grad = weight.grad, None
    x, head = ops.embedding(IDX, weight)
    (F.linear(x, head).sin().sum() + loss_of(x, head)).backward()
    assert F.cosine_similarity(fp32.flatten(), weight.grad.flatten(), dim=0) > 0.999


def test_no_tokens() -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    x, head = ops.embedding(torch.zeros(2, 0, dtype=torch.int64), weight)
    assert x.shape == (2, 0, 4)
    (x.sum() + head.sin().sum()).backward()
    torch.testing.assert_close(weight.grad, weight.detach().cos())


def test_float64_is_served_by_the_reference(isa: str) -> None:
    weight = torch.randn(12, 8, dtype=torch.float64)
    dx = torch.randn(2, 3, 8, dtype=torch.float64)
    ours = ops.embedding(IDX, weight)[0], bwd(weight, dx, IDX)
    with use_backend("reference"):
        assert torch.equal(ours[0], ops.embedding(IDX, weight)[0])
        assert torch.equal(ours[1], bwd(weight, dx, IDX))


def test_compiled_where_the_head_leaves_the_graph() -> None:
    # The head's gradient is an input of the compiled backward, and here other code uses it too.
    torch._dynamo.reset()
    compiled = torch.compile(ops.embedding, fullgraph=True, backend="aot_eager")
    results = []
    for embed in (plain, compiled):
        torch.manual_seed(shifted(1))
        weight, kept = torch.randn(12, 8, requires_grad=True), []
        x, head = embed(IDX, weight)
        head = head.view_as(head) if embed is plain else head
        head.register_hook(kept.append)
        loss_of(x, head).backward()
        results.append((weight.grad, *kept))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("idx", "weight", "message"),
    [
        (IDX, torch.zeros(3), r"\(V, C\) floating.*\(3,\)"),
        (IDX, torch.zeros(0, 3), r"V >= 1.*\(0, 3\)"),
        (IDX, torch.zeros(12, 3, dtype=torch.int64), "int64"),
        (IDX.int(), torch.zeros(12, 3), "idx must be int64, got torch.int32"),
        (IDX, torch.zeros(12, 3, device="meta"), "idx is on cpu, weight on meta"),
    ],
    ids=["one-dimension", "no-token", "integers", "int32-ids", "devices"],
)
def test_bad_arguments(idx: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.embedding(idx, weight)


@pytest.mark.parametrize(
    ("dweight", "dx"),
    [
        (torch.zeros(3, 12).T, torch.zeros(2, 3, 3)),
        (torch.zeros(12, 3), torch.zeros(2, 3, 4)),
        (torch.zeros(12, 3), torch.zeros(6, 3)),
        (torch.zeros(12, 3), torch.zeros(2, 3, 3, dtype=torch.bfloat16)),
    ],
    ids=["not-contiguous", "width", "rows", "dtype"],
)
def test_the_kernel_refuses_what_does_not_fit(cpp: None, dweight: Tensor, dx: Tensor) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        gptfast_ops.embedding_bwd(dweight, dx, IDX)


def test_compiled_backward_is_the_kernels() -> None:
    # torch.compile reads the Python of the backward, where the reference serves other derivatives.
    torch._dynamo.reset()
    weight = torch.randn(12, 8).bfloat16().requires_grad_()
    results = []
    for embed in (ops.embedding, torch.compile(ops.embedding, fullgraph=True, backend="aot_eager")):
        weight.grad = None
        x, head = embed(IDX, weight)
        loss_of(x.float(), head.float()).backward()
        results.append(weight.grad)
    assert torch.equal(*results)
