"""Test `convert`, `download`, and the other commands on models in every form."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SIZES, Capture, done, refused, run
from helpers import (
    random_model,
    save,
)

from gptfast import GPT, get_tokenizer
from gptfast.evaluate.loss import perplexity, sliding_score
from gptfast.weights.convert import FORMATS

FIXTURE = Path(__file__).parent / "fixtures" / "openai"
NAMES = {
    "transformers": "hf",
    "llm.c": "m.bin",
    "nanogpt": "ckpt.pt",
    "gguf": "m.gguf",
    "book": "m.pth",
}
BYTE = get_tokenizer("byte")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path


def byte_model() -> GPT:
    return random_model(vocab_size=257, n_embd=128, n_head=2, block_size=32, std=0.1)


def test_convert_from_form_to_form(capsys: Capture) -> None:
    source = str(FIXTURE)
    for form, name in NAMES.items():
        output = done(capsys, "convert", source, name, "--n-head", 2)
        notes = ["the file holds no vocabulary: nothing says which one the model has"]
        expected = [f"done: 17,760 parameters in {name} ({form})", *notes * (form == "gguf")]
        assert output.splitlines() == expected
        source = name
    back, first = GPT.from_pretrained("m.pth"), GPT.from_pretrained(FIXTURE)
    assert all(torch.equal(p, first.state_dict()[name]) for name, p in back.state_dict().items())
    done(capsys, "convert", FIXTURE, "half.bin", "--dtype", "bf16")
    assert GPT.from_pretrained("half.bin").wte.weight.dtype == torch.bfloat16
    assert Path("half.bin").stat().st_size < 0.7 * Path("m.bin").stat().st_size
    done(capsys, "convert", FIXTURE, "state.safetensors.d", "--to", "nanogpt")
    assert GPT.from_pretrained("state.safetensors.d").config == first.config


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth"])
@pytest.mark.parametrize(
    ("ends", "left"), [(256, ""), ([256], ""), ([5, 256, 9], "id 5, 9 ends"), (7, "id 7 ends")]
)
def test_a_single_file_says_what_it_does_not_hold(
    ends: Any, left: str, name: str, capsys: Capture
) -> None:
    byte_model().save_pretrained("a", tokenizer=get_tokenizer("byte"))
    config = json.loads(Path("a/config.json").read_text())
    Path("a/config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    output = done(capsys, "convert", "a", name)
    assert f"the file holds no vocabulary: use it with --tokenizer {Path('a').resolve()}" in output
    assert ("does not say that" in output) == bool(left) and left in output
    done(capsys, "generate", name, "--tokenizer", "a", "--prompt", "a", "--max-new-tokens", 2)


def test_convert_keeps_the_vocabulary(capsys: Capture) -> None:
    pytest.importorskip("tokenizers")
    from gptfast.tokenizer.train import train_tokenizer

    tokenizer = train_tokenizer(["the value of the name of the value"] * 3, 280, "words")
    random_model(vocab_size=tokenizer.n_vocab).save_pretrained("a", tokenizer=tokenizer)
    done(capsys, "convert", "a", "b")
    assert get_tokenizer("b").sha256 == tokenizer.sha256
    generated = done(capsys, "generate", "b", "--prompt", "the value", "--max-new-tokens", 2)
    assert generated.startswith("the value")


def test_convert_refuses(capsys: Capture) -> None:
    Path("there").mkdir()
    refused(run(capsys, "convert", FIXTURE, "there"), "there exists")
    refused(run(capsys, "convert", "nowhere", "x"), "nowhere is not a checkpoint")
    refused(run(capsys, "convert", FIXTURE, "x", "--to", "ggml"), "ggml")
    refused(run(capsys, "convert", FIXTURE, "x.bin", "--dtype", "fp16"), "fp32 or bf16")
    refused(run(capsys, "convert", "gpt2", "x"), "gptfast download gpt2")
    refused(run(capsys, "convert", FIXTURE, "x.safetensors"), "form is a directory")
    assert sorted(path.name for path in Path().iterdir()) == ["there"]


@pytest.mark.parametrize("form", FORMATS)
def test_commands_take_every_form(form: str, capsys: Capture) -> None:
    model, path = byte_model(), NAMES[form]
    save(model, path, form)
    Path("text.txt").write_text("the value of the name\n" * 40)
    options = ["--tokenizer", "byte"]
    generated = ["--prompt", "the ", "--max-new-tokens", 8, "--seed", 1, *options]
    text = done(capsys, "generate", path, *generated)
    model.save_pretrained("plain")
    same = done(capsys, "generate", "plain", *generated)
    assert text == same
    measured = done(capsys, "eval", path, "--data", "text.txt", *options)
    assert measured == done(capsys, "eval", "plain", "--data", "text.txt", *options)
    sizes = ["--max-steps", 1, "--batch-size", 2, "--sample-tokens", 1, "--device", "cpu"]
    given = ["--init", path, "--data", "text.txt", "--out", "run", "--lr", 1e-9, *sizes, *options]
    done(capsys, "train", *given)
    trained = GPT.from_pretrained("run").state_dict()
    for name, p in model.state_dict().items():
        torch.testing.assert_close(trained[name], p, rtol=0, atol=1e-6)


def test_a_run_is_converted(capsys: Capture) -> None:
    """`convert` writes a run's latest checkpoint in the forms that other programs read."""
    Path("text.txt").write_text("the value of the name\n" * 40)
    tiny = ["--tokenizer", "byte", *SIZES, "--batch-size", 2, "--sample-tokens", 1]
    done(capsys, "train", *tiny, "--data", "text.txt", "--out", "run", "--max-steps", 2)
    for name in NAMES.values():
        done(capsys, "convert", "run", name)
        loaded = GPT.from_pretrained(name)
        idx = torch.tensor([[5, 6, 7]])
        assert torch.equal(loaded(idx), GPT.from_pretrained("run")(idx))


def test_sliding_window(capsys: Capture) -> None:
    model = byte_model()
    model.save_pretrained("m")
    text = "the value of a name is what it was bound to\n" * 5
    Path("text.txt").write_text(text)
    tokens = torch.tensor(BYTE.encode(text))
    for stride, length in ((16, 32), (5, 20)):
        score = sliding_score(model, tokens, BYTE, max_length=length, stride=stride)
        given = ["--stride", stride, "--max-length", length, "--tokenizer", "byte"]
        assert done(capsys, "eval", "m", "--data", "text.txt", *given) == (
            f"loss {score.loss:.4f} nats per token, perplexity {perplexity(score.loss):.2f}, "
            f"{score.bits_per_byte:.4f} bits per byte\n"
        )
    prepare = ["prepare", "--data", "text.txt", "--tokenizer", "byte", "--split", 1, "--out", "t"]
    done(capsys, *prepare)
    token_file = next(Path("t").glob("*.bin"))
    by_file = done(capsys, "eval", "m", "--data", token_file, *given)
    assert by_file.startswith(f"loss {score.loss:.4f} ")
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "ab", "completion": "cd"}))
    refused(run(capsys, "eval", "m", "--data", "pairs.jsonl", *given), "--stride needs one text")
    refused(run(capsys, "eval", "m", "--data", "text.txt", *given[2:], "--stride", 99), "stride")


def test_hellaswag_and_tasks(capsys: Capture) -> None:
    byte_model().save_pretrained("m")
    line = {"ctx": "the value", "endings": ["of", "zzzzzz"], "label": 0}
    Path("x.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "label": 1}))
    output = done(capsys, "eval", "m", "--hellaswag", "x.jsonl", "--tokenizer", "byte")
    assert output == "hellaswag: acc 0.5000, acc_norm 0.5000 (2 examples)\n"
    refused(run(capsys, "eval", "m", "--tokenizer", "byte"), "nothing to measure")
    missing = run(capsys, "eval", "m", "--hellaswag", "no.jsonl", "--tokenizer", "byte")
    refused(missing, "no.jsonl")


def test_download_says_what_to_do(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("gptfast.weights.download.time.sleep", lambda _: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    result = run(capsys, "download", "gpt2", "--url", "http://127.0.0.1:9")
    refused(result, "gpt2 could not be downloaded", "cache/gpt2 by hand")
    refused(run(capsys, "download", "gpt3"), "gpt3")
    shutil.copytree(FIXTURE, "cache/gpt2")
    assert done(capsys, "download", "gpt2").endswith("cache/gpt2\n")
    assert done(capsys, "convert", "gpt2", "x.bin").endswith("x.bin (llm.c)\n")
