"""Run the gptfast command in this process at toy size, and check how it refuses bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptfast.cli import main

Capture = pytest.CaptureFixture[str]

SIZES = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16".split()
SEED_LINE = re.compile(r"^seed \d+: --seed .*\n", re.MULTILINE)
"""What is printed for a text without --seed."""
TINY = ["--tokenizer", "byte", *SIZES, *"--batch-size 4 --sample-tokens 4 --device cpu".split()]


def run(capsys: Capture, *args: object) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code, stdout and stderr."""
    capsys.readouterr()
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as exit:
        code = exit.code or 0
    return code, *capsys.readouterr()


def done(capsys: Capture, *args: object) -> str:
    """Return the output of a command that must succeed and write nothing but a seed to stderr."""
    code, out, err = run(capsys, *args)
    assert (code, SEED_LINE.sub("", err)) == (0, ""), err
    return out


def train(capsys: Capture, *args: object) -> tuple[int, str, str]:
    return run(capsys, "train", *TINY, *args)


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Check for an exit code above 0 and one line on stderr with these words, no traceback."""
    code, out, err = result
    assert code in (1, 2)
    assert "Traceback" not in out + err
    assert err.startswith("gptfast: ")
    assert err.count("\n") == 1 and err.endswith("\n"), err
    # The message names flags; the words may name the fields of functions instead.
    fields = re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), err)
    for word in words:
        assert word in err or word in fields, err


def start(*args: object, **environment: str) -> subprocess.Popen[str]:
    """Start the command in its own process and process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "gptfast", *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
