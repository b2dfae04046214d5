"""Test that flags which cannot apply beside others are refused in one line, not ignored."""

import json
from pathlib import Path

import pytest
import torch
from commands import TINY, Capture, done, refused, run
from helpers import random_model

from gptfast import GPT, GPTConfig, TrainConfig, create_dataloader
from gptfast.cli import parse
from gptfast.training.schedule import check_schedule
from gptfast.training.trainer import Trainer

MODEL = ["--tokenizer", "byte"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_model(vocab_size=257, block_size=16).save_pretrained("model")
    Path("t.txt").write_text("hello world, this is text. " * 60)
    records = [{"ctx": "a b", "endings": ["c", "d"], "label": 0}]
    Path("h.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


# The flags, words of the error, and whether the command line alone shows the fault (exit code 2).
TRAIN = {
    "--warmup-steps 10": ("--warmup-steps 10 is longer than the run of 3 steps", 2),
    "--min-lr 1": ("--min-lr must be at most --lr, got --min-lr 1.0 and --lr 0.002", 2),
    "--lr 1e-3 --min-lr 2e-3": ("--min-lr must be at most --lr", 2),
    "--decay-steps 1": ("--decay-steps 1 is for schedule wsd, not cosine", 2),
    "--decay-steps 1 --schedule linear": ("is for schedule wsd, not linear", 2),
    "--schedule wsd --decay-steps 5": ("--decay-steps 5 is longer than the run of 3 steps", 2),
    "--schedule wsd --decay-steps 2 --warmup-steps 2": ("longer than the run of 3 steps", 2),
    "--schedule constant --min-lr 1e-5": ("--schedule constant stays at --lr", 2),
    "--stride 100": ("--stride 100 would skip the text between windows of 16 tokens", 2),
    "--stride 6 --max-length 5": ("would skip the text between windows of 5 tokens", 2),
    "--sample-prompt x --sample-tokens 0": ("--sample-tokens 0 writes none", 2),
    "--resume --init model": ("leave one out", 2),
    "--resume --preset gpt2": ("leave out --preset", 2),
    "--init model --preset gpt2": ("--init brings the shape of its model", 2),
    "--data": ("--data takes one or more values", 2),
}


@pytest.mark.parametrize("flags", TRAIN)
def test_train(flags: str, capsys: Capture) -> None:
    words, code = TRAIN[flags]
    args = [*TINY, "--data", "t.txt", "--out", "out", "--max-steps", 3, *flags.split()]
    result = run(capsys, "train", *args)
    refused(result, words)
    assert result[0] == code and not Path("out").exists()


def test_what_only_the_data_tells(capsys: Capture) -> None:
    """With --epochs, the length of the run is known once the data is read."""
    args = [*TINY, "--data", "t.txt", "--out", "out", "--epochs", 1, "--warmup-steps", 1000]
    refused(run(capsys, "train", *args), "--warmup-steps 1000 is longer than the run of")
    assert not Path("out").exists()


def test_what_goes_together() -> None:
    """Values of a file and of flags are compared once all of them are known."""
    Path("a.toml").write_text("lr = 5e-5")
    run_of = parse(["train", "--config", "a.toml", "--min-lr", "1e-5"]).train
    assert (run_of.lr, run_of.min_lr) == (5e-5, 1e-5)
    Path("b.toml").write_text("min_lr = 0.01\nschedule = 'wsd'\ndecay_steps = 5")
    run_of = parse(["train", "--config", "b.toml", "--lr", "0.1"]).train
    assert (run_of.lr, run_of.min_lr, run_of.decay_steps) == (0.1, 0.01, 5)
    # A file describes a run, which --resume starts and continues.
    Path("c.toml").write_text("init = 'model'\nmax_steps = 10\nwarmup_steps = 10")
    command = parse(["train", "--config", "c.toml", "--resume"])
    assert command.resume and command.init == "model"
    assert parse(["train", "--schedule", "constant"]).train.schedule == "constant"
    assert parse(["train", "--max-steps", "10", "--warmup-steps", "10"]).train.warmup_steps == 10


def test_the_trainer_refuses_the_same() -> None:
    loader = create_dataloader(torch.arange(200) % 50, 2, 16, 16)
    model = GPT(GPTConfig(50, 16, 1, 1, 16))
    for changes in (
        {"warmup_steps": 4},
        {"min_lr": 1.0},
        {"decay_steps": 2},
        {"schedule": "wsd", "decay_steps": 4},
    ):
        config = TrainConfig(out="out", max_steps=3, **changes)
        with pytest.raises(ValueError, match="warmup_steps|min_lr|decay_steps"):
            Trainer(model, config, loader, loader)
    check_schedule(TrainConfig(schedule="wsd", warmup_steps=1, decay_steps=2), 3)


OTHERS = {
    "eval model --data t.txt --part test": "--part is for data that gptfast prepare has split",
    "eval model --data t.txt --part val": "--part is for data that gptfast prepare has split",
    "eval model --data t.txt --limit 3": "--limit counts the examples of --hellaswag and --tasks",
    "eval model --hellaswag h.jsonl --part val": "--part is for --data",
    "eval model --hellaswag h.jsonl --stride 3": "--stride is for --data",
    "eval model --hellaswag h.jsonl --max-length 3": "--max-length is for --data and --tasks",
    "eval model": "nothing to measure",
    "generate model -p a --num-samples 2 --num-beams 2": "beams find one text",
    "generate model -p a --num-samples 2 --temperature 0": "always writes the same text",
    "generate model -p a --num-beams 2 --stats on": "--stats on measures sampling",
    "search --grid lr=1e-3 --trials 3": "--trials counts the draws of --random",
    "search --lr-range 1e-4 1 --trials 3": "--trials counts the draws of --random",
    "search --lr-range 1e-4 1 --jobs 2": "--lr-range is one run",
    "search --lr-range 1e-4 1 --schedule wsd": "--lr-range sets --schedule itself",
    "search --lr-range 1e-4 1 --min-lr 1e-5": "--lr-range sets --min-lr itself",
    "search --grid lr=1e-3 --decay-steps 3": "--decay-steps 3 is for schedule wsd",
    "search --grid schedule=wsd,cosine --decay-steps 3": "is for schedule wsd, not cosine",
    "search --grid lr=1e-3 --resume": "search takes no resume",
    "search --grid lr=1e-3 --warmup-steps 9 --max-steps 4": "is longer than the run of 4 steps",
}


@pytest.mark.parametrize("line", OTHERS)
def test_other_commands(line: str, capsys: Capture) -> None:
    name, *args = line.split()
    own = [*TINY, "--data", "t.txt", "--out", "out"] if name == "search" else MODEL
    result = run(capsys, name, *args, *own)
    refused(result, OTHERS[line])
    assert result[1] == "" and not Path("out").exists()


def test_length_penalty_without_beams(capsys: Capture) -> None:
    args = ["generate", "model", *MODEL, "-p", "a", "-n", 3, "--length-penalty"]
    result = run(capsys, *args, 2)
    refused(result, "leave it out or take --num-beams above 1")
    assert result[0] == 2
    assert done(capsys, *args, 1).startswith("a")
    assert done(capsys, *args, 2, "--num-beams", 2).startswith("a")


def test_several_samples(capsys: Capture) -> None:
    """Each has the next seed, and the seed that was drawn gives the same texts again."""
    args = ["generate", "model", *MODEL, "-p", "ab", "-n", 12]
    texts = done(capsys, *args, "--num-samples", 3, "--seed", 5).split("-" * 15 + "\n")
    assert texts == [done(capsys, *args, "--seed", seed) for seed in (5, 6, 7)]
    assert len(set(texts)) == 3
    _, first, err = run(capsys, *args, "--num-samples", 2)
    again = err.split(": ")[1].split(" writes")[0].split()
    assert "--num-samples" in again and run(capsys, *args, *again) == (0, first, "")
    assert run(capsys, *args)[1] != run(capsys, *args)[1]
    for quiet in (["--temperature", 0], ["--num-beams", 2], ["--seed", 1]):
        assert run(capsys, *args, *quiet)[2] == ""


@pytest.mark.parametrize(
    ("written", "prompt"),
    [("Once\n", "Once"), ("a\nb\r\n", "a\nb"), ("", ""), ("\ufeffé\n\n", "é\n")],
)
def test_a_prompt_from_standard_input(
    written: str, prompt: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompt.txt").write_bytes(written.encode())
    args = ["generate", "model", *MODEL, "-n", 5, "-s", 1, "--prompt"]
    with open("prompt.txt") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert done(capsys, *args, "-") == done(capsys, *args, prompt)


def test_standard_input_that_is_no_text(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("prompt.txt").write_bytes(b"\xff\xfe")
    args = ["generate", "model", *MODEL, "--prompt", "-"]
    with open("prompt.txt", "rb") as file:
        monkeypatch.setattr("sys.stdin", open(file.fileno(), closefd=False))
        refused(run(capsys, *args), "standard input is not UTF-8 text")
    monkeypatch.setattr("sys.stdin", None)
    refused(run(capsys, *args), "reads standard input, which is closed")


def test_stops_with_line_breaks(capsys: Capture) -> None:
    model = GPT.from_pretrained("model")
    with torch.no_grad():  # so that it often writes a line break
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[ord("\n")] = 0.2
    model.save_pretrained("lines")
    args = ["generate", "lines", *MODEL, "-p", "a", "-n", 40, "-s", 2]
    whole = done(capsys, *args)
    assert "\n" in whole.rstrip("\n")
    cut = done(capsys, *args, "--stop", "never", "--stop", r"\n")
    assert cut == whole[: whole.index("\n")] + "\n"


def test_threads(capsys: Capture) -> None:
    before = torch.get_num_threads()
    try:
        args = ["generate", "model", *MODEL, "-p", "a", "-n", 5, "-s", 2]
        assert done(capsys, *args, "--threads", 1) == done(capsys, *args, "--threads", 2)
        assert torch.get_num_threads() == 2
        refused(run(capsys, *args, "--threads", 0), "--threads must be an integer from 1")
    finally:
        torch.set_num_threads(before)


def test_advice_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptfast.cli import threads

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    busy = "4 threads compute 0.3 times as fast as one; --threads 1 would be faster"
    for seconds, advice in (([3.0, 1.0], busy), ([1.0, 3.0], None)):
        times = iter(seconds)
        monkeypatch.setattr(threads, "_seconds", lambda times=times: next(times))
        found = threads.thread_advice()
        assert advice is None and found is None or advice in found


@pytest.mark.parametrize(
    ("asked", "fp32_s", "bf16_s", "advice"),
    [
        ("fp32", 0.5, 0.25, "2.0 times as fast in bf16: --precision bf16 would be faster"),
        ("bf16", 0.25, 0.5, "2.0 times as fast in fp32: --precision fp32 would be faster"),
        ("fp32", 0.25, 0.5, None),
        ("bf16", 0.5, 0.25, None),
        ("fp32", 0.53125, 0.5, None),
        ("bf16", 0.5, 0.53125, None),
    ],
)
def test_advice_on_precision(
    asked: str, fp32_s: float, bf16_s: float, advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is invented; the products that it times are the model's own."""
    from gptfast.cli import precision

    now, shapes, linear = 0.0, set(), precision.ops.linear

    def timed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        nonlocal now
        out = linear(x, weight)
        now += fp32_s if out.dtype == torch.float32 else bf16_s
        shapes.add((x.shape, weight.shape, out.dtype))
        return out

    monkeypatch.setattr(precision.ops, "linear", timed)
    config, before = GPTConfig(n_layer=1, n_head=2, n_embd=128), torch.get_rng_state()
    found = precision.precision_advice(config, 256, asked, clock=lambda: now)
    assert found is None if advice is None else found is not None and advice in found
    dtypes = torch.float32, torch.bfloat16
    assert shapes == {((256, 128), (512, 128), dtype) for dtype in dtypes}
    shapes.clear()
    assert precision.precision_advice(config, 24, asked) is None and not shapes  # too small
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("is_first", [True, False])
def test_one_process_of_a_run_measures_precisions(
    is_first: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    from gptfast.cli import train

    asked = []
    monkeypatch.setattr(train, "precision_advice", lambda *args: asked.append(args) or "advice")
    settings = TrainConfig(out=str(tmp_path), max_steps=1, precision="bf16", sample_tokens=0)
    model = GPTConfig(1, block_size=8, n_layer=1, n_head=1, n_embd=4)
    command = train.Train(model, settings, ("t.txt",), "byte", batch_size=2)
    trainer, sources, T = command.trainer()
    monkeypatch.setattr(type(trainer.world), "is_first", is_first)
    command._introduce(trainer, sources, T)
    assert asked == ([(trainer.model.config, 2 * T, "bf16")] if is_first else [])
    assert capsys.readouterr().out.endswith("advice\n") == is_first
