"""Test registration: opcheck, autocast, torch.compile, use_backend, levels, a missing extension."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ENGINE_LEVELS, PRODUCTS
from torch import Tensor
from torch.profiler import ProfilerActivity

from gptfast import ops, use_backend
from gptfast.ops.adamw import grad_norm
from gptfast.ops.backend import EXTENSION
from gptfast.ops.library import autocast_enabled, operators
from gptfast.torch_private import OLDEST_TORCH, check_version

gptfast_ops = torch.ops.gptfast


def randn(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def attention_samples() -> list[tuple]:
    seed, kv_len = torch.tensor(3), torch.tensor([5, 2])
    packed = randn(2, 6, 3 * 8, grad=True)
    views = [x.unflatten(-1, (2, 4)).transpose(1, 2) for x in packed.chunk(3, -1)]
    expanded = randn(2, 1, 6, 4, grad=True).expand(2, 2, 6, 4)
    return [
        tuple(randn(2, 2, 6, 4, grad=True) for _ in range(3)) + (0.5, 0.0, None, None),
        (*views, 0.5, 0.2, seed, None),
        (randn(2, 2, 3, 4, grad=True), expanded, expanded, 0.5, 0.0, None, kv_len),
        tuple(randn(2, 2, 4, 6, grad=True).mT for _ in range(3)) + (0.5, 0.0, None, None),
        tuple(randn(1, 1, 3, 4, dtype=torch.bfloat16) for _ in range(3)) + (0.5, 0.0, None, None),
        tuple(randn(1, 1, 3, 4, dtype=torch.float64) for _ in range(3)) + (0.5, 0.0, None, None),
    ]


def with_backward(samples: list[tuple], forward: object, n: int) -> list[tuple]:
    """Turn the forward's samples into samples of its backward, with expanded gradients."""
    result = []
    for sample in samples:
        tensors, options = [x.detach() for x in sample[:n]], sample[n:]
        out, lse = forward(*tensors, *options)
        dout = torch.ones((), dtype=out.dtype).expand(out.shape)
        result.append((dout, *tensors, out, lse, *options))
    return result


def qkv_samples() -> list[tuple]:
    return [
        (randn(2, 5, 24, grad=True), 2, 0.5, 0.0, None, None),
        (randn(5, 2, 24, grad=True).transpose(0, 1), 2, 0.5, 0.1, torch.tensor(1), None),
        (randn(1, 5, 24, grad=True).expand(2, 5, 24), 4, 0.5, 0.0, None, torch.tensor([5, 3])),
    ]


TARGET = torch.tensor([1, -100, 4])
CROSS_ENTROPY = (-100, 0.1, 0.01)


def cross_entropy_samples() -> list[tuple]:
    logits = [randn(3, 7, grad=True), randn(7, 3, grad=True).T, randn(1, 7, grad=True).expand(3, 7)]
    return [(x, TARGET, *CROSS_ENTROPY) for x in (*logits, randn(3, 7, dtype=torch.bfloat16))]


def cross_entropy_bwd_samples() -> list[tuple]:
    result = []
    for logits, target, *options in cross_entropy_samples():
        stats = gptfast_ops.cross_entropy_fwd(logits.detach(), target, *options)[1]
        for dloss in (torch.ones(()).expand(3), torch.randn(6)[::2]):
            result.append((dloss, logits.detach(), target, stats, *options))
    return result


def linear_samples() -> list[tuple]:
    return [
        (randn(3, 4, grad=True), randn(7, 4, grad=True), TARGET, *CROSS_ENTROPY),
        (randn(4, 3, grad=True).T, randn(4, 7, grad=True).T, TARGET, *CROSS_ENTROPY),
        (randn(1, 4, grad=True).expand(3, 4), randn(7, 4), TARGET, *CROSS_ENTROPY),
    ]


def linear_bwd_samples() -> list[tuple]:
    dloss = torch.ones(()).div(2).expand(3)
    (x, _, target, *options), *_ = samples = linear_samples()
    frozen = (x, randn(7, 4), target, dloss, *options, 0.0, False)
    return [*((x, w, target, dloss, *options) for x, w, target, *options in samples), frozen]


def embedding_samples(gradient: bool) -> list[tuple]:
    idx = [TARGET.abs() % 7, torch.tensor([[1, 1], [6, 0]]).T, torch.zeros(2, 0, dtype=torch.int64)]
    weights = [randn(7, 4), randn(7, 5, dtype=torch.bfloat16), randn(7, 3, dtype=torch.float64)]
    if not gradient:
        return [*zip([*weights, randn(4, 7).T], [*idx, idx[0]], strict=True)]
    rows = [w.new_ones(()).expand(*i.shape, w.shape[1]) for w, i in zip(weights, idx, strict=True)]
    return [*zip(weights, rows, idx, strict=True), (weights[0], randn(4, 3).T, idx[0])]


def layer_samples(shapes: list[tuple[int, ...]]) -> list[tuple]:
    """Return arguments of layers of these shapes with a norm, without one, and in two dtypes."""
    layers = [randn(*shape, grad=True) for shape in shapes]
    norm = randn(4, grad=True), randn(4, grad=True), 1e-5
    low = [t.detach().bfloat16() for t in layers]
    return [
        (randn(3, 4, grad=True), *norm, *layers),
        (randn(4, 3, grad=True).T, None, None, 0.0, *layers),
        (randn(1, 4).expand(3, 4), *norm, *low),
    ]


def linear_layer_samples() -> list[tuple]:
    samples = [(*sample, None, None) for sample in layer_samples([(7, 4), (7,)])]
    no_bias, residual = (randn(3, 4), None, None, 0.0, randn(7, 4), None), randn(3, 7, grad=True)
    as_autocast = (*samples[0][:-2], residual, torch.bfloat16)
    return [*samples, (*no_bias, None, None), (*no_bias, residual, None), as_autocast]


def linear_layer_bwd_samples() -> list[tuple]:
    result = []
    for x, *norm, weight, bias, _, dtype in linear_layer_samples():
        y, stats = gptfast_ops.linear_fwd(x.detach(), *norm, weight, bias, None, dtype)
        for needs in ((True, True), (True, False), (False, True)):
            rest = weight, bias, stats, *needs, dtype
            result.append(detached(torch.ones_like(y), x, *norm, *rest))
    return result


def mlp_samples() -> list[tuple]:
    samples = layer_samples([(6, 4), (6,), (4, 6), (4,)])
    residual = [(*samples[0], True, dtype) for dtype in (None, torch.bfloat16)]
    return [*((*sample, False, None) for sample in samples), *residual]


def mlp_bwd_samples() -> list[tuple]:
    result = []
    for x, *norm_and_layers, dtype in mlp_samples():
        y, h, stats = gptfast_ops.mlp_fwd(x, *norm_and_layers, dtype)
        for needs in ((True, True, True), (False, True, False), (True, False, True)):
            dy = torch.ones_like(y)
            result.append(detached(dy, x, h, stats, *norm_and_layers, *needs, dtype))
    return result


def decode_linear_samples() -> list[tuple]:
    norm, weight, n_out = (randn(4), randn(4), 1e-5), randn(7, 4), 7
    rounded, scale = torch.arange(28, dtype=torch.int8).view(7, 4), randn(7)
    low = randn(3, 4, dtype=torch.bfloat16), None, None, 0.0, weight.bfloat16()
    return [
        (randn(3, 4), *norm, weight, None, randn(7), randn(3, n_out), True, False),
        (randn(4, 3).T, None, None, 0.0, randn(4, 7).T, None, None, None, False, True),
        (randn(1, 4).expand(12, 4), *norm, rounded, scale, randn(7), None, False, False),
        (*low, None, None, None, False, True),
    ]


def detached(*arguments: object) -> tuple:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)


def adamw_samples() -> list[tuple]:
    def state(dtype: torch.dtype) -> tuple:
        params = [randn(3, 4, dtype=dtype), randn(5, 2, dtype=dtype).T]
        moments = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2)]
        grads = [randn(3, 4, dtype=dtype), torch.ones((), dtype=dtype).expand(2, 5)]
        return params, grads, *moments

    lr, steps = torch.tensor(0.1, dtype=torch.float64), [torch.zeros(()), torch.ones(())]
    numbers = (1.0, 0.9, 0.99, 1e-8, 0.1, [0, 1])
    bf16 = state(torch.bfloat16)
    masters = [p.float() for p in bf16[0]]
    return [
        (*state(torch.float32), [], steps, lr, None, *numbers, False, 0),
        (*bf16, masters, steps, lr, torch.tensor(2.0), *numbers, False, 0),
        (*state(torch.bfloat16), [], steps, lr, torch.tensor(torch.nan), *numbers, True, 5),
    ]


def sample_samples() -> list[tuple]:
    def row(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((2,), value, dtype=dtype)

    i = torch.int64
    return [
        (x, row(0.8), row(3, i), row(0.9), row(0.1), row(1, i), row(2, i))
        for x in (randn(2, 9), randn(9, 2).T, randn(1, 9).expand(2, 9))
    ]


def samples(name: str) -> list[tuple]:
    return {
        "attention_fwd": attention_samples,
        "attention_bwd": lambda: with_backward(attention_samples(), gptfast_ops.attention_fwd, 3),
        "attention_qkv_fwd": qkv_samples,
        "attention_qkv_bwd": lambda: [
            (dout, qkv, out, lse, *options)
            for dout, qkv, out, lse, *options in with_backward(
                qkv_samples(), gptfast_ops.attention_qkv_fwd, 1
            )
        ],
        "cross_entropy_fwd": cross_entropy_samples,
        "cross_entropy_bwd": cross_entropy_bwd_samples,
        "linear_cross_entropy_fwd": linear_samples,
        "linear_cross_entropy_fwd_bwd": linear_bwd_samples,
        "decode_linear": decode_linear_samples,
        "linear_fwd": linear_layer_samples,
        "linear_bwd": linear_layer_bwd_samples,
        "mlp_fwd": mlp_samples,
        "mlp_bwd": mlp_bwd_samples,
        "scale_": lambda: [(randn(3, 4), randn(7, 4), TARGET, torch.tensor(0.5), -100)],
        "embedding_fwd": lambda: embedding_samples(gradient=False),
        "embedding_bwd": lambda: embedding_samples(gradient=True),
        "grad_norm": lambda: [([randn(3, 4), randn(5, 6).T, torch.ones(()).expand(3)],)],
        "adamw": adamw_samples,
        "sample": sample_samples,
    }[name]()


NAMES = [op.name().removeprefix("gptfast::") for op in operators()]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    for arguments in samples(name):
        torch.library.opcheck(getattr(gptfast_ops, name).default, arguments)


def losses(x: Tensor, w: Tensor) -> list[Tensor]:
    """Return a loss of every differentiable operation, from x (2, 12, 24) and w (40, 8)."""
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in x.chunk(3, -1))
    out = ops.attention(q, k, v, dropout_p=0.1, seed=3).transpose(1, 2).flatten(2)
    out = out + ops.attention_qkv(x, 2)
    target = torch.arange(24).view(2, 12)
    return [
        ops.linear_cross_entropy(out, w, target),
        ops.linear_cross_entropy(out, w, target, reduction="none").square().mean(),
        ops.cross_entropy((out @ w.T).flatten(0, 1), target.flatten(), label_smoothing=0.1),
    ]


def gradients(f, x: Tensor, w: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    values = f(x, w)
    sum(values).backward()
    return [*(value.detach() for value in values), x.grad, w.grad]


def test_compile_fullgraph() -> None:
    x, w = randn(2, 12, 24), randn(40, 8)
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, x, w), gradients(losses, x, w), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    q, k, v = (randn(1, 2, 9, 4) for _ in range(3))
    x, w, target = randn(9, 8), randn(20, 8), torch.arange(9)
    low = [t.to(dtype) for t in (q, k, v)]
    with torch.autocast("cpu", dtype):
        out = ops.attention(q, low[1], v)
        loss = ops.linear_cross_entropy(x, w, target)
        separate = ops.cross_entropy(x.to(dtype) @ w.to(dtype).T, target)
        grads = gradients(losses, randn(2, 12, 24), randn(40, 8))
    assert out.dtype == dtype and torch.equal(out, ops.attention(*low))
    # Like F.cross_entropy's under autocast, the loss is fp32; gradients have their input's dtype.
    assert loss.dtype == separate.dtype == torch.float32
    exact = ops.cross_entropy(x.to(dtype).float() @ w.to(dtype).float().T, target)
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(separate, loss, rtol=1e-3, atol=1e-3)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_autocast_leaves_float64_alone() -> None:
    x, w = randn(9, 8, dtype=torch.float64), randn(20, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(x, w, torch.arange(9))
    assert torch.equal(loss, ops.linear_cross_entropy(x, w, torch.arange(9)))


@pytest.mark.filterwarnings("ignore:.*no longer used as device type")
def test_autocast_is_asked_about_on_every_device() -> None:
    """A device of PyTorch either has autocast or is known to have none; no question raises."""
    with pytest.raises(RuntimeError, match="Expected one of") as error:
        torch.device("nonsense")
    listed = re.search(r"Expected one of (.*?) device type", str(error.value))
    kinds = listed.group(1).replace(" or ", ", ").split(", ")
    assert {"cpu", "cuda", "mps", "xpu", "meta"} <= {*kinds}
    for kind in kinds:
        tensor = SimpleNamespace(device=SimpleNamespace(type=kind))
        assert autocast_enabled(tensor) is False
        if torch.amp.is_autocast_available(kind):
            with mock.patch.object(
                torch, "is_autocast_enabled", lambda asked, kind=kind: asked == kind
            ):
                assert autocast_enabled(tensor)
    meta = torch.empty(2, 3, device="meta", requires_grad=True)
    loss = ops.linear_cross_entropy(meta, torch.empty(5, 3, device="meta"), meta.new_ones(2).long())
    assert loss.device.type == "meta" and loss.shape == ()


def test_float64_is_served_by_the_reference(isa: str) -> None:
    x, w = randn(2, 12, 24, dtype=torch.float64), randn(40, 8, dtype=torch.float64)
    got = gradients(losses, x, w)
    with use_backend("reference"):
        expected = gradients(losses, x, w)
    assert all(t.dtype == torch.float64 for t in got)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    logits = randn(20, 50, dtype=torch.float64)
    drawn = ops.sample(logits, top_k=5, seed=1)
    with use_backend("reference"):
        assert torch.equal(drawn, ops.sample(logits, top_k=5, seed=1))


def test_errors_of_the_reference_stay_what_they_are(
    isa: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """C++ kernels call it through PyTorch, which would print them and raise RuntimeError."""
    x, target = randn(2, 5, dtype=torch.float64), torch.tensor([1, 7])
    with pytest.raises(IndexError, match="out of range") as raised:
        gptfast_ops.cross_entropy_fwd(x, target, *CROSS_ENTROPY)
    assert any("kernels" in str(entry.path) for entry in raised.traceback)
    x[1, 3] = torch.nan
    with pytest.raises(ValueError, match="row 1 has NaN"):
        ops.sample(x)
    assert gptfast_ops.cross_entropy_fwd(x[:1], target[:1], *CROSS_ENTROPY)[0].isfinite()
    assert capfd.readouterr() == ("", "")


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, dx):  # type: ignore[no-untyped-def]
        return None


def test_an_undefined_gradient_is_none_at_all() -> None:
    x, w = randn(2, 12, 24, grad=True), randn(40, 8, grad=True)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in x.chunk(3, -1))
    head, target = randn(24, 8, grad=True), torch.arange(24)
    outputs = [
        ops.attention(q, k, v),
        ops.attention_qkv(x, 2),
        ops.cross_entropy(head @ w.T, target),
        ops.linear_cross_entropy(head, w, target),
        ops.linear_cross_entropy(head, w, target, reduction="none"),
        ops.embedding(target, w)[0],
        ops.embedding(target, w)[1],
    ]
    for out in outputs:
        (NoGradient.apply(out).sum() + x.sum() + w.sum() + head.sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, len(outputs)))
    assert torch.equal(w.grad, torch.full_like(w, len(outputs)))


class Recorder:
    """Counts calls of the reference by replacing the functions that `use_backend` finds there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from gptfast.ops import library

        self.called: list[str] = []
        for op, function in library.IMPLEMENTATIONS["reference"].items():
            monkeypatch.setitem(
                library.IMPLEMENTATIONS["reference"], op, self.wrap(op.name(), function)
            )

    def wrap(self, name: str, function):  # type: ignore[no-untyped-def]
        def call(*args):  # type: ignore[no-untyped-def]
            self.called.append(name.removeprefix("gptfast::"))
            return function(*args)

        return call


def test_use_backend_serves_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    qkv = randn(2, 12, 24, grad=True)
    with use_backend("reference"):
        ops.attention_qkv(qkv, 2).sum().backward()
    assert recorder.called == ["attention_qkv_fwd", "attention_qkv_bwd"]
    recorder.called.clear()
    ops.attention_qkv(qkv, 2).sum().backward()
    assert not recorder.called


def test_use_backend_nests(monkeypatch: pytest.MonkeyPatch, cpp: None) -> None:
    recorder, logits = Recorder(monkeypatch), randn(2, 5)
    with use_backend("reference"):
        with use_backend("cpp"):
            ops.sample(logits)
            with use_backend("reference"):
                ops.sample(logits)
            assert len(recorder.called) == 1
            with use_backend("auto"):
                ops.sample(logits)
        assert len(recorder.called) == 1
        ops.sample(logits)
        assert len(recorder.called) == 2
    ops.sample(logits)
    assert len(recorder.called) == 2


def test_use_backend_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    with pytest.raises(ValueError, match="top_k"), use_backend("reference"):
        ops.sample(randn(2, 5), top_k=0)
    ops.sample(randn(2, 5))
    assert not recorder.called


def test_use_backend_affects_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    logits, inside, done = randn(2, 5), threading.Event(), threading.Event()

    def other() -> None:
        with use_backend("reference"):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    ops.sample(logits)
    assert not recorder.called
    done.set()
    thread.join()
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: ops.sample(logits))
        thread.start()
        thread.join()
    assert not recorder.called


def test_use_backend_names() -> None:
    with pytest.raises(ValueError, match="auto, reference, cpp, triton, got 'cuda'"):
        use_backend("cuda")


def test_use_backend_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptfast.ops import backend

    monkeypatch.setattr(backend, "EXTENSION", None)
    monkeypatch.setattr(backend, "MISSING", "there is no compiler g++; run it again")
    with pytest.raises(RuntimeError, match="'cpp' is missing: there is no compiler g.*again$"):
        use_backend("cpp")
    monkeypatch.setattr(backend, "TRITON_MISSING", "triton is not installed")
    with pytest.raises(RuntimeError, match="'triton' is missing: triton is not installed"):
        use_backend("triton")


def test_use_backend_cpp_takes_cpu_tensors_only(cpp: None) -> None:
    with use_backend("cpp"), pytest.raises(ValueError, match="'cpp' needs CPU tensors.*meta"):
        ops.sample(torch.zeros(2, 5, device="meta"))


def test_use_backend_is_refused_inside_compile() -> None:
    def inside(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return ops.cross_entropy(x, torch.tensor([1, 2]))

    torch._dynamo.reset()
    with pytest.raises(Exception, match="eager mode only|use_backend"):
        torch.compile(inside, fullgraph=True, backend="eager")(randn(2, 5))


def test_isa_levels(cpp: None) -> None:
    before = EXTENSION.build_info()["isa"]
    for level in ENGINE_LEVELS:
        EXTENSION.set_isa(level)
        assert EXTENSION.build_info()["isa"] == level
    with pytest.raises(ValueError, match="'sse9'"):
        EXTENSION.set_isa("sse9")
    assert EXTENSION.build_info()["isa"] == ENGINE_LEVELS[-1]
    EXTENSION.set_isa(before)
    assert EXTENSION.build_info()["openmp"]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


IMPORT = "from gptfast.ops.library import EXTENSION; print(EXTENSION.build_info()['isa'])"


def test_gptfast_isa(cpp: None) -> None:
    for level in (ENGINE_LEVELS[0], ENGINE_LEVELS[-1]):
        assert python(IMPORT, GPTFAST_ISA=level).stdout.strip() == level
    assert python(IMPORT, GPTFAST_ISA="").stdout.strip() == ENGINE_LEVELS[-1]


def test_gptfast_isa_of_another_machine(cpp: None) -> None:
    """Importing works; the first kernel raises; the reference needs no level."""
    code = """
import torch
from gptfast import ops, use_backend
from gptfast.ops.adamw import grad_norm
logits, target = torch.zeros(2, 4), torch.tensor([1, 2])
with use_backend("reference"):
    print(ops.cross_entropy(logits, target).item())
print(ops.cross_entropy(logits, target).item())
"""
    result = python(code, GPTFAST_ISA="sve2")
    assert result.returncode != 0 and result.stdout == "1.3862943649291992\n"
    assert "Warning" not in result.stderr
    assert (
        f"'sve2' is not one this CPU has (unset GPTFAST_ISA or choose one of: {ENGINE_LEVELS[0]}"
        in result.stderr.splitlines()[-1]
    )


def test_the_kernels_read_the_settings_of_this_torch(cpp: None) -> None:
    """They are no part of PyTorch's stable interface: csrc/torch_settings.cpp has their names."""
    assert EXTENSION.build_info()["unknown_settings"] == []


def test_errors_of_a_reference_reach_who_called_it(cpp: None) -> None:
    """C++ kernels call it for float64. Its error is that of this call, and of no later one."""
    embed = torch.ops.gptfast.embedding_fwd
    weight, there = torch.randn(4, 8, dtype=torch.float64), torch.tensor([1])
    traced = torch.jit.trace(lambda w, i: embed(w, i), (weight, there))
    with pytest.raises(RuntimeError, match=r"IndexError: .*\[0, 4\)"):  # the only kind it raises
        traced(weight, torch.tensor([9]))
    assert torch.equal(embed(weight, there), weight[1:2])
    with pytest.raises(IndexError, match=r"\[0, 4\)"):
        embed(weight, torch.tensor([9]))


def test_a_reference_is_interrupted(cpp: None) -> None:
    logits = torch.randn(64, 5000, dtype=torch.float64)
    targets = torch.zeros(64, dtype=torch.int64)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                torch.ops.gptfast.cross_entropy_fwd(logits, targets, -100, 0.0, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_errors_in_a_parallel_region_keep_their_type(cpp: None) -> None:
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, got Int"):
        grad_norm([torch.ones(4, dtype=torch.int32)])


def test_accumulating_products_copy_nothing(cpp: None) -> None:
    """PyTorch's own product adds to its result where that stands."""
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    EXTENSION.set_matmul_provider("library")
    try:
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiled:
            torch.ops.gptfast.linear_fwd(x, None, None, 0.0, weight, None, x, None)
    finally:
        EXTENSION.set_matmul_provider(PRODUCTS)
    counts = {event.key: event.count for event in profiled.key_averages()}
    assert counts["aten::copy_"] == 1  # of the residual


def test_an_old_torch_is_refused_in_one_line() -> None:
    old = "import torch; torch.__version__ = '2.9.1+cpu'; import gptfast"
    last = python(old).stderr.splitlines()[-1]
    assert last == (
        "ImportError: gptfast needs torch 2.11 or newer, got 2.9.1+cpu; run pip install -U torch"
    )
    for version in ("2.11.0a0+git1234", "2.11.0", "2.13.0+cpu", "3.0.0.dev20270101", "nightly"):
        check_version(version)


def test_the_versions_of_torch_are_the_same_everywhere() -> None:
    """What is refused, declared, tested by `make test-torch` and told to readers agrees."""
    root = Path(__file__).parents[1]
    oldest = ".".join(map(str, OLDEST_TORCH))
    project = (root / "pyproject.toml").read_text("utf-8")
    assert re.findall(r'"torch>=(.*?)"', project) == [oldest]
    told = r"# `make test` runs the tests with (\S+), `make test-torch` with (\S+) and (\S+) "
    usual, *others = re.search(told, project).groups()
    make = (root / "Makefile").read_text("utf-8")
    assert re.search(r"^TORCHES \?= (.*)$", make, re.MULTILINE)[1].split() == others
    assert re.search(r"^TORCH \?= (.*)$", make, re.MULTILINE)[1] == usual
    short = [version.rpartition(".")[0] for version in (usual, *others)]
    readme = (root / "README.md").read_text("utf-8")
    assert f"# {oldest} or newer" in readme and short[1] == oldest
    told = "torch {} and Python 3.11, in part with torch {} and {}"
    assert told.format(*short) in " ".join(readme.split())


def test_missing_extension_says_so_once() -> None:
    code = """
import sys
sys.modules["gptfast._C"] = None
import torch
from gptfast import ops
torch.manual_seed(0)
x, w = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8)
for _ in range(3):
    loss = ops.linear_cross_entropy(x, w, torch.arange(6))
    loss.backward()
q = torch.randn(1, 2, 5, 4)
out = ops.attention(q, q, q)
expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
torch.testing.assert_close(out, expected)
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x @ w.T, torch.arange(6)))
print(ops.sample(torch.eye(3), temperature=0).tolist())
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[0, 1, 2]"
    assert result.stderr.count("\n") == 1, result.stderr
    assert "no C++ kernels" in result.stderr and "reference" in result.stderr


LOOPS = sorted((Path(__file__).parent.parent / "csrc").glob("*_loops.cpp"))


@pytest.mark.parametrize("loops", LOOPS, ids=lambda path: path.stem)
def test_levels_share_no_symbol(loops: Path, tmp_path: Path) -> None:
    # The linker keeps one copy of a weak symbol for all levels; this CPU may be unable to run it.
    compiler = (sysconfig.get_config_var("CXX") or "g++").split()[0]
    if not (shutil.which(compiler) and shutil.which("nm")):
        pytest.skip("needs a C++ compiler and nm")
    level = "avx2" if "avx2" in ENGINE_LEVELS else "generic"
    flags = ["-mavx2", "-mfma", "-mf16c"] if level == "avx2" else []
    target = tmp_path / "loops.o"
    command = [compiler, "-std=c++20", "-O0", "-w", *flags, f"-DGPTFAST_LEVEL={level}", "-c"]
    subprocess.run([*command, loops, "-o", target], check=True)
    listed = subprocess.run(
        ["nm", "-C", "--defined-only", target], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    symbols = [line.split(maxsplit=2)[1:] for line in listed]
    assert symbols
    shared = [
        name for kind, name in symbols if kind in "TWVuBDR" and f"gptfast::{level}::" not in name
    ]
    assert not [name for name in shared if not name.startswith("DW.ref.")]
