"""Run the trials of a search: training runs in subprocesses, several at once, resumable.

OUT/search.json holds the base settings and the trials. OUT/trial-001 and so on are run directories.
Each also has trial.toml, the settings that the subprocess reads; log.txt, what it printed; and
result.json, its result.
"""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from gptfast.checks import integer
from gptfast.config import to_toml
from gptfast.device import threads_of
from gptfast.files import lock, replacing, write_json
from gptfast.training.interrupt import EXIT_CODES, Interrupt
from gptfast.training.log import say
from gptfast.training.metrics import MetricsRow, finite, read_metrics

Settings = dict[str, Any]
COMMAND = (sys.executable, "-m", "gptfast", "train")
POLL_INTERVAL_S = 0.05
"""Time between checks of whether a trial has ended."""


def short(value: Any) -> str:
    """Return a value as short text for a table or a legend."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _label(settings: Settings) -> str:
    """Return the settings as one short line."""
    return " ".join(f"{name}={short(value)}" for name, value in settings.items())


@dataclass(frozen=True)
class Result:
    """The result of one trial. Losses are in nats per token; None stands for a missing number."""

    trial: str
    """The name of its directory."""
    settings: Settings
    """The settings that vary between the trials."""
    status: str
    """"done", "failed" or "interrupted"."""
    val_loss: float | None
    """The lowest validation loss."""
    best_step: int | None
    """The step of the lowest validation loss."""
    last_val_loss: float | None
    train_loss: float | None
    """Training loss at the last evaluation."""
    tokens_per_second: float | None
    """The median over the run."""
    seconds: float
    """The total time, over all starts of the trial."""
    reason: str | None
    """Why the trial is not done; None if it is."""

    @property
    def label(self) -> str:
        """The settings, short enough for a legend."""
        return _label(self.settings)


def _settings(base: Settings, settings: Settings, directory: Path) -> Settings:
    """Return all settings of a trial. Its max_steps replaces the epochs of base, or vice versa."""
    merged = {**base, **settings, "out": str(directory)}
    for name, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if name in settings and other not in settings:
            merged[other] = None
    return merged


def _open_search(out: Path, base: Settings, trials: Sequence[Settings]) -> None:
    """Write search.json. Raises ValueError if the existing one is of another search.

    The existing one may have fewer trials, the first of these.
    """
    ours = json.loads(json.dumps({"base": base, "trials": trials}))
    file = out / "search.json"
    if file.exists():
        try:
            theirs = json.loads(file.read_text())
            base_there, trials_there = theirs["base"], theirs["trials"]
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        differ = sorted(
            name
            for name in {*base_there, *ours["base"]}
            if base_there.get(name) != ours["base"].get(name)
        )
        if differ or ours["trials"][: len(trials_there)] != trials_there:
            what = f"with another {', '.join(differ)}" if differ else "of other trials"
            raise ValueError(
                f"{out} holds another search, {what}; choose another --out, or continue that one "
                "with the same settings"
            )
    write_json(file, ours)


def load_result(directory: Path) -> Result | None:
    """Return the result of the trial in that directory; None if it never ended."""
    try:
        return Result(**json.loads((directory / "result.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _environment(jobs: int) -> dict[str, str]:
    """Return the environment variables of a trial's process."""
    # Unbuffered, so that a killed process has written all its lines to the log.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if jobs > 1:
        # Parallel trials share the cores; each would otherwise start a thread per core.
        environment.setdefault("OMP_NUM_THREADS", str(threads_of(jobs)))
    return environment


class _Trial:
    """A trial that runs in a subprocess."""

    def __init__(
        self, directory: Path, settings: Settings, base: Settings, command: Sequence[str], jobs: int
    ) -> None:
        self.directory, self.settings = directory, settings
        before = load_result(directory)
        self.seconds_before = before.seconds if before else 0.0
        directory.mkdir(exist_ok=True)
        say(f"{directory.name} starts: {_label(settings)}")
        toml = directory / "trial.toml"
        with replacing(toml) as file:
            file.write(to_toml(_settings(base, settings, directory)))
        self.log = directory / "log.txt"
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.begin = time.perf_counter()
            self.process = subprocess.Popen(
                [*command, "--config", str(toml), "--resume"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(jobs),
            )

    def result(self, interrupted: bool) -> Result:
        """Return the result of the ended process, and write it to result.json."""
        code = self.process.returncode
        seconds = self.seconds_before + time.perf_counter() - self.begin
        rows, damage = [], None
        try:
            rows = read_metrics(self.directory)
        except ValueError as error:
            damage = str(error)
        final = bool(rows) and bool(rows[-1].get("final"))
        numbers = _numbers(rows)
        if code == 0 and final and numbers["val_loss"] is not None:
            status, reason = "done", None
        elif interrupted or code in EXIT_CODES or (code == 0 and rows and not final):
            status, reason = "interrupted", "stopped before its last step"
        elif code == 0:
            status, reason = "failed", damage or "it has no validation loss"
        else:
            status, reason = "failed", self._reason(code)
        result = Result(
            trial=self.directory.name,
            settings=self.settings,
            status=status,
            seconds=round(seconds, 1),
            reason=reason,
            **numbers,
        )
        write_json(self.directory / "result.json", dataclasses.asdict(result))
        return result

    def _reason(self, code: int) -> str:
        """Return why the process failed: its error message, or else the last line it wrote."""
        if code < 0:
            return f"killed by signal {-code} ({signal.strsignal(-code)})"
        text = self.log.read_bytes()[self.log_start :].decode("utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("gptfast: ")]
        last = (errors or lines or [f"exit code {code}"])[-1]
        return last.removeprefix("gptfast: ")


def _numbers(rows: Sequence[MetricsRow]) -> dict[str, Any]:
    """Return the numbers of a `Result` from the rows of metrics.jsonl."""
    # Without step 0: its loss is the same in all trials, and hides those that only get worse.
    evaluations = [row for row in rows if finite(row, "val_loss") and row["step"] > 0]
    nothing: MetricsRow = {}
    best = min(evaluations, key=lambda row: row["val_loss"], default=nothing)
    last = evaluations[-1] if evaluations else nothing
    speeds = [row["tokens_per_second"] for row in rows if finite(row, "tokens_per_second")]
    train_loss = last["train_loss"] if finite(last, "train_loss") else None
    return {
        "val_loss": best.get("val_loss"),
        "best_step": best.get("step"),
        "last_val_loss": last.get("val_loss"),
        "train_loss": train_loss,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
    }


def run_trials(
    base: Settings,
    trials: Sequence[Settings],
    out: str | PathLike,
    *,
    jobs: int = 1,
    command: Sequence[str] = COMMAND,
) -> list[Result]:
    """Run the trials that are not done, `jobs` at a time, and return all results in order.

    A trial runs `command --config OUT/trial-NNN/trial.toml --resume`. The file has the settings of
    base, those of the trial, and the trial's directory as out. After Ctrl-C, SIGTERM or SIGHUP
    the running trials stop, and KeyboardInterrupt is raised once they have. Raises ValueError if
    out holds another search or one that is running.
    """
    if not trials:
        raise ValueError("a search needs at least one trial")
    jobs = integer("jobs", jobs, 1)
    out, base = Path(out), {name: value for name, value in base.items() if name != "out"}
    with lock(out):
        _open_search(out, base, trials)
        directories = [out / f"trial-{i:03d}" for i in range(1, len(trials) + 1)]
        loaded = {directory: load_result(directory) for directory in directories}
        results = {d: result for d, result in loaded.items() if result and result.status == "done"}
        waiting = [t for t in zip(directories, trials, strict=True) if t[0] not in results]
        if results:
            say(f"{len(results)} of {len(trials)} trials are done already")
        _run_waiting(waiting, base, results, jobs, command)
    return [results[directory] for directory in directories]


def _run_waiting(
    waiting: list[tuple[Path, Settings]],
    base: Settings,
    results: dict[Path, Result],
    jobs: int,
    command: Sequence[str],
) -> None:
    """Run the waiting trials and add their results to `results`.

    Raises KeyboardInterrupt with the signal's name after SIGINT, SIGTERM or SIGHUP, when no trial
    runs any more.
    """
    running: list[_Trial] = []
    stopping = False
    with Interrupt() as interrupt:
        try:
            while running or (waiting and not interrupt.requested):
                while waiting and len(running) < jobs and not interrupt.requested:
                    running.append(_Trial(*waiting.pop(0), base, command, jobs))
                time.sleep(POLL_INTERVAL_S)
                if interrupt.requested and not stopping:
                    # Ctrl-C in a terminal reached the trials too. A run ignores the second signal.
                    for trial in running:
                        trial.process.terminate()
                    stopping = True
                for trial in [trial for trial in running if trial.process.poll() is not None]:
                    running.remove(trial)
                    results[trial.directory] = trial.result(bool(interrupt.requested))
                    say(_line(results[trial.directory]))
        finally:
            for trial in running:
                trial.process.kill()
                trial.process.wait()
    if interrupt.requested:
        raise KeyboardInterrupt(interrupt.requested)


def _line(result: Result) -> str:
    """Return the line that is printed when a trial has ended."""
    what = result.reason
    if result.status == "done":
        what = f"validation loss {result.val_loss:.4f} at step {result.best_step}"
    return f"{result.trial} {result.status} in {result.seconds:.1f} s: {result.label}: {what}"
