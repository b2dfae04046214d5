"""Check examples/plain.py and docs/drop_in.md: each replacement, and all together, give the losses
of the plain script, and the page says what is tested; and run examples/instructions.py."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench_drop_in import ALL, REPLACEMENTS, script

import gptfast
from gptfast import ops

ROOT = Path(__file__).parents[1]
SIZES = {"batch_size": 4, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
CALLED = {"attention": 2, "cross_entropy": 1, "linear_cross_entropy": 1}


@pytest.mark.parametrize(
    "names",
    [("attention",), ("cross_entropy",), ("linear_cross_entropy",), ("AdamW",), ALL[2:], ALL],
    ids="+".join,
)
def test_same_losses(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = dict.fromkeys(CALLED, 0)
    for name in CALLED:

        def call(*args: object, name: str = name, op: object = getattr(ops, name)) -> object:
            counts[name] += 1
            return op(*args)

        monkeypatch.setattr(ops, name, call)
    steps = []

    class Counted(gptfast.AdamW):
        def step(self) -> None:
            steps.append(self.param_groups[0].get("lr"))
            super().step()

    monkeypatch.setattr(gptfast, "AdamW", Counted)
    plain = list(script(())(12, **SIZES))
    assert not any(counts.values()) and not steps
    swapped = list(script(names)(12, **SIZES))
    # Roundings carry over from step to step.
    assert swapped == pytest.approx(plain, abs=2e-4)
    assert plain[-1] < plain[0] - 0.2
    assert counts == {name: 12 * CALLED[name] if name in names else 0 for name in CALLED}
    assert len(steps) == (12 if "AdamW" in names else 0)


def test_clipping_is_on() -> None:
    """Clipping changes the plain script's losses, so max_norm in its place is really tested."""
    unclipped = (
        (ROOT / "examples/plain.py").read_text().replace("clip_grad_norm_", "get_total_norm")
    )
    namespace: dict = {"__name__": "x"}
    exec(unclipped.replace("(model.parameters(), 1.0)", "([])"), namespace)
    losses = [list(train(5, **SIZES)) for train in (namespace["train"], script(ALL))]
    assert losses[0] != pytest.approx(losses[1], abs=2e-4)


def test_the_page_says_what_is_tested() -> None:
    page = (ROOT / "docs/drop_in.md").read_text()
    rows = re.findall(r"^\| (.+?) \| `(.+?)`", page, re.M)
    before = [row[0].strip("`") for row in rows]
    assert [row[1] for row in rows] == [after for _, after in REPLACEMENTS.values()]
    assert before[:2] == [REPLACEMENTS["attention"][0], REPLACEMENTS["cross_entropy"][0]]
    assert before[3] == REPLACEMENTS["AdamW"][0]
    assert len((ROOT / "examples/plain.py").read_text().splitlines()) <= 90


def test_instructions_to_chat_and_server(tmp_path: Path) -> None:
    """The example goes from chats in a file to an answer by `chat` and one by `serve`."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed (the extra serve)")
    done = subprocess.run(
        [sys.executable, ROOT / "examples/instructions.py", "--out", "out", "--steps", "4"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^\$ gptfast (\w+)", done.stdout, re.M)
    assert commands == ["train", "train", "chat", "serve"]
    chats = [json.loads(line) for line in (tmp_path / "out/chats.jsonl").open()]
    assert {message["role"] for message in chats[0]["messages"]} == {"user", "assistant"}
    assert done.stdout.count("168 documents") == 1
    assert done.stdout.splitlines()[-1]


def test_a_server_that_does_not_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What it says is seen, and a path with spaces stays one."""
    spec = importlib.util.spec_from_file_location("instructions", ROOT / "examples/instructions.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with pytest.raises(SystemExit, match="the server did not start"):
        example.ask_server(tmp_path / "no model", "Which day?")
    assert "no model" in capfd.readouterr().err
