"""Run `gptfast train` as several processes of one machine, as torchrun would start them.

The processes are forked from one that has imported everything, which saves their start-up.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from helpers import english

import gptfast.training.trainer
from gptfast.cli import main
from gptfast.training.failures import Failures
from gptfast.training.metrics import read_metrics

CONTEXT = multiprocessing.get_context("forkserver")
# 12 rows a step, which 1, 2, 3, 4, 6 and 12 processes can share.
RUN = (
    "train --tokenizer byte --n-layer 2 --n-head 2 --n-embd 16 --block-size 16 --batch-size 6 "
    "--accumulation-steps 2 --dropout 0.2 --sample-tokens 4 --device cpu --log-interval 1 "
    "--eval-interval 10 --checkpoint-interval 5"
).split()
DEADLINE_S = 90.0


class Ended(NamedTuple):
    """How the processes of a run ended, each in the order of ranks."""

    codes: list[int]
    errors: list[str]
    """What each wrote to stderr."""
    out: list[str]
    seconds: float

    @property
    def told(self) -> list[str]:
        """The lines in which the command says why it ended."""
        lines = "".join(self.errors).splitlines()
        return [line for line in lines if line.startswith("gptfast: ")]

    def shown(self) -> "Ended":
        """Print all of it, which pytest shows where a test fails, and return it."""
        print(f"{len(self.codes)} processes ended after {self.seconds:.1f} s")
        for rank, (code, error) in enumerate(zip(self.codes, self.errors, strict=True)):
            print(f"--- rank {rank} ended with {code}; its stderr:\n{error}")
        return self


def write_data(folder: Path) -> Path:
    """Write a small text and return its path."""
    path = folder / "text.txt"
    path.write_text(english()[:6000])
    return path


def _rank(
    environment: Mapping[str, str], files: tuple[Path, Path], before: Callable | None, argv: list
) -> None:
    os.environ.update(environment)
    for file, number in zip(files, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.enable()  # an abort shows where
    torch.set_num_threads(1)
    # Measuring the peak and plotting are slow, and no test here needs them.
    gptfast.training.trainer.peak_flops = lambda device, dtype: 1e12
    gptfast.training.trainer.plot_losses = lambda history, out: None
    if before is not None:
        before(int(environment["RANK"]))
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


def apart(rank: int) -> None:
    """Let the processes of a run take one another for processes of other machines."""
    Failures.is_one_machine = lambda self: False  # type: ignore[method-assign]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(
    n: int,
    folder: Path,
    argv: list[str],
    *,
    before: Callable[[int], None] | None = None,
    of_rank: Mapping[int, list[str]] | None = None,
    **environment: str,
) -> list[Any]:
    """Start n processes and return them.

    before: called in each with its rank. of_rank: more arguments of some ranks. Their output goes
    to files in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    CONTEXT.set_forkserver_preload(
        ["ranks", "gptfast.training.sharded_step", "gptfast.training.processes", "torch._dynamo"]
    )
    common = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    started = []
    for rank in range(n):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        files = folder / f"out-{rank}", folder / f"err-{rank}"
        more = (of_rank or {}).get(rank, [])
        arguments = {**common, **own}, files, before, [*argv, *more]
        started.append(CONTEXT.Process(target=_rank, args=arguments))
        started[-1].start()
    return started


def end(started: list[Any], folder: Path) -> Ended:
    """Wait for processes that `start` returned; kill those that hang, which fails the test."""
    begin = time.monotonic()
    for process in started:
        process.join(max(0.0, DEADLINE_S - (time.monotonic() - begin)))
    hanging = [rank for rank, process in enumerate(started) if process.exitcode is None]
    for process in started:
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    read = [
        [(folder / f"{kind}-{i}").read_text() for i in range(len(started))]
        for kind in ("out", "err")
    ]
    assert not hanging, f"ranks {hanging} hang: {read}"
    codes = [process.exitcode for process in started]
    return Ended(codes, read[1], read[0], time.monotonic() - begin).shown()


def train(n: int, out: Path, data: Path, *more: str, **options: Any) -> Ended:
    """Train with n processes, and return how they ended."""
    folder = out.with_name(f"{out.name}-streams")
    argv = [*RUN, "--data", str(data), "--out", str(out), *more]
    return end(start(n, folder, argv, **options), folder)


def losses(out: Path) -> list[dict[str, float]]:
    """Return the numbers of each step that do not depend on the machine."""
    names = ("step", "loss", "grad_norm", "lr", "tokens", "train_loss", "val_loss")
    return [{k: row[k] for k in names if k in row} for row in read_metrics(out)]
