"""Draw the pictures of bench/results from the JSON beside them, so that they cannot differ.

Also draws what scaling.py predicts.
"""

from pathlib import Path

import matplotlib
from record import machine_line, publishable, row_label

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - the backend is chosen before pyplot loads
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402


def bars(record: dict) -> Figure:
    """Return bars of peer / gptfast on a logarithmic axis, with quartiles and the ratio as text.

    The ratios stand beside the axes like tick labels, so that none meets a bar or leaves the frame.
    """
    rows = publishable(record)
    figure, axes = plt.subplots(figsize=(12, 1.3 + 0.3 * len(rows)), layout="constrained")
    ops = list(dict.fromkeys(row["op"] for row in rows))
    for y, row in enumerate(rows):
        axes.barh(y, row["ratio"] - 1, left=1, color=f"C{ops.index(row['op'])}")
        axes.plot(row["ratio_quartiles"], [y, y], color="black", linewidth=1)
    places = range(len(rows))
    axes.set_yticks(places, [row_label(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    ratios = axes.secondary_yaxis("right")
    ratios.set_yticks(places, [f"{row['ratio']:.2f}x" for row in rows], fontsize=8)
    ratios.tick_params(length=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_locator(NullLocator())
    ends = [end for row in rows for end in (row["ratio"], *row["ratio_quartiles"])]
    # Wide enough for two tick labels, whatever the ratios are.
    axes.set_xlim(min(0.9, min(ends) / 1.1), max(2.2, max(ends) * 1.1))
    axes.axvline(1.0, color="black", linewidth=1)
    # Centred on the figure: labels of rows may leave the axes narrower than this text.
    figure.supxlabel("peer / gptfast, time or memory: above 1x gptfast needs less", fontsize=9)
    figure.suptitle(machine_line(record), fontsize=8)
    return figure


def _size_text(size: float, _: object = None) -> str:
    """Return a size such as 512, 8K or 64M (powers of two)."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if size >= unit and size % unit == 0:
            return f"{size / unit:g}{name}"
    return f"{size:g}"


def _seconds_text(seconds: float, _: object = None) -> str:
    unit, name = next((x for x in ((1, "s"), (1e-3, "ms")) if seconds >= x[0]), (1e-6, "µs"))
    return f"{seconds / unit:g} {name}"


def curves(record: dict) -> Figure:
    """Return a panel for each curve of bench/curves.py, both axes logarithmic."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 6), layout="constrained")
    for ax, curve in zip(axes.flat, record["curves"], strict=True):
        ax.loglog(curve["sizes"], curve["seconds"], marker="o")
        ax.set_xticks(curve["sizes"])
        ax.xaxis.set_major_formatter(FuncFormatter(_size_text))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(_seconds_text))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_locator(NullLocator())
        ax.tick_params(labelsize=8)
        ax.set_title(f"{curve['name']}: slope {curve['slope']:.2f}", fontsize=9)
    figure.suptitle(machine_line(record), fontsize=8)
    return figure


def scaling(curves: dict, title: str) -> Figure:
    """Return a panel for each model: predicted tokens/s over the number of GPUs, by layout.

    curves: by model and number of GPUs, the predictions of step_model.py by layout.
    """
    figure, axes = plt.subplots(1, len(curves), figsize=(15, 4), layout="constrained", sharey=True)
    for ax, (model, by_size) in zip(axes, curves.items(), strict=True):
        sizes = [n for n, found in by_size.items() if found]
        first = max(p.tokens_per_s for p in by_size[sizes[0]].values()) / sizes[0]
        ax.loglog(sizes, [first * n for n in sizes], "k:", linewidth=1, label="linear")
        for layout, marker in (("ddp", "o"), ("fsdp", "s"), ("hsdp", "^")):
            points = [(n, by_size[n][layout].tokens_per_s) for n in sizes if layout in by_size[n]]
            ax.loglog(*zip(*points, strict=True), marker=marker, markersize=4, label=layout)
        ax.set_title(model, fontsize=9)
        ax.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=7, rotation=60)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("tokens/s (prediction)")
    axes[0].legend(fontsize=8)
    figure.supxlabel("GPUs", fontsize=9)
    figure.suptitle(f"Predicted, not measured: {title}", fontsize=9)
    return figure


def draw(path: Path, record: dict) -> None:
    """Write the picture of a record; a record without a row to show gets none."""
    if "curves" not in record and not publishable(record):
        path.unlink(missing_ok=True)
        return
    figure = curves(record) if "curves" in record else bars(record)
    figure.savefig(path, dpi=110)
    plt.close(figure)
