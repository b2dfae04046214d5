"""The loss plot: what is on its axes, and that it is a picture."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from gptfast.plot import plot_losses

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
    # Both scales start and end with the run, so that epoch and tokens line up.
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
    # Two coloured lines, not just black axes on white.
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
