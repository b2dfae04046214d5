"""Test adapters beside a base in int8: parity, what is kept in memory, runs, files, refusals."""

import copy
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import differing, random_ids, random_model, without_speed
from seeds import torch_generator
from test_lora import ALL, CPU, base_and_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gptfast
from gptfast import GPT, TrainConfig
from gptfast.cli import main
from gptfast.cli.train_weights import load_adapted
from gptfast.lora import Int8Linear, LoRALinear, adapter_state, add_adapters, merge_adapters
from gptfast.model import empty_model
from gptfast.modules import attention_weights, mlp_weights
from gptfast.ops.int8_linear import quantize, widen
from gptfast.training.metrics import read_metrics
from gptfast.training.step import TrainStep
from gptfast.weights.adapter import AdapterConfig, fingerprint, read_tensors

BATCH = random_ids(3, 7), random_ids(3, 7, seed=2)


def is_rounded(name: str) -> bool:
    """Return whether a parameter of this name is one that int8 stands for."""
    return name.startswith("h.") and name.endswith(
        ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    )


def rounded(model: GPT) -> GPT:
    """Return a copy whose layers have the weights that their int8 form stands for."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_rounded(name):
                p.copy_(widen(*quantize(p), p.dtype))
    return model


def two_models(targets: tuple[str, ...], **changes: Any) -> tuple[GPT, GPT]:
    """Return a model with a base in int8, and one with what that stands for, of one adapter."""
    base = random_model(**changes)
    models = copy.deepcopy(base), rounded(base)
    for model, dtype in zip(models, ("int8", None), strict=True):
        add_adapters(model, AdapterConfig(3, 5.0, 0.0, targets), base_dtype=dtype)
        for i, values in enumerate(adapter_state(model).values()):
            values.normal_(std=0.2, generator=torch_generator(i))
    return models


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("targets", [("c_attn",), ("c_attn", "c_proj"), ("mlp.c_proj",), ALL])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_parity(
    qkv_bias: bool, targets: tuple[str, ...], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients are those of a model with the weights that the int8 ones stand for.

    They are the same bits where that model's layers are computed one by one too; test_lora.py and
    test_int8_linear.py hold both to the parity rule.
    """
    model, wide = two_models(targets, qkv_bias=qkv_bias)
    assert all(attention_weights(h.ln_1, h.attn._modules) for h in model.h)  # no module is called
    assert all(mlp_weights(h.ln_2, h.mlp._modules) for h in model.h)
    monkeypatch.setattr("gptfast.lora.Layer.is_plain", False)

    def of(model: GPT) -> dict[str, Tensor]:
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with gptfast.use_backend(kernels):
            loss = model(*BATCH)
            grads = torch.autograd.grad(loss, list(params.values()))
        return {"loss": loss.detach(), **dict(zip(params, grads, strict=True))}

    ours = of(model)
    assert not differing(ours, of(wide))
    assert all(x.abs().max() > 0 for x in ours.values())


def test_a_module_that_is_called_is_the_same() -> None:
    """With a hook, the layers are called one by one."""
    model, _ = two_models(("c_attn",))
    wanted = model(*BATCH).detach()
    called = []
    for block in model.h:
        block.mlp.c_fc.register_forward_hook(lambda *_: called.append(1))
        block.attn.c_attn.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(model(*BATCH).detach(), wanted)
    assert len(called) == 4


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_checkpointing": True}, {"lora_dropout": 0.3}, {"precision": "bf16"}],
    ids=str,
)
def test_steps_are_those_of_the_rounded_base(options: dict[str, Any]) -> None:
    """The same steps, beside a base in int8 and beside the weights that it stands for."""
    base, rows, states = random_model(std=0.1), [], []
    for model, dtype in ((copy.deepcopy(base), "int8"), (rounded(base), None)):
        config = TrainConfig(lora_rank=3, lora_targets=ALL, lora_base_dtype=dtype, **options)
        torch.manual_seed(3)
        step = TrainStep(model, config, CPU)
        rows.append([step.run([BATCH], 0.01) for _ in range(3)])
        states.append(adapter_state(model))
    ours, wanted = ([row["loss"] for row in r] for r in rows)
    assert wanted[2] < wanted[0]
    assert ours == wanted and not differing(*states)


def test_what_is_in_int8() -> None:
    """The matrices of the blocks' linear layers, with or without an adapter, and nothing else."""
    base = random_model()
    model = copy.deepcopy(base)
    add_adapters(model, AdapterConfig(2, targets=("c_attn",)), base_dtype="int8")
    before, after = base.state_dict(), model.state_dict()
    for name, values in before.items():
        if is_rounded(name):
            weight, scale = quantize(values)
            assert torch.equal(after[name], weight) and after[name].dtype == torch.int8
            assert torch.equal(after[f"{name}_scale"], scale)
        else:
            assert torch.equal(after[name], values) and after[name].dtype == values.dtype
    kinds = {name: type(m) for name, m in model.named_modules() if "weight" in m._parameters}
    assert {n for n, kind in kinds.items() if kind is LoRALinear} == {
        "h.0.attn.c_attn",
        "h.1.attn.c_attn",
    }
    assert sum(kind is Int8Linear for kind in kinds.values()) == 6
    assert {p.dtype for p in adapter_state(model).values()} == {torch.float32}
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert model.adapter is not None and model.adapter.fingerprint == fingerprint(before)


def test_a_base_of_16_bits() -> None:
    model = random_model().bfloat16()
    add_adapters(model, AdapterConfig(2), base_dtype="int8")
    assert {p.dtype for p in adapter_state(model).values()} == {torch.bfloat16}
    loss = model(*BATCH)
    loss.backward()
    torch.testing.assert_close(loss, rounded(random_model().bfloat16())(*BATCH), rtol=0.02, atol=0)
    assert all(x.grad is not None for n, x in model.named_parameters() if n.endswith("lora_B"))


class Wide(TorchDispatchMode):
    """Count the tensors of frozen weights' shapes that are made, and those that live at once."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.made, self.most = shapes, 0, 0
        self._refs: list[weakref.ref[torch.UntypedStorage]] = []

    def alive(self) -> int:
        self._refs = [ref for ref in self._refs if ref() is not None]
        return len(self._refs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                continue
            if tuple(x.shape) in self.shapes and x.untyped_storage().data_ptr() not in old:
                self.made += 1
                self._refs.append(weakref.ref(x.untyped_storage()))
        self.most = max(self.most, self.alive())
        return out


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("targets", [("c_attn",), ALL])
def test_no_wide_weight_outlives_its_product(targets: tuple[str, ...], recomputed: bool) -> None:
    """One layer's weight is wide at a time, in the forward and in the backward."""
    model, wide = two_models(targets)
    # No activation and no gradient of 3 x 7 tokens has one of these shapes.
    shapes = {tuple(p.shape) for name, p in wide.named_parameters() if is_rounded(name)}
    for m in (model, wide):
        m.activation_checkpointing = recomputed
    with Wide(shapes) as seen:
        loss = model(*BATCH)
        assert seen.made == 8 and seen.alive() == 0
        loss.backward()
        assert seen.alive() == 0 and seen.most == 1
        # c_attn of the first block has no gradient to pass on.
        assert seen.made >= 15
    if targets == ALL:  # else ops.mlp keeps less beside a wide base
        assert saved_bytes(model) <= saved_bytes(wide)


def saved_bytes(model: GPT) -> int:
    """Return the bytes that the graph of a forward keeps, each memory once, but no parameter's."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(t: Tensor) -> Tensor:
        memory = t.untyped_storage()
        if memory.data_ptr() not in own:
            kept[memory.data_ptr()] = memory.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(*BATCH)  # which holds what is kept, so that no address is used twice
    assert loss.requires_grad
    return sum(kept.values())


def test_a_base_is_never_wide_as_a_whole(tmp_path: Path) -> None:
    """Reading a base into int8 holds one wide matrix; a model that is there gives the same."""
    base = random_model(n_layer=4)
    base.save_pretrained(tmp_path / "base")
    shapes = {tuple(p.shape) for name, p in base.named_parameters() if is_rounded(name)}
    config = TrainConfig(lora_rank=2, lora_base_dtype="int8")
    model = empty_model(base.config)
    with Wide(shapes) as seen:
        load_adapted(model, tmp_path / "base", config)
        assert seen.made >= 16 and seen.most <= 4 and seen.alive() == 0
    assert model.adapter is not None
    assert model.adapter.fingerprint == fingerprint(base.state_dict())
    add_adapters(base, AdapterConfig(2), base_dtype="int8")
    state = model.state_dict()
    assert not [
        n for n, x in base.state_dict().items() if "lora" not in n and not torch.equal(x, state[n])
    ]


def test_an_adapter_is_for_the_base_that_is_not_rounded(tmp_path: Path) -> None:
    """Its files are as any other's: they are for the base's own weights, and merged into those."""
    base, out = base_and_run(tmp_path, lora_base_dtype="int8")
    _, other = base_and_run(tmp_path, name="other")
    last, of_other = (path / "checkpoints" / "step-00000004" for path in (out, other))
    ours, theirs = ((p / "adapter_config.json").read_text() for p in (last, of_other))
    assert json.loads(ours) == json.loads(theirs)
    assert read_tensors(last).keys() == read_tensors(of_other).keys()
    merged, alone = GPT.from_pretrained(out).state_dict(), GPT.from_pretrained(base).state_dict()
    parts = {name: t.read() for name, t in read_tensors(last).items()}
    name = "h.0.attn.c_attn"
    delta = 16 / 2 * parts[f"{name}.lora_B"] @ parts[f"{name}.lora_A"]
    assert delta.abs().max() > 0
    torch.testing.assert_close(merged[f"{name}.weight"] - alone[f"{name}.weight"], delta)


def test_peft_loads_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base, out = base_and_run(tmp_path, lora_base_dtype="int8", lora_targets=ALL)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(base).eval()
    adapted = peft.PeftModel.from_pretrained(theirs, out / "checkpoints/step-00000004")
    idx = random_ids(2, 16)
    with torch.no_grad():
        logits = adapted(idx).logits
        torch.testing.assert_close(logits, GPT.from_pretrained(out)(idx), rtol=1e-4, atol=1e-4)


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, resume with the same bits, evaluate, generate and merge; what is refused."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the cat sat on the mat. " * 60)
    sizes = "--n-layer 1 --n-head 1 --n-embd 16 --block-size 16 --sample-tokens 0".split()
    data = ["--data", "text.txt", "--tokenizer", "byte"]
    assert main(["train", *data, *sizes, "--max-steps", "2", "--out", "base"]) == 0
    tune = ["train", *data, "--init", "base", "--lora-rank", "2", "--sample-tokens", "0"]
    tune += ["--lora-dropout", "0.2", "--schedule", "constant", "--warmup-steps", "0"]
    in_int8 = [*tune, "--lora-base-dtype", "int8", "--eval-interval", "2"]
    assert main([*in_int8, "--max-steps", "4", "--out", "whole"]) == 0
    assert main([*in_int8, "--max-steps", "2", "--out", "cut"]) == 0
    assert main(["train", "--resume", "--max-steps", "4", "--out", "cut"]) == 0
    files = [Path(out) / "checkpoints/step-00000004" for out in ("whole", "cut")]
    a, b = ({k: v.read() for k, v in read_tensors(f).items()} for f in files)
    assert not differing(a, b)
    assert 'lora_base_dtype = "int8"' in (files[1] / "train.toml").read_text()
    rows = [without_speed(read_metrics(Path(out))) for out in ("whole", "cut")]
    assert rows[0] == rows[1]
    capsys.readouterr()
    assert main([*in_int8, "--out", "dry", "--dry-run"]) == 0
    assert "targets c_attn c_proj, base in int8)" in capsys.readouterr().out
    assert main(["eval", "whole", "--data", "text.txt"]) == 0
    assert main(["generate", "whole", "--prompt", "the", "-n", "4"]) == 0
    assert main(["convert", "--merge", "whole", "merged"]) == 0
    capsys.readouterr()
    for flags, said in (
        (["--init", "base", "--lora-base-dtype", "int8"], "give --lora-rank too, or leave it out"),
        ([*in_int8[3:], "--compile"], "--lora-base-dtype int8 is not for compile"),
        ([*tune[3:], "--lora-base-dtype", "int4"], "takes one of int8, got 'int4'"),
    ):
        assert main(["train", *data, *flags, "--out", "none"]) != 0
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not Path("none").exists()


@pytest.mark.parametrize("dtype", ["int4", "INT8", torch.int8])
def test_an_unknown_dtype_of_the_base_is_refused(dtype: Any) -> None:
    model = random_model()
    error = f"base_dtype must be 'int8' or None, got {dtype!r}"
    with pytest.raises(ValueError, match=re.escape(error)):
        add_adapters(model, AdapterConfig(3, 5.0, 0.0, ALL), base_dtype=dtype)
    assert model.adapter is None and model.wte.weight.requires_grad


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_base_dtype int8 is for the base of an adapter"):
        TrainConfig(lora_base_dtype="int8")
    with pytest.raises(ValueError, match="int8 is not for compile"):
        TrainConfig(lora_rank=2, lora_base_dtype="int8", compile=True)
    model, _ = two_models(("c_attn",))
    with pytest.raises(ValueError, match="the base is in int8, and an adapter is added to its own"):
        merge_adapters(model)
    with pytest.raises(ValueError, match="an adapter of other settings already; load its base"):
        add_adapters(model, AdapterConfig(3, 5.0, 0.0, ("c_attn",)))
    with pytest.raises(ValueError, match="change a model's dtype before it is in int8"):
        model.bfloat16()(*BATCH)
    unadapted = copy.deepcopy(model)
    unadapted.adapter = None
    with pytest.raises(ValueError, match="h.0.attn.c_proj is a gptfast.lora.Int8Linear"):
        unadapted.save_pretrained(tmp_path / "model")
