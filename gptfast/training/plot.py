"""Pictures of the losses of one training run, or of several runs in comparison."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast.files import replacing
from gptfast.training.metrics import MetricsRow, finite, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X_LABELS = {"tokens": "tokens seen", "step": "steps", "epoch": "epochs"}
SUFFIXES = (".png", ".pdf", ".svg")


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def colours_of(n: int) -> list[Any]:
    """Return n colours: distinct ones up to 10, otherwise evenly spaced ones of a rainbow."""
    from matplotlib import colormaps

    if n <= 10:
        return [colormaps["tab10"](i) for i in range(n)]
    return [colormaps["turbo"](0.03 + 0.94 * i / (n - 1)) for i in range(n)]


def draw_rows(
    axes: "Axes", rows: Sequence[MetricsRow], x: str, y: str, *style: str, **options: Any
) -> None:
    """Draw column y of the rows over column x, where both are finite numbers."""
    points = [(row[x], row[y]) for row in rows if finite(row, x) and finite(row, y)]
    axes.plot([a for a, _ in points], [b for _, b in points], *style, **options)


def set_loss_range(axes: "Axes", histories: Sequence[Sequence[MetricsRow]], *names: str) -> None:
    """Fit the axis to the losses after the first evaluation.

    The first one is of the untrained model, and so high that it would hide the differences later.
    """
    evaluations = [[row for row in rows if finite(row, "val_loss")] for rows in histories]
    later = [row[n] for rows in evaluations for row in rows[1:] for n in names if finite(row, n)]
    if not later:
        return
    # A run whose loss rises above its start diverges and must not set the scale.
    top = min(max(later), max(rows[0]["val_loss"] for rows in evaluations if rows))
    if (margin := 0.05 * (top - min(later))) > 0:
        axes.set_ylim(min(later) - margin, top + margin)


def set_tokens_axis(axes: "Axes") -> None:
    """Label the horizontal axis in thousands and millions: 500k, 2M."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def plot_losses(history: Sequence[MetricsRow], out: str | Path) -> list[Path]:
    """Draw training and validation loss over epochs (below) and tokens seen (above).

    history: rows of metrics.jsonl; those without "val_loss" are left out. Writes loss.png and
    loss.pdf into `out` and returns their paths. Raises ValueError if no row has "val_loss".
    """
    rows = [row for row in history if "val_loss" in row]
    if not rows:
        raise ValueError("no evaluation in the history yet: nothing to plot")
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    draw_rows(axes, rows, "epoch", "train_loss", label="training loss")
    draw_rows(axes, rows, "epoch", "val_loss", "-.", label="validation loss")
    axes.set_xlabel("epochs")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    tokens = axes.twiny()
    draw_rows(tokens, rows, "tokens", "val_loss", alpha=0)
    tokens.set_xlabel("tokens seen")
    paths = [Path(out) / f"loss.{suffix}" for suffix in ("png", "pdf")]
    for path in paths:
        save_figure(figure, path)
    return paths


def run_names(runs: Sequence[str | PathLike]) -> list[str]:
    """Return the shortest parts of the runs' paths that are different for each run.

    runs/a/out and runs/b/out become a and b. Raises ValueError if a run is given twice.
    """
    paths = [Path(run).resolve() for run in runs]
    parts = [list((p.parent if p.name == "metrics.jsonl" else p).parts) for p in paths]
    for i, part in enumerate(parts):
        if part in parts[:i]:
            raise ValueError(f"{runs[i]} is given twice; give each run once")
    while len(parts) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    length = 1
    while len({tuple(part[-length:]) for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def plot_runs(runs: Sequence[str | PathLike], out: str | PathLike, *, x: str = "tokens") -> Path:
    """Draw several runs in one picture, write it to `out` and return `out`.

    The upper panel shows validation losses (solid) and training losses (thin and dashed), the lower
    one learning rates. runs: run directories, or their metrics.jsonl files. out: a .png, .pdf or
    .svg file. x: the horizontal axis, "tokens", "step" or "epoch". Raises ValueError for a run
    without metrics or evaluations and for bad arguments.
    """
    out = Path(out)
    if x not in X_LABELS:
        raise ValueError(f"x must be one of {', '.join(X_LABELS)}, got {x!r}")
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the picture must end in one of {', '.join(SUFFIXES)}, got {out.name!r}")
    if not runs:
        raise ValueError("no runs to plot; give the directory of at least one training run")
    histories = [read_metrics(run) for run in runs]
    for run, rows in zip(runs, histories, strict=True):
        if not any(finite(row, "val_loss") for row in rows):
            raise ValueError(f"{run} has no evaluation yet: nothing to plot")
    figure = new_figure(8, 6)
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    colours = colours_of(len(runs))
    for name, rows, colour in zip(run_names(runs), histories, colours, strict=True):
        draw_rows(losses, rows, x, "val_loss", color=colour, label=name)
        draw_rows(losses, rows, x, "train_loss", "--", color=colour, linewidth=0.8, alpha=0.8)
        draw_rows(rates, rows, x, "lr", color=colour, linewidth=1)
    losses.plot([], [], "--", color="gray", linewidth=0.8, label="training loss")
    losses.set_ylabel("loss (nats per token)")
    set_loss_range(losses, histories, "val_loss", "train_loss")
    if x == "tokens":
        set_tokens_axis(losses)
    losses.legend(fontsize="small", ncols=1 + len(runs) // 12)
    rates.set_ylabel("learning rate")
    rates.set_xlabel(X_LABELS[x])
    rates.set_ylim(bottom=0)
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    save_figure(figure, out)
    return out


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure to a file. Raises ValueError if that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150)
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror}" if error.strerror else error
        raise ValueError(reason) from None
