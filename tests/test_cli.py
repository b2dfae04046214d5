"""The command line: valid commands work, and each invalid one gets one clear line."""

import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import TINY, Capture, refused, rows, run, train
from helpers import random_model

import gptfast
from gptfast import GPT, GPTConfig
from gptfast.cli import COMMANDS, main
from gptfast.cli.info import Info
from gptfast.cli.settings import flat
from gptfast.cli.train import Train
from gptfast.data.embedded import embedded_text
from gptfast.files import lock
from gptfast.ops.backend import EXTENSION
from gptfast.ops.library import backend_of, operators
from gptfast.tokenizer.bpe import BPETokenizer
from gptfast.tokenizer.train import reduce_tokenizer
from gptfast.tokenizer.vocabulary import get_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(embedded_text()[:1500], "utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output directory of a finished run of 6 steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(["train", *TINY, "--data", str(text), "--out", str(out), "--max-steps", "6"]) == 0
    return out


def test_installed_command(text: Path, tmp_path: Path) -> None:
    """Run train and generate as a user types them, each in its own process."""

    def command(*args: object) -> subprocess.CompletedProcess[str]:
        script = Path(sysconfig.get_path("scripts")) / "gptfast"
        return subprocess.run(
            [sys.executable, script, *map(str, args)],
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )

    done = command("train", *TINY, "--data", text, "--out", "out", "--epochs", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert "done: see out/loss.png" in done.stdout
    assert rows(tmp_path / "out")[-1]["epoch"] == 1
    done = command("generate", "out", "--prompt", "The ", "--max-new-tokens", 5, "--seed", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("The ")
    done = command("generate", "nowhere", "--prompt", "The ")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nowhere is not a checkpoint: there is no such directory" in done.stderr
    assert done.stderr.count("\n") == 1


def test_train_writes_a_run(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    files = {"metrics.jsonl", "samples.txt", "loss.png", "loss.pdf", "environment.json"}
    assert names == {*files, "checkpoints"}
    assert [row["step"] for row in rows(trained)] == [0, 6]
    model = GPT.from_pretrained(trained)
    assert model.config == GPTConfig(257, 16, 1, 2, 16)


@pytest.mark.parametrize("prompt", ["the cat's", '-a "b" $HOME', "--größe", "T"])
def test_the_command_that_is_suggested_can_be_copied(
    prompt: str, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The run's path may have spaces, and its prompt quotes, a dollar and a dash."""
    out = tmp_path / "Läufe 1"
    flags = ["--out", out, "--max-steps", 1, f"--sample-prompt={prompt}"]
    trained, packed = train(capsys, "--data", text, *flags)[1], tmp_path / "pac ked"
    words = shlex.split(trained.splitlines()[-1])
    assert words[:3] == ["gptfast", "generate", str(out)]
    code, written, _ = run(capsys, *words[1:], "-n", "2")
    assert code == 0 and written.startswith(prompt)
    converted = run(capsys, "convert", out, packed, "--dtype", "int8")[1]
    assert shlex.split(converted.splitlines()[-1]) == ["gptfast", "chat", str(packed)]


def test_train_reports_what_it_does(text: Path, tmp_path: Path, capsys: Capture) -> None:
    code, out, err = train(
        capsys, "--data", text, "--out", tmp_path, "--max-steps", 2, "--split", 0.8, 0.1, 0.1
    )
    assert (code, err) == (0, "")
    first = out.splitlines()[0]
    assert "1,500 tokens" in first and "2 steps of 4 x 16 tokens on cpu" in first
    assert f"kernels: {backend_of(operators()[0], 'cpu')}" in first
    assert "validation loss" in out and "test loss" in out


def test_without_data_it_trains_on_the_embedded_text(tmp_path: Path, capsys: Capture) -> None:
    code, out, err = train(
        capsys, "--out", tmp_path, "--max-steps", 1, "--eval-batches", 2, "--sample-tokens", 0
    )
    assert (code, err) == (0, "")
    assert f"{len(embedded_text().encode()):,} tokens" in out


def test_the_default_run_brings_its_vocabulary(tmp_path: Path, capsys: Capture) -> None:
    """Without --data and --tokenizer, the run saves a small vocabulary and resumes with it."""
    out = tmp_path / "run"
    options = ["--n-layer", 1, "--n-embd", 8, "--n-head", 1, "--eval-batches", 1, "--out", out]
    options += ["--sample-tokens", 4]
    args = ["train", *map(str, options)]
    assert main([*args, "--max-steps", "2"]) == 0
    vocabulary = (out / "tokenizer" / "encoder.json").read_bytes()
    assert 5000 < len(json.loads(vocabulary)) < 10_000
    assert main([*args, "--max-steps", "3", "--resume"]) == 0
    assert (out / "tokenizer" / "encoder.json").read_bytes() == vocabulary
    assert "resumed from" in capsys.readouterr().out
    assert main(["generate", str(out), "--prompt", "This is", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("This is")


def test_a_vocabulary_that_is_there_is_not_replaced(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary may belong to another process that has just started in the same directory."""
    gpt2 = get_tokenizer("gpt2")
    assert isinstance(gpt2, BPETokenizer)
    reduce_tokenizer(gpt2, "the cat, the cat", tmp_path / "tokenizer")
    written = (tmp_path / "tokenizer" / "encoder.json").read_bytes()
    options = ["--max-steps", 1, "--eval-batches", 1, "--sample-tokens", 0, "--n-embd", 8]
    code, _, err = train(capsys, *options, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert (tmp_path / "tokenizer" / "encoder.json").read_bytes() == written
    monkeypatch.setattr("gptfast.cli.train.LOCK_TIMEOUT_S", 0.1)
    with lock(tmp_path / "other"):
        code, _, err = train(capsys, *options, "--out", tmp_path / "other")
    assert code == 1 and "is in use by another process" in err
    assert not (tmp_path / "other" / "tokenizer").exists()


def test_resume_continues(text: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ["--data", text, "--log-interval", 1, "--checkpoint-interval", 3, "--seed", 5]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(capsys, *options, "--max-steps", 6, "--out", whole)[0] == 0
    assert train(capsys, *options, "--max-steps", 6, "--out", cut)[0] == 0
    last = cut / "checkpoints" / "step-00000006"
    last.rename(tmp_path / "lost")
    code, out, err = train(capsys, *options, "--max-steps", 6, "--out", cut, "--resume")
    assert (code, err) == (0, "")
    assert "at step 3" in out
    for file in ("model.safetensors", "optimizer.safetensors"):
        other = whole / "checkpoints" / "step-00000006" / file
        assert (last / file).read_bytes() == other.read_bytes()


def test_init_starts_from_weights(
    trained: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    options = ["--data", text, "--max-steps", 1, "--seed", 9, "--out", tmp_path]
    code, _, err = train(capsys, *options, "--init", trained)
    assert (code, err) == (0, "")
    # The run that gave the weights ended where this one begins.
    assert math.isclose(rows(tmp_path)[0]["val_loss"], rows(trained)[-1]["val_loss"], rel_tol=1e-6)
    assert rows(trained)[0]["val_loss"] - rows(trained)[-1]["val_loss"] > 1e-3


def test_generate_is_fixed_by_its_seed(trained: Path, capsys: Capture) -> None:
    def text_of(seed: int, *options: object) -> str:
        args = ("--prompt", "The ", "--max-new-tokens", 30, "--seed", seed, *options)
        code, out, err = run(capsys, "generate", trained, *args)
        assert (code, err) == (0, "")
        assert out.startswith("The ")
        return out

    assert text_of(1) == text_of(1) != text_of(2)
    assert text_of(1, "--temperature", 0) == text_of(2, "--temperature", 0)
    assert text_of(1, "--top-k", 1) == text_of(1, "--temperature", 0)
    assert text_of(1, "--top-p", 1e-6) == text_of(1, "--temperature", 0)
    assert text_of(1, "--min-p", 1.0) == text_of(1, "--temperature", 0)


def test_info(capsys: Capture) -> None:
    code, out, err = run(capsys, "info")
    assert (code, err) == (0, "")
    assert f"gptfast {gptfast.__version__}, torch {torch.__version__}, Python 3." in out
    assert f"installed in {Path(gptfast.__file__).parent}" in out.splitlines()
    assert f"threads: {torch.get_num_threads()}" in out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()[1:]}
    for op in operators():
        name = op.name().removeprefix("gptfast::")
        assert lines[name] == [backend_of(op, "cpu"), backend_of(op, "cuda")]


@pytest.mark.parametrize("engine", ["none", "AMX", "AMX, refused by the system"])
def test_info_names_the_matrix_engine(
    engine: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    if EXTENSION is None:
        pytest.skip("the C++ extension is not built")
    build = {**EXTENSION.build_info(), "matrix_engine": engine}
    monkeypatch.setattr("gptfast.cli.info.EXTENSION", SimpleNamespace(build_info=lambda: build))
    assert f"matrix engine: {engine}" in run(capsys, "info")[1].splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag(command: str, capsys: Capture) -> None:
    code, out, err = run(capsys, command, "--help-all")
    assert (code, err) == (0, "")
    fields = {field.name for field in dataclasses.fields(COMMANDS[command])}
    if command in ("train", "search"):
        fields |= flat(Train()).keys()
    fields -= set(getattr(COMMANDS[command], "not_in_help", ()))
    for name in fields - {"model", "train", "common", "checkpoint", "runs", "src", "dst", "name"}:
        assert f"--{name.replace('_', '-')}" in out
    titles = re.findall(r"^[a-z]+:$", out, re.MULTILINE)
    assert len(titles) == len(set(titles))
    if command != "info":
        assert f"\ngptfast {command} " in out, "no example"


def test_help_shows_the_default_line_break(capsys: Capture) -> None:
    shown = " ".join(run(capsys, "chat", "--help")[1].split())
    assert r"(default: 'Q: {prompt}\nA:')" in shown


def test_help_of_search(capsys: Capture) -> None:
    """It has a directory of its own, and no --resume."""
    out = " ".join(run(capsys, "search", "--help-all")[1].split())
    assert "(default: runs/search)" in out and "runs/train" not in out
    assert "--no-resume" not in out


def test_help_names_every_command(capsys: Capture) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["bad.txt is empty"]),
        (b" \n \n", ["bad.txt is empty"]),
        (b"a\0b", ["bad.txt is binary", "NUL byte at 1"]),
        (b"caf\xe9", ["bad.txt is not UTF-8 text", "at 3", "save it as UTF-8"]),
        (b"\xff\xfe\x00", ["bad.txt is UTF-16 text; save it as UTF-8"]),
        (b"short", ["tokens are too few for one window of 16"]),
        (b"x" * 100, ["tokens are too few for one window of 16"]),
        (b"x", ["split of 1 tokens", "is empty"]),
    ],
    ids="empty blank nul not-utf-8 utf-16 short short-validation one-byte".split(),
)
def test_bad_text(content: bytes, words: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    args = ["--data", tmp_path / "bad.txt", "--out", tmp_path / "out"]
    refused(train(capsys, *args), *words)
    assert not (tmp_path / "out").exists()


BAD_TRAIN_FLAGS = {
    "--n-embd 10 --n-head 3": ["n_embd must be divisible by n_head, got n_embd=10, n_head=3"],
    "--max-steps 5 --epochs 2": ["max_steps or epochs, not both: got 5 and 2"],
    "--dropout 1.5": ["dropout must be in [0, 1), got 1.5"],
    "--max-steps 0": ["max_steps must be >= 1, got 0"],
    "--lr -1": ["lr must be a finite number > 0, got -1.0"],
    "--lr fast": ["--lr", "'fast'"],
    "--seed -1": ["seed must be >= 0, got -1"],
    "--batch-size 0": ["batch_size must be an integer >= 1, got 0"],
    "--split 1.0": ["--split must be two or three shares above 0 that sum to 1", "got 1"],
    "--split 0.9 0.3": ["--split must be two or three", "sum to 1", "got 0.9 0.3"],
    "--data nowhere.txt": ["nowhere.txt"],
    "--tokenizer gpt5": ["tokenizer must be 'gpt2', 'byte' or a directory, got 'gpt5'"],
    "--init nowhere": ["nowhere is not a checkpoint"],
    "--device toaster": ["--device", "toaster"],
    "--nonsense 3": ["--nonsense"],
}


@pytest.mark.parametrize("flags", BAD_TRAIN_FLAGS)
def test_bad_train_flags(flags: str, text: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    result = train(capsys, "--data", text, "--out", out, *flags.split())
    refused(result, *BAD_TRAIN_FLAGS[flags])
    assert not out.exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_absent_device(text: Path, trained: Path, tmp_path: Path, capsys: Capture) -> None:
    words = "device must be auto or cpu, got 'cuda'"
    refused(train(capsys, "--data", text, "--out", tmp_path / "x", "--device", "cuda"), words)
    refused(run(capsys, "generate", trained, "--prompt", "a", "--device", "cuda"), words)


def test_out_cannot_be_written(text: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    refused(train(capsys, "--data", text, "--out", out), "cannot write to", str(out))


def test_a_run_is_not_overwritten(trained: Path, text: Path, capsys: Capture) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    refused(train(capsys, "--data", text, "--out", trained), "already holds a run", "--resume")
    assert (trained / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("flag", ["--resume", "--init"])
def test_another_architecture(
    flag: str, trained: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    where = ["--out", trained, flag] if flag == "--resume" else ["--out", tmp_path, flag, trained]
    result = train(capsys, "--data", text, "--n-layer", 2, *where)
    refused(result, "another shape: its n_layer is 1, not 2")


BAD_GENERATE_FLAGS = {
    "--prompt=a --top-k=-1": ["--top-k must be an integer >= 1, or 0 for off, got -1"],
    "--prompt=a --top-p=0": ["top_p must be in (0, 1], got 0.0"],
    "--prompt=a --top-p=1.5": ["top_p must be in (0, 1], got 1.5"],
    "--prompt=a --min-p=2": ["min_p must be in [0, 1], got 2.0"],
    "--prompt=a --temperature=-1": ["temperature must be", "got -1.0"],
    "--prompt=a --max-new-tokens=-1": ["max_new_tokens must be an integer >= 0, got -1"],
    "--prompt=a --top-k=1.5": ["--top-k", "1.5"],
    "--prompt=a --tokenizer=gpt5": ["got 'gpt5'"],
    "--seed=1": ["--prompt"],
}


@pytest.mark.parametrize("flags", BAD_GENERATE_FLAGS)
def test_bad_generate_flags(flags: str, trained: Path, capsys: Capture) -> None:
    refused(run(capsys, "generate", trained, *flags.split()), *BAD_GENERATE_FLAGS[flags])


def test_tokenizer_larger_than_the_model(tmp_path: Path, capsys: Capture) -> None:
    random_model(vocab_size=61).save_pretrained(tmp_path)
    result = run(capsys, "generate", tmp_path, "--prompt", "a", "--tokenizer", "byte")
    refused(result, "token id 97, out of range for a vocabulary of 61")


def test_nan_logits(tmp_path: Path, capsys: Capture) -> None:
    model = random_model(vocab_size=257)
    torch.nn.init.constant_(model.ln_f.weight, float("nan"))
    model.save_pretrained(tmp_path)
    refused(run(capsys, "generate", tmp_path, "--prompt", "a", "--tokenizer", "byte"), "NaN")


@pytest.mark.parametrize("kind", ["missing", "empty", "another-model", "damaged"])
def test_no_checkpoint(kind: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "model"
    words = {
        "missing": "model is not a checkpoint: there is no such directory",
        "empty": "model is not a checkpoint: it has no config.json with model.safetensors",
        "another-model": "model of type 'llama', not GPT-2's architecture",
        "damaged": "model.safetensors is damaged",
    }
    if kind != "missing":
        path.mkdir()
    if kind in ("another-model", "damaged"):
        random_model().save_pretrained(path)
    if kind == "another-model":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    if kind == "damaged":
        (path / "model.safetensors").write_bytes(b"nothing")
    refused(run(capsys, "generate", path, "--prompt", "a"), words[kind])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], f"{{{', '.join(COMMANDS)}}}"),
        (["tran"], "tran"),
    ],
    ids=["none", "unknown"],
)
def test_no_command(args: list[str], words: str, capsys: Capture) -> None:
    refused(run(capsys, *args), words, "see gptfast --help")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(self: Info) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Info, "run", interrupted)
    assert run(capsys, "info") == (130, "", "gptfast: interrupted\n")
