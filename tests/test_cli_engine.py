"""Packed models on the command line, the speed line, and the modules that a command imports."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import TINY, Capture, done, refused, run

from gptfast import GPT, Engine, get_tokenizer
from gptfast.cli import main
from gptfast.cli.terminal import printable
from gptfast.data.embedded import embedded_text
from gptfast.engine import engine
from gptfast.engine.gpu_model import GpuModel
from gptfast.ops.backend import EXTENSION


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output directory of a finished run of 6 steps."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(embedded_text()[:1500], "utf-8")
    args = ["--data", str(folder / "text.txt"), "--out", str(folder / "out"), "--max-steps", "6"]
    assert main(["train", *TINY, *args]) == 0
    return folder / "out"


needs_engine = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")


@needs_engine
def test_int4_says_what_it_costs(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    packed, text = tmp_path / "packed", tmp_path / "text.txt"
    text.write_text("The value of the words. " * 20)

    def told(*args: object) -> str:
        code, out, err = run(capsys, *args)
        assert (code, err) == (0, "")
        return out

    said = told("convert", trained, packed, "--dtype", "int4")
    assert "MB of int4 weights in" in said and "of perplexity" in said and "in fp32" in said
    measured = told("eval", trained, "--data", text, "--dtype", "int4").splitlines()
    assert told("eval", packed, "--data", text).splitlines() == measured[:1]
    assert measured[1].startswith("int4 costs ")
    fp32 = told("eval", trained, "--data", text, "--dtype", "fp32").split("perplexity ")[1]
    assert f"{fp32.split(',')[0]} in fp32" in measured[1]


@needs_engine
def test_packed(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    """A packed model gives generate and eval the same results as its source with --dtype."""
    packed, text = tmp_path / "packed", tmp_path / "text.txt"
    text.write_text("The value of the words. " * 20)

    def told(command: str, model: Path, *args: object) -> str:
        code, out, err = run(capsys, command, model, *args)
        assert (code, err) == (0, "")
        return out

    assert "int8 weights in" in told("convert", trained, packed, "--dtype", "int8")
    prompt = ["--prompt", "The ", "--seed", 7, "--max-new-tokens", 30]
    written = told("generate", packed, *prompt)
    assert written == told("generate", trained, *prompt, "--dtype", "int8")
    assert written == told("generate", packed, *prompt, "--lookup")
    assert written == told("generate", packed, *prompt, "--draft", trained)
    measured = [
        told("eval", *args, "--data", text)
        for args in ((packed,), (trained, "--dtype", "int8"), (trained, "--dtype", "fp32"))
    ]
    assert measured[0] == measured[1]
    plain = told("eval", trained, "--data", text)
    losses = [float(line.split()[1]) for line in (plain, *measured[1:])]
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    for args in (("convert", packed, tmp_path / "new"), ("train", *TINY, "--init", packed)):
        result = run(capsys, *args, *(() if args[0] == "convert" else ("--data", text)))
        refused(
            result, f"{packed} is packed for generation", "`serve`", "the model it was made from"
        )
    bf16 = tmp_path / "bf16"
    assert "bf16 weights" in told("convert", trained, bf16, "--to", "packed", "--dtype", "bf16")


@needs_engine
def test_speed_is_reported_on_request(trained: Path, capsys: Capture) -> None:
    args = ["generate", trained, "--prompt", "The ", "--max-new-tokens", 5, "--seed", 1, "--stats"]
    code, out, err = run(capsys, *args, "on")
    assert code == 0 and out.startswith("The ")
    line = (
        r"\[5 tokens, [\d.]+ tokens/s, [\d.e-]+ GB/s of weights; prompt \d+ tokens in [\d.]+ s\]\n"
    )
    assert re.fullmatch(line, err)
    assert run(capsys, *args, "off") == run(capsys, *args, "auto") == (0, out, "")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU stand for a GPU: --device cuda is there, and engines take a GPU's way."""
    cuda = torch.device("cuda")
    cpu = torch.device("cpu")
    found = {"cpu": cpu, "cuda": cuda, "auto": cuda}
    monkeypatch.setattr("gptfast.cli.model_flags.choose_device", lambda name: found[name])
    monkeypatch.setattr(GPT, "to", lambda model, device: model)
    pack = engine._pack

    def packed(model: object, dtype: str | None, base: object) -> object:
        given = isinstance(model, GPT)
        return GpuModel(model, dtype or "fp32") if given else pack(model, dtype, base)

    monkeypatch.setattr(engine, "_pack", packed)


@pytest.mark.parametrize("options", [[], ["--lookup"], ["--num-beams", 3]], ids=str)
def test_a_gpu_writes_what_the_cpu_writes(
    trained: Path, gpu: None, capsys: Capture, options: list[object]
) -> None:
    args = ["generate", trained, "--prompt", "The ", "--max-new-tokens", 12, "--seed", 3]
    args += options
    if not options:
        args += ["--temperature", 0.9, "--top-k", 20]
    on_gpu = done(capsys, *args, "--device", "cuda")
    assert on_gpu == done(capsys, *args) == done(capsys, *args, "--device", "cpu")


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_dtypes_on_a_gpu(trained: Path, gpu: None, capsys: Capture, dtype: str) -> None:
    """The command writes what an engine of the model on the GPU generates, drafts included."""
    model = GPT.from_pretrained(trained)
    tokenizer = get_tokenizer("byte")
    ids = tokenizer.encode("The ")
    (row,) = Engine(model, dtype).generate([ids], 9, temperature=0.0)
    args = ["generate", trained, "--prompt", "The ", "--max-new-tokens", 9, "--temperature", 0]
    args += ["--dtype", dtype]
    text = printable(tokenizer.decode(row)) + "\n"
    assert done(capsys, *args, "--device", "cuda") == text
    assert done(capsys, *args, "--draft", trained) == text
    code, out, err = run(capsys, *args, "--stats", "on")
    assert (code, out) == (0, text) and "tokens/s" in err


def test_chat_on_a_gpu(
    trained: Path, gpu: None, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr("sys.stdin", io.StringIO("The value\nAnd more\n"))
        options = ["--max-new-tokens", 6, "--seed", 0, "--device", device]
        replies.append(run(capsys, "chat", trained, *options))
    assert replies[0] == replies[1] and replies[0][0] == 0 and replies[0][1].count("\n") >= 2


def test_eval_on_a_gpu(trained: Path, gpu: None, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The value of the words. " * 20)
    args = ["eval", trained, "--data", text]
    losses = [
        float(done(capsys, *args, *more).split()[1])
        for more in (["--device", "cpu"], [], ["--dtype", "fp32"], ["--dtype", "int8"])
    ]
    assert losses[:3] == pytest.approx([losses[0]] * 3, abs=1e-4)
    assert losses[3] == pytest.approx(losses[0], abs=0.05)


@needs_engine
def test_packed_weights_stay_on_the_cpu(
    trained: Path, gpu: None, tmp_path: Path, capsys: Capture
) -> None:
    packed = tmp_path / "packed"
    done(capsys, "convert", trained, packed, "--dtype", "int8")
    args = ["generate", packed, "--prompt", "The ", "--max-new-tokens", 4, "--seed", 0]
    assert done(capsys, *args) == done(capsys, *args, "--device", "cpu")
    remedy = "use --device cpu, or the model it was made from"
    refused(run(capsys, *args, "--device", "cuda"), f"{packed} is packed for the CPU", remedy)
    args[1] = trained
    refused(run(capsys, *args, "--draft", packed), f"{packed} is packed for the CPU", remedy)


BAD_PACKED = {
    "convert RUN new.bin --dtype int8": ["llm.c has no int8 weights: name a directory"],
    "convert RUN new --to nanogpt --dtype int8": ["nanogpt has no int8 weights"],
    "convert RUN new --to packed --dtype fp16": [
        "packed weights are fp32, bf16, int8 or int4, not fp16"
    ],
    "convert RUN RUN --dtype int8": ["exists; name another or delete it"],
    "convert nowhere new --dtype int8": ["nowhere is not a checkpoint"],
    "generate RUN --prompt a --dtype fp16": ["--dtype", "fp16"],
    "generate RUN --prompt a --draft nowhere": ["nowhere is not a checkpoint"],
    "generate RUN --prompt a --lookup --num-beams 2": ["lookup and num_beams=2 do not go together"],
    "eval RUN --data a.txt --dtype fp16": ["--dtype", "fp16"],
    "eval RUN --tasks arc_easy --dtype int8": ["--tasks measures the PyTorch model"],
}


@needs_engine
@pytest.mark.parametrize("command", BAD_PACKED)
def test_bad_packed(
    command: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(trained) if word == "RUN" else word for word in command.split()]
    refused(run(capsys, *words), *BAD_PACKED[command])
    assert not list(tmp_path.iterdir())


def modules_after(code: str) -> set[str]:
    """Run the code in a new Python process; return the modules that it has imported."""
    script = f"{code}\nimport sys\nprint('modules:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.partition("modules: ")[2].split())


def test_unneeded_modules_are_not_imported(trained: Path) -> None:
    heavy = {"matplotlib", "transformers", "lm_eval", "tensorboard", "requests", "sympy"}
    heavy |= {"torch._dynamo", "torch._inductor", "gptfast.drop_in"}
    command = ["generate", str(trained), "--prompt", "a", "--max-new-tokens", "1"]
    modules = modules_after(f"from gptfast.cli import main\nassert main({command}) == 0")
    assert "gptfast.cli.generate" in modules
    assert not modules & (
        heavy | {"gptfast.training.trainer", "gptfast.cli.train", "gptfast.cli.chat"}
    )


def test_public_names() -> None:
    import gptfast.generate  # the submodule must not replace the function

    assert callable(gptfast.generate)
    assert {*gptfast.__all__, "accelerate", "restore"} <= set(dir(gptfast))
    for name in gptfast.__all__:
        assert getattr(gptfast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gptfast.nothing
