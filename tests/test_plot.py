"""Test the pictures (their axes and files) and the reader of metrics.jsonl."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptfast.search.plot import numeric_fields
from gptfast.training.metrics import read_metrics
from gptfast.training.plot import plot_losses, plot_runs, run_names

HISTORY = [
    {"step": 0, "epoch": 0.0, "tokens": 0, "train_loss": 5.5, "val_loss": 5.6},
    {"step": 5, "epoch": 0.25, "tokens": 320, "loss": 5.0},
    {"step": 10, "epoch": 0.5, "tokens": 640, "loss": 4.0, "train_loss": 4.1, "val_loss": 4.4},
    {"step": 20, "epoch": 1.0, "tokens": 1280, "loss": 3.0, "train_loss": 3.2, "val_loss": 4.0},
]


def test_axes_hold_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    real = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k)
    )
    plot_losses(HISTORY, tmp_path)
    epochs, tokens = figures[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in epochs.lines}
    assert drawn == {
        "training loss": [[0, 5.5], [0.5, 4.1], [1.0, 3.2]],
        "validation loss": [[0, 5.6], [0.5, 4.4], [1.0, 4.0]],
    }
    assert (epochs.get_xlabel(), tokens.get_xlabel()) == ("epochs", "tokens seen")
    assert "loss" in epochs.get_ylabel()
    assert epochs.get_legend() is not None
    # Both scales start and end with the run, so that epochs and tokens line up.
    shares = [
        [(x - low) / (high - low) for x in ends]
        for (low, high), ends in ((epochs.get_xlim(), (0, 1)), (tokens.get_xlim(), (0, 1280)))
    ]
    assert np.allclose(*shares)
    assert tokens.xaxis.get_label_position() == "top"


def test_files_are_pictures(tmp_path: Path) -> None:
    paths = plot_losses(HISTORY, tmp_path)
    assert [path.name for path in paths] == ["loss.png", "loss.pdf"]
    pixels = matplotlib.image.imread(paths[0])[..., :3]
    assert min(pixels.shape[:2]) > 400
    # The picture has two coloured lines, not just black axes on white.
    coloured = np.ptp(pixels, axis=-1) > 0.3
    assert 500 < coloured.sum() < 0.1 * coloured.size
    pdf = paths[1].read_bytes()
    assert pdf.startswith(b"%PDF") and len(pdf) > 5000


def test_rows_without_evaluation_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = plot_losses(HISTORY, tmp_path / "a")[0]
    evaluated = plot_losses([row for row in HISTORY if "val_loss" in row], tmp_path / "b")[0]
    assert whole.read_bytes() == evaluated.read_bytes()


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_losses(HISTORY[1:2], tmp_path)
    assert list(tmp_path.iterdir()) == []


def write_run(directory: Path, rows: list[dict] = HISTORY, end: str = "\n") -> Path:
    directory.mkdir(parents=True)
    text = "\n".join(json.dumps(row) for row in rows) + end
    (directory / "metrics.jsonl").write_text(text, "utf-8")
    return directory


def test_read_metrics_reads_a_directory_or_its_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert read_metrics(run) == HISTORY
    assert read_metrics(str(run / "metrics.jsonl")) == HISTORY


@pytest.mark.parametrize("tail", ["", '\n{"st', '\n{"step": 30, "loss": 2.', "\n\n", '\n{"a": "é'])
def test_an_incomplete_last_line_is_passed_over(tail: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", end="")
    with (run / "metrics.jsonl").open("ab") as file:
        # The cut may also be within a character.
        file.write(tail.encode()[:-1] if tail.endswith("é") else tail.encode())
    assert read_metrics(run) == HISTORY


@pytest.mark.parametrize("line", ['{"step": 30, "lo', "[1]", "7", '{"loss": 1}', "\0\0\0"])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", end=f"\n{line}\n" + '{"step": 40}\n')
    with pytest.raises(ValueError, match=r"run/metrics.jsonl:5 is damaged: "):
        read_metrics(run)


def test_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} has no metrics.jsonl; give the directory"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="nowhere cannot be read: No such file"):
        read_metrics(tmp_path / "nowhere")


NAMES = [
    (["runs/a"], ["a"]),
    (["runs/a", "runs/b"], ["a", "b"]),
    (["runs/a/out", "runs/b/out/metrics.jsonl"], ["a", "b"]),
    (["x/a", "y/a", "x/b"], ["x/a", "y/a", "x/b"]),
    (["x/1/a/out", "y/1/a/out"], ["x", "y"]),
    (["deep/er/a", "b"], ["a", "b"]),
]


@pytest.mark.parametrize(("runs", "names"), NAMES, ids=lambda x: " ".join(x))
def test_runs_have_the_shortest_names(runs: list[str], names: list[str]) -> None:
    assert run_names(runs) == names


def test_a_run_given_twice() -> None:
    with pytest.raises(ValueError, match="a/metrics.jsonl is given twice"):
        run_names(["a", "b", "a/metrics.jsonl"])


def drawn(axes: Axes) -> list[tuple[str, list]]:
    return [(line.get_label(), line.get_xydata().tolist()) for line in axes.lines]


@pytest.mark.parametrize(("x", "unit"), [("tokens", 64), ("step", 1), ("epoch", 0.05)])
def test_plot_runs_compares(
    x: str, unit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    real = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k)
    )
    a = write_run(tmp_path / "a" / "out", [row | {"lr": 0.1} for row in HISTORY])
    skipped = {"step": 15, "epoch": 0.75, "tokens": 960, "loss": None, "lr": 0.2, "skipped": True}
    test = HISTORY[-1] | {"val_loss": 9.0, "test_loss": 9.5, "final": True}
    b = write_run(tmp_path / "b" / "out", [*HISTORY[:3], skipped, test])
    out = plot_runs([a, b / "metrics.jsonl"], tmp_path / "new" / "compared.png", x=x)
    assert out == tmp_path / "new" / "compared.png"
    losses, rates = figures[0].axes
    lines = drawn(losses)
    assert [lines[0][0], lines[2][0], lines[4][0]] == ["a", "b", "training loss"]
    at = [0, 10 * unit, 20 * unit]
    values = {0: [5.6, 4.4, 4.0], 1: [5.5, 4.1, 3.2], 2: [5.6, 4.4, 9.0], 3: [5.5, 4.1, 3.2]}
    for i, expected in values.items():
        assert np.allclose(lines[i][1], list(zip(at, expected, strict=True)))
    # A run's validation and training lines share its colour; only the training line is dashed.
    styles = [(line.get_color(), line.get_linestyle()) for line in losses.lines[:4]]
    assert styles[0][0] == styles[1][0] != styles[2][0] == styles[3][0]
    assert [style for _, style in styles] == ["-", "--"] * 2
    assert np.allclose(drawn(rates)[0][1], [[row[x], 0.1] for row in HISTORY])
    assert np.allclose(drawn(rates)[1][1], [[skipped[x], 0.2]])
    # Everything after the first evaluation is in sight, except what diverged.
    low, high = losses.get_ylim()
    assert low < 3.2 < 4.4 < high < 9.0
    pixels = matplotlib.image.imread(out)[..., :3]
    assert (np.ptp(pixels, axis=-1) > 0.3).sum() > 500


@pytest.mark.parametrize(
    ("suffix", "start"), [("pdf", b"%PDF"), ("SVG", b"<?xml"), ("png", b"\x89PNG")]
)
def test_plot_runs_writes_by_suffix(suffix: str, start: bytes, tmp_path: Path) -> None:
    out = plot_runs([write_run(tmp_path / "run")], tmp_path / f"picture.{suffix}")
    assert out.read_bytes().startswith(start)


def test_plot_runs_refuses(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "picture.png"
    empty = write_run(tmp_path / "empty", HISTORY[1:2])
    cases = [
        (([run], tmp_path / "picture.jpg", "step"), r"must end in one of .png, .pdf, .svg, got"),
        (([run], tmp_path / "picture", "step"), "got 'picture'"),
        (([run], out, "time"), "x must be one of tokens, step, epoch, got 'time'"),
        (([], out, "step"), "no runs to plot"),
        (([run, empty], out, "step"), "empty has no evaluation yet"),
        (([run, tmp_path], out, "step"), "has no metrics.jsonl"),
        (([run, run], out, "step"), "is given twice"),
        (([run], run / "metrics.jsonl" / "picture.png", "step"), "cannot write"),
    ]
    for (runs, path, x), message in cases:
        with pytest.raises(ValueError, match=message):
            plot_runs(runs, path, x=x)
        assert not out.exists()


def test_numeric_fields_vary_and_are_numbers() -> None:
    trials = [
        {"a": 1, "b": True, "c": "x", "d": 2, "e": 1.0},
        {"a": 1.5, "b": False, "c": "y", "d": 2},
    ]
    assert numeric_fields(trials) == ["a"]
