"""Data on the command line: fields, pipes, data that moved, small data, data of a search."""

import errno
import gzip
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import TINY, Capture, done, refused, run, train

import gptfast.cli.search
import gptfast.data.prepare
from gptfast import get_tokenizer
from gptfast.cli import main
from gptfast.cli.settings import read_toml
from gptfast.cli.train import Train
from gptfast.cli.train_data import absolute, make_loaders
from gptfast.data.tokens import as_tokens
from gptfast.weights.checkpoint import checkpoints

BYTE = get_tokenizer("byte")
TEXT = "Some words of a text, and a few more of them. " * 60
STEP = ["--max-steps", 1, "--sample-tokens", 0]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose data was named by a relative path."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "a.txt").write_text(TEXT)
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main([*map(str, ("train", *TINY, "--data", "a.txt", "--out", "run", *STEP))]) == 0
    finally:
        os.chdir(before)
    return folder / "run"


def lines(path: str, *records: dict[str, Any]) -> None:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_fields_are_flags_of_every_command(trained: Path, capsys: Capture) -> None:
    lines("a.jsonl", *({"story": f"story {i} of many"} for i in range(40)))
    lines("b.jsonl", *({"q": f"is {i}?", "a": f" is {i}"} for i in range(40)))
    Path("c.csv").write_text("story\n" + "".join(f"story {i} of many\n" for i in range(40)))
    named = {"a.jsonl": ["--text-field", "story"], "c.csv": ["--text-field", "story"]}
    named["b.jsonl"] = ["--prompt-field", "q", "--completion-field", "a"]
    for data, flags in named.items():
        for command in (
            ["prepare", "--tokenizer", "byte", "--out", f"{data}.tokens"],
            ["train", *TINY, *STEP, "--out", f"{data}.run"],
            ["eval", trained],
        ):
            refused(run(capsys, *command, "--data", data), f"{data}:", "has no field 'text'", "--")
            done(capsys, *command, "--data", data, *flags)
        # What the run was told is kept for --resume.
        done(capsys, "train", "--resume", "--out", f"{data}.run", "--max-steps", 2)


def test_end_of_text_is_a_flag_of_every_command(trained: Path, capsys: Capture) -> None:
    Path("a.txt").write_text((TEXT + "<|endoftext|>") * 3 + TEXT)
    for command in (
        ["prepare", "--tokenizer", "byte", "--out", "tokens"],
        ["train", *TINY, *STEP, "--out", "run"],
        ["eval", trained],
    ):
        done(capsys, *command, "--data", "a.txt", "--split-on-eot")
    ids = np.fromfile("tokens/train_000000.bin", "<u2")[512:]
    assert (ids == BYTE.eot).sum() == 3


@pytest.mark.parametrize("command", ["prepare", "train", "eval"])
def test_standard_input(command: str, trained: Path, capsys: Capture) -> None:
    own = {
        "prepare": ["--tokenizer", "byte", "--out", "out"],
        "train": [*TINY, *STEP, "--out", "out"],
        "eval": [trained],
    }[command]
    reading, writing = os.pipe()
    os.write(writing, gzip.compress(TEXT.encode()))
    os.close(writing)
    kept = os.dup(0)
    try:
        os.dup2(reading, 0)
        out = done(capsys, command, *own, "--data", "-")
    finally:
        os.dup2(kept, 0)
        for descriptor in (kept, reading):
            os.close(descriptor)
    assert f"{len(TEXT):,} tokens" in out or "train 2,4" in out or "bits per byte" in out


def settings_of(out: Path) -> dict[str, Any]:
    return tomllib.loads((checkpoints(out)[-1] / "train.toml").read_text())


def test_a_run_keeps_the_path_of_its_data_alone(trained: Path) -> None:
    """The data's path is absolute; no other path is in the settings or in the state."""
    path = checkpoints(trained)[-1]
    assert settings_of(trained)["data"] == [str(trained.parent / "a.txt")]
    assert settings_of(trained).keys().isdisjoint(("out", "init", "config"))
    for name in ("train.toml", "state.json"):
        content = (path / name).read_text()
        assert content.count(str(trained.parent)) == 1 and str(trained) not in content
    state = json.loads((path / "state.json").read_text())
    assert "out" not in state["config"]["train"]


def test_resuming_elsewhere(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    """Another working directory does not matter; data that moved is named by the error."""
    data = trained.parent / "a.txt"
    done(capsys, "train", "--resume", "--out", os.path.relpath(trained), "--max-steps", 2)
    data.rename(tmp_path / "moved.txt")
    more = ["train", "--resume", "--out", trained, "--max-steps", 3]
    try:
        refused(run(capsys, *more), str(data), "if this run's data has moved, name it (--data)")
        Path("other.txt").write_text(TEXT[::-1])
        refused(run(capsys, *more, "--data", "other.txt"), "trained on other data", "--data")
        done(capsys, *more, "--data", "moved.txt")
        assert settings_of(trained)["data"] == [str(tmp_path / "moved.txt")]
    finally:
        (tmp_path / "moved.txt").rename(data)
    done(capsys, "train", "--resume", "--out", trained, "--max-steps", 4, "--data", data)


def test_what_absolute_paths_are(tmp_path: Path) -> None:
    here = str(tmp_path)
    found = absolute(["a.txt", "b/*.txt", "../c", "-", "/d/e", ""])
    assert found == (
        *(f"{here}/a.txt", f"{here}/b/*.txt", f"{tmp_path.parent}/c"), "-", "/d/e", ""
    )  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "crlf", "utf-16", "latin-1"])
def test_a_file_of_settings_as_editors_write_it(encoding: str) -> None:
    text = 'out = "été"\nn_layer = 2\n'
    if encoding == "crlf":
        Path("a.toml").write_bytes(text.replace("\n", "\r\n").encode())
    else:
        Path("a.toml").write_bytes(text.encode(encoding))
    if encoding in ("utf-16", "latin-1"):
        with pytest.raises(ValueError, match="a.toml is not UTF-8 text .*; save it as UTF-8"):
            read_toml("a.toml")
    else:
        assert read_toml("a.toml") == {"out": "été", "n_layer": 2}


@pytest.mark.parametrize("kind", ["text", "prompts"])
def test_small_data_trains_with_a_smaller_batch(kind: str, capsys: Capture) -> None:
    data = "a.txt"
    if kind == "text":
        Path(data).write_text(TEXT[:340])
    else:
        data = "a.jsonl"
        lines(data, *({"prompt": "a", "completion": "bcd"} for _ in range(4)))
    flags = ["--data", data, *STEP, "--batch-size", 100, "--split", 0.7, 0.3]
    out = done(capsys, "train", *TINY, *flags, "--out", "run")
    n = 14 if kind == "text" else 3
    assert f"the data fills no batch of 100: batches have {n}, all there is" in out
    assert f"1 steps of {n} x 16 tokens" in out
    # The run is resumed by the same rule.
    assert f"have {n}" in done(capsys, "train", "--resume", "--out", "run", "--max-steps", 2)


def test_long_examples_are_counted(capsys: Capture) -> None:
    """A window has 16 tokens and their targets: 17 with end-of-text fit, the 18th is cut."""
    pairs = [("a", "b" * 15), ("a", "b" * 16), ("ab", "c" * 40), ("a" * 16, "b"), ("a" * 17, "b")]
    lines("a.jsonl", *({"prompt": a, "completion": b} for a, b in pairs * 2))
    flags = ["--data", "a.jsonl", *STEP, "--split", 0.5, 0.5]
    out = done(capsys, "train", *TINY, *flags, "--out", "run")
    assert "left out 1 examples without a completion in their first 16 tokens\n" in out
    assert "cut 3 completions that go on after their examples' first 16 tokens\n" in out
    code, _, said = run(capsys, "eval", "run", "--data", "a.jsonl")
    assert code == 0 and said.startswith("left out 2 examples without a") and "\ncut 6 " in said
    lines("a.jsonl", *({"prompt": "a", "completion": "b"} for _ in pairs * 2))
    out = done(capsys, "train", *TINY, *flags, "--out", "short")
    assert "left out" not in out and "cut " not in out


@pytest.mark.parametrize("n", [20, 40, 150])
def test_messages_of_data_name_flags(n: int, capsys: Capture) -> None:
    """No option of Python is in a message of the command, however small the data is."""
    Path("a.txt").write_text(TEXT[:n])
    result = train(capsys, "--data", "a.txt", "--out", "out", *STEP)
    refused(result, "--max-length")
    assert "drop_last" not in result[2] and "batch_size=" not in result[2]
    if n == 40:
        assert "the val part of the data" in result[2] and "--split" in result[2]


def test_loaders_of_large_data_are_as_before() -> None:
    tokens = as_tokens(TEXT, BYTE)
    loaders = make_loaders(Train(max_length=16, batch_size=8), [tokens, tokens[:100]], BYTE)
    assert [len(loader.dataset) for loader in loaders] == [172, 6]
    assert [len(loader) for loader in loaders] == [172 // 8, 1]


SEARCHES = {
    "--grid lr=1e-3,1e-2 --data bad.jsonl": ["bad.jsonl:30 has no field 'text'", "--text-field"],
    "--lr-range 1e-4 1 --data bad.jsonl": ["bad.jsonl:30 has no field 'text'"],
    "--random lr=1e-3:1e-2 --trials 2 --data nowhere.txt": ["cannot read nowhere.txt"],
    "--grid lr=1e-3 --data a.txt --max-length 9 --block-size 8": ["at most block_size=8, got 9"],
    "--grid max_length=8,2000 block_size=4000 --data a.txt": ["are too few for one window of 2000"],
    "--grid lr=1e-3 --data page.html": ["page.html is markup"],
    "--grid lr=1e-3 --data -": ["- can be read only once", "save it to a file"],
    "--grid lr=1e-3 --data pipe": ["pipe can be read only once"],
}


@pytest.mark.parametrize("command", SEARCHES)
def test_a_searchs_data_is_checked_before_its_trials(command: str, capsys: Capture) -> None:
    Path("a.txt").write_text(TEXT[:1000])
    Path("page.html").write_text("<html>")
    os.mkfifo("pipe")
    lines("bad.jsonl", *({"text": TEXT[:50]} for _ in range(29)), {"body": "x"})
    flags = [*TINY, *STEP, "--out", "out"]
    refused(run(capsys, "search", *flags, *command.split()), *SEARCHES[command])
    assert not Path("out").exists()


def test_a_search_names_its_data_from_everywhere(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command continues a search from another working directory."""
    Path("a.txt").write_text(TEXT)
    found = []

    def no_trials(base: dict[str, Any], *args: Any, **options: Any) -> None:
        found.append(base["data"])

    monkeypatch.setattr(gptfast.cli.search, "run_search", no_trials)
    monkeypatch.setattr(gptfast.cli.search, "lr_range", no_trials)
    for command in (["--grid", "lr=1e-3"], ["--lr-range", 1e-4, 1]):
        done(capsys, "search", *command, *TINY, *STEP, "--data", "a.txt", "--out", "out")
    assert found == [(str(tmp_path / "a.txt"),)] * 2


def test_out_is_checked_before_the_work(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory that cannot be replaced, such as a mounted disk, is an error at once."""
    Path("a.txt").write_text(TEXT)
    Path("disk").mkdir()
    rename = Path.rename

    def busy(self: Path, target: Path) -> Path:
        if "disk" in (self.name, Path(target).name):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    def no_work(*args: object) -> None:
        raise AssertionError("it has begun")

    monkeypatch.setattr(Path, "rename", busy)
    monkeypatch.setattr(gptfast.data.prepare, "tokenize", no_work)
    command = ["prepare", "--data", "a.txt", "--tokenizer", "byte", "--out"]
    refused(run(capsys, *command, "disk"), "cannot replace", "disk: Device or resource busy")
    assert os.listdir("disk") == []
    refused(run(capsys, *command, "a.txt/below"), "cannot write")
    refused(run(capsys, *command, "."), "already exists")
