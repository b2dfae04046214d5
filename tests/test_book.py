"""docs/book.md: every name and flag it gives for ours exists."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from gptfast.cli.data import Prepare, TrainTokenizer
from gptfast.cli.generate import Eval, Generate
from gptfast.cli.search import Plot, Search
from gptfast.cli.settings import flat
from gptfast.cli.train import Train

TEXT = (Path(__file__).parents[1] / "docs" / "book.md").read_text("utf-8")
NAMES = sorted(set(re.findall(r"\bgptfast(?:\.[A-Za-z_]\w*)+", TEXT)))


@pytest.mark.parametrize("name", NAMES)
def test_name_exists(name: str) -> None:
    parts = name.split(".")
    value = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        # `gptfast.generate` is a function and a module: the module has more behind it.
        module = ".".join(parts[:i])
        if i < len(parts) and importlib.util.find_spec(module):
            value = importlib.import_module(module)
        elif not hasattr(value, part):
            value = importlib.import_module(module)
        else:
            value = getattr(value, part)
    assert value is not None


def test_there_are_names() -> None:
    assert len(NAMES) > 30


def test_flags_exist() -> None:
    known = set(flat(Train()))
    for command in (Generate, Eval, Prepare, TrainTokenizer, Search, Plot):
        known |= {field.name for field in dataclasses.fields(command)}
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z0-9-]*)", TEXT)}
    assert {flag for flag in flags if flag.removeprefix("no_") not in known} == set()


def test_python_example_is_python() -> None:
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    compile(example[1], "docs/book.md", "exec")
