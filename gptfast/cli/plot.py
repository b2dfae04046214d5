"""`gptfast plot`: draw several runs in one picture, or write a page about one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from gptfast.cli.flags import Positional, UsageError
from gptfast.cli.settings import with_tuples
from gptfast.training.plot import plot_runs


@dataclass(frozen=True)
class Plot:
    """Draw the losses of several runs in one picture, or write a page about one run.

    gptfast plot runs/a runs/b --out comparison.png

    gptfast plot runs/a --report a.html
    """

    runs: Positional[tuple[str, ...]] = ()
    """Run directories, or their metrics.jsonl files."""
    out: str = "runs.png"
    """The picture to write, a .png, .pdf or .svg file."""
    x: Literal["tokens", "step", "epoch"] = "tokens"
    """The horizontal axis: tokens seen, steps or epochs."""
    report: str | None = None
    """Write an .html file about one run instead: losses, learning rate, samples, speed, settings
    and environment in one page, which needs no network."""

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> Self:
        """Return the command with these flags. Raises UsageError for some that do not apply."""
        command = cls(**with_tuples(given))
        if command.report is not None and len(command.runs) != 1:
            raise UsageError(
                f"--report is about one run, got {len(command.runs)}: gptfast plot RUN --report "
                "PAGE.html"
            )
        for name in ("out", "x"):
            if command.report is not None and name in given:
                raise UsageError(f"--{name} is for a picture: leave out --report or --{name}")
        return command

    def run(self) -> None:
        if self.report is None:
            print(f"done: see {plot_runs(self.runs, self.out, x=self.x)}")
            return
        from gptfast.training.report import write_report

        print(f"done: see {write_report(self.runs[0], self.report)}")
