"""The trainer: equal to plain PyTorch, repeatable, resumable bit for bit, and what it writes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    differing,
    make_trainer,
    one_thread,  # noqa: F401 - applies to every test here
    parameters,
    random_model,
    tiny_config,
    without_speed,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from gptfast import GPT, TrainConfig, Trainer, create_dataloader, get_tokenizer
from gptfast.checkpoint import checkpoints
from gptfast.data import as_tokens, embedded_text
from gptfast.trainer import choose_device, learning_rate, parameter_groups


class PlainBlock(nn.Module):
    def __init__(self, C: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, -1).transpose(1, 2)
            for part in self.attn["c_attn"](self.ln_1(x)).split(C, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden)


class PlainGPT(nn.Module):
    """GPT-2 of nothing but torch.nn."""

    def __init__(self, V: int, block_size: int, n_layer: int, n_head: int, C: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(block_size, C)
        self.h = nn.ModuleList(PlainBlock(C, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(C)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


def test_a_run_equals_plain_pytorch(tmp_path: Path) -> None:
    """The same model, batches and schedule without a line of ours: 1e-4 in loss at every step."""
    steps, warmup, lr, min_lr = 30, 5, 3e-3, 1e-4
    tokens = as_tokens(embedded_text()[:4000], get_tokenizer("byte"))

    def loader() -> torch.utils.data.DataLoader:
        return create_dataloader(tokens, 4, 24, 24, seed=5)

    torch.manual_seed(0)
    model = GPT(tiny_config(vocab_size=257, block_size=24, n_head=4, n_embd=48))
    plain = PlainGPT(257, 24, 2, 4, 48)
    plain.load_state_dict(model.state_dict())
    config = TrainConfig(
        out=str(tmp_path),
        max_steps=steps,
        lr=lr,
        min_lr=min_lr,
        warmup_steps=warmup,
        max_norm=1.5,
        log_interval=1,
        eval_interval=steps,
        eval_batches=1,
        sample_tokens=0,
        device="cpu",
    )
    rows = Trainer(model, config, loader(), loader()).fit()[1:]

    decay = [p for name, p in plain.named_parameters() if "ln_" not in name and "bias" not in name]
    rest = [p for name, p in plain.named_parameters() if "ln_" in name or "bias" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    batches, losses, norms = iter(loader()), [], []
    for step in range(steps):
        x, y = next(batches)
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - 1 - warmup))
        rate = lr * (step + 1) / warmup if step < warmup else min_lr + (lr - min_lr) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(plain(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), 1.5).item())
        optimizer.step()
        losses.append(loss.item())

    assert len(rows) == steps
    worst = max(abs(row["loss"] - loss) for row, loss in zip(rows, losses, strict=True))
    assert worst < 1e-4, f"losses differ by {worst}"
    assert all(
        math.isclose(row["grad_norm"], norm, rel_tol=1e-3)
        for row, norm in zip(rows, norms, strict=True)
    )
    # It learned, and the clip had something to do.
    assert losses[-1] < losses[0] - 0.8
    assert min(norms) < 1.5 < max(norms)


def test_loss_falls(tmp_path: Path) -> None:
    history = make_trainer(
        tmp_path, epochs=12, lr=1e-2, eval_interval=1000, dropout=0.0, n_tokens=1000
    ).fit()
    first, last = history[0], history[-1]
    assert abs(first["train_loss"] - math.log(257)) < 0.2
    assert last["train_loss"] < first["train_loss"] - 2.5
    assert last["val_loss"] < first["val_loss"] - 2
    assert last["epoch"] == 12


@pytest.mark.parametrize("threads", [1, 2])
def test_a_seed_fixes_the_run(tmp_path: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    runs = {}
    for name, seed in (("first", 3), ("same", 3), ("other", 4)):
        trainer = make_trainer(tmp_path / name, max_steps=9, seed=seed)
        history = without_speed(trainer.fit())
        runs[name] = (
            history,
            parameters(trainer.model),
            (tmp_path / name / "samples.txt").read_text(),
        )
    assert runs["first"][0] == runs["same"][0]
    assert differing(runs["first"][1], runs["same"][1]) == []
    assert runs["first"][2] == runs["same"][2]
    assert runs["first"][0] != runs["other"][0]
    assert "wte.weight" in differing(runs["first"][1], runs["other"][1])


class Cut(Exception):
    """Stands for a power failure."""


def cut_at(trainer: Trainer, step: int) -> None:
    """Let the trainer fail when it is about to take the step after `step`."""
    real: Callable[[Tensor, Tensor], Tensor] = trainer.train_step

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        if trainer.step == step:
            raise Cut
        return real(x, y)

    trainer.train_step = train_step


# 7 batches an epoch, a checkpoint every 2 steps.
@pytest.mark.parametrize("cuts", [(2,), (5,), (7,), (8, 13), (1, 14, 15)], ids=str)
def test_a_run_cut_and_resumed_is_the_same_run(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    options = {"max_steps": 16, "checkpoint_interval": 2, "dropout": 0.2, "seed": 6}
    whole = make_trainer(tmp_path / "whole", **options)
    history = without_speed(whole.fit())
    out = tmp_path / "cut"

    def restarted() -> Trainer:
        # With a checkpoint, the weights the new process starts from must not matter.
        return make_trainer(out, init_seed=99 if checkpoints(out) else 0, **options)

    for step in cuts:
        trainer = restarted()
        cut_at(trainer, step)
        with pytest.raises(Cut):
            trainer.fit(resume=True)
    resumed = restarted()
    assert without_speed(resumed.fit(resume=True)) == history
    assert differing(parameters(resumed.model), parameters(whole.model)) == []
    last = "checkpoints/step-00000016"
    for file in ("model.safetensors", "optimizer.safetensors"):
        moments = [load_file(tmp_path / run / last / file) for run in ("whole", "cut")]
        assert differing(*moments) == []
    for file in ("samples.txt", f"{last}/config.json"):
        assert (out / file).read_text() == (tmp_path / "whole" / file).read_text()
    rows = (out / "metrics.jsonl").read_text().splitlines()
    assert without_speed([json.loads(row) for row in rows]) == history


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    done = make_trainer(tmp_path, max_steps=4)
    history = done.fit()
    again = make_trainer(tmp_path, max_steps=4, init_seed=99)
    assert again.fit(resume=True) == history
    assert differing(parameters(again.model), parameters(done.model)) == []


def test_used_loaders_do_not_change_the_run(tmp_path: Path) -> None:
    fresh = make_trainer(tmp_path / "fresh", max_steps=5, dropout=0.0)
    used = make_trainer(tmp_path / "used", max_steps=5, dropout=0.0)
    list(used.train_loader)
    rebuilt = Trainer(used.model, used.config, used.train_loader, used.val_loader)
    assert without_speed(rebuilt.fit()) == without_speed(fresh.fit())


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 12: 0.55, 20: 0.1}),
        ({"warmup_steps": 0, "min_lr": 0.0}, {0: 1.0, 10: 0.5, 20: 0.0}),
        ({"warmup_steps": 10, "min_lr": 0.5}, {9: 1.0, 10: 1.0, 15: 0.75, 20: 0.5}),
        ({"warmup_steps": 100}, {0: 0.01, 20: 0.21}),
        # A twentieth of 21 steps is one.
        ({}, {0: 1.0, 1: 1.0, 20: 0.1}),
    ],
    ids=["warm-up", "no-warm-up", "min-lr", "warm-up-only", "defaults"],
)
def test_learning_rate(changes: dict[str, Any], rates: dict[int, float]) -> None:
    config = TrainConfig(lr=1.0, **changes)
    got = {step: learning_rate(step, 21, config) for step in rates}
    assert got == pytest.approx(rates)


def test_learning_rate_of_one_step() -> None:
    assert learning_rate(0, 1, TrainConfig(lr=2.0)) == 2.0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameter_groups(tied: bool) -> None:
    model = random_model(tie_weights=tied)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = parameter_groups(model, 0.3)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    decaying = {names[id(p)] for p in decay["params"]}
    matrices = ("wte", "wpe", "c_attn", "c_proj", "c_fc", "lm_head")
    assert decaying == {
        name
        for name in names.values()
        if name.split(".")[-2] in matrices and name.endswith("weight")
    }
    assert decaying | {names[id(p)] for p in rest["params"]} == set(names.values())
    assert len(decay["params"]) + len(rest["params"]) == len(names)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, epochs=2, log_interval=2, eval_interval=4, checkpoint_interval=3, lr=2e-3
    )
    history = trainer.fit()
    assert trainer.steps == 14
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == history
    evaluated = {0, 4, 8, 12, 14}
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8, 10, 12, 14]
    for row in rows:
        assert row["tokens"] == 64 * row["step"]
        assert row["epoch"] == round(row["step"] / 7, 6)
        assert ({"train_loss", "val_loss"} <= row.keys()) == (row["step"] in evaluated)
        if row["step"]:
            assert row["lr"] == learning_rate(row["step"] - 1, 14, trainer.config)
            assert row["tokens_per_second"] > 0 and row["grad_norm"] > 0 and row["loss"] > 0
    samples = (tmp_path / "samples.txt").read_text().splitlines()
    assert [line[: line.index(":")] for line in samples] == ["step 7", "step 14"]
    assert all("This is" in line for line in samples)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000012", "step-00000014"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "loss.pdf").read_bytes().startswith(b"%PDF")
    state = json.loads((tmp_path / "checkpoints" / kept[1] / "state.json").read_text())
    assert (state["step"], state["tokens"]) == (14, 14 * 64)
    assert state["config"]["tokenizer"] == "byte"
    assert state["config"]["train"]["lr"] == 2e-3
    assert state["config"]["model"]["n_embd"] == 24


@pytest.mark.parametrize("keep", [1, 3])
def test_keep(tmp_path: Path, keep: int) -> None:
    make_trainer(tmp_path, max_steps=5, checkpoint_interval=1, keep=keep).fit()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in range(6 - keep, 6)]


def test_evaluation_is_that_of_the_weights_then(tmp_path: Path) -> None:
    from gptfast.evaluate import loader_loss

    trainer = make_trainer(tmp_path, max_steps=6, dropout=0.3)
    last = trainer.fit()[-1]
    assert last["val_loss"] == loader_loss(trainer.model, trainer.val_loader)
    assert last["train_loss"] == loader_loss(trainer.model, trainer.train_sample)


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2).fit()
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        make_trainer(tmp_path, max_steps=2).fit()
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("below", ["", "/run"], ids=["a-file", "below-a-file"])
def test_out_cannot_be_written(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write to .*file"):
        make_trainer(Path(f"{tmp_path}/file{below}"), max_steps=2).fit()
    assert (tmp_path / "file").read_text() == "in the way"


def test_non_finite_loss_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=6, checkpoint_interval=1)
    real = trainer.train_step

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        if trainer.step == 3:
            with torch.no_grad():
                trainer.model.wte.weight[0] = float("nan")
        return real(x, y)

    trainer.train_step = train_step
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 4; lower --lr.*Checkpoints"):
        trainer.fit()
    # The last checkpoint is from before.
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir())[-1] == "step-00000003"


def test_choose_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(ValueError, match="device must be auto or one of cpu.*got 'toaster'"):
        choose_device("toaster")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_absent_device() -> None:
    with pytest.raises(ValueError, match="got 'cuda:1'"):
        choose_device("cuda:1")
