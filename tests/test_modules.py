"""Test that GPT's modules are real: hooks run, and what takes a module's place is what computes."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import make_trainer, random_ids, random_model, tiny_config
from parity import assert_parity
from seeds import shifted
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import gptfast
from gptfast import GPT, Engine, TrainConfig, Trainer
from gptfast.engine.choice import dtype_to_pack
from gptfast.evaluate import token_losses
from gptfast.generate import stream
from gptfast.generation.sequences import model_to_call
from gptfast.model import foreign_part
from gptfast.ops.backend import EXTENSION

needs_engine = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
Change = Callable[[GPT], object]
# A step in float64 differs from PyTorch's by some roundings of 2^-53; a wrong term would be larger.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def in_pytorch(model: GPT, idx: Tensor) -> Tensor:
    """Return the logits by calling the model's modules as a plain GPT-2 in PyTorch does."""
    B, T = idx.shape
    x = model.drop(model.wte(idx) + model.wpe(torch.arange(T)))
    for block in model.h:
        attn, mlp = block.attn, block.mlp
        q, k, v = (
            y.view(B, T, attn.n_head, -1).transpose(1, 2)
            for y in attn.c_attn(block.ln_1(x)).chunk(3, dim=2)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + attn.drop(attn.c_proj(out.transpose(1, 2).reshape(B, T, -1)))
        hidden = F.gelu(mlp.c_fc(block.ln_2(x)), approximate="tanh")
        x = x + mlp.drop(mlp.c_proj(hidden))
    x = model.ln_f(x)
    return F.linear(x, model.wte.weight) if model.config.tie_weights else model.lm_head(x)


def loss_in_pytorch(model: GPT, idx: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(in_pytorch(model, idx).flatten(0, 1), target.flatten())


class LoRA(nn.Module):
    """An adapter as peft's: it has its base's weight and bias as properties."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        make = torch.Generator().manual_seed(5)
        self.A = nn.Parameter(torch.randn(4, base.in_features, generator=make) * 0.1)
        self.B = nn.Parameter(torch.randn(base.out_features, 4, generator=make) * 0.1)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.A.T @ self.B.T


class Scaled(nn.Module):
    """A norm with the attributes of nn.LayerNorm and another function."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Int8(nn.Module):
    """A linear layer with its weight in integers, under another name."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", base.weight.detach().abs().amax() / 127)
        self.register_buffer("codes", (base.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes * self.scale, self.bias)


class Quantized(nn.Linear):
    """A linear layer whose weight is stored packed in another shape, as bitsandbytes does it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.bias = base.bias
        self.weight = nn.Parameter(base.weight.detach().reshape(-1, 1) * 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, self.in_features) / 2
        return F.linear(x, weight, self.bias)


class Doubled(nn.Parameter):
    """A parameter that stands for twice its values, as those of torchao and GGUF for others."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                args = (args[0], args[1].as_subclass(Tensor) * 2, *args[2:])
            return func(*args, **(kwargs or {}))


def replaced(name: str, make: Callable[[Any], nn.Module]) -> Change:
    return lambda model: model.set_submodule(name, make(model.get_submodule(name)))


def on(name: str, change: Callable[[Any], object]) -> Change:
    return lambda model: change(model.get_submodule(name))


def without_bias(layer: nn.Linear) -> None:
    layer.bias = None


def with_own_forward(layer: nn.Module) -> None:
    layer.forward = lambda x: F.linear(x, layer.weight * 3, layer.bias)  # type: ignore[method-assign]


def doubled(layer: nn.Linear) -> None:
    layer.weight = Doubled(layer.weight.detach(), requires_grad=False)


def pruned_for_good(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")


def every_linear(wrap: Callable[[Any], object]) -> Change:
    def change(model: GPT) -> None:
        for module in list(model.modules()):
            if type(module) is nn.Linear:
                wrap(module)

    return change


def weight_as_buffer(layer: nn.Linear) -> None:
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)


# What can happen to a model, by name.
CHANGES: dict[str, Change] = {
    "utils.weight_norm-c_fc": on("h.0.mlp.c_fc", torch.nn.utils.weight_norm),
    "utils.weight_norm-all": every_linear(torch.nn.utils.weight_norm),
    "utils.spectral_norm-c_attn": on("h.0.attn.c_attn", torch.nn.utils.spectral_norm),
    "utils.spectral_norm-all": every_linear(torch.nn.utils.spectral_norm),
    "utils.weight_norm-wte": on("wte", torch.nn.utils.weight_norm),
    "prune-c_fc": on("h.0.mlp.c_fc", lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "prune-bias": on("h.1.mlp.c_proj", lambda m: prune.l1_unstructured(m, "bias", 0.5)),
    "prune-all": every_linear(lambda m: prune.random_unstructured(m, "weight", 0.3)),
    "prune-removed": on("h.1.attn.c_proj", pruned_for_good),
    "weight_norm": on("h.1.mlp.c_proj", parametrizations.weight_norm),
    "weight_norm-all": every_linear(parametrizations.weight_norm),
    "spectral_norm": on("h.0.attn.c_proj", parametrizations.spectral_norm),
    "orthogonal": on("h.0.mlp.c_fc", parametrizations.orthogonal),
    "weight_norm-wte": on("wte", parametrizations.weight_norm),
    "lora-c_attn": replaced("h.0.attn.c_attn", LoRA),
    "lora-c_proj": replaced("h.1.mlp.c_proj", LoRA),
    "norm": replaced("h.0.ln_1", Scaled),
    "rms-norms": lambda m: [replaced(f"h.{i}.ln_2", lambda _: nn.RMSNorm(24))(m) for i in (0, 1)],
    "no-affine": replaced("h.1.ln_1", lambda _: nn.LayerNorm(24, elementwise_affine=False)),
    "norm-without-bias": replaced("h.1.ln_2", lambda _: nn.LayerNorm(24, bias=False)),
    "another-ln_f": replaced("ln_f", lambda _: nn.Identity()),
    "no-c_fc-bias": on("h.0.mlp.c_fc", without_bias),
    "no-c_proj-biases": every_linear(without_bias),
    "int8": replaced("h.0.mlp.c_proj", Int8),
    "packed": replaced("h.1.attn.c_attn", Quantized),
    "tensor-subclass": on("h.0.attn.c_proj", doubled),
    "own-forward": on("h.0.mlp.c_fc", with_own_forward),
    "buffer": on("h.1.mlp.c_fc", weight_as_buffer),
    "padding_idx": replaced("wte", lambda m: nn.Embedding(61, 24, 5, _weight=m.weight.detach())),
    "max_norm": replaced(
        "wte", lambda m: nn.Embedding(61, 24, max_norm=0.5, _weight=m.weight.detach())
    ),
    "scale_grad": replaced(
        "wte",
        lambda m: nn.Embedding(61, 24, scale_grad_by_freq=True, _weight=m.weight.detach().clone()),
    ),
    "identity-drop": replaced("h.0.attn.drop", lambda _: nn.Identity()),
    "pre-hook": on("h.0.ln_2", lambda m: m.register_forward_pre_hook(lambda _, x: (x[0] * 2,))),
}
UNTIED: dict[str, Change] = {
    "head-weight_norm": on("lm_head", torch.nn.utils.weight_norm),
    "head-lora": replaced("lm_head", LoRA),
    "head-bias": replaced("lm_head", lambda _: nn.Linear(24, 61)),
    "head-int8": replaced("lm_head", Int8),
    "wte-module": replaced("wte", lambda m: nn.Sequential(m, nn.Linear(24, 24))),
}
CASES = [(name, True) for name in CHANGES] + [(name, False) for name in CHANGES | UNTIED]


def changed_model(name: str, tied: bool, dtype: torch.dtype = torch.float64) -> GPT:
    """Return one and the same model at each call, with a change."""
    torch.manual_seed(shifted(7))
    model = random_model(tie_weights=tied).to(dtype)
    torch.manual_seed(shifted(8))
    (CHANGES | UNTIED)[name](model)
    return model.to(dtype)


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_trains_as_in_pytorch(name: str, tied: bool) -> None:
    """Several steps of a changed model are those of the same modules, called one by one."""
    idx, target = random_ids(3, 16), random_ids(3, 16, seed=2)
    target[0, 3:9] = -100
    losses: list[list[float]] = []
    models = changed_model(name, tied), changed_model(name, tied)
    for model, loss_of in zip(models, (GPT.__call__, loss_in_pytorch), strict=True):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(model, idx, target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*map(torch.tensor, losses), **EXACT)
    assert losses[0][-1] < losses[0][0]
    for (p, ours), (_, theirs) in zip(*(m.named_parameters() for m in models), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT, msg=lambda m, n=p: f"{n}: {m}")
    with torch.no_grad():
        ours, theirs = models[0].eval()(idx), in_pytorch(models[1].eval(), idx)
        torch.testing.assert_close(ours, theirs, **EXACT)
        losses_of_tokens = token_losses(models[0], idx, target).double()
        wanted = F.cross_entropy(theirs.transpose(1, 2), target, reduction="none")
        torch.testing.assert_close(losses_of_tokens, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_parity_in_fp32(name: str, tied: bool) -> None:
    idx = random_ids(4, 16)
    with torch.no_grad():
        out = changed_model(name, tied, torch.float32).eval()(idx)
        pt = in_pytorch(changed_model(name, tied, torch.float32).eval(), idx)
        ref = in_pytorch(changed_model(name, tied, torch.float32).double().eval(), idx)
    assert_parity("logits", out, ref, pt)


def recomputed(model: GPT, prompt: list[int], n: int) -> list[int]:
    """Return the prompt with n greedy tokens, each from a forward of the whole context."""
    ids = list(prompt)
    for _ in range(n):
        logits = model(torch.tensor([ids[-model.config.block_size :]]))
        ids.append(int(logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_cached_generation_is_recomputation(name: str, tied: bool) -> None:
    """It also goes on past block_size, and packs nothing that it must not."""
    model = changed_model(name, tied).eval()
    prompts = [[3, 9, 27, 4], [5], [8, 1, 2]]
    with torch.no_grad():
        model.wte(torch.arange(61))  # max_norm changes the rows when they are first read
        wanted = [recomputed(model, prompt, 17) for prompt in prompts]
    assert gptfast.generate(model, prompts, 17, temperature=0.0) == wanted
    assert gptfast.generate(model, prompts[:1], 3, temperature=0.0)[0] == wanted[0][:7]


UNCHANGED = ("prune-removed", "scale_grad", "padding_idx")  # the weights say it all


@needs_engine
@pytest.mark.parametrize(("name", "tied"), CASES)
def test_the_engine_and_files_refuse_what_they_would_leave_out(
    name: str, tied: bool, tmp_path: Path
) -> None:
    model = changed_model(name, tied, torch.float32).eval()
    if name in UNCHANGED:
        assert foreign_part(model) is None and dtype_to_pack(model, 100) == "fp32"
        prompts = [[3, 9], [5]]
        wanted = [recomputed(model, prompt, 5) for prompt in prompts]
        assert Engine(model).generate(prompts, 5, temperature=0.0) == wanted
        return
    assert dtype_to_pack(model, 100) is None
    with pytest.raises(ValueError, match="the engine takes an unchanged gptfast.GPT, but .*; "):
        Engine(model)
    if name in ("pre-hook", "own-forward"):  # no file has those, and none promises to
        model.save_pretrained(tmp_path)
        assert torch.equal(GPT.from_pretrained(tmp_path).wte.weight, model.wte.weight)
        return
    with pytest.raises(ValueError, match="a saved model holds the weights of a GPT alone, but .*;"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    loader = make_trainer(tmp_path / "other").train_loader
    with pytest.raises(ValueError, match="a saved model holds the weights of a GPT alone, but .*;"):
        Trainer(model, TrainConfig(out=str(tmp_path / "run"), max_steps=1), loader, loader)


@needs_engine
def test_refusals_name_the_module_and_the_remedy() -> None:
    model = random_model()
    model.h[1].attn.c_proj = LoRA(model.h[1].attn.c_proj)
    with pytest.raises(ValueError, match=r"h.1.attn.c_proj is a test_modules.LoRA; merge it"):
        Engine(model)
    hooked = random_model()
    hooked.h[0].ln_2.register_full_backward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"h.0.ln_2 has a hook .*remove it, or generate with the"):
        Engine(hooked)
    for other in (nn.Linear(2, 2), nn.Sequential(random_model())):
        with pytest.raises(ValueError, match="but the model is a torch.nn.modules"):
            Engine(other)  # type: ignore[arg-type]


def leaves(model: GPT) -> list[str]:
    """Return the names of all modules that a forward runs: nobody calls a ModuleList."""
    return [n for n, m in model.named_modules() if not isinstance(m, nn.ModuleList)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["plain", "dropout"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_hook_runs_once(tied: bool, dropout: float, training: bool) -> None:
    """One at a time, so that no other hook can send the block on its plain path, then together."""
    model = random_model(tie_weights=tied, dropout=dropout).train(training)
    idx, target, names = random_ids(2, 16), random_ids(2, 16, seed=2), leaves(model)

    def runs(hooked: list[str]) -> dict[str, Counter]:
        found = {kind: Counter() for kind in ("pre", "forward", "backward_pre", "backward")}
        handles = []
        for name in hooked:
            module = model.get_submodule(name)

            def count(kind: str, name: str = name) -> Callable[..., None]:
                return lambda *_: found[kind].update([name])

            handles += [
                module.register_forward_pre_hook(count("pre")),
                module.register_forward_hook(count("forward")),
                module.register_full_backward_pre_hook(count("backward_pre")),
                module.register_full_backward_hook(count("backward")),
            ]
        model(idx, target).backward()
        for handle in handles:
            handle.remove()
        return found

    for hooked in [*([name] for name in names), names]:
        for kind, found in runs(hooked).items():
            assert found == Counter(hooked), f"{kind}: {hooked}"


@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_one_kind_of_hook_is_enough(kind: str) -> None:
    model, idx, target = random_model(tie_weights=False), random_ids(2, 9), random_ids(2, 9, seed=2)
    for name in leaves(model):
        ran: list[str] = []
        module = model.get_submodule(name)
        handle = getattr(module, f"register_{kind}")(lambda *_, n=name, r=ran: r.append(n))
        model(idx, target).backward()
        handle.remove()
        assert ran == [name]


def test_hooks_on_all_modules_see_every_module() -> None:
    model = random_model(tie_weights=False)
    seen = Counter()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.update([type(m)]))
    try:
        model(random_ids(1, 5))
        assert dtype_to_pack(model, 100) is None
    finally:
        handle.remove()
    types = Counter(type(m) for m in model.modules() if not isinstance(m, nn.ModuleList))
    assert seen == types


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_hook_changes_the_output_as_in_pytorch(tied: bool) -> None:
    idx, target = random_ids(2, 11), random_ids(2, 11, seed=2)
    model = random_model(tie_weights=tied).double()
    base, parts = model(idx), (gptfast.model.Attention, gptfast.model.MLP)
    for name in leaves(model):
        module = model.get_submodule(name)
        handle = module.register_forward_hook(lambda _, __, out: out.flip(-1))
        out = model(idx)
        assert (out - base).abs().max() > 1e-3, name
        # Those that hold others are called by GPT alone.
        if not isinstance(module, (GPT, gptfast.model.Block, *parts)):
            torch.testing.assert_close(out, in_pytorch(model, idx), **EXACT)
            ours = torch.autograd.grad(model(idx, target), list(model.parameters()))
            plain = torch.autograd.grad(loss_in_pytorch(model, idx, target), model.parameters())
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, b, **EXACT)
        handle.remove()
        assert torch.equal(model(idx), base), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["plain", "dropout"])
def test_without_hooks_the_model_is_the_fused_one_again(dtype: torch.dtype, dropout: float) -> None:
    def result(model: GPT) -> list[Tensor]:
        torch.manual_seed(shifted(3))
        model.zero_grad()
        loss = model(random_ids(2, 16), random_ids(2, 16, seed=2))
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    model = random_model(dropout=dropout).to(dtype).train()
    before = result(model)
    handles = [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    prune.identity(model.h[0].mlp.c_fc, "weight")
    result(model)
    prune.remove(model.h[0].mlp.c_fc, "weight")
    for handle in handles:
        handle.remove()
    after = dict(zip([n for n, _ in model.named_parameters()], result(model)[1:], strict=True))
    names = [n for n, _ in random_model().named_parameters()]  # pruning moves a name to the end
    assert all(torch.equal(after[n], b) for n, b in zip(names, before[1:], strict=True))


def test_a_replaced_class_method_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model, idx = random_model(), random_ids(2, 7)
    base = model(idx)
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: x * self.weight)
    assert not torch.equal(model(idx), base)
    torch.testing.assert_close(model(idx), in_pytorch(model, idx))
    monkeypatch.undo()
    assert torch.equal(model(idx), base)


def test_dropout_modules_have_the_say() -> None:
    """They may be in training while the model is not (Monte Carlo dropout), and the other way."""
    model, idx = random_model(dropout=0.5).eval(), random_ids(2, 16)
    base = model(idx)
    for block in model.h:
        block.attn.drop.train()
    assert not torch.equal(model(idx), base)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert torch.equal(model(idx), base)


def neftune(alpha: float) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    """Return a hook that adds NEFTune's noise (Jain et al., 2023) to an embedding in training."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        size = alpha / (out.shape[1] * out.shape[2]) ** 0.5
        return out + torch.zeros_like(out).uniform_(-size, size) if module.training else None

    return hook


def test_neftune() -> None:
    def transformers_own(wte: Any) -> None:
        from transformers.integrations.neftune import neftune_post_forward_hook

        wte.neftune_noise_alpha = 5.0
        wte.register_forward_hook(neftune_post_forward_hook)

    idx, target = random_ids(2, 16), random_ids(2, 16, seed=2)
    plain = random_model().double()
    for attach in (lambda wte: wte.register_forward_hook(neftune(5.0)), transformers_own):
        model = random_model().double().train()
        attach(model.wte)
        losses = []
        for loss_of in (GPT.__call__, loss_in_pytorch):
            torch.manual_seed(shifted(11))
            losses.append(loss_of(model, idx, target))
        torch.testing.assert_close(*losses, **EXACT)
        assert abs(losses[0] - plain(idx, target)) > 1e-6
        assert torch.equal(model.eval()(idx), plain.eval()(idx))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast-checkpointed"])
def test_compiles_whole(autocast: bool) -> None:
    def hooked(model: GPT) -> None:
        model.wte.register_forward_hook(lambda _, __, out: out * 1.1)
        model.lm_head.register_forward_hook(lambda _, __, out: out.tanh())
        model.h[1].mlp.c_fc.register_forward_pre_hook(lambda _, x: (x[0] + 0.1,))

    changes: list[Change] = [lambda model: None, hooked, UNTIED["head-lora"]]
    changes += [CHANGES[n] for n in ("lora-c_attn", "norm", "weight_norm")]
    for change in changes:
        torch._dynamo.reset()
        model = random_model(tie_weights=False)
        change(model)
        model.activation_checkpointing = autocast
        results = []
        for f in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = f(random_ids(2, 16), random_ids(2, 16, seed=2))
            loss.backward()
            results.append([loss, *(p.grad.clone() for p in model.parameters())])
        for ours, compiled in zip(*results, strict=True):
            torch.testing.assert_close(ours, compiled)


def test_what_replaces_a_module_after_compilation_takes_part() -> None:
    torch._dynamo.reset()
    model, idx = random_model(), random_ids(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = compiled(idx)
    model.h[0].attn.c_attn = LoRA(model.h[0].attn.c_attn)
    torch.testing.assert_close(compiled(idx), model(idx))
    assert not torch.equal(compiled(idx), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpointing_changes_nothing(dtype: torch.dtype) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(shifted(2))
        model = random_model(dropout=0.2).train()
        model.h[0].attn.c_attn = LoRA(model.h[0].attn.c_attn)
        model.h[1].ln_2.register_forward_hook(lambda _, __, out: out * 2)
        model.to(dtype).activation_checkpointing = checkpointing
        model(random_ids(2, 16), random_ids(2, 16, seed=2), seed=3).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_quantize_dynamic() -> None:
    from torch.ao.quantization import quantize_dynamic

    model = random_model(tie_weights=False).eval()
    quantized, idx = quantize_dynamic(model, {nn.Linear}, torch.qint8), random_ids(2, 16)
    with torch.no_grad():
        out, wanted = quantized(idx), model(idx)
        torch.testing.assert_close(out, in_pytorch(quantized, idx), rtol=1e-3, atol=1e-3)
    # Each of the 9 products rounds inputs and weights to 8 bits.
    assert 0 < (out - wanted).norm() < 9 * 2**-7 * wanted.norm()
    assert gptfast.generate(quantized, [[1, 2], [3]], 17, temperature=0.0)
    assert token_losses(quantized, idx, idx).shape == idx.shape


def test_a_tied_head_is_not_replaced_silently() -> None:
    model, idx = random_model(), random_ids(1, 5)
    model.lm_head = nn.Linear(24, 61)
    for use in (model, lambda idx: model(idx, idx), lambda idx: gptfast.generate(model, idx, 2)):
        with pytest.raises(ValueError, match="lm_head was set, but .*tie_weights=False"):
            use(idx)
    del model.lm_head
    model(idx)
    model.wte = nn.Sequential(model.wte)
    with pytest.raises(
        ValueError, match="tied to wte, but a Sequential has no .*tie_weights=False"
    ):
        model(idx)


def test_target_of_another_shape_with_a_called_head() -> None:
    model = random_model(tie_weights=False)
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"target must be int64 of shape .*2, 16.*4, 8"):
        model(random_ids(2, 16), random_ids(4, 8))


def test_hooks_of_the_whole_model_run_in_generation() -> None:
    """Each step then calls the model, and so does a search, past block_size too."""
    model = random_model().eval()

    def only_7(_: nn.Module, args: Any, logits: Tensor) -> Tensor:
        return torch.full_like(logits, -20.0).index_fill_(-1, torch.tensor(7), 5.0)

    handle = model.register_forward_hook(only_7)
    assert gptfast.generate(model, [[1], [2, 3]], 17) == [[1] + [7] * 17, [2, 3] + [7] * 17]
    assert gptfast.generate(model, [[1]], 3, num_beams=2) == [[1, 7, 7, 7]]
    assert list(stream(model, [4], 3)) == [7, 7, 7]
    for wrapped in (torch.compile(model), nn.Sequential(model)):  # its hooks, not the wrapper's
        assert model_to_call(wrapped) is model
    sevens = torch.full((1, 4), 7)
    assert token_losses(model, sevens, sevens).max() < 1e-6
    handle.remove()
    assert gptfast.generate(model, [[1]], 17, temperature=0.0) != [[1] + [7] * 17]
    assert model_to_call(model) is model_to_call(torch.compile(model)) is None


# peft.


def adapted(targets: Any, **changes: Any) -> tuple[Any, Any]:
    """Return a model with peft's LoRA on it, and peft."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(shifted(0))
    config = peft.LoraConfig(target_modules=targets, r=4, lora_alpha=16, lora_dropout=0.1)
    return peft.get_peft_model(GPT(tiny_config(n_embd=32, **changes)), config), peft


@pytest.mark.parametrize(
    ("targets", "tied"),
    [
        (["c_attn"], True),
        (["c_attn", "c_proj", "c_fc"], True),
        ("all-linear", False),
        (["wte"], False),
        (["lm_head"], False),
        (["wte", "c_fc", "lm_head"], False),
    ],
    ids=str,
)
def test_peft(targets: Any, tied: bool, tmp_path: Path) -> None:
    wrapped, peft = adapted(targets, tie_weights=tied)
    model, idx, target = wrapped.get_base_model(), random_ids(4, 16), random_ids(4, 16, seed=2)
    with wrapped.disable_adapter(), torch.no_grad():
        base = wrapped.eval()(idx)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    frozen = {n: p.clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = gptfast.AdamW(trained.values(), lr=1e-2)
    wrapped.train()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = wrapped(idx, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, frozen[n]) for n, p in wrapped.named_parameters() if n in frozen)

    with torch.no_grad():
        out = wrapped.eval()(idx)
    assert (out - base).abs().max() > 1e-2
    torch.testing.assert_close(out, in_pytorch(model, idx), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="is a peft.tuners.lora.*merge_and_unload"):
        model.save_pretrained(tmp_path / "model")
    wrapped.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(shifted(0))
    fresh = GPT(tiny_config(n_embd=32, tie_weights=tied))
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(loaded(idx), out)

    merged = wrapped.merge_and_unload()
    assert type(merged) is GPT and foreign_part(merged) is None
    torch.testing.assert_close(merged(idx), out, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(GPT.from_pretrained(tmp_path / "merged")(idx), merged(idx))
    assert len(gptfast.generate(merged, [[1, 2], [3]], 17)[0]) == 19


@needs_engine
def test_peft_generates_with_the_adapter() -> None:
    """The last token's row of the head grows so much that no rounding decides what is written."""
    wrapped, _ = adapted(["lm_head"], tie_weights=False)
    model = wrapped.get_base_model().eval()
    with torch.no_grad():
        model.ln_f.bias.fill_(1.0)
        model.lm_head.lora_A["default"].weight.fill_(1.0)
        model.lm_head.lora_B["default"].weight[42] = 5.0
    for decoder in (wrapped, model, Engine(copy.deepcopy(wrapped).merge_and_unload())):
        written = gptfast.generate(decoder, [[1, 2], [3]], 17, temperature=0.0)
        assert written == [[1, 2] + [42] * 17, [3] + [42] * 17]
    with pytest.raises(ValueError, match="lm_head is a peft.*merge_and_unload"):
        Engine(model)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_peft_compiles_in_bf16(checkpointing: bool) -> None:
    torch._dynamo.reset()
    wrapped, _ = adapted(["c_attn", "c_fc"])
    wrapped.bfloat16().eval().get_base_model().activation_checkpointing = checkpointing
    idx = random_ids(2, 16)
    results = []
    for f in (wrapped, torch.compile(wrapped, fullgraph=True, backend="aot_eager")):
        wrapped.zero_grad()
        loss = f(idx, idx)
        loss.backward()
        results.append([loss, *(p.grad for p in wrapped.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# The cache.


def test_the_cache_keeps_its_dtype() -> None:
    """Autocast's narrower keys are converted; wider ones, of modules of others, lose nothing."""
    model = random_model()
    for ragged in (False, True):
        cache = model.new_cache(2, 8)
        cache.ragged = ragged
        k, v = torch.randn(2, 2, 2, 3, 12).bfloat16()
        for got, given in zip(cache.append(0, k, v), (k, v), strict=True):
            assert torch.equal(got, given)
        assert cache.k[0].dtype == cache.v[0].dtype == torch.float32
        assert torch.equal(cache.k[0][:, :, :3], k.float())
        narrow = model.bfloat16().new_cache(2, 8)
        wide = torch.randn(2, 2, 3, 12)
        assert all(torch.equal(got, wide) for got in narrow.append(1, wide, wide))
        model.float()


def test_unequal_prompts_under_autocast() -> None:
    model = changed_model("lora-c_attn", True, torch.float32).eval()
    prompts = [[3, 9, 27], [5], [8, 1]]
    for m in (random_model().eval(), model):
        with torch.no_grad():
            m.ln_f.bias.copy_(m.wte.weight[9] * 100)  # far above what bf16 rounds
            for n in (3, 17):
                wanted = [prompt + [9] * n for prompt in prompts]
                with torch.autocast("cpu", torch.bfloat16):
                    assert gptfast.generate(m, prompts, n, temperature=0.0) == wanted
                    beams = gptfast.generate(m, prompts, n, num_beams=2)
                assert beams == wanted


def test_attention_gets_a_projection_of_any_strides() -> None:
    model, idx = random_model(), random_ids(2, 9)
    base = model(idx)
    transposed = lambda _, __, out: out.mT.contiguous().mT  # noqa: E731
    model.h[0].attn.c_attn.register_forward_hook(transposed)
    torch.testing.assert_close(model(idx), base)
    model(idx, idx).backward()
