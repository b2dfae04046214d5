"""What a path holds that no reader takes, in words, with the path or command to give; where a
converted model may go; and who may read what is written."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import TINY, Capture, done, refused, run
from helpers import differing, parameters, random_model
from safetensors.torch import load_file, save_file

from gptfast import GPT, get_tokenizer
from gptfast.weights.lazy_tensor import CheckpointError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path


def files(**contents: bytes) -> Callable[[Path], None]:
    """Return a function that writes files; __ in a name stands for a point."""

    def make(path: Path) -> None:
        for name, content in contents.items():
            (path / name.replace("__", ".")).write_bytes(content)

    return make


def with_config(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(path: Path) -> None:
        random_model().save_pretrained(path)
        (path / "model.safetensors").unlink()
        make(path)

    return both


def models(*names: str) -> Callable[[Path], None]:
    return lambda path: [random_model().save_pretrained(path / n) for n in names] and None


def adapter(path: Path) -> None:
    base = {"peft_type": "LORA", "base_model_name_or_path": "gpt2"}
    (path / "adapter_config.json").write_text(json.dumps(base))
    (path / "adapter_model.bin").write_bytes(b"0")  # as peft wrote it before safetensors


def named_adapter(path: Path) -> None:
    """Write one as peft does under the name mine."""
    (path / "mine").mkdir()
    adapter(path / "mine")


def hub_cache(path: Path) -> None:
    random_model().save_pretrained(path / "snapshots" / "abc")
    (path / "refs").mkdir()
    (path / "refs" / "main").write_text("abc")


def run_of_two(path: Path) -> None:
    for name in ("a", "b"):
        (path / name / "checkpoints" / "step-00000005").mkdir(parents=True)


DIRECTORIES = {
    "empty": (files(), ["empty directory"]),
    "flax": (
        with_config(files(flax_model__msgpack=b"0")),
        ["flax_model.msgpack", "transformers 4"],
    ),
    "tf": (with_config(files(tf_model__h5=b"0")), ["tf_model.h5", "transformers 4"]),
    "gguf": (files(**{"gpt2__gguf": b"GGUF"}), ["D/gpt2.gguf", "give the file itself"]),
    "onnx": (with_config(files(model__onnx=b"0")), ["ONNX"]),
    "fp16": (with_config(files(model__fp16__safetensors=b"0")), ["D/model.fp16.safetensors"]),
    "renamed": (with_config(files(my_model__pt=b"0")), ["give the file itself, D/my_model.pt"]),
    "lightning": (files(**{"last__ckpt": b"0"}), ["D/last.ckpt", "without a config.json"]),
    "no-config": (files(model__safetensors=b"0"), ["D/model.safetensors", "without a config.json"]),
    "config": (with_config(files()), ["config.json, but no weights"]),
    "peft": (adapter, ["adapter of peft for gpt2 without adapter_model.safetensors"]),
    "peft-half": (
        files(adapter_model__safetensors=b"0"),
        ["adapter of peft without adapter_config.json; put that beside it"],
    ),
    "peft-named": (named_adapter, ["the model is in D/mine; give that"]),
    "trainer": (models("checkpoint-2", "checkpoint-10"), ["2 models", "D/checkpoint-10; give one"]),
    "one": (models("final"), ["the model is in D/final"]),
    "runs": (run_of_two, ["2 models or runs, D/a, D/b"]),
    "killed-run": (lambda path: (path / "checkpoints").mkdir(), ["has saved no checkpoint yet"]),
    "checkpoints": (models("step-00000009", "step-00000010"), ["D/step-00000010; give one"]),
    "hub": (hub_cache, ["give its snapshot, D/snapshots/abc"]),
    "shards": (
        with_config(files(**{"model-00001-of-00003__safetensors": b"0"})),
        ["1 of the 3 shards", "model-00002-of-00003.safetensors"],
    ),
    "dcp": (files(**{"0_0__distcp": b"0"}), ["dcp_to_torch D model.pt"]),
    "deepspeed": (files(zero_to_fp32__py=b""), ["zero_to_fp32.py D DIR"]),
    "tensorflow": (files(**{"model__ckpt__index": b"0"}), ["no hparams.json"]),
    "other": (files(**{"notes__txt": b"0"}), ["only notes.txt"]),
}


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_a_directory_of_another_kind(kind: str) -> None:
    make, words = DIRECTORIES[kind]
    Path("D").mkdir()
    make(Path("D"))
    with pytest.raises(CheckpointError) as caught:
        GPT.from_pretrained("D")
    assert str(caught.value).startswith("D is not a checkpoint: ")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_complete_shards_without_an_index(suffix: str) -> None:
    model = random_model()
    model.save_pretrained("D")
    state = load_file("D/model.safetensors")
    Path("D/model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    for i in range(3):
        part = dict(list(state.items())[i::3])
        path = f"D/{stem}-{i + 1:05}-of-00003.{suffix}"
        save_file(part, path) if suffix == "safetensors" else torch.save(part, path)
    assert differing(parameters(GPT.from_pretrained("D")), parameters(model)) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGML\3\0\0\0", "it is GGML"),
        (b"\x89HDF\r\n\x1a\n", "it is HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b'{"a": 1}', "it is text"),
        (b"\x1f\x8b\x08", "compressed by gzip"),
        (b"", "it is empty"),
        ((20240520).to_bytes(4, "little") * 9, "token file of llm.c"),
    ],
)
def test_a_file_of_another_kind(content: bytes, words: str) -> None:
    Path("m").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"m is not a checkpoint: .*{words}"):
        GPT.from_pretrained("m")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("openai-community/gpt2", "run `gptfast download gpt2`"),
        ("openai-community/gpt2-xl", "run `gptfast download gpt2-xl`"),
        ("https://huggingface.co/gpt2", "run `gptfast download gpt2`"),
        ("hf://openai-community/gpt2", "run `gptfast download gpt2`"),
        ("GPT2", "run `gptfast download gpt2`"),
        ("distilgpt2", "`hf download distilgpt2 --local-dir distilgpt2`"),
        ("some/model-v1.5", "`hf download some/model-v1.5 --local-dir model-v1.5`"),
        ("https://huggingface.co/some/model", "`hf download some/model --local-dir model`"),
        ("a/b/c", "there is no such directory$"),
        ("model.pt", "there is no such directory$"),
    ],
)
def test_a_name_of_the_hub(name: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        GPT.from_pretrained(name)


def test_a_downloaded_model_by_its_name_on_the_hub() -> None:
    random_model().save_pretrained("cache/gpt2")
    assert GPT.from_pretrained("openai-community/gpt2").config.n_layer == 2


# Where a converted model may go


@pytest.mark.parametrize(
    "name", ["m.ggml", "m.npz", "m.h5", "m.ckpt", "m.safetensors", "m.GGML", "m.json", "m.xyz"]
)
@pytest.mark.parametrize("flags", [[], ["--dtype", "int8"]], ids=["", "int8"])
def test_convert_makes_no_directory_with_a_files_suffix(
    name: str, flags: list[str], capsys: Capture
) -> None:
    random_model().save_pretrained("a")
    refused(run(capsys, "convert", "a", name, *flags), "directory")
    assert not Path(name).exists()
    if name != "m.xyz":
        refused(run(capsys, "convert", "a", name, "--to", "transformers"), name)


def test_what_a_suffix_means(capsys: Capture) -> None:
    random_model(n_embd=128).save_pretrained("a")
    for name, form in {"M.PTH": "book", "m.Bin": "llm.c", "gpt2-1.5b": "transformers"}.items():
        assert f"in {name} ({form})" in done(capsys, "convert", "a", name)
    assert Path("gpt2-1.5b").is_dir()
    refused(run(capsys, "convert", "a", "pytorch_model.bin"), "transformers' name", "directory")
    refused(run(capsys, "convert", "a", "m.pt", "--to", "transformers"), "is a directory")
    assert "(transformers)" in done(capsys, "convert", "a", "m.model", "--to", "transformers")


# A vocabulary that grew, and fine-tuning


def test_convert_resizes_the_vocabulary(capsys: Capture) -> None:
    model = random_model()
    model.save_pretrained("a")
    done(capsys, "convert", "a", "b", "--resize-vocab", 64)
    found = GPT.from_pretrained("b")
    assert found.config.vocab_size == 64
    assert torch.equal(found.wte.weight[63], model.wte.weight.mean(0))
    refused(run(capsys, "convert", "a", "c", "--resize-vocab", 60), "--resize-vocab only adds")


def test_training_from_a_model_with_fewer_tokens(capsys: Capture) -> None:
    """A token without a row is an error that names --resize-vocab; with it, old rows stay."""
    model = random_model(vocab_size=250)
    model.save_pretrained("a")
    Path("text.txt").write_text("the value of the name\n" * 40)
    given = ["train", "--init", "a", "--data", "text.txt", "--tokenizer", "byte", "--max-steps", 1]
    given += ["--batch-size", 2, "--sample-tokens", 0, "--device", "cpu", "--lr", 1e-9]
    # A tokenizer may have tokens that are not used.
    done(capsys, *given, "--out", "q")
    assert GPT.from_pretrained("q").config.vocab_size == 250
    Path("more.txt").write_text("a second document")
    two = run(capsys, *given, "--data", "text.txt", "more.txt", "--out", "r")
    refused(two, "has token 256", "rows for 250 tokens", "--resize-vocab")
    code, _, error = run(capsys, *given, "--out", "s", "--resize-vocab")
    assert code == 0, error
    found = GPT.from_pretrained("s")
    torch.testing.assert_close(found.wte.weight[:250], model.wte.weight, rtol=0, atol=1e-6)
    refused(run(capsys, "train", "--resize-vocab", "--out", "u"), "--resize-vocab needs --init")
    pytest.importorskip("tokenizers")
    for name, text in {"v": "the value of ", "w": "another name, in other words "}.items():
        Path(f"{name}.txt").write_text(text * 90)
        size = 262 + 8 * (name == "w")
        done(capsys, "tokenizer", "--data", f"{name}.txt", "--out", name, "--vocab-size", size)
    random_model(vocab_size=262).save_pretrained("b", tokenizer=get_tokenizer("v"))
    grown = ["train", "--init", "b", "--data", "text.txt", "--tokenizer", "w", "--out", "x"]
    refused(run(capsys, *grown, "--resize-vocab"), "was trained with another vocabulary")
    longer = run(capsys, *given, "--out", "t", "--resize-vocab", "--block-size", 32)
    refused(longer, "its --block-size is 16, not 32; leave --block-size out")


@pytest.mark.parametrize(("flags", "lr"), [([], 3e-4), (["--lr", "0.01"], 0.01)])
def test_the_learning_rate_of_fine_tuning(flags: list[str], lr: float, capsys: Capture) -> None:
    random_model(vocab_size=257).save_pretrained("a")
    Path("text.txt").write_text("the value of the name\n" * 40)
    given = ["--data", "text.txt", "--tokenizer", "byte", "--max-steps", 1, "--batch-size", 2]
    given += ["--sample-tokens", 0, "--device", "cpu", "--out", "r"]
    code, output, error = run(capsys, "train", "--init", "a", *given, *flags)
    assert code == 0, error
    assert f"fine-tuning a at a learning rate of {lr:g}" in output
    assert ("the default with --init; --lr sets another" in output) == (not flags)
    settings = next(Path("r/checkpoints").glob("step-*")).joinpath("train.toml").read_text()
    assert f"lr = {lr}" in settings.splitlines() or f"lr = {lr:g}" in settings


# Permissions


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_are_readable_by_whom_the_umask_says(umask: int, capsys: Capture) -> None:
    Path("text.txt").write_text("the value of the name\n" * 40)
    before = os.umask(umask)
    try:
        random_model(n_embd=128).save_pretrained("saved")
        for name in ("hf", "m.bin", "m.pt", "m.pth"):
            done(capsys, "convert", "saved", name)
        done(capsys, "train", *TINY, "--data", "text.txt", "--out", "run", "--max-steps", 2)
        done(capsys, "prepare", "--data", "text.txt", "--tokenizer", "byte", "--out", "tokens")
    finally:
        os.umask(before)
    for top in ("saved", "hf", "m.bin", "m.pt", "m.pth", "run", "tokens"):
        for path in (Path(top), *Path(top).rglob("*")):
            allowed = 0o777 if path.is_dir() else 0o666
            if not path.is_symlink():
                assert stat.S_IMODE(path.stat().st_mode) == allowed & ~umask, path
