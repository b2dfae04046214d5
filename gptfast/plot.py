"""The picture of a training run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_losses(history: Sequence[dict[str, Any]], out: str | Path) -> list[Path]:
    """Draw training and validation loss over epochs (below) and tokens seen (above).

    history: rows with "epoch", "tokens", "train_loss" and "val_loss" (others are passed over).
    Writes loss.png and loss.pdf into `out` and returns their paths. ValueError without such a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in history if "val_loss" in row]
    if not rows:
        raise ValueError("no evaluation in the history yet: nothing to plot")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    epochs = [row["epoch"] for row in rows]
    axes.plot(epochs, [row["train_loss"] for row in rows], label="training loss")
    axes.plot(epochs, [row["val_loss"] for row in rows], "-.", label="validation loss")
    axes.set_xlabel("epochs")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    tokens = axes.twiny()
    tokens.plot([row["tokens"] for row in rows], [row["val_loss"] for row in rows], alpha=0)
    tokens.set_xlabel("tokens seen")
    paths = [Path(out) / f"loss.{suffix}" for suffix in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
