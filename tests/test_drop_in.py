"""gptfast inside transformers' GPT2LMHeadModel gives the same logits, losses, gradients, texts and
files, works in a real run of transformers' Trainer, and can be removed without a trace."""

import copy
import dataclasses
import filecmp
import gc
import inspect
import io
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    random_ids,
)
from parity import assert_parity
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers")

from seeds import shifted  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model  # noqa: E402
from transformers.modeling_outputs import CausalLMOutput  # noqa: E402

import gptfast  # noqa: E402
from gptfast import accelerate, deferred, drop_in, ops, restore  # noqa: E402

V, T = 211, 33


def make(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(shifted(seed))
    sizes = {"vocab_size": V, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 3}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(
        **{**sizes, **drops, "bos_token_id": 0, "eos_token_id": None, "initializer_range": 0.2}
        | changes
    )
    return GPT2LMHeadModel(config).eval()


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return ids and labels; some labels are ignored."""
    ids = random_ids(2, T, vocab_size=V, seed=seed)
    labels = ids.clone()
    labels[0, :9] = -100
    return ids, labels


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the calls of gptfast's operations."""
    counts = {"attention": 0, "linear_cross_entropy": 0}

    def counting(name: str) -> Callable[..., Tensor]:
        op = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            counts[name] += 1
            return op(*args, **kwargs)

        return call

    for name in counts:
        # Patch the loss function's own module, which is where it looks the name up.
        owner = sys.modules["gptfast.ops.cross_entropy"] if name == "linear_cross_entropy" else ops
        monkeypatch.setattr(owner, name, counting(name))
    return counts


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_parity(dtype: torch.dtype, training: bool, calls: dict[str, int]) -> None:
    found: dict[str, list[list[Tensor]]] = {}
    for seed in range(12):  # a loss is one number, so compare the maximum of several
        theirs = make(seed).to(dtype).train(training)
        ours = accelerate(copy.deepcopy(theirs))
        ref = copy.deepcopy(theirs).double()
        ids, labels = batch(seed)
        rows = []
        for model in (ours, ref, theirs):
            model.zero_grad()
            out = model(input_ids=ids, labels=labels)
            loss, logits = out.loss, out.logits
            if model is ref:  # transformers would round it to fp32
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss.backward()
            grads = {f"d{name}": p.grad.clone() for name, p in model.named_parameters()}
            rows.append({"loss": loss.detach(), "logits": logits.detach(), **grads})
        for name in rows[0]:
            found.setdefault(name, []).append([row[name] for row in rows])
    assert calls == {"attention": 2 * 12, "linear_cross_entropy": 12}
    for name, cases in found.items():
        out, ref_values, pt = (torch.stack(kind) for kind in zip(*cases, strict=True))
        wide = name.startswith("d") and dtype == torch.bfloat16
        assert_parity(name, out, ref_values.double(), pt, 3.0 if wide else 2.0)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the calls of a layer as large as the head."""
    calls, forward = [], nn.Linear.forward

    def counting(self: nn.Linear, x: Tensor) -> Tensor:
        calls.extend([1] * (self.out_features == V))
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    return calls


def test_no_logits_in_training(heads: list[int]) -> None:
    """The head is called once, when the logits are first read in any way, and not before."""
    model = accelerate(make()).train()
    ids, labels = batch()
    wanted = model(input_ids=ids).logits
    reads = [
        lambda out: out.logits,
        lambda out: out["logits"],
        lambda out: out[1],
        lambda out: out[:2][1],
        lambda out: out.to_tuple()[1],
        lambda out: out.get("logits"),
    ]
    for read in reads:
        out = model(input_ids=ids, labels=labels)
        heads.clear()
        out.loss.backward()
        assert "loss" in out and list(out) == ["loss", "logits"] and len(out) == 2
        assert out["loss"] is out.loss is out[0] and not heads
        assert torch.equal(read(out), wanted) and out.logits is out["logits"] and len(heads) == 1
    out = model.eval()(input_ids=ids, labels=labels)
    assert torch.equal(out["logits"], wanted) and type(out) is not drop_in.LazyLogits


def test_logits_are_those_of_the_forward() -> None:
    """Logits read later, under other modes, equal those computed during the forward."""
    model, (ids, labels) = accelerate(make()).train(), batch()
    out = model(input_ids=ids, labels=labels)
    with torch.no_grad():
        assert out.logits.requires_grad
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
    assert not out.logits.requires_grad
    with torch.inference_mode():
        out = model(input_ids=ids, labels=labels)
    assert out.logits.is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=ids, labels=labels)
    assert out.logits.dtype == torch.bfloat16


def pair() -> tuple[list[Any], list[Any]]:
    """Return the outputs in training of an accelerated model and of a plain one, and the models."""
    theirs, (ids, labels) = make().train(), batch()
    models = [accelerate(copy.deepcopy(theirs)), theirs]
    options = {"output_hidden_states": True, "use_cache": True}
    outs = [m(input_ids=ids, labels=labels, **options) for m in models]
    return outs, models


def test_no_cache_in_training_unless_asked_for() -> None:
    model, (ids, labels) = accelerate(make().train()), batch()
    out = model(input_ids=ids, labels=labels)
    assert [*out] == ["loss", "logits"]
    assert all(value.detach() is not None for value in out.values())
    asked = model(input_ids=ids, labels=labels, use_cache=True)
    evaluated = model.eval()(input_ids=ids, labels=labels)
    assert [*asked] == [*evaluated] == [*make()(input_ids=ids, labels=labels)]
    assert len(asked) == 3


def gradients(model: nn.Module) -> list[Tensor | None]:
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return grads


def same(a: Any, b: Any) -> None:
    """Compare two structures: their tensors up to rounding, everything else exactly."""
    if isinstance(b, Tensor):
        assert isinstance(a, Tensor) and torch.is_tensor(a)
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
        assert (a.device, a.is_leaf, a.stride()) == (b.device, b.is_leaf, b.stride())
        scale = max(1, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)
    elif isinstance(b, dict):
        assert list(a) == list(b)
        for key in b:
            same(a[key], b[key])
    elif isinstance(b, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif type(b).__module__.startswith("transformers"):
        assert type(a) is type(b)
    elif isinstance(b, float):
        assert a == pytest.approx(b, rel=1e-5, abs=2e-5)
    elif type(b).__module__ == "numpy":
        same(torch.tensor(a), torch.tensor(b))
    else:
        assert a == b


def without_cache(out: Any) -> list[Any]:
    return [value for name, value in out.items() if name != "cache"]


def flattened_and_back(out: Any) -> dict[str, Any]:
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    return dict(torch.utils._pytree.tree_unflatten(leaves, spec))


def saved(out: Any) -> Any:
    stream = io.BytesIO()
    torch.save({"logits": dict(out.items())["logits"], "loss": out.loss}, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


LOOKS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda out: out.logits,
    "getattr": lambda out: getattr(out, "logits", None),
    "key": lambda out: out["logits"],
    "index": lambda out: out[1],
    "negative index": lambda out: out[-3],
    "slice": lambda out: out[:2],
    "get": lambda out: [out.get("logits"), out.get("no", 3)],
    "to_tuple": lambda out: out.to_tuple(),
    "unpacked": lambda out: [*out.to_tuple()][:2],
    "keys": lambda out: [list(out), list(out.keys()), len(out), "logits" in out],
    "items": lambda out: list(out.items()),
    "reversed": lambda out: [out[name] for name in reversed(out)],
    "values": lambda out: list(out.values()),
    "dict": lambda out: dict(out),
    "dict of items": lambda out: dict(out.items()),
    "stars": lambda out: {**out},
    "keywords": lambda out: (lambda **given: given)(**out),
    "copy": lambda out: [dict(copy.copy(out)), dict(out.copy())],
    "detach": lambda out: [v.detach() for v in without_cache(out)[:2]],
    "float": lambda out: [v.float() for v in without_cache(out)[:2]],
    "double": lambda out: [v.double() for v in without_cache(out)[:2]],
    "to": lambda out: [v.to("cpu", torch.float64) for v in without_cache(out)[:2]],
    "clone": lambda out: [v.clone() for v in without_cache(out)[:2]],
    "both": lambda out: [list(out.values())[1], out.logits, list(out.values())[1]],
    "tree_map": lambda out: torch.utils._pytree.tree_map(
        lambda v: v.mean() if torch.is_tensor(v) else 0, dict(out.items())
    ),
    "merged": lambda out: dict(out | {"more": 1}),
    "merged from the right": lambda out: {"more": 1} | out,
    "tree_map of an output": lambda out: dict(torch.utils._pytree.tree_map(lambda v: v, out)),
    "tree_flatten": flattened_and_back,
    "fields": lambda out: {f.name: getattr(out, f.name) for f in dataclasses.fields(out)},
    "replace": lambda out: dict(dataclasses.replace(out, loss=out.loss * 2)),
    "pickle": lambda out: dict(pickle.loads(pickle.dumps(out))),
    "pickle of items": lambda out: pickle.loads(pickle.dumps(list(out.items()))),
    "save": saved,
    "isinstance": lambda out: [torch.is_tensor(v) for v in out.values()],
    "repr": lambda out: repr(out.logits.detach())[:40],
    "vars": lambda out: {k: v for k, v in vars(out).items() if k == "logits"},
    "an output of items": lambda out: dict(CausalLMOutput(dict(list(out.items())[:2]))),
    "map": lambda out: list(map(lambda name: out[name], out)),
    "setattr": lambda out: [setattr(out, "logits", out.logits * 2), out.logits, out[1]],
    "setitem": lambda out: [out.__setitem__("logits", out[1] * 2), out.logits, out[1]],
}


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_at_an_output(look: str) -> None:
    """Each gives what transformers' own output gives: order, types, values and gradients."""
    outs, models = pair()
    a, b = map(LOOKS[look], outs)
    same(a, b)
    found = [[x for x in torch.utils._pytree.tree_leaves(s) if torch.is_tensor(x)] for s in (a, b)]
    leaves = [[x for x in kind if x.grad_fn is not None] for kind in found]
    for tensors in leaves:
        if tensors:
            sum(x.float().square().mean() for x in tensors).backward()
    for g, h in zip(*map(gradients, models), strict=True):
        assert (g is None) == (h is None)
        if h is not None:
            torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-5 * max(1, h.abs().max().item()))


@pytest.mark.parametrize(
    "call",
    [
        lambda out: out.pop("logits"),
        lambda out: out.setdefault("logits", 1),
        lambda out: out.update({"logits": 1}),
        lambda out: out.__delitem__("logits"),
        lambda out: out["nothing"],
        lambda out: out.nothing,
        lambda out: out[9],
        lambda out: copy.deepcopy(out),
        lambda out: copy.deepcopy(list(out.values())),
        lambda out: dataclasses.asdict(out),
        lambda out: list(out.values())[1].numpy(),
    ],
)
def test_what_an_output_refuses(call: Callable[[Any], Any]) -> None:
    errors = []
    for out in pair()[0]:
        with pytest.raises(Exception) as caught:  # noqa: B017 - the same one for both
            call(out)
        errors.append(type(caught.value))
    assert errors[0] is errors[1]


G = torch.linspace(-1, 1, 2 * T * V).view(2, T, V)


def in_place(v: Tensor) -> Tensor:
    v.mul_(3)
    v[:, 0] = 0
    return v


def through_a_view(v: Tensor) -> Tensor:
    flat = v.view(-1, V)
    flat.mul_(2)
    return v + 0


def with_a_hook(v: Tensor) -> Tensor:
    v.register_hook(lambda g: g * 2)
    return v * 1


def doubly(v: Tensor) -> Tensor:
    part = v[:, :2].square().sum()
    return torch.autograd.grad(part, v, create_graph=True)[0]


# Each takes unread logits to a tensor, whose gradients are compared.
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda v: v.sum(),
    "right operand": lambda v: 2 - G * v,
    "softmax": lambda v: v.softmax(-1),
    "cross_entropy": lambda v: F.cross_entropy(v.flatten(0, 1), batch()[0].flatten()),
    "index": lambda v: v[:, :-1, ::2],
    "mask": lambda v: v[torch.arange(v.numel()).view(v.shape) % 3 == 0],
    "iteration": lambda v: sum(row.mean() for row in v),
    "stack": lambda v: torch.stack([v, v * 2]),
    "cat of a pair": lambda v: torch.cat((v, v.detach())),
    "matmul": lambda v: v @ v.mT,
    "where": lambda v: torch.where(v > 0, v, 0 * v),
    "float": lambda v: v.float(),
    "bf16": lambda v: v.bfloat16(),
    "chain": lambda v: v.double().clone().float(),
    "contiguous": lambda v: v.contiguous(),
    "in place": in_place,
    "view": through_a_view,
    "hook": with_a_hook,
    "second order": doubly,
    "vmap": lambda v: torch.vmap(lambda row: row.sum(-1))(v),
    "out of torch.func": lambda v: torch.func.grad(lambda x: (v.detach() * x).sum())(1 + 0 * G) * v,
    "checkpoint": lambda v: checkpoint(lambda x: x.exp(), v, use_reentrant=False),
    "autograd.Function": lambda v: Twice.apply(v),
    "keyword": lambda v: torch.mul(input=torch.clone(input=v), other=2),
}


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def unread(out: Any) -> Tensor:
    return list(out.values())[1]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_unread_logits(function: str) -> None:
    results, grads = [], []
    for out, model in zip(*pair(), strict=True):
        result = FUNCTIONS[function](unread(out))
        assert type(result + 0) is Tensor
        results.append(result + 0)
        (result.float() ** 2).sum().backward()
        grads.append(gradients(model))
    scale = results[1].abs().max().item()
    wide = {"bf16": 2.0**-7}.get(function, 1e-5)  # two roundings to 16 bits may differ by an ulp
    torch.testing.assert_close(*results, rtol=0, atol=wide * max(1, scale))
    for g, h in zip(*grads, strict=True):
        torch.testing.assert_close(g, h, rtol=0, atol=wide * max(1, h.abs().max().item()))


VALUES: dict[str, Callable[[Any], Any]] = {
    "metadata": lambda v: (
        [v.shape, v.dtype, v.device, v.ndim, v.size(1), v.dim(), len(v), v.layout]
        + [v.numel(), v.requires_grad, v.is_leaf, v.stride(), v.is_contiguous(), v.element_size()]
        + [v.is_floating_point(), v.nbytes, v.storage_offset(), v.is_cpu, v.is_sparse]
        + [v.grad_fn is None, v.is_meta, v.type(), torch.numel(v), v.is_inference()]
    ),
    "tolist": lambda v: v[0, 0].tolist(),
    "item": lambda v: v.sum().item(),
    "numpy": lambda v: v.detach().numpy(),
    "force": lambda v: v.numpy(force=True),
    "asarray": lambda v: np.asarray(v.detach()),
    "from_dlpack": lambda v: np.from_dlpack(v.detach()),
    "format": lambda v: f"{v[0, 0, 0]:.2f} {v.shape}",
    "repr": lambda v: repr(v).split("grad_fn")[0],
    "argmax": lambda v: v.argmax(-1),
    "comparison": lambda v: (v > 0).float().mean(),
    "equal": lambda v: torch.equal(v, v.clone()),
    "bytes": lambda v: len(v.detach().untyped_storage()),
    "deepcopy": lambda v: copy.deepcopy(v.detach()),
    "copy": lambda v: copy.copy(v.detach()),
    "reduced": lambda v: ForkingPickler.loads(ForkingPickler.dumps(v.detach())),
    "data": lambda v: v.data,
    "leaf": lambda v: [leaf_of(v), v.detach().requires_grad, v.detach() * 2],
    "no grad": lambda v: torch.no_grad()(lambda: v * 2)(),
    "grad of": lambda v: torch.autograd.grad(v, list(v.model.parameters()), G),
    "grad to": lambda v: torch.autograd.grad((v * G).sum(), v),
    "backward": lambda v: [v.backward(G), gradients(v.model)],
    "backward of a list": lambda v: [torch.autograd.backward([v], [G]), gradients(v.model)],
    "retain_grad": lambda v: [v.retain_grad(), (v * G).sum().backward(), v.grad],
    "compiled": lambda v: torch.compile(lambda x: (x * 2).detach(), backend="eager")(v),
}


def leaf_of(v: Tensor) -> Tensor:
    leaf = v.detach().requires_grad_()
    (leaf * G).sum().backward()
    assert leaf.is_leaf
    return leaf.grad


@pytest.mark.parametrize("name", VALUES)
def test_values_of_unread_logits(name: str) -> None:
    results = []
    for out, model in zip(*pair(), strict=True):
        v = unread(out)
        v.model = model
        results.append(VALUES[name](v))
    assert type(results[0]) is type(results[1])
    same(*results)


@pytest.mark.parametrize("training", [True, False], ids=["train", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_metadata_is_that_of_the_values(dtype: torch.dtype, training: bool) -> None:
    ids, labels = batch()
    for autocast in (False, dtype != torch.float64):
        model = accelerate(make().train().to(torch.float32 if autocast else dtype))
        with (
            torch.autocast("cpu", dtype, enabled=autocast),
            torch.set_grad_enabled(training),
        ):
            out, wanted = model(input_ids=ids, labels=labels), model(input_ids=ids).logits
        v = unread(out)
        before = (v.dtype, v.shape, v.stride(), v.device, v.requires_grad, v.is_leaf)
        x = out.logits
        assert before == (x.dtype, x.shape, x.stride(), x.device, x.requires_grad, x.is_leaf)
        assert torch.equal(x, wanted) and (x.grad_fn is None) == (wanted.grad_fn is None)
        if training:
            a, b = (torch.autograd.grad(y.float().square().sum(), model.lm_head.weight)[0]
                    for y in (x, wanted))  # fmt: skip
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * b.abs().max().item())


def test_what_does_not_compute(heads: list[int]) -> None:
    """An unread tensor is looked at, detached, cast, copied and hooked without the head; whatever
    is read of them later has one product behind it."""
    ours = pair()[0][0]
    heads.clear()
    assert ours[0] is ours.loss and ours[-1] is ours.hidden_states is ours["hidden_states"]
    seen: list[Tensor] = []
    v = unread(ours)
    assert (v.shape, v.dtype, v.requires_grad, v.grad_fn is None) == (G.shape, G.dtype, True, False)
    assert v is v.float() is v.to("cpu")
    parts = [v.detach(), v.double(), v.detach().clone(), v.to(torch.bfloat16).float()]
    v.register_hook(seen.append)
    mapped = torch.utils._pytree.tree_map(lambda x: x, ours)
    again = type(ours)(dict(ours.items()))
    ours.loss.backward(retain_graph=True)
    assert not heads and not seen
    for part in (*parts, mapped.logits, again["logits"], unread(ours)):
        torch.testing.assert_close(part.float() + 0, v + 0, rtol=0, atol=0.05)
    assert len(heads) == 1
    (mapped.logits * G).sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], G)


@pytest.mark.parametrize("name", ["fake", "gather", "reduce"])
def test_below_autograd(name: str, process_group: None) -> None:
    """Functions of the dispatcher get the values."""
    ours = pair()[0][0]
    if name == "fake":
        with FakeTensorMode():
            ids, labels = batch()
            out = accelerate(make()).train()(input_ids=ids, labels=labels)
            assert unread(out).shape == out.logits.shape == G.shape
        return
    v, found = unread(ours).detach(), [torch.empty(G.shape)]
    if name == "gather":
        torch.distributed.all_gather(found, v)
    else:
        torch.distributed.all_reduce(v)
        found = [v]
    assert torch.equal(found[0] + 0, ours.logits)


def test_a_copy_that_is_too_late_is_refused() -> None:
    ours = pair()[0][0]
    v = unread(ours)
    late = v.clone()
    v.mul_(2)
    with pytest.raises(RuntimeError, match="read the copy before the change"):
        late.sum()


class ByHand(torch.optim.Optimizer):
    """An optimizer that changes weights where autograd does not see it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
        lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
        lambda params: gptfast.AdamW(params, lr=0.1),
        ByHand,
    ],
    ids=["SGD", "foreach", "fused", "gptfast", "data"],
)
def test_logits_after_a_step(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    """They are those of the forward, for all outputs, with one copy of the weight, which goes."""
    model, (ids, labels) = accelerate(make()).train(), batch()
    optimizer = optimizer(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        wanted = model(input_ids=ids).logits.detach()
        outs = [model(input_ids=ids, labels=labels) for _ in range(3)]
        sum(out.loss for out in outs).backward()
        optimizer.step()
        products = pending(model)
        assert len(products) == 3 and len({id(product.copy) for product in products}) == 1
        optimizer.step()
        assert torch.equal(outs[0].logits, wanted) and outs[1].logits.requires_grad
        assert torch.equal(unread(outs[2]).detach().clone() + 0, wanted)
        assert not torch.equal(wanted, model(input_ids=ids).logits)
        with pytest.raises(RuntimeError, match="changed since the forward"):
            outs[0].logits.sum().backward()
        where = weakref.ref(products[0].copy)
        del outs, products
        assert where() is None and not pending(model)


def pending(model: nn.Module) -> list[Any]:
    """Return what may still be asked for."""
    weight = model.lm_head.weight
    return [product for product in deferred._pending.values() if product.weight is weight]


def test_a_step_copies_only_for_those_who_may_ask() -> None:
    model, other = (accelerate(make()).train() for _ in range(2))
    weight, (ids, labels) = model.lm_head.weight, batch()
    model(input_ids=ids, labels=labels).loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()  # nobody has the output any more
    assert not pending(model) and weight not in deferred._spares
    out, another = (m(input_ids=ids, labels=labels) for m in (model, other))
    read = model(input_ids=ids, labels=labels)
    assert read.logits.requires_grad
    (out.loss + read.loss).backward()
    optimizer.step()
    assert [product.copy is not None for product in pending(model)] == [True]
    assert [product.copy for product in pending(other)] == [None] and another.logits is not None
    del out
    assert weight in deferred._spares  # its memory serves the next step, or goes then
    optimizer.step()
    assert weight not in deferred._spares
    out = model(input_ids=ids, labels=labels)
    optimizer.step()
    gone = weakref.ref(pending(model)[0].copy.tensor)
    del out, read, optimizer, model, weight
    gc.collect()  # modules and their parameters are in circles
    assert gone() is None


@pytest.mark.parametrize("change", ["no_grad", "data", "copy_", "nan", "hidden", "swap"])
def test_logits_after_a_change_by_hand(change: str) -> None:
    model, (ids, labels) = accelerate(make()).train(), batch()
    weight = model.lm_head.weight
    if change == "nan":
        weight.data[3, 5] = float("nan")
    out = model(input_ids=ids, labels=labels, output_hidden_states=True)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        if change == "no_grad":
            weight.sub_(0.1)
        elif change == "data":
            weight.data.sub_(0.1)
        elif change == "copy_":
            weight.copy_(torch.zeros_like(weight))
        elif change == "hidden":
            out.hidden_states[-1].mul_(2)
        elif change == "swap":
            weight.data = weight.data * 2
    if change in ("nan", "swap"):  # nothing has changed that the logits come from
        assert torch.equal(out.logits.nan_to_num(), wanted.nan_to_num())
        return
    for _ in range(2):
        with pytest.raises(RuntimeError, match="read them before the change"):
            out.logits  # noqa: B018


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_distributed_data_parallel(
    options: dict[str, bool], process_group: None, heads: list[int]
) -> None:
    """Logits are not computed for it, and a loss of one's own of the logits has its gradients."""
    theirs, (ids, labels) = make().train(), batch()
    ours = accelerate(copy.deepcopy(theirs))
    wrapped = [torch.nn.parallel.DistributedDataParallel(m, **options) for m in (ours, theirs)]
    for own_loss in (False, False, True, True):
        found = []
        for model in wrapped:
            heads.clear()
            out = model(input_ids=ids, labels=labels)
            loss = out.loss + (unread(out) * G).mean() if own_loss else out.loss
            loss.backward()
            assert len(heads) == (own_loss or model is wrapped[1])
            found.append(gradients(model))
        for g, h in zip(*found, strict=True):
            torch.testing.assert_close(g, h, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerator_copies_an_output(precision: str, heads: list[int]) -> None:
    """Accelerator copies outputs item by item; the logits stay unread and can be read later."""
    hf_accelerate = pytest.importorskip("accelerate")
    hf_accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = hf_accelerate.Accelerator(cpu=True, mixed_precision=precision)
    theirs, (ids, labels) = make().train(), batch()
    inner = accelerate(copy.deepcopy(theirs))
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.0)
    model, optimizer = accelerator.prepare(inner, optimizer)
    peer = accelerator.prepare(theirs)
    out = model(input_ids=ids, labels=labels)
    accelerator.backward(out.loss, retain_graph=True)
    optimizer.step()
    gradients(inner)
    assert not heads and isinstance(out, drop_in.LazyLogits)
    wanted = peer(input_ids=ids, labels=labels)
    wide = 1e-5 if precision == "no" else 0.05
    assert out.logits.dtype == wanted.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits, wanted.logits, rtol=0, atol=wide)
    out, wanted = (m(input_ids=ids, labels=labels) for m in (model, peer))
    for x in (unread(out), wanted.logits):
        (x * G).mean().backward()
    for g, h in zip(gradients(inner), gradients(theirs), strict=True):
        torch.testing.assert_close(g, h, rtol=0, atol=wide * h.abs().max().item())
    restore(inner)
    a, b = model(input_ids=ids, labels=labels), inner(input_ids=ids)
    assert "logits" in a and not isinstance(a, drop_in.LazyLogits) and b.logits.shape == (2, T, V)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_trainer_computes_no_logits_in_training(
    bf16: bool, tmp_path: Path, heads: list[int]
) -> None:
    """It computes them for compute_metrics alone, which sees transformers' own."""
    pytest.importorskip("accelerate")
    seen = []
    for ours in (True, False):
        model = make(initializer_range=0.02).train()
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[],
            save_strategy="no", bf16=bf16, use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = transformers.Trainer(
            accelerate(model) if ours else model,
            args,
            train_dataset=Windows(),
            eval_dataset=Windows(),
            compute_metrics=lambda p: {"sum": float(abs(p.predictions[0]).sum())},
        )
        heads.clear()
        trainer.train()
        assert len(heads) == (0 if ours else 3)
        seen.append(trainer.evaluate())
    for name in ("eval_loss", "eval_sum"):
        assert seen[0][name] == pytest.approx(seen[1][name], rel=0.02 if bf16 else 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 37},
        {"num_items_in_batch": torch.tensor(37)},
        {"ignore_index": 5, "labels": batch()[0]},
        {"shift_labels": random_ids(2, T, vocab_size=V, seed=9)},
        {"shift_labels": random_ids(2 * T, vocab_size=V, seed=9)},
        {"logits_to_keep": 4, "labels": batch()[1][:, -4:]},
        {"return_dict": False},
        {"use_cache": False},
        {"output_hidden_states": True},
        {"attention_mask": torch.ones(2, T, dtype=torch.int64)},
        {"attention_mask": torch.arange(T).lt(torch.tensor([[T], [20]])).long()},
        {"attention_mask": torch.arange(T).ge(torch.tensor([[0], [7]])).long()},
        {"position_ids": torch.arange(T).flip(0)[None]},
    ],
    ids=lambda options: "-".join(options),
)
def test_arguments_of_forward(options: dict[str, Any]) -> None:
    ids, labels = batch()
    for training in (True, False):
        theirs = make().train(training)
        ours = accelerate(copy.deepcopy(theirs))
        given = {"labels": labels, **options}
        a, b = ours(input_ids=ids, **given), theirs(input_ids=ids, **given)
        if options.get("return_dict") is False:
            torch.testing.assert_close(a[:2], b[:2], rtol=0, atol=1e-5)
            continue
        torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-5)
        if options.get("output_hidden_states"):
            torch.testing.assert_close(a.hidden_states, b.hidden_states, rtol=0, atol=1e-5)
        assert (a.loss.dtype, a.logits.dtype) == (b.loss.dtype, b.logits.dtype)


def test_embeddings_instead_of_ids() -> None:
    theirs, (ids, labels) = make(), batch()
    ours = accelerate(copy.deepcopy(theirs))
    x = theirs.transformer.wte(ids).detach()
    a, b = (m(inputs_embeds=x, labels=labels) for m in (ours, theirs))
    torch.testing.assert_close((a.loss, a.logits), (b.loss, b.logits), rtol=0, atol=1e-5)


def test_another_loss_or_head_is_left_alone() -> None:
    ids, labels = batch()
    model = accelerate(make()).train()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    assert torch.equal(model(input_ids=ids, labels=labels).loss, model(input_ids=ids).logits.sum())
    theirs = make()
    theirs.lm_head = nn.Sequential(nn.Linear(48, V))
    ours = accelerate(copy.deepcopy(theirs))
    a, b = (m(input_ids=ids, labels=labels).loss for m in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"left": True},
    ],
    ids=str,
)
def test_generate(options: dict[str, Any], calls: dict[str, int]) -> None:
    theirs = make()
    ours = accelerate(copy.deepcopy(theirs))
    ids, mask = batch()[0][:1, :8], torch.ones(1, 8, dtype=torch.int64)
    if options.pop("left", False):
        ids, mask = batch()[0][:, :8], torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    fixed = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = theirs.generate(ids, **fixed, **options)
    assert torch.equal(ours.generate(ids, **fixed, **options), expected)
    if not options and mask.all():
        assert calls["attention"] == 2 * 20


def test_dropout_is_drawn_from_torchs_generator(calls: dict[str, int]) -> None:
    model = accelerate(make(attn_pdrop=0.3)).train()
    ids, labels = batch()

    def loss(seed: int) -> Tensor:
        torch.manual_seed(shifted(seed))
        return model(input_ids=ids, labels=labels).loss

    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))
    without = model.eval()(input_ids=ids, labels=labels).loss
    model.train()
    drawn = torch.stack([loss(s) for s in range(3)])
    assert 0 < (drawn - without).abs().max() < without
    # Checkpointing runs the forward twice and must draw the same dropout.
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss(3).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_restore_leaves_no_trace(before: str, tmp_path: Path) -> None:
    theirs = make(attn_implementation=before)
    ours = accelerate(copy.deepcopy(theirs))
    assert accelerate(ours) is ours
    assert isinstance(ours, GPT2LMHeadModel)
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    same, *others = filecmp.cmpfiles(tmp_path / "theirs", tmp_path / "ours", files, False)
    assert (same, others) == (files, [[], []])
    back = restore(ours)
    assert back is ours and restore(back) is back
    assert type(back) is GPT2LMHeadModel and back.__dict__.keys() == theirs.__dict__.keys()
    assert back.config._attn_implementation == theirs.config._attn_implementation == before
    ids, labels = batch()
    a, b = (m(input_ids=ids, labels=labels) for m in (back, theirs))
    assert torch.equal(a.loss, b.loss) and torch.equal(a.logits, b.logits)


def test_copies_and_pickles() -> None:
    model = accelerate(make())
    ids, labels = batch()
    wanted = model(input_ids=ids, labels=labels).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is drop_in.GPT2LMHeadModel
        assert torch.equal(other(input_ids=ids, labels=labels).loss, wanted)
        assert type(restore(other)) is GPT2LMHeadModel


def test_compiled() -> None:
    theirs, (ids, labels) = make().train(), batch()
    ours = accelerate(copy.deepcopy(theirs))
    compiled = torch.compile(ours, backend="aot_eager")
    a, b = (m(input_ids=ids, labels=labels) for m in (compiled, theirs))
    a.loss.backward()
    b.loss.backward()
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-5)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert max((p.grad - q.grad).abs().max() for p, q in pairs) < 1e-5


@pytest.mark.parametrize("bad", [GPT2Model, nn.Linear, "subclass"])
def test_other_models_are_refused(bad: Any) -> None:
    class Mine(GPT2LMHeadModel):
        pass

    config = make().config
    kinds = {"subclass": lambda: Mine(config), nn.Linear: lambda: nn.Linear(1, 1)}
    model = kinds.get(bad, lambda: bad(config))()
    with pytest.raises(ValueError, match=f"GPT2LMHeadModel, got {type(model).__name__}"):
        gptfast.accelerate(model)


def test_models_that_cannot_be_accelerated() -> None:
    model = make()
    model.forward = model.forward
    with pytest.raises(ValueError, match="forward was replaced"):
        accelerate(model)
    model = make(attn_implementation="eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        accelerate(model)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "norm"])
def test_a_head_with_hooks_is_left_alone(kind: str) -> None:
    theirs, (ids, labels) = make().train(), batch()
    ours = accelerate(copy.deepcopy(theirs))
    for model in (theirs, ours):
        if kind == "hook":
            model.lm_head.register_forward_hook(lambda _, __, out: 3 * torch.tanh(out / 3))
        elif kind == "pre-hook":
            model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
        else:
            nn.utils.parametrizations.weight_norm(model.lm_head)
    for _ in range(2):
        a, b = (m(input_ids=ids, labels=labels).loss for m in (ours, theirs))
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_models_that_share_a_config() -> None:
    config = make().config
    a, b = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    accelerate(a)
    assert b.config._attn_implementation == "sdpa"
    accelerate(b)
    for model in (a, b):
        assert restore(model).config._attn_implementation == "sdpa"
        assert model.transformer.h[0].attn.config is model.config


def test_an_accelerated_class_loads_models_too(tmp_path: Path) -> None:
    model = accelerate(make())
    model.save_pretrained(tmp_path)
    other = accelerate(type(model).from_pretrained(tmp_path))
    assert other.config._attn_implementation == "gptfast"
    assert restore(other).config._attn_implementation == "sdpa"
    assert type(other) is GPT2LMHeadModel


def test_importing_gptfast_needs_no_transformers() -> None:
    import subprocess
    import sys

    code = "import sys; sys.modules['transformers'] = None; from gptfast import *; import gptfast"
    code += "; assert 'accelerate' in dir(gptfast)"
    subprocess.run([sys.executable, "-c", code], check=True)


class Windows(torch.utils.data.Dataset):
    """Windows of text with a pattern that can be learnt in a few steps."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = (torch.arange(i, i + 24) * 7) % V
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def test_a_run_of_trainer(tmp_path: Path, calls: dict[str, int]) -> None:
    """transformers' Trainer gives the same losses with an accelerated model and gptfast.AdamW as
    with the plain pair; it saves, resumes and evaluates."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def run(name: str, ours: bool, resume: bool = False) -> tuple[list[float], float, Trainer]:
        model = make(initializer_range=0.02).train()
        if ours:
            accelerate(model)
        kind = gptfast.AdamW if ours else torch.optim.AdamW
        optimizer = kind(model.parameters(), lr=3e-3, weight_decay=0.01)
        args = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=12,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            logging_steps=1,
            save_steps=6,
            lr_scheduler_type="linear",
            warmup_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=Windows(),
            eval_dataset=Windows(),
            optimizers=(optimizer, None),
        )
        trainer.train(resume_from_checkpoint=resume)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return losses, trainer.evaluate()["eval_loss"], trainer

    ours, our_eval, trainer = run("ours", True)
    assert calls["attention"] > 2 * 24 and calls["linear_cross_entropy"] >= 24
    theirs, their_eval, _ = run("theirs", False)
    assert len(ours) == 12 and ours[-1] < 0.85 * ours[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    assert abs(our_eval - their_eval) < 2e-3
    assert type(trainer.model) is drop_in.GPT2LMHeadModel
    # The run resumes from its checkpoint at step 6 and ends the same.
    final = [p.clone() for p in trainer.model.parameters()]
    import shutil

    shutil.rmtree(tmp_path / "ours" / "checkpoint-12")
    resumed, _, again = run("ours", True, resume=True)
    torch.testing.assert_close(resumed[-6:], ours[-6:], rtol=0, atol=1e-5)
    torch.testing.assert_close(list(again.model.parameters()), final, rtol=0, atol=1e-5)
    # Both transformers and gptfast load what Trainer saved.
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "ours" / "checkpoint-12").eval()
    gpt = gptfast.GPT.from_pretrained(tmp_path / "ours" / "checkpoint-12")
    ids = batch()[0]
    torch.testing.assert_close(gpt(ids), plain(ids).logits, rtol=0, atol=1e-5)
