"""Test the trainer: equality with plain PyTorch, repeatable and resumed runs, and its files."""

import json
import math
import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    differing,
    make_trainer,
    parameters,
    random_model,
    tiny_config,
    without_speed,
)
from safetensors.torch import load_file
from seeds import shifted
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gptfast import GPT, TrainConfig, Trainer, create_dataloader, get_tokenizer
from gptfast.data.embedded import embedded_text
from gptfast.data.loader import from_start
from gptfast.data.tokens import as_tokens
from gptfast.device import choose_device
from gptfast.evaluate.loss import loader_loss
from gptfast.training.run_directory import RunDirectory
from gptfast.training.schedule import learning_rate
from gptfast.training.step import parameter_groups
from gptfast.weights.checkpoint import checkpoints, read_state


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
    """GPT-2 made only of torch.nn."""

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


@pytest.fixture(autouse=True)
def few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures, which take longer than these runs, where no test looks at them."""
    if request.node.name != "test_files_of_a_run":
        monkeypatch.setattr("gptfast.training.trainer.plot_losses", lambda history, out: None)


def test_a_run_equals_plain_pytorch(tmp_path: Path) -> None:
    """The same run without our code agrees to 1e-4 in loss at every step."""
    steps, warmup, lr, min_lr = 30, 5, 3e-3, 1e-4
    tokens = as_tokens(embedded_text()[:4000], get_tokenizer("byte"))

    def loader() -> torch.utils.data.DataLoader:
        return create_dataloader(tokens, 4, 24, 24, seed=5)

    torch.manual_seed(shifted(0))
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
    # The run learned, and clipping had an effect.
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
    """Represents a power failure."""


def cut_at(trainer: Trainer, step: int) -> None:
    """Make the trainer fail just before the step after `step`."""
    real: Callable = trainer.train_step

    def train_step(batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        if trainer.progress.step == step:
            raise Cut
        return real(batches)

    trainer.train_step = train_step


# An epoch has 7 batches, and every 2 steps there is a checkpoint.
@pytest.mark.parametrize("cuts", [(2,), (5,), (7,), (8, 13), (1, 14, 15)], ids=str)
def test_a_run_cut_and_resumed_is_the_same_run(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    options = {"max_steps": 16, "checkpoint_interval": 2, "dropout": 0.2, "seed": 6}
    whole = make_trainer(tmp_path / "whole", **options)
    history = without_speed(whole.fit())
    out = tmp_path / "cut"

    def restarted() -> Trainer:
        # With a checkpoint, the new process's own initial weights must not matter.
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


def test_files_of_a_run(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, epochs=2, log_interval=2, eval_interval=4, checkpoint_interval=3, lr=2e-3
    )
    history = trainer.fit()
    assert trainer.total_steps == 14
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
    assert kept == ["best", "step-00000012", "step-00000014"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "loss.pdf").read_bytes().startswith(b"%PDF")
    state = json.loads((tmp_path / "checkpoints" / kept[-1] / "state.json").read_text())
    assert (state["step"], state["tokens"]) == (14, 14 * 64)
    assert state["config"]["tokenizer"] == "byte"
    assert state["config"]["train"]["lr"] == 2e-3
    assert state["config"]["model"]["n_embd"] == 24


@pytest.mark.parametrize("keep", [1, 3])
def test_keep(tmp_path: Path, keep: int) -> None:
    make_trainer(tmp_path, max_steps=5, checkpoint_interval=1, keep=keep, keep_best=False).fit()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in range(6 - keep, 6)]


def with_losses(trainer: Trainer, val_losses: dict[int, float]) -> Trainer:
    """Return the trainer with these validation losses by step in the place of measured ones."""

    def loss_over(loader: DataLoader, n: int | None) -> float:
        return val_losses[trainer.progress.step] if loader is trainer.val_loader else 5.0

    trainer._loss_over = loss_over
    return trainer


FALL_AND_RISE = {0: 4.5, 1: 5.0, 2: 4.0, 3: 3.0, 4: 3.5, 5: 3.0, 6: 3.2, 7: 2.5, 8: 2.6}


@pytest.mark.parametrize("interval", [1, 100], ids=["every-step", "never"])
def test_the_best_checkpoint_is_kept(tmp_path: Path, interval: int) -> None:
    options = {"eval_interval": 1, "checkpoint_interval": interval, "keep": 1}
    trainer = with_losses(make_trainer(tmp_path, max_steps=6, **options), FALL_AND_RISE)
    trainer.fit()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best", "step-00000003", "step-00000006"]
    assert read_state(tmp_path / "checkpoints" / "best")["step"] == 3
    assert GPT.from_pretrained(tmp_path / "checkpoints" / "best").config == trainer.model.config
    # The run continues, and a better checkpoint replaces the best one.
    again = with_losses(make_trainer(tmp_path, max_steps=8, **options), FALL_AND_RISE)
    again.fit(resume=True)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best", "step-00000007", "step-00000008"]
    assert read_state(tmp_path / "checkpoints" / "best")["step"] == 7


def test_no_loss_at_all_is_never_the_best(tmp_path: Path) -> None:
    losses = {0: 4.0, 1: math.nan, 2: 3.0, 3: math.inf, 4: 2.0}
    trainer = with_losses(make_trainer(tmp_path, eval_interval=1, max_steps=4), losses)
    history = trainer.fit()
    assert trainer.progress.best == {"step": 4, "val_loss": 2.0}
    assert ["val_loss" in row for row in history] == [True, False, True, False, True]


def test_early_stopping(tmp_path: Path) -> None:
    options = {"eval_interval": 1, "max_steps": 8}
    trainer = with_losses(make_trainer(tmp_path, early_stopping=3, **options), FALL_AND_RISE)
    history = trainer.fit()
    assert trainer.progress.step == 6
    assert history[-1]["final"] and history[-1]["val_loss"] == 3.2
    assert read_state(checkpoints(tmp_path)[-1])["step"] == 6
    # A stopped run stays stopped unless it gets more patience.
    again = with_losses(make_trainer(tmp_path, early_stopping=3, **options), FALL_AND_RISE)
    assert again.fit(resume=True) == history
    more = with_losses(make_trainer(tmp_path, early_stopping=4, **options), FALL_AND_RISE)
    rows = more.fit(resume=True)
    assert [row["step"] for row in rows] == list(range(9))
    assert [row.get("final") for row in rows] == [None] * 8 + [True]


def test_a_model_only_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3, save_optimizer=False)
    trainer.fit()
    last = checkpoints(tmp_path)[-1]
    assert sorted(path.name for path in last.iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "state.json",
        "tokenizer_config.json",
        "train.toml",
        "vocab.json",
    ]
    assert differing(parameters(GPT.from_pretrained(last)), parameters(trainer.model)) == []
    with pytest.raises(ValueError, match="holds the model only and cannot be resumed.*--init"):
        make_trainer(tmp_path, max_steps=5).fit(resume=True)


def test_the_test_loss_is_measured_once_at_the_end(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4, eval_interval=2)
    tokens = as_tokens(embedded_text()[3000:3200], get_tokenizer("byte"))
    trainer.test_loader = create_dataloader(tokens, 4, 16, 16, shuffle=False, drop_last=False)
    history = trainer.fit()
    assert ["test_loss" in row for row in history] == [False] * 4 + [True]
    assert history[-1]["test_loss"] == loader_loss(trainer.model, trainer.test_loader)


def test_loaders_must_be_ours(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    plain = DataLoader([(torch.zeros(4), torch.zeros(4))])
    with pytest.raises(ValueError, match="must come from gptfast.create_dataloader"):
        Trainer(trainer.model, trainer.config, plain, trainer.val_loader)


def test_a_directory_is_one_runs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptfast.training.run_directory.LOCK_TIMEOUT_S", 0.1)
    with RunDirectory(tmp_path).lock():
        with pytest.raises(ValueError, match="is in use by another process"):
            make_trainer(tmp_path, max_steps=2).fit()
    make_trainer(tmp_path, max_steps=2).fit()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_trainer(tmp_path, max_steps=4, tensorboard=True).fit()
    history = make_trainer(tmp_path, max_steps=7, tensorboard=True).fit(resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "val_loss", "lr"):
        rows = {row["step"]: row[name] for row in history if name in row}
        written = {event.step: event.value for event in events.Scalars(name)}
        assert written == pytest.approx(rows)


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"not installed.*pip install tensorboard"):
        make_trainer(tmp_path, tensorboard=True)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_profile(tmp_path: Path, steps: int) -> None:
    make_trainer(tmp_path, max_steps=steps, profile=True).fit()
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    # Two parameter groups make two calls per step.
    assert names.count("gptfast::adamw") == 2 * min(3, steps)


def test_evaluation_is_that_of_the_weights_then(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=6, dropout=0.3)
    last = trainer.fit()[-1]
    assert last["val_loss"] == loader_loss(trainer.model, trainer.val_loader)
    first = islice(from_start(trainer.train_loader), len(trainer.val_loader))
    assert last["train_loss"] == loader_loss(trainer.model, first)


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


def spoil(trainer: Trainer, step: int, part: str) -> None:
    """Make the loss, or the gradient only, of the step after `step` not finite."""
    model, real = trainer.model, trainer.train_step

    def broken(x: Tensor, y: Tensor) -> Tensor:
        loss = model(x, y)
        # The square root's value at 0 is finite, but its slope is not.
        return loss * torch.nan if part == "loss" else loss + (model.ln_f.bias * 0).sqrt().sum()

    def train_step(batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        trainer.step.model = broken if trainer.progress.step == step else model
        return real(batches)

    trainer.train_step = train_step


@pytest.mark.parametrize("part", ["loss", "grad_norm"])
def test_a_step_that_is_not_finite_stops_the_run(tmp_path: Path, part: str) -> None:
    options = {"checkpoint_interval": 100, "eval_interval": 100, "dropout": 0.2}
    whole = make_trainer(tmp_path / "whole", max_steps=6, **options)
    whole.fit()
    trainer = make_trainer(tmp_path / "run", max_steps=6, **options)
    spoil(trainer, 3, part)
    windows = ", ".join(map(str, trainer.train_loader.batch_sampler.indices(3)))
    with pytest.raises(FloatingPointError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert re.match(rf"{part} is (nan|inf) at step 4, on batch 3 \(epoch 0\): ", message)
    assert f"windows {windows} at tokens" in message
    for remedy in ("lower --lr", "--nonfinite skip", "No weight was changed"):
        assert remedy in message
    # The weights before the step are saved, and the step can be taken again.
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000003"
    again = make_trainer(tmp_path / "run", max_steps=6, init_seed=5, **options)
    again.fit(resume=True)
    assert differing(parameters(again.model), parameters(whole.model)) == []
    assert without_speed(again.history) == without_speed(whole.history)


@pytest.mark.parametrize("part", ["loss", "grad_norm"])
def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path, part: str) -> None:
    trainer = make_trainer(tmp_path, max_steps=6, nonfinite="skip", log_interval=100)
    spoil(trainer, 3, part)
    real, seen = trainer.train_step, {}

    def train_step(batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        before = parameters(trainer.model)
        row = real(batches)
        seen[trainer.progress.step] = differing(before, parameters(trainer.model))
        return row

    trainer.train_step = train_step
    history = trainer.fit()
    assert seen[4] == [] and all(seen[step] for step in (1, 2, 3, 5, 6))
    (row,) = [row for row in history if "skipped" in row]
    assert row["step"] == 4 and part not in row
    assert row["skipped"] in (f"{part} is nan", f"{part} is inf")
    assert history[-1]["tokens"] == 5 * 64
    assert trainer.step.guard.skipped == 1
    # The file is strict JSON, without NaN.
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)


def test_a_sample_that_cannot_be_drawn_is_no_failure(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    real = trainer._sample

    def sample() -> None:
        with torch.no_grad():
            trainer.model.ln_f.weight[0] = torch.nan
        real()

    trainer._sample = sample
    trainer.fit()
    assert "none: " in (tmp_path / "samples.txt").read_text()
    assert checkpoints(tmp_path)[-1].name == "step-00000002"


def test_a_run_of_bad_steps_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptfast.training.guard.MAX_SKIPS_IN_A_ROW", 3)
    trainer = make_trainer(tmp_path, max_steps=9, nonfinite="skip")
    trainer.step.model = lambda x, y: trainer.model(x, y) * torch.nan
    with pytest.raises(FloatingPointError, match="loss is nan after 3 steps skipped at step 3"):
        trainer.fit()


def test_the_guards_state_is_resumed(tmp_path: Path) -> None:
    """An outlier after a cut is judged by the steps before the cut."""
    options = {"max_steps": 24, "skip_zscore": 4.0, "dropout": 0.0, "eval_interval": 100}

    def run(out: Path, cut: int | None, init_seed: int = 0) -> Trainer:
        trainer = make_trainer(out, init_seed=init_seed, checkpoint_interval=20, **options)
        if cut is not None:
            cut_at(trainer, cut)
            with pytest.raises(Cut):
                trainer.fit()
            trainer = make_trainer(out, init_seed=9, checkpoint_interval=20, **options)
        model = trainer.model
        real = trainer.train_step

        def train_step(batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
            factor = 10.0 if trainer.progress.step == 21 else 1.0
            trainer.step.model = lambda x, y: model(x, y) * factor
            return real(batches)

        trainer.train_step = train_step
        trainer.fit(resume=True)
        return trainer

    whole, resumed = run(tmp_path / "whole", None), run(tmp_path / "cut", 20)
    assert [row["step"] for row in whole.history if "skipped" in row] == [22]
    assert "outlier" in next(row["skipped"] for row in whole.history if "skipped" in row)
    assert without_speed(resumed.history) == without_speed(whole.history)
    assert differing(parameters(resumed.model), parameters(whole.model)) == []
    assert resumed.step.guard.state_dict() == whole.step.guard.state_dict()


def test_choose_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(ValueError, match="device must be auto.* cpu, got 'toaster'"):
        choose_device("toaster")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_absent_device() -> None:
    with pytest.raises(ValueError, match="got 'cuda:1'"):
        choose_device("cuda:1")
