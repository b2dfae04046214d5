"""The results of a GPU run: printed as they come, and written after each job.

<out>/<gpu>/<call>.json has everything as data, <call>.md the same as a page; both may be committed
under bench/results/gpu. What jobs printed and what tools wrote lies beside them, in jobs/.
"""

import datetime
import json
from dataclasses import asdict
from pathlib import Path

from gpu_jobs import Job, Outcome, file_of, slug

HEAD = (
    "| case | GPU, us | host until all is queued, us | wall, us | against the best peer | rate | "
)
HEAD += "share of the limit | target |\n|" + "---|" * 8


def _times(seconds: dict[str, float]) -> str:
    return ", ".join(f"{side} {s * 1e6:,.0f}" for side, s in seconds.items())


def row_text(row: dict) -> str:
    """Return one line of the Markdown table."""
    rate = ""
    if row["tflops"]:
        rate = f"{row['tflops']:.0f} TFLOP/s"
    elif row["gb_per_s"]:
        rate = f"{row['gb_per_s']:.0f} GB/s"
    ratio = f"{row['ratio']:.2f}x {row['best_peer']}" if row["ratio"] else ""
    share = "" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}"
    times = (_times(row[name]) for name in ("seconds", "host_seconds", "wall_seconds"))
    return "| " + " | ".join((row["case"], *times, ratio, rate, share, row["target"])) + " |"


def _lines(result: object) -> list[str]:
    """Return a result that is no row of the table as lines of text."""
    if not isinstance(result, dict):
        return [] if result is None else [str(result)]
    lines = []
    for key, value in result.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"    {x}" for x in value)]
        else:
            lines.append(f"{key}: {value}")
    return lines


class Report:
    """The results so far. Each job is written at once, so that a time limit loses none."""

    def __init__(self, out: Path, call: str) -> None:
        self.out, self.call = out, call
        self.machine: dict[str, object] = {"date": f"{datetime.date.today():%Y-%m-%d}"}
        self.jobs: dict[str, dict] = {}
        out.mkdir(parents=True, exist_ok=True)

    def add(self, job: Job, outcome: Outcome) -> None:
        """Take in how a job ended, print it and write everything."""
        self.jobs[job.name] = {"section": job.section, **asdict(outcome)}
        if job.section == "machine" and isinstance(outcome.result, dict):
            self.machine |= outcome.result
        self._print(job, outcome)
        self._write()

    def result_of(self, name: str) -> object:
        """Return what the job of that name found, or None."""
        return self.jobs.get(name, {}).get("result")

    @property
    def directory(self) -> Path:
        """The place of this GPU's results."""
        return self.out / slug(str(self.machine.get("gpu", "unknown GPU")))

    def _print(self, job: Job, outcome: Outcome) -> None:
        print(f"\n== {job.section}: {job.name}: {outcome.status}, {outcome.seconds:.0f} s")
        log = file_of(job, self.out).with_suffix(".log")
        if outcome.status != "done" and log.exists():
            print("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
        if job.section == "bench" and outcome.result:
            row = dict(outcome.result)  # type: ignore[call-overload]
            print(row_text(row), row["failed"] or "", flush=True)
        else:
            print("\n".join(_lines(outcome.result)[-40:]), flush=True)

    def _write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        data = {"call": self.call, "machine": self.machine, "jobs": self.jobs}
        page = self.directory / f"{self.call}.md"
        for path, text in (
            (page.with_suffix(".json"), json.dumps(data, indent=1) + "\n"),
            (page, self.page()),
        ):
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(text)
            partial.replace(path)

    def page(self) -> str:
        """Return the Markdown page."""
        parts = [f"# {self.machine.get('gpu', 'unknown GPU')}: {self.call}"]
        parts.append("\n".join(f"- {key}: {value}" for key, value in self.machine.items()))
        rows = [j["result"] for j in self.jobs.values() if j["section"] == "bench" and j["result"]]
        if rows:
            parts.append("\n".join([HEAD, *map(row_text, rows)]))
        for name, job in self.jobs.items():
            if job["section"] == "machine" or (
                job["section"] == "bench" and job["status"] == "done"
            ):
                continue
            parts.append(f"## {job['section']}: {name}\n\n{job['status']}, {job['seconds']:.0f} s")
            lines = _lines(job["result"]) if job["section"] != "bench" else []
            if lines:
                parts.append("```text\n" + "\n".join(lines) + "\n```")
        return "\n\n".join(parts) + "\n"
