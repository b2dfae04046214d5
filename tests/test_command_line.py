"""Test how words become values of flags, and the hints for what people type from habit."""

import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Capture, refused, run
from helpers import random_model
from hypothesis import given
from hypothesis import strategies as st

import gptfast
from gptfast.cli import COMMANDS, command_flags, parse
from gptfast.cli.command_line import CommandLine, looks_like_flag
from gptfast.cli.flags import SHORT, UsageError
from gptfast.cli.generate import unescaped
from gptfast.cli.hints import _COMMANDS_ELSEWHERE, _ELSEWHERE, with_flags
from gptfast.cli.settings import flat, read_toml
from gptfast.cli.terminal import print_note
from gptfast.cli.train import Train

ROOT = Path(__file__).parents[1]


def read(command: str, *words: str) -> dict[str, Any]:
    return CommandLine(command, command_flags(command)).read(words)


GENERATE = {"checkpoint": "RUN", "prompt": "a"}
READ = {
    "generate RUN --prompt a": {},
    "generate RUN -p a": {},
    "generate -p a RUN": {},
    "generate RUN -p a -n 5": {"max_new_tokens": 5},
    "generate RUN -p a -n5": {"max_new_tokens": 5},
    "generate RUN -p a -s=5": {"seed": 5},
    "generate RUN --prompt=a --top_k 3": {"top_k": 3},
    "generate RUN -p a --top-k none": {"top_k": None},
    "generate RUN -p a --temperature -1": {"temperature": -1.0},
    "generate RUN -p a --min-p -.5": {"min_p": -0.5},
    "generate RUN -p a --length-penalty -inf": {"length_penalty": float("-inf")},
    "generate RUN -p a --stop . ,": {"stop": [".", ","]},
    "generate RUN -p a --stop . --stop ,": {"stop": [".", ","]},
    "generate RUN -p a --stop=. --stop=, --stop ; !": {"stop": [".", ",", ";", "!"]},
    "generate -p a --stop . , RUN": {"stop": [".", ","]},
    "generate -p a --stop . RUN": {"stop": ["."]},
    "generate --stop . RUN -p a": {"stop": ["."]},
    "generate RUN -p a --stop --": {"stop": ["--"]},
    "generate RUN -p a --stop=--": {"stop": ["--"]},
    "generate RUN -p a --stop - -1": {"stop": ["-", "-1"]},
    "generate -p a --stop x -- RUN": {"stop": ["x"]},
    "generate RUN -p a --stop=--prompt": {"stop": ["--prompt"]},
    "generate RUN -p b -p a": {},
    "generate RUN -p a --lookup": {"lookup": True},
    "generate RUN -p a --lookup=true --logprobs=False": {"lookup": True, "logprobs": False},
    "generate RUN -p a --lookup --no-lookup": {"lookup": False},
}


@pytest.mark.parametrize("line", READ)
def test_words_become_values(line: str) -> None:
    name, *words = line.split()
    assert read(name, *words) == {**GENERATE, **READ[line]}


@pytest.mark.parametrize("prompt", ["-", "-5", "- a list", "-no way", "--my_flag is", "", "–x"])
def test_prompts_that_are_taken_as_they_are(prompt: str) -> None:
    assert read("generate", "RUN", "--prompt", prompt)["prompt"] == prompt


@given(prompt=st.text(max_size=8) | st.from_regex(r"--?[a-z]+(=[a-z]*)?", fullmatch=True))
def test_any_prompt_can_be_written(prompt: str) -> None:
    """With =, and without it unless it looks like a flag, which is refused with the remedy."""
    assert read("generate", "RUN", f"--prompt={prompt}")["prompt"] == prompt
    if looks_like_flag(prompt):
        with pytest.raises(UsageError) as error:
            read("generate", "RUN", "--prompt", prompt)
        assert f"is written --prompt={prompt}" in str(error.value)
    else:
        assert read("generate", "RUN", "--prompt", prompt)["prompt"] == prompt


@given(words=st.lists(st.sampled_from("- -- -p -n5 --stop --stop= a RUN --lookup -x =".split())))
def test_any_words_are_read_or_a_usage_error(words: list[str]) -> None:
    try:
        assert "checkpoint" in read("generate", *words)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1 and "gptfast generate --help" in str(error)


MISTYPED = {
    "generate RUN --temp 0.5": "perhaps you meant --temperature",
    "generate RUN --temprature 0.5": "perhaps you meant --temperature",
    "generate RUN -temperature 0.5": "perhaps you meant --temperature",
    "generate RUN -prompt a": "perhaps you meant --prompt",
    "generate RUN -pHi": "there is no flag -pHi; perhaps you meant -p Hi (",
    "generate RUN -pa=b": "perhaps you meant -p a=b",
    "generate RUN -s-1": "perhaps you meant -s -1",
    "train -dbook.txt": "perhaps you meant -d book.txt",
    "train -oruns/x": "perhaps you meant -o runs/x",
    "train -data x": "perhaps you meant --data",
    "generate RUN -t 8": "perhaps you meant --threads or --temperature",
    "generate RUN --n-predict 9": "perhaps you meant --max-new-tokens",
    "generate RUN --max_tokens 9": "perhaps you meant --max-new-tokens",
    "generate RUN --max-length 9": "perhaps you meant --max-new-tokens",
    "generate RUN --num-return-sequences 4": "perhaps you meant --num-samples",
    "generate RUN --repeat-penalty 2": "perhaps you meant --repetition-penalty",
    "generate RUN --do_sample": "perhaps you meant --temperature (above 0 draws)",
    "generate RUN --file a.txt": "perhaps you meant --prompt - < FILE",
    "generate -m RUN": "the model stands without a flag: gptfast generate MODEL",
    "generate RUN --model-draft x": "perhaps you meant --draft",
    "generate RUN --lr 1": "gptfast train, gptfast search have it",
    "chat RUN -r User:": "there is no flag -r",
    "train --learning-rate 1": "perhaps you meant --lr",
    "train --learning_rate=1": "perhaps you meant --lr",
    "train --max-iters 5": "perhaps you meant --max-steps",
    "train --gradient_accumulation_steps 5": "perhaps you meant --accumulation-steps",
    "train --per_device_train_batch_size 5": "perhaps you meant --batch-size",
    "train --num_train_epochs 5": "perhaps you meant --epochs",
    "train --output_dir x": "perhaps you meant --out",
    "train --init_from gpt2": "perhaps you meant --init",
    "train --bf16": "perhaps you meant --precision bf16",
    "train --dtype bf16": "perhaps you meant --precision",
    "train --batch 8": "perhaps you meant --batch-size",
    "train --no-cuda": "perhaps you meant --device cpu",
    "train --no-compil": "perhaps you meant --no-compile",
    "train --prompt a": "gptfast generate has it",
    "train book.txt": "if it is data, write --data book.txt",
    "train --wholly-unknown 3": "there is no flag --wholly-unknown (see gptfast train --help)",
    "train --compile False": "a switch takes no value: --compile or --no-compile",
    "train \u2013\u2013lr 3": "begins with another kind of dash",
    "train --data": "--data takes one or more values",
    "train --data --out x": "--data takes one or more values",
    "train --lr": "--lr takes a value, X",
    "train --lr --out x": "--lr takes a value, X, got --out",
    "train --lr fast": "--lr takes a number, got 'fast'",
    "train --max-steps 1.5": "--max-steps takes a whole number, got '1.5'",
    "train --schedule cos": "--schedule takes one of cosine, linear, constant",
    "train --resume=maybe": "--resume takes no value, got 'maybe'",
    "search --grid lr=1 --lr-range 1": "--lr-range takes 2 values, LOW HIGH",
    "eval RUN --prompt a": "gptfast generate has it",
    "generate RUN This is": "text with spaces needs quotes",
    "trian": "perhaps you meant gptfast train;",
    "Train": "perhaps you meant gptfast train;",
    "finetune": "perhaps you meant gptfast train --init;",
    "sample": "perhaps you meant gptfast generate;",
    "gen": "perhaps you meant gptfast generate;",
    "frobnicate": "there is no command 'frobnicate'; choose one of",
    "--prompt a": "--prompt stands before the command; write gptfast COMMAND [FLAGS]",
}


@pytest.mark.parametrize("line", MISTYPED)
def test_what_people_type(line: str, capsys: Capture) -> None:
    result = run(capsys, *line.split())
    refused(result, MISTYPED[line])
    assert result[0] == 2 and result[1] == ""


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_the_terminal(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It is one screen, and only a command to copy may be longer than a line."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(capsys, *filter(None, [name]), "--help")[1].splitlines()
    assert 5 < len(lines) < 40
    every = run(capsys, name, "--help-all")[1].splitlines() if name else []
    long = [line for line in (*lines, *every) if len(line) > 80 and line[:8] != "gptfast "]
    assert long == []


def test_help_has_first_what_people_set_first(capsys: Capture) -> None:
    """It says how to see the rest, where they come first too."""
    shown, every = (run(capsys, "train", word)[1] for word in ("--help", "--help-all"))
    assert "--lr X" in shown and "--beta2" not in shown and "--beta2 X" in every
    n = sum(not (flag.hidden or flag.positional) for flag in command_flags("train"))
    assert shown.endswith(f"\n\ngptfast train --help-all explains all {n} flags.\n")
    assert every.index("--data FILE") < every.index("--text-field NAME")
    for name in COMMANDS:
        flags = {flag.name: flag for flag in command_flags(name)}
        first = getattr(COMMANDS[name], "set_first", ())
        assert len(set(first)) == len(first)
        assert not any(flags[word].hidden or flags[word].positional for word in first)
        required = {flag.name for flag in flags.values() if flag.required and not flag.positional}
        assert not first or required <= {*first}


def test_an_attached_text_with_spaces(capsys: Capture) -> None:
    result = run(capsys, "generate", "-pOnce upon", "RUN")
    refused(result, "there is no flag -pOnce; perhaps you meant -p 'Once upon'")
    assert result[0] == 2


OUT_OF_RANGE = [
    "train --batch-size 0",
    "train --max-length 0",
    "train --stride -1",
    "train --threads 0",
    "train --threads 5000",
    "train --device tpu",
    "train --split 1",
    "train --split 0.9 0.2",
    "train --split 1 2 3 4",
    "train --split 1.5 -0.5",
    "train --split nan nan",
    "train --resize-vocab",
    "search --grid lr=1 --jobs 0",
    "search --random lr=1:2 --trials 0",
    "search --grid lr=1 --batch-size 0",
    "search --grid lr=1 --threads 0",
    "eval RUN --data x --batch-size 0",
    "eval RUN --data x --stride 0",
    "eval RUN --data x --threads 0",
    "eval RUN --data x --device tpu",
    "eval RUN --hellaswag x --limit 0",
    "generate RUN -p a --threads 0",
    "generate RUN -p a --device tpu",
    "chat RUN --threads 0",
    "chat RUN --device tpu",
    "chat RUN --template x",
    "tokenizer --data x --vocab-size 256",
    "tokenizer --data x --vocab-size 65537",
    "prepare --data x --split 2",
    "prepare --data x --workers 0",
    "prepare --data x --shard-tokens 0",
    "convert RUN x --resize-vocab 2147483648",
    "convert RUN x --resize-vocab 0",
    "convert RUN x --n-head 0",
]


@pytest.mark.parametrize("line", OUT_OF_RANGE)
def test_values_out_of_range_are_wrong_usage(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """They end with 2 before anything is read, and name the flag."""
    monkeypatch.chdir(tmp_path)
    words = line.split()
    if words[0] in ("tokenizer", "prepare"):
        words += ["--out", "out"]
    result = run(capsys, *words)
    flags = [word for word in line.split() if word.startswith("--")]
    assert result[0] == 2, result[2]
    refused(result)
    assert any(f"gptfast: {flag} " in result[2] for flag in flags)
    assert not [*tmp_path.iterdir()]


def test_a_value_out_of_range_in_a_file(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.toml").write_text("batch_size = 0\n")
    result = run(capsys, "train", "--config", tmp_path / "a.toml")
    refused(result, "a.toml: batch_size must be an integer >= 1, got 0")
    assert result[0] == 1 and "--batch-size" not in result[2]


def test_a_refused_flag_is_not_suggested(capsys: Capture) -> None:
    """A search takes no --resume, so nothing like it is suggested."""
    for word in ("--res", "--resum", "--resume-from", "--continue"):
        assert "--resume" not in run(capsys, "search", word)[2].replace(word, "")


def test_the_names_of_other_programs_lead_to_flags_that_exist() -> None:
    flags = {flag.long for name in COMMANDS for flag in command_flags(name)}
    for entries in _ELSEWHERE.values():
        for entry in entries:
            assert entry.split()[0] in flags or entry.split()[:1] == ["gptfast"], entry
    for command in _COMMANDS_ELSEWHERE.values():
        assert command.split()[0] in COMMANDS or command == "--version"


def test_short_flags_mean_the_same_everywhere(capsys: Capture) -> None:
    assert len(set(SHORT.values())) == len(SHORT) == 5
    for name in COMMANDS:
        shown = run(capsys, name, "--help-all")[1]
        for flag in command_flags(name):
            if flag.short:
                assert f"  {flag.short}, {flag.long}" in shown


def test_help_speaks_words(capsys: Capture) -> None:
    for name in COMMANDS:
        shown = run(capsys, name, "--help")[1]
        assert "STR" not in shown.split() and "None" not in shown and "INT" not in shown.split()
        assert run(capsys, "help", name)[1] == run(capsys, name, "-h")[1] == shown
        shown = run(capsys, name, "--help-all")[1]
        assert "STR" not in shown.split() and "None" not in shown and "INT" not in shown.split()
    assert run(capsys, "train", "--lr", "1", "--help")[0] == 0


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version(word: str, capsys: Capture) -> None:
    assert run(capsys, word) == (0, f"gptfast {gptfast.__version__}\n", "")


def test_errors_name_flags() -> None:
    flags = command_flags("train")
    assert with_flags("batch_size must be >= 1, got 0", flags) == "--batch-size must be >= 1, got 0"
    assert with_flags("lr must be > 0, got -1", flags) == "--lr must be > 0, got -1"
    for kept in ("a/batch_size.txt", "the split must be", "no field 'batch_size'", "--batch-size"):
        assert with_flags(kept, flags) == kept


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\n", "\n"),
        (r"a\n\n", "a\n\n"),
        (r"\\n", r"\n"),
        (r"\t|\r", "\t|\r"),
        (r"\d \x", r"\d \x"),
    ],
)
def test_escapes(written: str, meant: str) -> None:
    assert unescaped(written) == meant


def test_the_sample_settings_are_settings() -> None:
    """examples/train.toml can be given as it is, and shows at least the most used settings."""
    path = ROOT / "examples" / "train.toml"
    command = parse(["train", "--config", str(path)])
    assert dataclasses.replace(command, config=None) != Train()
    assert {"data", "out", "lr", "max_steps", "n_layer", "batch_size"} <= read_toml(path).keys()
    assert read_toml(path).keys() <= flat(Train()).keys()


def test_a_preset() -> None:
    model = parse(["train", "--preset", "gpt2-medium", "--block-size", "256"]).model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (24, 16, 1024, 256)
    assert model.vocab_size == 1  # raised to the tokenizer's


def test_misspelt_keys_of_a_file(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run.toml").write_text("learning_rate = 1e-3")
    refused(run(capsys, "train", "--config", tmp_path / "run.toml"), "did you mean 'lr'?")
    (tmp_path / "run.toml").write_text("batch_size = 0.5")
    refused(run(capsys, "train", "--config", tmp_path / "run.toml"), "run.toml: batch_size must")


@pytest.mark.parametrize("module", ["tokenizers", "lm_eval"])
def test_an_extra_that_is_not_installed(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.txt").write_text("some words " * 9)
    random_model(vocab_size=257).save_pretrained(tmp_path / "model")
    args = {
        "tokenizers": ["tokenizer", "--data", tmp_path / "a.txt", "--out", tmp_path / "out"],
        "lm_eval": ["eval", tmp_path / "model", "--tokenizer", "byte", "--tasks", "arc_easy"],
    }[module]
    refused(run(capsys, *args), f"pip install {module}")
    assert not (tmp_path / "out").exists()


def test_no_compiler_for_torch_compile(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    said = "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx"

    def run_without(self: Any) -> int:
        raise RuntimeError(f"{said}: (None, 'g++')")

    monkeypatch.setattr(COMMANDS["info"], "run", run_without)
    refused(run(capsys, "info"), "--compile needs a C++ compiler; install g++, or leave out")


@pytest.mark.parametrize(("value", "dim"), [("1", False), ("", True), (None, True)])
def test_no_color(value: str | None, dim: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """https://no-color.org: the variable counts unless it is empty."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    print_note("seed 1")
    assert ("\x1b[2m" in screen.getvalue()) == dim


def completed(script: str, line: str) -> list[str]:
    """Return what bash offers for a command line, whose last word is completed."""
    words = line.split(" ")
    code = f"""{script}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
COMP_CWORD={len(words) - 1}
_gptfast
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    process = subprocess.run(["bash", "-u", "-c", code], capture_output=True, encoding="utf-8")
    assert process.returncode == 0 and process.stderr == ""
    return process.stdout.split()


def test_bash_completes(capsys: Capture) -> None:
    """Commands, flags with the switches that turn off, choices; else it leaves the word to bash."""
    code, script, err = run(capsys, "--completion", "bash")
    assert (code, err) == (0, "")
    assert completed(script, "gptfast ") == [*COMMANDS]
    assert completed(script, "gptfast ge") == ["generate"]
    for name in COMMANDS:
        shown = {flag.long for flag in command_flags(name) if not flag.hidden}
        offered = set(completed(script, f"gptfast {name} --"))
        assert {word for word in shown if word.startswith("--")} <= offered
        assert {"--help", "--help-all"} <= offered
    assert completed(script, "gptfast train --data x --sched") == ["--schedule"]
    choices = next(flag.choices for flag in command_flags("train") if flag.name == "schedule")
    assert completed(script, "gptfast train --schedule ") == [*choices]
    assert completed(script, "gptfast train --data bo") == []
    assert completed(script, "gptfast nothing --") == []
    _, zsh, _ = run(capsys, "--completion", "zsh")
    assert zsh == f"autoload -U +X bashcompinit && bashcompinit\n{script}"


@pytest.mark.parametrize("shell", ["", "fish"])
def test_other_shells_are_refused(shell: str, capsys: Capture) -> None:
    result = run(capsys, *f"--completion {shell}".split())
    refused(result, f"--completion takes bash or zsh, got {shell!r}")
    assert result[0] == 2
