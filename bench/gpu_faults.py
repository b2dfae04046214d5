"""Jobs that end badly on purpose: tests/test_gpu_bench.py shows that they take nothing along."""

import os
import signal
import subprocess
import sys
import time

from gpu_jobs import Emit, Job


def _crash(emit: Emit) -> None:
    emit("before the crash")
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang(emit: Emit) -> None:
    """Hang with a child that hangs too, as pytest does with its workers."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    emit(child.pid)
    time.sleep(600)


def _fail(emit: Emit) -> None:
    emit("before the error")
    raise ValueError("on purpose")


def jobs() -> list[Job]:
    """Return a job for each bad end, and one that does its work after them."""
    return [
        Job("crash", "faults", _crash, 30),
        Job("hang", "faults", _hang, 1),
        Job("fail", "faults", _fail, 30),
        Job("work", "faults", lambda emit: emit("after the others"), 30),
    ]
