"""`gptfast plot`: several runs in one picture."""

from dataclasses import dataclass
from typing import Literal

from gptfast.cli.flags import Positional
from gptfast.training.plot import plot_runs


@dataclass(frozen=True)
class Plot:
    """Draw the losses of several runs in one picture.

    gptfast plot runs/a runs/b --out comparison.png
    """

    runs: Positional[tuple[str, ...]]
    """Run directories, or their metrics.jsonl."""
    out: str = "runs.png"
    """The picture: .png, .pdf or .svg."""
    x: Literal["tokens", "step", "epoch"] = "tokens"
    """What the losses are drawn over."""

    def run(self) -> None:
        print(f"done: see {plot_runs(self.runs, self.out, x=self.x)}")
