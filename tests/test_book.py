"""docs/book.md: its names, flags and settings exist, and its example equals its command."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from gptfast.cli import parse
from gptfast.cli.evaluate import Eval
from gptfast.cli.generate import Generate
from gptfast.cli.plot import Plot
from gptfast.cli.prepare import Prepare
from gptfast.cli.search import Search
from gptfast.cli.settings import flat
from gptfast.cli.tokenizer import TrainTokenizer
from gptfast.cli.train import Train

TEXT = (Path(__file__).parents[1] / "docs" / "book.md").read_text("utf-8")
# Join a command's continued lines into one.
JOINED = re.sub(r"\\\n\s*", "", TEXT)
EXAMPLE = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
NAMES = sorted(set(re.findall(r"\bgptfast(?:\.[A-Za-z_]\w*)+", TEXT)))
IMPORTS = sorted(set(re.findall(r"from gptfast[\w.]* import \w+(?:, \w+)*", TEXT)))
COMMANDS = {
    "train": Train,
    "generate": Generate,
    "eval": Eval,
    "prepare": Prepare,
    "tokenizer": TrainTokenizer,
    "search": Search,
    "plot": Plot,
}
FLAGS = {
    name: set(flat(Train())) if command is Train else {f.name for f in dataclasses.fields(command)}
    for name, command in COMMANDS.items()
}
CALLS = re.findall(rf"\bgptfast ({'|'.join(COMMANDS)})\b([^`\n#]*)", JOINED)


def flags_in(text: str) -> set[str]:
    flags = re.findall(r"(?<!\S)--([a-z][a-z0-9-]*)", text)
    return {flag.replace("-", "_").removeprefix("no_") for flag in flags}


@pytest.mark.parametrize("statement", IMPORTS)
def test_import_works(statement: str) -> None:
    exec(statement, {})


def test_there_are_names_and_commands() -> None:
    assert len(NAMES) > 30
    assert len(IMPORTS) > 2
    assert {name for name, _ in CALLS} == set(COMMANDS)


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=lambda value: value.strip()[:30])
def test_flags_are_the_commands(name: str, arguments: str) -> None:
    assert flags_in(arguments) - FLAGS[name] == set()


def test_flags_named_alone_exist() -> None:
    flags = set().union(*(flags_in(span) for span in re.findall(r"`(--[^`]*)`", TEXT)))
    assert len(flags) > 8
    assert flags - set().union(*FLAGS.values()) == set()


def test_python_example_is_the_command() -> None:
    arguments = next(arguments for name, arguments in CALLS if name == "train")
    wanted = flat(parse(["train", *shlex.split(arguments)]))
    calls = {
        node.func.attr: {k.arg: eval(ast.unparse(k.value), {}) for k in node.keywords}
        for node in ast.walk(ast.parse(EXAMPLE))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") in ("GPTConfig", "TrainConfig")
    }
    given = {**calls["GPTConfig"], **calls["TrainConfig"]}
    # The example also sets the book's seed; its loaders choose the text, its split and its batches.
    assert given.pop("seed") == 123
    assert set(given) == flags_in(arguments) - {"data", "split", "batch_size"}
    assert given == {name: wanted[name] for name in given}
