"""Pictures of a search's trials."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast.training.metrics import Row
from gptfast.training.plot import (
    colours_of,
    draw_rows,
    new_figure,
    save_figure,
    set_loss_range,
    set_tokens_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gptfast.search.range_test import RangeTest
    from gptfast.search.trials import Result


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def numeric_fields(trials: Sequence[dict[str, Any]]) -> list[str]:
    """Return the fields that are a number in every trial and differ between some."""
    names = dict.fromkeys(name for trial in trials for name in trial)
    values = {name: [trial.get(name) for trial in trials] for name in names}
    return [n for n, v in values.items() if all(map(_is_number, v)) and len(set(v)) > 1]


def _is_log(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > 30 * min(values)


def plot_search(
    results: Sequence["Result"],
    histories: Sequence[Sequence[Row]],
    out: str | PathLike,
    *,
    log_fields: Sequence[str] = (),
) -> Path:
    """Draw a search: validation loss over tokens for each trial, and the lowest loss against each
    of the first two fields that are numbers and vary.

    results: the best trial first. histories: the rows of each result's metrics.jsonl. A field's
    axis is logarithmic if it is one of log_fields or spans more than a factor of 30. Returns out.
    """
    fields = numeric_fields([result.settings for result in results])[:2]
    figure = new_figure(8.5 + 3.5 * len(fields), 5)
    losses, *panels = figure.subplots(
        1, 1 + len(fields), width_ratios=(1.6, *(1 for _ in fields)), squeeze=False
    )[0]
    colours = colours_of(len(results))
    _draw_losses(losses, results, histories, colours)
    for axes, field in zip(panels, fields, strict=True):
        _draw_field(axes, field, results, colours, field in log_fields)
    for axes in (losses, *panels):
        axes.grid(alpha=0.3)
    save_figure(figure, Path(out))
    return Path(out)


def _draw_losses(
    axes: "Axes",
    results: Sequence["Result"],
    histories: Sequence[Sequence[Row]],
    colours: Sequence[Any],
) -> None:
    """Draw each trial's validation loss over tokens; the first result, the best, is thicker."""
    for result, rows, colour in zip(results, histories, colours, strict=True):
        done = result.status == "done"
        best = result is results[0]
        draw_rows(
            axes,
            rows,
            "tokens",
            "val_loss",
            "-" if done else ":",
            color=colour if done else "gray",
            label=result.label if done else f"{result.label} ({result.status})",
            linewidth=2.2 if best else 1.2,
            zorder=3 if best else 2,
        )
    finished = [rows for r, rows in zip(results, histories, strict=True) if r.status == "done"]
    set_loss_range(axes, finished, "val_loss")
    set_tokens_axis(axes)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("validation loss (nats per token)")
    if len(results) <= 10:
        axes.legend(fontsize="small", loc="upper right")
        return
    axes.legend(
        fontsize="x-small",
        loc="center right",
        bbox_to_anchor=(-0.12, 0.5),
        ncols=1 + len(results) // 36,
    )


def _draw_field(
    axes: "Axes", field: str, results: Sequence["Result"], colours: Sequence[Any], log: bool
) -> None:
    from matplotlib.ticker import MaxNLocator

    done = [r for r in zip(results, colours, strict=True) if r[0].status == "done"]
    values = [result.settings[field] for result, _ in done]
    losses = [result.val_loss for result, _ in done]
    axes.scatter(values, losses, c=[colour for _, colour in done], s=40, zorder=3)
    axes.scatter(values[:1], losses[:1], s=160, facecolors="none", edgecolors="black", zorder=4)
    if log or _is_log(values):
        axes.set_xscale("log")
    elif all(isinstance(value, int) for value in values):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(field)
    axes.set_ylabel("best validation loss")


def plot_range(test: "RangeTest", out: str | PathLike) -> Path:
    """Draw a learning-rate range test: loss and smoothed loss over the rate, with the suggestion.

    Returns out.
    """
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    axes.plot(test.lr, test.loss, color="tab:blue", alpha=0.25, linewidth=0.8, label="loss")
    axes.plot(test.lr, test.smoothed, color="tab:blue", label="smoothed")
    marks = ((test.suggestion, "tab:red", "-", "steepest descent"),)
    marks += ((test.tenth_of_minimum, "tab:gray", "--", "a tenth of the minimum's"),)
    for lr, colour, style, why in marks:
        axes.axvline(lr, color=colour, linestyle=style, label=f"{lr:.2g}, {why}")
    low, high = min(test.smoothed), max(test.smoothed)
    axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    save_figure(figure, Path(out))
    return Path(out)
