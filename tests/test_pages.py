"""Check README, CONTRIBUTING and docs/: Python examples run, and the things they name exist.
README's commands run, and those of docs/weights.md.

docs/finetuning.md and docs/book.md have tests of their own.
"""

import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import torch

import gptfast
from gptfast import GPT, GPTConfig, get_tokenizer, ops
from gptfast.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text("utf-8") for path in PAGES}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = {
    name: "\n".join(block for language, block in BLOCK.findall(text) if language == "python")
    for name, text in TEXTS.items()
    if name not in ("finetuning.md", "book.md")
}
# Make the examples' runs shorter and their models smaller.
SMALLER = {"n_layer=4, n_head=4, n_embd=128": "n_layer=1, n_head=2, n_embd=16"}
SMALLER |= {"max_steps=100": "max_steps=2", "embedded_text(),": "embedded_text()[:40_000],"}
COMMAND = re.compile(r"^gptfast ([a-z]+)((?:\\\n|[^\n#])*)", re.MULTILINE)
COMMANDS = [
    (page, command, arguments)
    for page, text in TEXTS.items()
    for code in (*(block for _, block in BLOCK.findall(text)), *re.findall(r"`([^`\n]+)`", text))
    for command, arguments in COMMAND.findall(code)
]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write tiny models with the names that the examples use to the current directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=32))
    for name in ("gpt2", "runs/train"):
        model.save_pretrained(name)
    Path("runs/train/tokenizer").mkdir()
    for name, text in get_tokenizer("gpt2").transformers_files().items():
        Path("runs/train/tokenizer", name).write_text(text, "utf-8")


@pytest.mark.parametrize("page", [name for name, code in EXAMPLES.items() if code])
def test_the_examples_run(page: str, models: None) -> None:
    if "transformers" in EXAMPLES[page]:
        pytest.importorskip("transformers")
    if "peft" in EXAMPLES[page]:
        pytest.importorskip("peft")
    code = EXAMPLES[page]
    for long, short in SMALLER.items():
        code = code.replace(long, short)
    exec(compile(code, page, "exec"), {"__name__": "page"})


def commands_of(page: str) -> list[list[str]]:
    """Return the arguments of a page's commands that need no network and no terminal."""
    shell = "".join(block for language, block in BLOCK.findall(TEXTS[page]) if language == "sh")
    lines = [shlex.split(line, comments=True) for line in shell.splitlines()]
    runs = [args[1:] for args in lines if args and args[0] == "gptfast"]
    away = re.compile(r"download|chat|serve|hf:.*|.*\.onnx")  # they have tests of their own
    return [args for args in runs if not any(map(away.fullmatch, args))]


@pytest.mark.parametrize("page", ["README.md", "weights.md"])
def test_the_commands_run(page: str, models: None, capsys: pytest.CaptureFixture[str]) -> None:
    """As they are printed, in order, on a tiny GPT-2 and with few steps."""
    Path("notes").mkdir()
    for name in ("book.txt", "notes/a.txt"):
        Path(name).write_text("The cat sat on the mat. " * 100)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    Path("chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 20)
    if page == "weights.md":  # README makes it
        GPT.from_pretrained("gpt2").save_pretrained("runs/tuned")
    few = {"train": "--max-steps 1 --sample-tokens 0", "generate": "--max-new-tokens 2"}
    commands = commands_of(page)
    assert len(commands) >= 7
    pytest.importorskip("gguf")
    for args in commands:
        flags = few.get(args[0], "").split()
        if args[0] == "train" and "--init" not in args:
            flags += "--n-layer 1 --n-head 1 --n-embd 16 --block-size 16".split()
        assert main([*args, *flags]) == 0, (args, capsys.readouterr().err)


@cache
def options_of(command: str) -> set[str]:
    """Return the options that a command's help lists; without a command, return the commands."""
    words = [command, "--help-all"] if command else ["--help"]
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code
    if not command:
        return set(re.findall(r"^  ([a-z]+)  ", printed.getvalue(), re.MULTILINE))
    return set(re.findall(r"--[a-z][a-z0-9-]*", printed.getvalue()))


@pytest.mark.parametrize("command", sorted({command for _, command, _ in COMMANDS}))
def test_the_commands_have_these_options(command: str) -> None:
    assert command in options_of("")
    for page, name, arguments in COMMANDS:
        if name == command:
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", arguments)) - options_of(name)
            assert not unknown, f"{page}: gptfast {name} has no {', '.join(unknown)}"


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "reference.md"])
def test_names_exist(page: str) -> None:
    for name in set(re.findall(r"\bgptfast(?:\.[A-Za-z_]\w*)+", TEXTS[page])):
        value, parts = gptfast, name.split(".")
        for i, part in enumerate(parts[1:], 2):
            if not hasattr(value, part):
                importlib.import_module(".".join(parts[:i]))
            value = getattr(value, part)


@pytest.mark.parametrize("page", TEXTS)
def test_files_exist(page: str) -> None:
    """Paths that the pages name exist in the repository, or in gptfast/ for short ones."""
    folders = sorted({path.name for path in (*ROOT.iterdir(), *(ROOT / "gptfast").iterdir())})
    for path in re.findall(rf"`((?:{'|'.join(map(re.escape, folders))})/[\w./]+)`", TEXTS[page]):
        if not path.startswith(("docs/_", "build/")):
            assert (ROOT / path).exists() or (ROOT / "gptfast" / path).exists(), path


def test_the_links_lead_somewhere(tmp_path: Path) -> None:
    """Local links lead to files; `make docs` checks the rest but needs packages."""
    command = [sys.executable, str(ROOT / "docs/site.py"), str(tmp_path / "pages")]
    process = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert process.returncode == 0, process.stderr
    for page in PAGES[2:]:
        assert (tmp_path / "pages" / page.name).is_file()
    assert "](benchmarks.md)" in (tmp_path / "pages/index.md").read_text("utf-8")


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    missing = [page.name for page in PAGES[2:] if f": {page.name}\n" not in navigation]
    assert not missing


def test_every_public_name_is_in_the_reference() -> None:
    reference = re.findall(r"^::: gptfast\.([\w.]+)$", TEXTS["reference.md"], re.MULTILINE)
    listed = {name.rpartition(".")[2] for name in reference}
    assert {*gptfast.__all__, *ops.__all__} - {"ops"} <= listed
