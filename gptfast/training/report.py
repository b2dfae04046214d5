"""One HTML file about a run: its losses, samples, speed, settings and environment.

It opens without a network: the picture stands in it, there is no script, and its policy lets a
browser load nothing. All text is escaped. Files are named without their folders, because where they
lie on this machine is nobody's business.
"""

import io
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

from gptfast.evaluate.loss import perplexity
from gptfast.files import replacing
from gptfast.training.metrics import MetricsRow, finite, read_metrics
from gptfast.training.plot import draw_rows, new_figure, set_loss_range
from gptfast.weights.card import ENVIRONMENT, facts_of, without_folders
from gptfast.weights.checkpoint import checkpoints, read_settings

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 0.2rem 1rem 0.2rem 0; text-align: left; vertical-align: top; }}
th {{ font-weight: 600; white-space: nowrap; }}
td {{ overflow-wrap: anywhere; white-space: pre-wrap; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
# Rows of metrics.jsonl that are drawn below the losses, and what their axes are called.
_PANELS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
# Settings that are paths, or may be.
_PATHS = ("data", "tokenizer")


def write_report(run: str | PathLike, out: str | PathLike) -> Path:
    """Write a page about a run, complete or not, to the file `out`, and return its path.

    run: its directory, or the metrics.jsonl in it. Raises ValueError for a directory without
    metrics or evaluations, and for a file that cannot be written.
    """
    run, out = Path(run), Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"a report is an .html file, got {out.name!r}")
    rows = read_metrics(run)
    run = run if run.is_dir() else run.parent
    if not any(finite(row, "val_loss") for row in rows):
        raise ValueError(f"{run} has no evaluation yet: nothing to report")
    body = "\n".join(
        part
        for part in (
            _table(_summary(rows)),
            _section("Losses and speed", _picture(rows)),
            _section("Samples", _table(_samples(run))),
            _section("Settings", _table(_settings(run))),
            _section("Environment", _table(_environment(run))),
        )
        if part
    )
    page = _PAGE.format(title=escape(run.resolve().name), body=body)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out, "wb") as file:
            file.write(page.encode("utf-8", "replace"))  # names of files need not be UTF-8
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}") from None
    return out


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}" if content else ""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and texts, which are escaped; "" for none."""
    lines = [f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows]
    return "\n".join(["<table>", *lines, "</table>"]) if lines else ""


def _summary(rows: Sequence[MetricsRow]) -> list[tuple[str, str]]:
    """Return the numbers to see first."""
    evaluations = [row for row in rows if finite(row, "val_loss")]
    # The first evaluation is of the model before its training.
    best = min(evaluations[1:] or evaluations, key=lambda row: row["val_loss"])
    last = evaluations[-1]
    found = [
        ("steps", f"{rows[-1]['step']:,}" + ("" if rows[-1].get("final") else ", so far")),
        ("tokens learnt from", f"{rows[-1].get('tokens', 0):,}"),
        ("lowest validation loss", _loss(best, "val_loss")),
        ("last validation loss", _loss(last, "val_loss")),
    ]
    for name, title in (("train_loss", "last training loss"), ("test_loss", "test loss")):
        if finite(last, name):
            found.append((title, _loss(last, name)))
    if speeds := [row["tokens_per_second"] for row in rows if finite(row, "tokens_per_second")]:
        found.append(("tokens per second", f"{median(speeds):,.0f} (median)"))
    if shares := [row["mfu"] for row in rows if finite(row, "mfu")]:
        found.append(("share of the machine's matrix products", f"{median(shares):.0%} (median)"))
    if sizes := [row["memory_mb"] for row in rows if finite(row, "memory_mb")]:
        found.append(("peak memory", f"{max(sizes):,} MiB"))
    if skipped := sum("skipped" in row for row in rows):
        found.append(("skipped steps", f"{skipped:,}"))
    return found


def _loss(row: MetricsRow, name: str) -> str:
    loss = row[name]
    return f"{loss:.4f} (perplexity {perplexity(loss):.2f}) at step {row['step']:,}"


def _picture(rows: Sequence[MetricsRow]) -> str:
    """Return the losses, and what else the rows have of _PANELS, over steps, as SVG."""
    panels = [name for name in _PANELS if any(finite(row, name) for row in rows)]
    figure = new_figure(9, 4 + 1.5 * len(panels))
    losses, *others = figure.subplots(
        1 + len(panels), sharex=True, squeeze=False, height_ratios=[3, *[1] * len(panels)]
    ).ravel()
    draw_rows(losses, rows, "step", "loss", color="0.8", linewidth=0.8, label="loss of a step")
    draw_rows(losses, rows, "step", "train_loss", label="training loss")
    draw_rows(losses, rows, "step", "val_loss", "-.", label="validation loss")
    set_loss_range(losses, [rows], "val_loss", "train_loss")
    losses.set_ylabel("nats per token")
    losses.legend(loc="upper right")
    for axes, name in zip(others, panels, strict=True):
        draw_rows(axes, rows, "step", name, linewidth=1)
        axes.set_ylabel(_PANELS[name])
        axes.set_ylim(bottom=0)
    for axes in (losses, *others):
        axes.grid(alpha=0.3)
    (losses, *others)[-1].set_xlabel("step")
    file = io.StringIO()
    # Without metadata, which names addresses; text becomes outlines, so no font is needed.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    return re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.DOTALL).strip()


def _samples(run: Path) -> list[tuple[str, str]]:
    """Return the text samples, by the steps that they are of."""
    try:
        text = (run / "samples.txt").read_text("utf-8", "replace")
    except OSError:
        return []
    found = re.findall(r"^step (\d{1,18}): (.*)$", text, re.M)
    return [(f"step {int(n):,}", line) for n, line in found]


def _settings(run: Path) -> list[tuple[str, str]]:
    """Return the settings of the newest undamaged checkpoint, and which weights it began with."""
    for path in reversed(checkpoints(run)):
        if settings := read_settings(path):
            facts = facts_of(path)
            began = [("started from", facts.started_from)] if facts and facts.started_from else []
            return began + [(name, _shown(name, value)) for name, value in settings.items()]
    return []


def _shown(name: str, value: Any) -> str:
    """Return the value of a setting as text, without the folders of a path."""
    texts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    return " ".join(map(without_folders, texts) if name in _PATHS else texts)


def _environment(run: Path) -> list[tuple[str, str]]:
    """Return what the run has recorded of where it computed."""
    try:
        found = json.loads((run / ENVIRONMENT).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    found = found if isinstance(found, dict) else {}
    return [(str(name), str(value)) for name, value in found.items()]
