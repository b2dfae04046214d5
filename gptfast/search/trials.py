"""Training runs as trials: each a subprocess with settings of its own, some at once, resumable.

OUT/search.json holds the base settings and the trials; OUT/trial-001 is a run directory with
trial.toml, what the subprocess reads, log.txt, what it printed, and result.json, what came of it.
"""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from gptfast.config import to_toml
from gptfast.files import lock, write_json
from gptfast.training.interrupt import Interrupt
from gptfast.training.metrics import finite, read_metrics

Settings = dict[str, Any]
COMMAND = (sys.executable, "-m", "gptfast", "train")
POLL = 0.05
"""Seconds between looks at the running trials."""


def short(value: Any) -> str:
    """A setting or a number for a table or a legend."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _label(settings: Settings) -> str:
    return " ".join(f"{name}={short(value)}" for name, value in settings.items())


@dataclass(frozen=True)
class Result:
    """What came of one trial. Losses in nats per token; None where there is no such number."""

    trial: str
    """Its directory's name."""
    settings: Settings
    """What it varies."""
    status: str
    """done, failed or interrupted."""
    val_loss: float | None
    """The lowest validation loss."""
    best_step: int | None
    """The step of the lowest validation loss."""
    last_val_loss: float | None
    train_loss: float | None
    """Training loss at the last evaluation."""
    tokens_per_second: float | None
    """Median."""
    seconds: float
    """In all, over every start of it."""
    reason: str | None
    """Why it is not done."""

    @property
    def label(self) -> str:
        """Its settings, short enough for a legend."""
        return _label(self.settings)


def _settings(base: Settings, settings: Settings, directory: Path) -> Settings:
    """All settings of a trial. One of max_steps and epochs takes the place of base's other."""
    merged = {**base, **settings, "out": str(directory)}
    for name, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if name in settings and other not in settings:
            merged[other] = None
    return merged


def _open_search(out: Path, base: Settings, trials: Sequence[Settings]) -> None:
    """Write search.json, or check that the one there is of this search, maybe with fewer trials."""
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
    """What came of the trial in that directory; None if it never ended."""
    try:
        return Result(**json.loads((directory / "result.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _environment(jobs: int) -> dict[str, str]:
    # Unbuffered: the last line of the log is then the last that was written.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if jobs > 1:
        # Trials side by side share the cores instead of crowding them.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // jobs)))
    return environment


class _Trial:
    """One running subprocess and what it leaves."""

    def __init__(
        self, directory: Path, settings: Settings, base: Settings, command: Sequence[str], jobs: int
    ) -> None:
        self.directory, self.settings = directory, settings
        before = load_result(directory)
        self.seconds_before = before.seconds if before else 0.0
        directory.mkdir(exist_ok=True)
        print(f"{directory.name} starts: {_label(settings)}", flush=True)
        toml = directory / "trial.toml"
        toml.write_text(to_toml(_settings(base, settings, directory)), "utf-8")
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
        """What came of it, now that it has ended; also written to result.json."""
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
        elif interrupted or (code == 0 and rows and not final):
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
        """The last line this process wrote, its own error message if there is one."""
        if code < 0:
            return f"killed by signal {-code} ({signal.strsignal(-code)})"
        text = self.log.read_bytes()[self.log_start :].decode("utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("gptfast: ")]
        last = (errors or lines or [f"exit code {code}"])[-1]
        return last.removeprefix("gptfast: ")


def _numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # Not the untrained model: where every trial only made it worse, they would all be the same.
    evaluations = [row for row in rows if finite(row, "val_loss") and row["step"] > 0]
    best = min(evaluations, key=lambda row: row["val_loss"], default={})
    last = evaluations[-1] if evaluations else {}
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
    """Run the trials that are not done, `jobs` at once, and return all results in order.

    Each is `command --config OUT/trial-NNN/trial.toml --resume` with base, its settings and its
    directory as out. On Ctrl-C or SIGTERM the running ones are asked to stop and waited for, then
    KeyboardInterrupt is raised. Raises ValueError where out holds another search or one that runs.
    """
    if not trials:
        raise ValueError("a search needs at least one trial")
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}")
    out, base = Path(out), {name: value for name, value in base.items() if name != "out"}
    with lock(out):
        _open_search(out, base, trials)
        directories = [out / f"trial-{i:03d}" for i in range(1, len(trials) + 1)]
        loaded = {directory: load_result(directory) for directory in directories}
        results = {d: result for d, result in loaded.items() if result and result.status == "done"}
        waiting = [t for t in zip(directories, trials, strict=True) if t[0] not in results]
        if results:
            print(f"{len(results)} of {len(trials)} trials are done already", flush=True)
        _run_waiting(waiting, base, results, jobs, command)
    return [results[directory] for directory in directories]


def _run_waiting(
    waiting: list[tuple[Path, Settings]],
    base: Settings,
    results: dict[Path, Result],
    jobs: int,
    command: Sequence[str],
) -> None:
    """Run what waits and add to results; KeyboardInterrupt after a signal, with nothing running."""
    running: list[_Trial] = []
    asked = False
    with Interrupt() as interrupt:
        try:
            while running or (waiting and not interrupt.requested):
                while waiting and len(running) < jobs and not interrupt.requested:
                    running.append(_Trial(*waiting.pop(0), base, command, jobs))
                time.sleep(POLL)
                if interrupt.requested and not asked:
                    # After Ctrl-C in a terminal they know; to a run a second signal is no news.
                    for trial in running:
                        trial.process.terminate()
                    asked = True
                for trial in [trial for trial in running if trial.process.poll() is not None]:
                    running.remove(trial)
                    results[trial.directory] = trial.result(bool(interrupt.requested))
                    print(_line(results[trial.directory]), flush=True)
        finally:
            for trial in running:
                trial.process.kill()
                trial.process.wait()
    if interrupt.requested:
        raise KeyboardInterrupt


def _line(result: Result) -> str:
    what = result.reason
    if result.status == "done":
        what = f"validation loss {result.val_loss:.4f} at step {result.best_step}"
    return f"{result.trial} {result.status} in {result.seconds:.1f} s: {result.label}: {what}"
