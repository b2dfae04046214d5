"""gptfast inside transformers' GPT2LMHeadModel gives the same logits, losses, gradients, texts and
files, works in a real run of transformers' Trainer, and can be removed without a trace."""

import copy
import filecmp
import inspect
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    random_ids,
)
from parity import assert_parity
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from seeds import shifted  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model  # noqa: E402

import gptfast  # noqa: E402
from gptfast import accelerate, drop_in, ops, restore  # noqa: E402

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
        assert "loss" in out and list(out)[:2] == ["loss", "logits"] and len(out) == 3
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
    out = model(input_ids=ids, labels=labels)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="read them before optimizer.step"):
        out.logits  # noqa: B018


def test_accelerator_copies_an_output(heads: list[int]) -> None:
    """Accelerator copies outputs item by item; the logits stay unread and can be read later."""
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True, mixed_precision="bf16")
    inner = accelerate(make()).train()
    model = accelerator.prepare(inner)
    ids, labels = batch()
    out = model(input_ids=ids, labels=labels)
    out.loss.backward()
    assert not heads and out.logits.shape == (2, T, V)
    restore(inner)
    a, b = model(input_ids=ids, labels=labels), inner(input_ids=ids)
    assert "logits" in a and not isinstance(a, drop_in.LazyLogits) and b.logits.shape == (2, T, V)


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
