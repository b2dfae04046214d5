"""The processes that torchrun launched, found by the variables that it sets."""

import os

from gptfast.config import TrainConfig
from gptfast.training.world import ONE, World

_started: list[World] = []


def processes_asked_for() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() and "RANK" in os.environ else 1


def check_parallel(config: TrainConfig) -> None:
    """Raise ValueError for settings of several processes in a run without torchrun."""
    if config.parallel is not None and "RANK" not in os.environ:
        raise ValueError(
            f"parallel {config.parallel} is for several processes: start them with torchrun "
            "--nproc-per-node N -m gptfast train ..., or leave it out"
        )


def world_of(config: TrainConfig) -> World:
    """Return the processes of a run, which are connected at the first call."""
    check_parallel(config)
    if processes_asked_for() == 1:
        return ONE
    if not _started:
        from gptfast.training.processes import Processes

        _started.append(Processes(config.device, config.dist_timeout))
    return _started[0]
