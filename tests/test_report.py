"""Test the page about a run: it is whole, escaped, and opens without a network; and on_row."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import make_trainer

from gptfast.cli import main
from gptfast.installed import version
from gptfast.training.metrics import read_metrics
from gptfast.training.report import write_report

VOID = {"meta", "br", "hr", "img", "link"}


class Page(HTMLParser):
    """Collects texts and attributes; an element that is not closed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.cells[-1] += data

    def table(self) -> dict[str, str]:
        return dict(zip(self.cells[::2], self.cells[1::2], strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "<b>one & two"
    trainer = make_trainer(out, max_steps=9, sample_prompt="the <script>")
    trainer.fit()
    return out


def test_the_page_has_everything(run: Path, tmp_path: Path) -> None:
    out = write_report(run, tmp_path / "new" / "run.html")
    text = out.read_text("utf-8")
    page = Page(text)
    found, rows = page.table(), read_metrics(run)
    assert found["steps"] == "9"
    best = min((row for row in rows[1:] if "val_loss" in row), key=lambda row: row["val_loss"])
    assert found["lowest validation loss"].startswith(f"{best['val_loss']:.4f} (perplexity")
    assert found["lowest validation loss"].endswith(f"at step {best['step']}")
    assert found["n_embd"] == "24" and float(found["lr"]) == 1e-3  # settings
    assert found["gptfast"] == version() and found["torch"] and found["device"]
    samples = (run / "samples.txt").read_text("utf-8").splitlines()
    assert len(samples) == 2
    for line in samples:
        step, _, sample = line.partition(": ")
        assert found[step] == sample and "<script>" in sample
    # The losses are drawn: the two lines and their legend are paths in the picture.
    assert page.tags.count("svg") == 1 and page.tags.count("path") > 20


def test_it_opens_without_a_network(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "run.html").read_text("utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "image"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value is not None and value.startswith("#"), (name, value)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text
    assert "<b>one" not in text and "&lt;b&gt;one &amp; two" in text


def test_no_folder_of_this_machine_is_shown(tmp_path: Path, monkeypatch: Any) -> None:
    """Data and a vocabulary are named without where they lie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private").mkdir()
    Path("private/book.txt").write_text("the cat sat on the mat. " * 60, "utf-8")
    sizes = "--n-layer 1 --n-head 1 --n-embd 16 --block-size 16 --sample-prompt /the --max-steps 1"
    data, out = ["--data", "private/book.txt"], str(tmp_path / "runs/a")
    assert main(["train", *data, "--tokenizer", "byte", *sizes.split(), "--out", out]) == 0
    text = write_report(out, "a.html").read_text("utf-8")
    assert str(tmp_path) not in text and "private" not in text
    found = Page(text).table()
    assert (found["data"], found["tokenizer"]) == ("book.txt", "byte")
    assert found["sample_prompt"] == "/the" and "started from" not in found
    tuned = ["--init", "runs/a", "--lora-rank", "2", "--max-steps", "1", "--out", "runs/b"]
    assert main(["train", *data, *tuned]) == 0
    found = Page(write_report("runs/b", "b.html").read_text("utf-8")).table()
    assert (found["started from"], found["lora_rank"]) == ("a", "2")


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, runs = str(tmp_path / "a.html"), [str(run), "other"]
    assert main(["plot", runs[0], "--report", page]) == 0
    assert f"see {page}" in capsys.readouterr().out and Path(page).stat().st_size > 10_000
    for flags, code, said in (
        ([*runs, "--report", page], 2, "--report is about one run, got 2"),
        (["--report", page], 2, "--report is about one run, got 0"),
        ([runs[0], "--report", page, "--out", "x.png"], 2, "leave out --report or --out"),
        ([runs[0], "--report", "a.png"], 1, "a report is an .html file, got 'a.png'"),
        ([str(tmp_path), "--report", page], 1, "has no metrics.jsonl"),
    ):
        assert main(["plot", *flags]) == code
        assert said in capsys.readouterr().err


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    """Neither samples, settings nor an environment are there, and one evaluation is enough."""
    row = {"step": 0, "epoch": 0.0, "tokens": 0, "train_loss": 5.5, "val_loss": 5.6}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step"')
    found = Page(write_report(tmp_path, tmp_path / "run.html").read_text("utf-8")).table()
    assert found["steps"] == "0, so far" and found["last validation loss"].startswith("5.6000")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    with pytest.raises(ValueError, match="has no evaluation yet: nothing to report"):
        write_report(tmp_path, tmp_path / "run.html")


def test_damaged_files_beside_the_metrics(tmp_path: Path) -> None:
    """They cost no page, and the metrics' own file finds those beside it."""
    run = tmp_path / "caf\udce9"
    run.mkdir()
    row = {"step": 0, "epoch": 0.0, "tokens": 0, "train_loss": 5.5, "val_loss": 5.6}
    (run / "metrics.jsonl").write_text(json.dumps(row))
    samples = b"step 1: a\xff</td><script>\nstep " + b"9" * 5000 + b": b\n"
    (run / "samples.txt").write_bytes(samples)
    for environment, shown in (("[1]", None), ('{"torch": "\\ud800<i>"}', "?<i>")):
        (run / "environment.json").write_text(environment)
        for name in (run, run / "metrics.jsonl"):
            page = Page(write_report(name, tmp_path / "run.html").read_text("utf-8"))
            assert page.table().get("torch") == shown
            assert page.table()["step 1"] == "a\ufffd</td><script>"
            assert "script" not in page.tags


def test_rows_go_to_a_tracker(tmp_path: Path) -> None:
    """on_row gets each row of metrics.jsonl in order; of a run that goes on, the new ones."""
    seen: list[dict[str, Any]] = []
    make_trainer(tmp_path / "run", max_steps=4, on_row=seen.append).fit()
    assert seen == read_metrics(tmp_path / "run") and len(seen) == 5
    more: list[dict[str, Any]] = []
    make_trainer(tmp_path / "run", max_steps=6, on_row=more.append).fit(resume=True)
    assert [row["step"] for row in more] == [5, 6]

    def fails(row: dict[str, Any]) -> None:
        row.clear()  # a copy: the run does not miss it
        if len(read_metrics(tmp_path / "other")) == 3:
            raise ConnectionError("the tracker is gone")

    with pytest.raises(ConnectionError, match="the tracker is gone"):
        make_trainer(tmp_path / "other", max_steps=4, on_row=fails).fit()
    assert [row["step"] for row in read_metrics(tmp_path / "other")] == [0, 1, 2]
