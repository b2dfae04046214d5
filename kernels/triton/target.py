"""What the GPU has: launchers choose their tiles by it.

Tiles come in classes, named after the first GPUs that they were written for. `arch` returns the
class of the GPU's tensor cores. Tiles of few bytes are looked up by it. Tiles that fill the shared
memory are looked up by `fitting`, which goes down to a class of smaller ones where the GPU has less
of it. A launcher that asks `fitting` is `stepping_down`: should a launch find too few resources all
the same, it takes the next class from then on.
"""

import functools
import logging
import threading
from collections.abc import Callable, Hashable
from typing import NamedTuple, ParamSpec, TypeVar

import triton
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

# Class of tiles: bytes of shared memory, of which none of its tiles takes more. The tests of the
# compile audit hold the figures.
SHARED_BYTES = {
    "sm_75": 64 << 10,
    "sm_80": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
# Class of tiles: the next class of smaller tiles that the same GPUs can run.
SMALLER = {"sm_100": "sm_80", "sm_90": "sm_80", "sm_80": "sm_75"}

P = ParamSpec("P")
R = TypeVar("R")
Kernel = tuple[Hashable, ...]
"""The name of a kernel and whatever else its tile depends on."""


class _Device(NamedTuple):
    number: int
    arch: str
    shared: float
    """Bytes of shared memory that a program may take."""


# Triton's interpreter, which has no hardware, uses the tiles of sm_90.
_INTERPRETER = _Device(-1, "sm_90", float("inf"))


@functools.cache
def _properties(active: object, index: int) -> _Device:
    """Return what a device of the active driver has; asking the driver takes long."""
    found = active.get_current_target()  # type: ignore[attr-defined]
    shared = active.utils.get_device_properties(index)["max_shared_mem"]  # type: ignore[attr-defined]
    if found.backend == "hip":
        return _Device(index, "gfx942", shared)
    # Consumer GPUs of the Blackwell generation multiply with the instructions of sm_80.
    generation = "sm_100" if found.arch >= 100 else "sm_90" if found.arch >= 90 else "sm_80"
    return _Device(index, generation if found.arch < 120 else "sm_80", shared)


def _device() -> _Device:
    if triton.knobs.runtime.interpret:
        return _INTERPRETER
    return _properties(driver.active, driver.active.get_current_device())


def arch() -> str:
    """Return "sm_80", "sm_90", "sm_100" or, for AMD GPUs, "gfx942": the class of the GPU's tiles.

    sm_80 stands for all of NVIDIA's GPUs with tensor cores but those of Hopper (90 to 99) and of
    datacenter Blackwell (100 to 119).
    """
    return _device().arch


class _Asked(threading.local):
    """What a launcher that is `stepping_down` has asked `fitting`, with the answers."""

    kernels: list[tuple[int, Kernel, str]] | None = None


_asked = _Asked()
_lowered: dict[tuple[int, Kernel], str] = {}


def lowered() -> dict[tuple[int, Kernel], str]:
    """Return which kernels, by device, have stepped down to which tiles so far."""
    return dict(_lowered)


def fitting(kernel: Kernel) -> str:
    """Return the class of tiles with which `kernel` fits the GPU: `arch`, or a smaller one.

    "sm_75" has the smallest ones.
    """
    device, tiles = _device(), arch()
    while SHARED_BYTES[tiles] > device.shared and tiles in SMALLER:
        tiles = SMALLER[tiles]
    tiles = _lowered.get((device.number, kernel), tiles)
    if _asked.kernels is not None:
        _asked.kernels.append((device.number, kernel, tiles))
    return tiles


def _step_down(error: OutOfResources) -> None:
    """Give the kernel that was asked for last a class of smaller tiles, or raise the error."""
    for index, kernel, tiles in reversed(_asked.kernels or []):
        if tiles in SMALLER:
            smaller = _lowered[index, kernel] = SMALLER[tiles]
            name = " ".join(map(str, kernel))
            logging.getLogger("gptfast").warning(
                f"gptfast: {name}: the tile of {tiles} needs {error.required} of {error.name}, "
                f"this GPU has {error.limit}; from now on it runs with the tile of {smaller}"
            )
            return
    raise error


def stepping_down(launcher: Callable[P, R]) -> Callable[P, R]:
    """Return the launcher, which starts over with a smaller tile where the GPU lacks resources.

    What it has launched before the failure must be harmless to launch again.
    """

    @functools.wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        before = _asked.kernels
        try:
            while True:
                _asked.kernels = []
                try:
                    return launcher(*args, **kwargs)
                except OutOfResources as error:
                    _step_down(error)
        finally:
            _asked.kernels = before

    return launch
