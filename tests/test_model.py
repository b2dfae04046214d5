"""Test the model: equality with transformers', initialisation, dropout, compilation, errors."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, PRODUCTS
from helpers import (
    differing,
    parameters,
    random_ids,
    random_model,
    tiny_config,
)
from seeds import shifted
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptfast import GPT, AdamW, GPTConfig, ops, use_backend
from gptfast.ops.backend import EXTENSION

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# (changes to the tiny config, (B, T))
CONFIGS = {
    "full-context": ({}, (2, 16)),
    "one-token": ({}, (1, 1)),
    "odd-head": ({"n_embd": 30, "n_head": 3, "n_layer": 3, "vocab_size": 101}, (3, 13)),
    "one-head": ({"n_embd": 20, "n_head": 1, "n_layer": 1}, (2, 7)),
    "untied": ({"tie_weights": False}, (2, 16)),
    "no-qkv-bias": ({"qkv_bias": False}, (2, 11)),
    "long": ({"block_size": 150, "n_embd": 32}, (1, 129)),
}


def as_ours(name: str, tensor: Tensor) -> Tensor:
    """Return transformers' tensor in our orientation: its Conv1D keeps (in, out)."""
    return tensor.t() if name.endswith(CONV1D) else tensor


def assert_equal_models(ours: GPT, theirs: torch.nn.Module, B: int, T: int) -> None:
    """Check that logits, loss and every gradient agree to 1e-4."""
    V = ours.config.vocab_size
    idx, target = random_ids(B, T, vocab_size=V), random_ids(B, T, vocab_size=V, seed=2)
    if T > 1:
        target[0, 0] = -100
    logits = theirs(idx).logits
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    loss.backward()
    torch.testing.assert_close(ours(idx), logits, rtol=0, atol=1e-4)
    our_loss = ours(idx, target)
    our_loss.backward()
    assert abs(our_loss.item() - loss.item()) < 1e-4
    grads = {
        name.removeprefix("transformer."): as_ours(name, p.grad)
        for name, p in theirs.named_parameters()
    }
    if not ours.config.qkv_bias:
        grads = {name: g for name, g in grads.items() if not name.endswith("c_attn.bias")}
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(
            p.grad, grads[name], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers_after_save_pretrained(name: str, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    changes, (B, T) = CONFIGS[name]
    ours = random_model(**changes).eval()
    ours.save_pretrained(tmp_path)
    theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_equal_models(ours, theirs.eval(), B, T)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loads_what_transformers_wrote(tied: bool, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(shifted(3))
    config = GPT2Config(
        vocab_size=53, n_positions=20, n_embd=24, n_layer=2, n_head=3, tie_word_embeddings=tied
    )
    theirs = GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config == GPTConfig(53, 20, 2, 3, 24, dropout=0.1, tie_weights=tied)
    assert not ours.training
    assert_equal_models(ours, theirs, 2, 19)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameter_counts(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(preset))
    assert sum(p.numel() for p in model.parameters()) == count


def test_untied_head_and_no_qkv_bias_change_the_count() -> None:
    def count(**changes: bool) -> int:
        return sum(p.numel() for p in GPT(tiny_config(**changes)).parameters())

    assert count(tie_weights=False) - count() == 61 * 24
    assert count() - count(qkv_bias=False) == 2 * 3 * 24


def test_initialisation() -> None:
    torch.manual_seed(shifted(0))
    model = GPT(tiny_config(n_embd=64, n_layer=4, vocab_size=300, tie_weights=False))
    for name, p in model.named_parameters():
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            assert torch.equal(p, torch.ones_like(p)), name
        elif name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        else:
            std = 0.02 / math.sqrt(8) if name.endswith("c_proj.weight") else 0.02
            # Five standard errors of a normal sample's deviation and mean.
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def test_initial_loss_is_that_of_guessing() -> None:
    torch.manual_seed(shifted(0))
    model = GPT(tiny_config(vocab_size=1000))
    loss = model(random_ids(4, 16, vocab_size=1000), random_ids(4, 16, vocab_size=1000, seed=2))
    assert abs(loss.item() - math.log(1000)) < 0.1


def test_manual_seed_fixes_the_initialisation() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(shifted(seed))
        return parameters(GPT(tiny_config()))

    assert differing(drawn(1), drawn(1)) == []
    assert "wte.weight" in differing(drawn(1), drawn(2))


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, idx = random_model().eval(), random_ids(2, 16)
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % 61
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-3


def step(model: GPT, torch_seed: int, seed: int | None = None) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one training step under torch.manual_seed(torch_seed)."""
    torch.manual_seed(shifted(torch_seed))
    model.zero_grad()
    loss = model(random_ids(2, 16), random_ids(2, 16, seed=2), seed=seed)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_manual_seed_governs_dropout() -> None:
    model = random_model(dropout=0.3).train()
    loss, grads = step(model, 5)
    again, same_grads = step(model, 5)
    assert loss == again
    assert differing(grads, same_grads) == []
    assert step(model, 6)[0] != loss


def test_seed_argument_governs_attention_dropout() -> None:
    model = random_model(dropout=0.3).train()
    assert step(model, 5, seed=1)[0] == step(model, 5, seed=1)[0]
    # All other dropout is the same here; only the attention mask differs.
    assert step(model, 5, seed=1)[0] != step(model, 5, seed=2)[0]
    assert step(model.eval(), 5, seed=1)[0] == step(model, 6, seed=2)[0]


def test_layers_drop_different_attention_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    real = ops.attention_qkv

    def spy(qkv: Tensor, n_head: int, *, dropout_p: float, seed: int) -> Tensor:
        seeds.append((dropout_p, int(seed)))
        return real(qkv, n_head, dropout_p=dropout_p, seed=seed)

    monkeypatch.setattr(ops, "attention_qkv", spy)
    model = random_model(dropout=0.3, n_layer=3).train()
    model(random_ids(1, 4), seed=7)
    assert {p for p, _ in seeds} == {0.3}
    assert len({seed for _, seed in seeds}) == 3


def test_dropout_on_embedding_and_both_residual_branches() -> None:
    model = random_model(dropout=0.25, n_layer=3, n_embd=64).train()
    dropped = []

    def hook(module: torch.nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        dropped.append((out == 0).double().mean().item())
        kept = out != 0
        torch.testing.assert_close(out[kept], args[0][kept] / 0.75)

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(hook)
    torch.manual_seed(shifted(0))
    model(random_ids(8, 16))
    assert len(dropped) == 1 + 2 * 3
    # Five standard errors for 8 * 16 * 64 draws.
    assert max(abs(share - 0.25) for share in dropped) < 5 * math.sqrt(0.25 * 0.75 / 8192)


class HeadSized(TorchDispatchMode):
    """Record the addresses of operators' outputs that are as large as the head's weight."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.numel = model.wte.weight.numel()
        self.places = {model.wte.weight.data_ptr()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() >= 4 * self.numel:
                self.places.add(t.untyped_storage().data_ptr())
        return out


def test_a_step_makes_one_gradient_of_the_size_of_the_head() -> None:
    model = random_model(vocab_size=3001)
    idx, target = random_ids(2, 16), random_ids(2, 16, seed=2)
    with HeadSized(model) as seen:
        model(idx, target).backward()
    assert seen.places == {model.wte.weight.data_ptr(), model.wte.weight.grad.data_ptr()}
    # The next batch's gradient is added to the one that is there.
    with HeadSized(model) as seen:
        model(idx, target).backward()
    assert len(seen.places - {model.wte.weight.grad.data_ptr()}) == 2


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_are_those_of_plain_embedding(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tied: bool
) -> None:
    model = random_model(tie_weights=tied).to(dtype)
    _, grads = step(model, 0)
    monkeypatch.setattr(ops, "embedding", lambda idx, weight: (F.embedding(idx, weight), weight))
    _, plain = step(model, 0)
    for name in grads:
        if name != "wte.weight":
            assert torch.equal(grads[name], plain[name]), name
    # Up to two rows of a token are added with one rounding in either way.
    if not tied:
        few = random_ids(2, 16).flatten().bincount(minlength=61) <= 2
        assert torch.equal(grads["wte.weight"][few], plain["wte.weight"][few])
    # The two differ by a rounding of the rows' sum and one of the result.
    largest = plain["wte.weight"].abs().max().item()
    atol = 2 * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(grads["wte.weight"], plain["wte.weight"], rtol=0, atol=atol)


def test_hidden_gives_the_same_gradients_as_forward() -> None:
    model, idx, target = random_model(), random_ids(2, 16), random_ids(2, 16, seed=2)
    _, grads = step(model, 0)
    model.zero_grad()
    x = model.hidden(idx)
    ops.linear_cross_entropy(x, model.head_weight, target).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs g++")
def test_compiled_equals_eager() -> None:
    model = random_model(vocab_size=67)
    idx, target = random_ids(2, 16), random_ids(2, 16, seed=2)
    target[1, 3:] = -100
    eager = model(idx, target)
    eager.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)(idx, target)
    compiled.backward()
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["plain", "dropout"])
def test_backends_agree(dropout: float) -> None:
    model = random_model(dropout=dropout).train()
    results = []
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            results.append(step(model, 3))
    (loss, grads), (cpp_loss, cpp_grads) = results
    assert abs(loss - cpp_loss) < 1e-5
    for name in grads:
        torch.testing.assert_close(cpp_grads[name], grads[name], rtol=1e-4, atol=1e-5)


def train(model: GPT, f: Callable[..., Tensor], steps: int = 3) -> list[float]:
    """Return the losses of a few optimizer steps on one batch."""
    optimizer = AdamW(model.parameters(), lr=1e-2, max_norm=1.0)
    idx, target = random_ids(2, 13), random_ids(2, 13, seed=2)
    target[0, 0] = -100
    losses = []
    for i in range(steps):
        loss = f(idx, target, seed=torch.tensor(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.skipif(GPU, reason="on a GPU: bench/gpu.py")
def test_triton_trains_as_the_reference_does(triton: str) -> None:
    # Without biases: that of the keys has a gradient of 0, and Adam turns its roundings into steps.
    models = [random_model(std=0.1, dropout=0.2, qkv_bias=False).train() for _ in range(2)]
    losses = []
    for backend, model in zip(("reference", "triton"), models, strict=True):
        torch.manual_seed(shifted(5))
        with use_backend(backend):
            losses.append(train(model, model))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    ours, theirs = (dict(model.named_parameters()) for model in reversed(models))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_bf16_with_fp32_masters_trains_compiled() -> None:
    models = [random_model(std=0.1).bfloat16() for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    losses = train(models[0], compiled, 20)
    assert losses == train(models[1], models[1], 20)
    assert losses[-1] < losses[0] - 0.5


def test_a_step_never_waits_for_the_device() -> None:
    """The meta device holds no numbers, so a step that reads one would raise."""
    with torch.device("meta"):
        model = GPT(tiny_config(dropout=0.1)).bfloat16()
        optimizer = AdamW(model.parameters(), max_norm=1.0)
        idx, target = torch.randint(61, (2, 2, 16))
        for _ in range(2):
            model(idx, target).backward()
            optimizer.step()


def test_bf16_autocast_is_near_fp32() -> None:
    model = random_model()
    loss, grads = step(model, 0)
    with torch.autocast("cpu", torch.bfloat16):
        bf16_loss, bf16_grads = step(model, 0)
    # bf16 keeps 8 bits, so allow a few times 2^-8 of the logits' size.
    assert bf16_loss != loss
    assert abs(bf16_loss - loss) < 0.02 * loss
    for name, grad in grads.items():
        assert bf16_grads[name].dtype == torch.float32
        cosine = F.cosine_similarity(bf16_grads[name].flatten(), grad.flatten(), dim=0).item()
        assert cosine > 0.99, f"{name}: {cosine}"


def copied_shapes(model: GPT, idx: Tensor) -> set[tuple[int, ...]]:
    """Return the shapes of what is copied or cast in a step under bf16 autocast."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)
        loss.backward()
    copies = [e for e in profiler.events() if e.name in ("aten::copy_", "aten::_to_copy")]
    return {tuple(shape) for copy in copies for shape in copy.input_shapes}


@pytest.fixture
def own_products() -> Iterator[None]:
    """Multiply by our own kernels, whoever the other tests let multiply."""
    EXTENSION.set_matmul_provider("gptfast")
    yield
    EXTENSION.set_matmul_provider(PRODUCTS)


@pytest.mark.skipif(EXTENSION is None, reason="the C++ kernels round weights as they read them")
def test_bf16_autocast_copies_no_weight_on_the_cpu(own_products: None) -> None:
    # Large enough for products of our own, and no activation has the shape of a weight.
    model = random_model(n_embd=32, block_size=20)
    idx = random_ids(2, 20)
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    weights |= {shape[::-1] for shape in weights}
    assert not copied_shapes(model, idx) & weights
    with use_backend("reference"):
        assert copied_shapes(model, idx) & weights


def test_float64_model_runs_in_float64() -> None:
    model, idx = random_model(), random_ids(2, 16)
    single = model(idx, idx)
    double = model.double()(idx, idx)
    assert double.dtype == torch.float64
    assert 0 < abs(double.item() - single.item()) < 1e-5


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"\(5,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"\(1, 0\)"),
        (torch.zeros(1, 17, dtype=torch.int64), r"block_size=16, got \(1, 17\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"\(1, 2, 3\)"),
        (torch.zeros(1, 4), "float32"),
    ],
    ids=["one-dimension", "no-token", "too-long", "three-dimensions", "floats"],
)
def test_bad_idx(idx: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"idx must be .*{message}"):
        random_model()(idx)


@pytest.mark.parametrize("bad", [61, 5000, -1])
def test_ids_out_of_range(bad: int) -> None:
    with pytest.raises(IndexError, match=rf"\[0, 61\), got .*{bad}"):
        random_model()(torch.tensor([[1, bad, 2]]))


@pytest.mark.parametrize("bad", [61, 2**40, -1])
def test_targets_out_of_range(bad: int) -> None:
    with pytest.raises(IndexError, match=str(bad)):
        random_model()(torch.tensor([[1, 2, 3]]), torch.tensor([[1, bad, 2]]))


def test_target_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"target must be int64 of shape .*2, 16.*2, 15"):
        random_model()(random_ids(2, 16), random_ids(2, 15))


def mixed(name: str) -> object:
    """Call the model with inputs that differ in dtype or device."""
    x, w, y = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(3, dtype=torch.int64)
    q = torch.zeros(1, 2, 3, 8)
    calls = {
        "attention-dtype": lambda: ops.attention(q, q.bfloat16(), q),
        "attention-device": lambda: ops.attention(q, q.to("meta"), q),
        "cross-entropy-target-dtype": lambda: ops.cross_entropy(x, y.int()),
        "cross-entropy-device": lambda: ops.cross_entropy(x, y.to("meta")),
        "linear-cross-entropy-dtype": lambda: ops.linear_cross_entropy(x, w.bfloat16(), y),
        "linear-cross-entropy-device": lambda: ops.linear_cross_entropy(x, w.to("meta"), y),
        "sample-device": lambda: ops.sample(x, seed=y.to("meta")),
        "sample-dtype": lambda: ops.sample(y[:, None]),
    }
    return calls[name]()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attention-dtype", "bfloat16"),
        ("attention-device", "meta"),
        ("cross-entropy-target-dtype", "int32"),
        ("cross-entropy-device", "meta"),
        ("linear-cross-entropy-dtype", "bfloat16"),
        ("linear-cross-entropy-device", "meta"),
        ("sample-device", "meta"),
        ("sample-dtype", "int64"),
    ],
)
def test_mixed_dtypes_and_devices(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed(name)
