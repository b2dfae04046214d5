"""Run the commands of docs/finetuning.md in order with fewer steps: they do what it says.

So a stranger's way is one test, from data to what peft, transformers and llama.cpp load.
"""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import rows
from finetuning_page import BLOCKS, shortened
from helpers import scripted_model

from gptfast import GPT, get_tokenizer
from gptfast.cli import main

BYTE = get_tokenizer("byte")


@pytest.fixture(scope="module", autouse=True)
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run each command in a new directory, where the tests run too; return what it printed."""
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finetuning"))
        for language, content in BLOCKS:
            if language == "python":
                exec(compile(content, "docs/finetuning.md", "exec"), {})
            for command in content.splitlines() if language == "sh" else ():
                program, *args = shlex.split(shortened(command), comments=True)
                assert program == "gptfast"
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    assert main(args) == 0, command
                printed[shlex.join(args)] = output.getvalue()
        yield printed


def loss_of(outputs: dict[str, str], beginning: str) -> float:
    """Return the loss that `gptfast eval` printed."""
    found = [text for command, text in outputs.items() if command.startswith(beginning)]
    form = r"loss ([\d.]+) nats per token, perplexity [\d.]+, [\d.]+ bits per byte\n"
    return float(re.fullmatch(form, found[0])[1])


def held_back() -> list[dict[str, str]]:
    """Return the examples of the test part: the last tenth."""
    lines = Path("questions.jsonl").read_text().splitlines()
    assert len(lines) == 190
    return [json.loads(line) for line in lines[171:]]


def test_every_step_is_there(outputs: dict[str, str]) -> None:
    commands = [command.split()[0] for command in outputs]
    assert commands == [
        *("train", "prepare", "eval"),
        *("train", "train", "train", "convert", "search", "eval", "generate", "convert", "convert"),
    ]
    for flag in ("--freeze", "--lora-rank"):
        assert any(flag in command for command in outputs)
    for flag in ("--init", "--grid lr=", "--stop"):
        assert any(flag in command for command in outputs)


def test_finetuning_lowers_the_loss(outputs: dict[str, str]) -> None:
    """The best model has a lower loss than the base on completions that were held back."""
    base = loss_of(outputs, "eval runs/base")
    assert loss_of(outputs, "eval runs/rates/best/checkpoints/best") < base


@pytest.mark.parametrize("run", ["runs/base", "runs/rates/best/checkpoints/best"])
def test_prompts_do_not_count(run: str, outputs: dict[str, str]) -> None:
    """The loss equals one by hand over the completions and their end-of-text alone."""
    model, total, n = GPT.from_pretrained(run), 0.0, 0
    for example in held_back():
        prompt, completion = (BYTE.encode(example[name]) for name in ("prompt", "completion"))
        ids = torch.tensor([*prompt, *completion, BYTE.eot])
        with torch.inference_mode():
            logprobs = model(ids[None, :-1])[0].log_softmax(-1)  # (T - 1, V)
        targets = ids[len(prompt) :]
        total -= logprobs[len(prompt) - 1 :].gather(1, targets[:, None]).sum().item()
        n += len(targets)
    assert abs(loss_of(outputs, f"eval {run}") - total / n) < 1e-4


def test_prompts_are_no_targets_in_training(outputs: dict[str, str]) -> None:
    """A run counts only the tokens that it learns: about 15 of an example's 50."""
    steps = rows(Path("runs/tuned"))[-1]
    examples = steps["step"] * 16
    lines = Path("questions.jsonl").read_text().splitlines()[:152]
    lengths = [len(json.loads(line)["completion"]) + 1 for line in lines]
    assert abs(steps["tokens"] / examples - sum(lengths) / 152) < 0.5


def test_frozen_is_as_it_was(outputs: dict[str, str]) -> None:
    base, frozen = (GPT.from_pretrained(f"runs/{name}").state_dict() for name in ("base", "frozen"))
    for name in base:
        same = torch.equal(base[name], frozen[name])
        assert same == name.startswith(("wte.", "wpe.", "h.0.")), name


def test_the_search_names_the_best(outputs: dict[str, str]) -> None:
    """The search reports the trial with the lowest validation loss of all evaluations as best."""
    results = json.loads(Path("runs/rates/results.json").read_text())
    lowest = {
        path.parent.name: min(row["val_loss"] for row in rows(path.parent)[1:] if "val_loss" in row)
        for path in Path("runs/rates").glob("trial-*/metrics.jsonl")
    }
    assert len(lowest) == 3
    best = min(lowest, key=lowest.get)
    assert results[0]["trial"] == best and results[0]["val_loss"] == lowest[best]
    printed = next(text for command, text in outputs.items() if command.startswith("search"))
    rate = f"lr={results[0]['settings']['lr']:.4g}"
    assert f"best: {rate} (runs/rates/{best})" in printed


QUESTION = "Which day comes after Monday? "


def generate_command(outputs: dict[str, str]) -> str:
    return next(command for command in outputs if command.startswith("generate"))


def test_the_answer_has_no_full_stop(outputs: dict[str, str]) -> None:
    """After so few steps the text is unpredictable, but --stop must cut it at the full stop."""
    printed = outputs[generate_command(outputs)]
    assert printed.startswith(QUESTION)
    assert "." not in printed


def test_the_answer_is_cut_at_its_full_stop(
    outputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the page's command on a model whose weights make it continue after the answer."""
    scripted_model(f"{QUESTION}It is Tuesday. It is Friday.").save_pretrained(tmp_path)
    _, _, *flags = shlex.split(generate_command(outputs))
    capsys.readouterr()
    assert main(["generate", str(tmp_path), *flags, "--tokenizer", "byte"]) == 0
    assert capsys.readouterr().out == f"{QUESTION}It is Tuesday\n"


# (what it imports first, content) of each Python block for programs of others.
LIBRARIES = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)
HANDED = {LIBRARIES.match(code)[1]: code for language, code in BLOCKS if language == "py"}


def run_for_others(library: str) -> tuple[dict[str, Any], str]:
    """Run the page's block that begins with this library; return its names and what it prints."""
    for module in LIBRARIES.findall(HANDED[library]):
        pytest.importorskip(module)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(HANDED[library], "docs/finetuning.md", "exec"), names)
    return names, output.getvalue()


def test_peft_and_transformers_load_what_is_handed_on(outputs: dict[str, str]) -> None:
    """Both have the logits of gptfast's own model, which are not those of the base."""
    names, printed = run_for_others("peft")
    assert printed.count(QUESTION) == 2
    idx = names["prompt"]["input_ids"]
    assert idx[0].tolist() == BYTE.encode(QUESTION)
    ours, base = GPT.from_pretrained("runs/adapter"), GPT.from_pretrained("runs/base")
    with torch.inference_mode():
        for theirs in (names["adapter"], names["merged"]):
            logits = theirs.eval()(idx).logits
            torch.testing.assert_close(logits, ours(idx), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(logits, base(idx), atol=1e-2)


def test_llama_cpp_loads_what_is_handed_on(outputs: dict[str, str]) -> None:
    names, printed = run_for_others("llama_cpp")
    ids = names["model"].tokenize(QUESTION.encode(), add_bos=False)
    assert ids == BYTE.encode(QUESTION) and printed.strip()


def test_what_is_handed_on_is_read_back(outputs: dict[str, str]) -> None:
    """Every number is within half a step of q8_0, of which 127 reach the largest in its row."""
    ours, back = (GPT.from_pretrained(path) for path in ("runs/adapter", "handed.gguf"))
    for name, p in ours.state_dict().items():
        error = (back.state_dict()[name] - p).abs()
        # The scale itself is in fp16.
        assert error.max() <= p.abs().max() * (0.5 / 127 + 2**-10), name
