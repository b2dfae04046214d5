"""The jobs of bench/gpu.py: each runs in a process of its own, with a time limit.

An illegal access poisons a process's GPU, a kernel may hang, a compiler may abort: nothing of that
reaches the next job. A job hands out its results as they come, in a file, so that what it had
before it ended badly is kept.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Emit = Callable[[object], None]
"""Stores what a job has found so far, in place of what it stored before."""

POLL_S = 0.05


@dataclass(frozen=True)
class Job:
    """A part of a run: `run` does the work, within `seconds`."""

    name: str
    section: str
    run: Callable[[Emit], None]
    seconds: float


@dataclass
class Outcome:
    """How a job ended, and what it had found until then."""

    status: str
    """"done", or why it is not."""
    seconds: float
    result: object = None


def slug(name: str) -> str:
    """Return a name as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def file_of(job: Job, out: Path) -> Path:
    """Return the file of a job's results; its log and what its tools write lie beside it."""
    return out / "jobs" / f"{slug(job.name)}.json"


def serve(job: Job, out: Path) -> int:
    """Run a job in this process, with its results and its error to its file; return the status."""
    path, found = file_of(job, out), dict[str, object]()

    def write() -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(path)

    def emit(result: object) -> None:
        found["result"] = result
        write()

    try:
        job.run(emit)
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"[:1000]
        write()
        return 1
    return 0


def run_job(job: Job, out: Path, limit: float, command: list[str] | None) -> Outcome:
    """Run a job in a process of its own and end all that it started after `limit` seconds.

    command: what runs the job in a fresh interpreter; None forks this one, which is quicker, but
    must not have touched the GPU.
    """
    path = file_of(job, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    start = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _in_child(job, out, command)
    status = _wait(pid, start + limit)
    seconds = time.monotonic() - start
    # Workers of tests and compilers may have outlived it.
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if status is None:
        os.waitpid(pid, 0)
    found = json.loads(path.read_text()) if path.exists() else {}
    return Outcome(_status_text(status, limit, found.get("error")), seconds, found.get("result"))


def _in_child(job: Job, out: Path, command: list[str] | None) -> None:
    """Become the job; never return."""
    code = 1
    try:
        os.setsid()
        log = os.open(
            file_of(job, out).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
        )
        os.dup2(log, 1)
        os.dup2(log, 2)
        if command is not None:
            os.execv(command[0], command)
        code = serve(job, out)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(pid: int, deadline: float) -> int | None:
    """Return the process's exit status, negative for a signal, or None after the deadline."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_S)


def _status_text(status: int | None, limit: float, error: object) -> str:
    if status is None:
        return f"not finished after {limit:.0f} s"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    if status:
        return str(error or f"ended with exit status {status}")
    return "done"
