"""Test LoRA: the adapters that gptfast trains, their files, and peft's."""

import copy
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import differing, make_trainer, parameters, random_ids, random_model, without_speed
from parity import assert_parity
from seeds import torch_generator
from test_modules import loss_in_pytorch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gptfast
from gptfast import GPT, Engine, TrainConfig
from gptfast.cli import main
from gptfast.cli.serve import Serve
from gptfast.cli.train_weights import adapter_base
from gptfast.lora import LoRALinear, adapter_state, add_adapters, load_adapter, merge_adapters
from gptfast.modules import attention_weights, mlp_weights
from gptfast.ops.backend import EXTENSION
from gptfast.training.metrics import read_metrics
from gptfast.training.step import TrainStep
from gptfast.weights.adapter import AdapterConfig, fingerprint, read_tensors
from gptfast.weights.lazy_tensor import CheckpointError
from gptfast.weights.open import open_weights

CPU = torch.device("cpu")
ALL = ("c_attn", "c_fc", "c_proj")


def adapted(targets: tuple[str, ...] = ALL, dropout: float = 0.0, **changes: Any) -> GPT:
    """Return a model with an adapter whose B is not zero."""
    model = random_model(**changes)
    add_adapters(model, AdapterConfig(3, 5.0, dropout, targets))
    for i, (name, values) in enumerate(adapter_state(model).items()):
        if name.endswith("lora_B"):
            values.normal_(std=0.2, generator=torch_generator(i))
    return model


def as_plain_modules(model: GPT) -> GPT:
    """Return a copy with each adapter as a module in PyTorch alone, which GPT has to call."""

    class Plain(nn.Module):
        def __init__(self, layer: LoRALinear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            w = self.layer
            y = nn.functional.linear(x, w.weight, w.bias)
            return y + w.scale * (x @ w.lora_A.T) @ w.lora_B.T

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoRALinear):
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, Plain(module))
    return plain


@pytest.mark.parametrize("targets", [("c_attn",), ("c_attn", "c_proj"), ("mlp.c_proj",), ALL])
def test_parity(targets: tuple[str, ...]) -> None:
    """Loss and gradients of the fused layers are those of the formula in float64."""
    model = adapted(targets)
    idx, y = random_ids(2, 16), random_ids(2, 16, seed=2)

    def of(model: GPT, loss_of: Callable[..., Tensor]) -> list[Tensor]:
        params = [p for p in model.parameters() if p.requires_grad]
        loss = loss_of(model, idx, y)
        return [loss.detach(), *torch.autograd.grad(loss, params)]

    plain = as_plain_modules(model)
    assert all(attention_weights(h.ln_1, h.attn._modules) for h in model.h)  # no module is called
    assert all(mlp_weights(h.ln_2, h.mlp._modules) for h in model.h)
    pt, ref = of(plain, loss_in_pytorch), of(copy.deepcopy(plain).double(), loss_in_pytorch)
    names = ["loss", *adapter_state(model)]
    for name, *three in zip(names, of(model, GPT.__call__), ref, pt, strict=True):
        assert_parity(name, *three)


def test_merged_model_is_the_same_function() -> None:
    model = adapted().eval()
    idx = random_ids(2, 16)
    with_adapter = model.double()(idx)
    merge_adapters(model)
    assert model.adapter is None and all(type(m) is not LoRALinear for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(idx), with_adapter, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}])
def test_dropout_is_that_of_the_input(options: dict[str, Any]) -> None:
    """In training the adapter's input is dropped, the same way when a block is computed again."""
    config = TrainConfig(lora_rank=3, lora_dropout=0.5, lr=0.1, **options)
    model = random_model()
    step = TrainStep(model, config, CPU)
    batch = random_ids(2, 16), random_ids(2, 16, seed=2)
    losses = []
    for _ in range(2):
        torch.manual_seed(4)
        step.run([batch], 0.1)
        torch.manual_seed(4)
        losses.append(model(*batch).item())
        torch.manual_seed(5)
        assert model(*batch).item() != losses[-1]
    model.eval()
    assert model(*batch).item() == model(*batch).item()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_step_changes_the_adapter_alone(kernels: str) -> None:
    model = random_model()
    before = parameters(model)
    config = TrainConfig(lora_rank=2, lr=0.1, weight_decay=0.5)
    step = TrainStep(model, config, CPU)
    batch = random_ids(2, 16), random_ids(2, 16, seed=2)
    with gptfast.use_backend(kernels):
        first = step.run([batch], 0.1)
        second = step.run([batch], 0.1)
    assert second["loss"] < first["loss"]
    state = parameters(model)
    assert not differing(before, {name: state[name] for name in before})
    assert all(p.grad is None for name, p in model.named_parameters() if name in before)
    of_adapter = {id(p) for name, p in model.named_parameters() if name not in before}
    assert {id(p) for p in step.optimizer.state} == of_adapter


class NewMemory(TorchDispatchMode):
    """Record the shapes of the results that lie in other memory than any argument."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in old:
                self.shapes.add(tuple(x.shape))
        return out


@pytest.mark.parametrize("targets", [("c_attn",), ALL])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_no_gradient_of_a_frozen_weight_is_computed(
    kernels: str, tied: bool, targets: tuple[str, ...]
) -> None:
    """No operation of a step makes a matrix of a frozen weight's shape, the head included."""
    model = random_model(tie_weights=tied)
    frozen = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    add_adapters(model, AdapterConfig(3, targets=targets))
    batch = random_ids(3, 7), random_ids(3, 7, seed=2)

    def shapes_of_a_step() -> set[tuple[int, ...]]:
        with gptfast.use_backend(kernels), NewMemory() as made:
            model(*batch).backward()
        return made.shapes

    assert not frozen & shapes_of_a_step()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    # The same step, had they been trained: then every matrix has its gradient.
    model.requires_grad_(True)
    assert frozen <= shapes_of_a_step()


def test_compiled() -> None:
    model = adapted()
    idx, y = random_ids(2, 16), random_ids(2, 16, seed=2)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(idx, y), model(idx, y)
    )


@pytest.mark.parametrize("dropout", [{"lora_dropout": 0.5}, {"lora_dropout": 0.0}])
def test_compiled_steps_drop_the_same(monkeypatch: pytest.MonkeyPatch, dropout: dict) -> None:
    """Compiled steps have the masks of steps that are not, of the adapter's dropout and GPT's."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **_: compiler(m, backend="aot_eager"))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(3)
        config = TrainConfig(lora_rank=3, lr=0.1, compile=compiled, seed=1, **dropout)
        model = random_model(dropout=0.0 if dropout["lora_dropout"] else 0.2)
        step = TrainStep(model, config, CPU)
        torch.manual_seed(4)
        batch = random_ids(2, 16), random_ids(2, 16, seed=2)
        losses.append([float(step.run([batch], 0.1)["loss"]) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_an_adapter_is_in_the_mode_of_its_model() -> None:
    for model in (random_model().eval(), random_model().train()):
        add_adapters(model, AdapterConfig(2, dropout=0.5))
        assert {module.training for module in model.modules()} == {model.training}


def base_and_run(tmp_path: Path, **train: Any) -> tuple[Path, Path]:
    """Return a base in transformers' form and a run of 4 steps that trained an adapter for it."""
    base = tmp_path / "base"
    if not base.exists():
        make_trainer(tmp_path / "unused").model.save_pretrained(base, tokenizer=None)
    options = {"max_steps": 4, "lora_rank": 2, "lr": 0.01, "checkpoint_interval": 2, **train}
    out = tmp_path / options.pop("name", "run")
    trainer = make_trainer(out, model=GPT.from_pretrained(base), **options)
    trainer.fit(resume=out.exists())
    return base, out


def test_checkpoint_holds_the_adapter_alone(tmp_path: Path) -> None:
    base, out = base_and_run(tmp_path)
    last = out / "checkpoints" / "step-00000004"
    names = {path.name for path in last.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "state.json"} <= names
    assert not names & {"model.safetensors", "config.json"}
    config = json.loads((last / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 16.0, "LORA")
    own = {k for k in read_tensors(last)}
    assert len(own) == 12 and all(name.endswith(("lora_A", "lora_B")) for name in own)


@pytest.mark.parametrize("base_dtype", [None, "int8"])
def test_resumed_run_is_the_uncut_one(base_dtype: str | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora_dropout": 0.3, "schedule": "constant", "warmup_steps": 0}
    options["lora_base_dtype"] = base_dtype
    base_and_run(tmp_path, name="cut", max_steps=2, **options)
    whole, cut = (base_and_run(tmp_path, name=name, **options)[1] for name in ("whole", "cut"))
    paths = [out / "checkpoints" / "step-00000004" for out in (whole, cut)]
    a, b = ({k: v.read() for k, v in read_tensors(path).items()} for path in paths)
    assert not differing(a, b)
    rows = [without_speed(read_metrics(out))[-1] for out in (whole, cut)]
    assert rows[0] == rows[1] and "val_loss" in rows[0]


def test_an_adapter_stands_for_the_merged_model(tmp_path: Path) -> None:
    """from_pretrained, the engine and --merge give the logits of the model that was trained."""
    _, out = base_and_run(tmp_path)
    idx = random_ids(1, 16)
    model = GPT.from_pretrained(out)
    base = GPT.from_pretrained(tmp_path / "base")
    add_adapters(base, AdapterConfig(2))
    load_adapter(out / "checkpoints" / "step-00000004", base)
    torch.testing.assert_close(model(idx), base.eval()(idx), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(idx), GPT.from_pretrained(tmp_path / "base")(idx), atol=1e-4)
    assert main(["convert", "--merge", str(out), str(tmp_path / "merged")]) == 0
    merged = GPT.from_pretrained(tmp_path / "merged")
    assert not differing(merged.state_dict(), model.state_dict())
    if EXTENSION is not None:
        assert Engine(out).generate([[1, 2, 3]], 8, temperature=0) == gptfast.generate(
            model, [[1, 2, 3]], 8, temperature=0
        )


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_merged_in_fp32_beside_a_base_of_16_bits(tmp_path: Path, dtype: str | None) -> None:
    """--merge --dtype fp32 keeps what bf16 would round away; without it, it is rounded once."""
    base = random_model().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = GPT.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    add_adapters(model, AdapterConfig(2))
    for i, values in enumerate(adapter_state(model).values()):
        values.normal_(std=0.05, generator=torch_generator(i))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapters(model)
    flags = [] if dtype is None else ["--dtype", dtype]
    paths = str(tmp_path / "adapter"), str(tmp_path / "merged")
    assert main(["convert", "--merge", *paths, *flags]) == 0
    merged = GPT.from_pretrained(tmp_path / "merged").state_dict()
    stored = torch.float32 if dtype == "fp32" else torch.bfloat16
    assert {x.dtype for x in merged.values()} == {stored}
    name = "h.0.attn.c_attn.weight"
    expected = model.state_dict()
    assert not torch.equal(expected[name], expected[name].bfloat16().float())
    assert not differing(merged, {name: x.to(stored) for name, x in expected.items()})


def test_a_base_that_moved_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, out = base_and_run(tmp_path)
    whole = GPT.from_pretrained(out).state_dict()
    base.rename("moved")
    assert main(["generate", str(out), "--prompt", "the", "-n", "4"]) == 1
    assert "if the base has moved, name its place (--base)" in capsys.readouterr().err
    to_moved = ["--base", "moved"]
    assert main(["generate", str(out), *to_moved, "--prompt", "the", "-n", "4"]) == 0
    Path("text.txt").write_text("the cat sat on the mat. " * 9)
    assert main(["eval", str(out), *to_moved, "--data", "text.txt"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n"))
    assert main(["chat", str(out), *to_moved, "-n", "4"]) == 0
    assert main(["convert", "--merge", str(out), "merged", *to_moved]) == 0
    assert not differing(GPT.from_pretrained("merged").state_dict(), whole)
    if EXTENSION is not None:
        assert Serve(checkpoint=str(out), base="moved")._model().engine.generate([[1]], 2)
    capsys.readouterr()
    random_model(vocab_size=257).save_pretrained("other")
    for flags, code, said in (
        (["convert", str(out), "x", *to_moved], 2, "--merge writes its base"),
        (["convert", "moved", "x", *to_moved], 2, "give --merge, or leave it out"),
        (["generate", "moved", *to_moved, "--prompt", "a"], 1, "is no adapter, so it has no base"),
        (["generate", str(out), "--base", "other", "--prompt", "a"], 1, "trained on another base"),
    ):
        assert main(flags) == code
        assert said in capsys.readouterr().err


def test_saved_and_loaded(tmp_path: Path) -> None:
    base = random_model()
    base.save_pretrained(tmp_path / "base")
    model = GPT.from_pretrained(tmp_path / "base")
    add_adapters(model, AdapterConfig(2))
    for values in adapter_state(model).values():
        values.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    if EXTENSION is not None:
        with pytest.raises(ValueError, match="no model with an adapter .*: give it the directory"):
            Engine(model)
    idx = random_ids(1, 16)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "adapter")(idx), model(idx))


def test_a_directory_holds_a_model_or_an_adapter(tmp_path: Path) -> None:
    base, out = base_and_run(tmp_path)
    model = GPT.from_pretrained(base)
    add_adapters(model, AdapterConfig(2))
    with pytest.raises(ValueError, match="holds a model: give the adapter a directory of its own"):
        model.save_pretrained(base)
    for file in (out / "checkpoints" / "step-00000004").glob("adapter_*"):
        shutil.copy(file, base)
    with pytest.raises(CheckpointError, match="holds a model and an adapter: move"):
        GPT.from_pretrained(base)
    merge_adapters(model)
    model.save_pretrained(base)
    assert not list(base.glob("adapter_*"))


def test_a_damaged_checkpoint_is_passed_over_for_its_base(tmp_path: Path) -> None:
    base, out = base_and_run(tmp_path, keep=2)
    oldest, newest = sorted((out / "checkpoints").glob("step-*"))
    (newest / "adapter_config.json").write_text("{")
    assert adapter_base(str(out)) == str(base)
    (oldest / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=oldest.name):
        adapter_base(str(out))


def test_fingerprint_is_of_the_values_not_the_form(tmp_path: Path) -> None:
    model = random_model()
    model.save_pretrained(tmp_path / "fp32")
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    marks = {fingerprint(open_weights(tmp_path / form).tensors) for form in ("fp32", "bf16")}
    assert marks == {fingerprint(model.state_dict())}
    with torch.no_grad():
        model.h[1].mlp.c_fc.bias[0] += 0.1
    assert fingerprint(model.state_dict()) not in marks


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = base_and_run(tmp_path)
    last = out / "checkpoints" / "step-00000004"
    adapter = shutil.copytree(last, tmp_path / "adapter")
    (adapter / "state.json").unlink()
    values = json.loads((adapter / "adapter_config.json").read_text())

    def refused(match: str, **changes: Any) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(values | changes))
        with pytest.raises(CheckpointError, match=match):
            GPT.from_pretrained(adapter)

    refused("use_dora True, which gptfast does not compute", use_dora=True)
    refused("alora_invocation_tokens", alora_invocation_tokens=[1, 2])
    refused("peft_type 'IA3'", peft_type="IA3")
    refused("r is 'x', not a number", r="x")
    refused("its adapter of h.0.attn.c_attn has rank 2, and in adapter_config.json it is 3", r=3)
    refused("c_attn has rank 2, and in adapter_config.json it is 1", rank_pattern={"c_attn": 1})
    # A rank that another layer has is not this one's.
    refused("c_attn has rank 2, and in adapter_config.json it is 3", r=3, rank_pattern={"c_fc": 2})
    refused(r"'c_\[f\]c' in rank_pattern", rank_pattern={"c_[f]c": 2})
    refused("use_rslora is 'yes', not true or false", use_rslora="yes")
    for ranks in ([2], {"c_fc": "x"}):
        refused("rank_pattern .* has no ranks by name", rank_pattern=ranks)
    with pytest.raises(CheckpointError, match="is an adapter of peft: give the directory"):
        GPT.from_pretrained(adapter / "adapter_model.safetensors")
    refused("does not say which model", base_model_name_or_path=None)
    refused("gone.*no such directory", base_model_name_or_path=str(tmp_path / "gone"))
    refused("is an adapter itself", base_model_name_or_path=str(out))
    random_model(vocab_size=257).save_pretrained(tmp_path / "other")
    refused("trained on another base", base_model_name_or_path=str(tmp_path / "other"))
    assert main(["convert", str(out), str(tmp_path / "x")]) != 0
    assert "--merge writes its base" in capsys.readouterr().err
    assert main(["convert", "--merge", str(base), str(tmp_path / "x")]) != 0
    assert "is no adapter: leave out --merge" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"rank 2, .*than the model \(rank 3"):
        base_and_run(tmp_path, lora_rank=3, max_steps=6)
    with pytest.raises(ValueError, match="holds an adapter, and a whole model is trained"):
        base_and_run(tmp_path, lora_rank=None, max_steps=6)
    with pytest.raises(ValueError, match="no layer is called 'q_proj'"):
        add_adapters(random_model(), AdapterConfig(2, targets=("q_proj",)))
    with pytest.raises(ValueError, match="merge it first"):
        TrainStep(adapted(), TrainConfig(), CPU)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train an adapter, resume it, evaluate and generate with it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the cat sat on the mat. " * 60)
    sizes = "--n-layer 1 --n-head 1 --n-embd 16 --block-size 16 --sample-tokens 0".split()
    data = ["--data", "text.txt", "--tokenizer", "byte"]
    assert main(["train", *data, *sizes, "--max-steps", "2", "--out", "base"]) == 0
    tune = ["train", *data, "--init", "base", "--lora-rank", "2", "--sample-tokens", "0"]
    assert main([*tune, "--max-steps", "2", "--out", "tuned", "--lora-targets", "c_fc"]) == 0
    shutil.copytree("tuned/checkpoints/step-00000002", "two")
    Path("tuned/adapter_base").rename("moved")
    assert main(["train", "--resume", "--max-steps", "4", "--out", "tuned"]) == 1
    again = ["train", "--resume", "--max-steps", "4", "--out", "tuned", "--base", "moved"]
    assert main(again) == 0
    assert len(read_tensors(Path("tuned/checkpoints/step-00000004"))) == 2
    assert main(["eval", "tuned", "--data", "text.txt"]) == 0
    assert main(["generate", "two", "--base", "moved", "--prompt", "the", "-n", "4"]) == 0
    assert main(["train", *data, "--lora-rank", "2", "--out", "none"]) == 2
    assert main(["train", *data, "--lora-rank", "2", "--out", "none", "--resume"]) == 2
    assert main([*tune, "--out", "twice", "--init", "tuned"]) == 1


def test_a_base_that_its_run_removes_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of a run that goes on is kept with the adapter, also where that moves to."""
    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path / "base", max_steps=2, checkpoint_interval=2, keep=1).fit()
    old = tmp_path / "base/checkpoints/step-00000002"
    options: dict[str, Any] = {"lora_rank": 2, "lr": 0.1, "checkpoint_interval": 2}
    make_trainer(
        tmp_path / "tuned", model=GPT.from_pretrained("base"), max_steps=2, **options
    ).fit()
    assert "it is kept in" in capsys.readouterr().out
    kept = tmp_path / "tuned/adapter_base"
    assert (kept / "model.safetensors").samefile(old / "model.safetensors")
    assert not [*kept.glob("optimizer*"), *kept.glob("state.json")]
    make_trainer(tmp_path / "base", max_steps=4, checkpoint_interval=2, keep=1).fit(resume=True)
    assert not old.exists()
    whole = GPT.from_pretrained("tuned").state_dict()
    config = json.loads(Path("tuned/checkpoints/step-00000002/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(kept)
    Path("tuned").rename("elsewhere")
    assert not differing(GPT.from_pretrained("elsewhere").state_dict(), whole)
    assert adapter_base("elsewhere") == str(tmp_path / "elsewhere/adapter_base")


def theirs_of(path: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel.from_pretrained(path).eval()


def test_peft_loads_ours(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, out = base_and_run(tmp_path, lora_alpha=40.0, lora_targets=ALL)
    idx = random_ids(2, 16)
    theirs = peft.PeftModel.from_pretrained(theirs_of(base), out / "checkpoints/step-00000004")
    ours = GPT.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(theirs_of(base)(idx).logits, ours(idx), atol=1e-3)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("on", ["transformers", "gptfast"])
def test_ours_loads_pefts(tmp_path: Path, on: str, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    base = random_model()
    base.save_pretrained(tmp_path / "base")
    model = theirs_of(tmp_path / "base") if on == "transformers" else base.eval()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=9,
        target_modules=["c_attn", "mlp.c_proj"],
        use_rslora=rslora,
        rank_pattern={"mlp.c_proj": 2} if rslora else {},
        fan_in_fan_out=on == "transformers",
        base_model_name_or_path=str(tmp_path / "base"),
    )
    theirs = peft.get_peft_model(model, config).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    config_json = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(config_json.read_text())
    values["base_model_name_or_path"] = str(tmp_path / "base")
    config_json.write_text(json.dumps(values))
    idx = random_ids(2, 16)
    with torch.no_grad():
        logits = theirs(idx)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        ours = GPT.from_pretrained(tmp_path / "adapter")(idx)
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
