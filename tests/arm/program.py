"""Compile the loops for aarch64 into one program without PyTorch, and call them in it.

The compiler is a cross compiler of its own (aarch64-linux-gnu-g++), the CPUs are those that
qemu-aarch64 has. Flags and levels are setup.py's.
"""

import fcntl
import os
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from gptfast.ops.backend import EXTENSION

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "arm"
COMPILER = "aarch64-linux-gnu-g++"
CPUS = {"neon": "cortex-a53", "neon_dot": "neoverse-n1", "neon_bf16": "max"}
"""The CPU on which a level is tested: the best that it has."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As in csrc/loops.h."""
NUMBER, ARRAY, NO_ARRAY = 0, 1, 2


def emulator() -> str | None:
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def missing() -> str:
    """Return why the tests of the program are skipped, or ""."""
    if os.environ.get("GPTFAST_TEST_ARM") != "1":
        return "GPTFAST_TEST_ARM is not 1 (make test-arm)"
    if EXTENSION is None:
        return "the C++ extension is not built"
    if not shutil.which(COMPILER):
        return f"there is no {COMPILER} (make test-tools installs it)"
    return "" if emulator() else "there is no qemu-aarch64 (make test-tools installs it)"


emulated = pytest.mark.skipif(bool(missing()), reason=missing())


@cache
def setup() -> dict[str, Any]:
    """Return what setup.py defines; it is run to print a name."""
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        with patch.object(sys, "argv", ["setup.py", "-q", "--name"]), redirect_stdout(StringIO()):
            return runpy.run_path("setup.py", run_name="__main__")
    finally:
        os.chdir(before)


def _jobs() -> list[tuple[Path, Path, list[str]]]:
    """Return source, object and flags of each file of the program."""
    given = setup()
    common = [*given["FLAGS"], f"-I{CSRC}"]
    jobs = [
        (CSRC / "level.cpp", OBJECTS / "level.o", common),
        (Path(__file__).parent / "program.cpp", OBJECTS / "program.o", common),
    ]
    for level in given["levels_of"]("aarch64"):
        # Emulated tiles are the same code everywhere, and slow: their table stays empty.
        sources = given["loop_sources"](level)
        sources = sources[:1] if level.namespace == "amx_emulated" else sources
        flags = [*common, *given["loop_flags"](level)]
        jobs += [
            (ROOT / source, OBJECTS / level.namespace / f"{source.stem}.o", flags)
            for source in sources
        ]
    return jobs


def _compile(job: tuple[Path, Path, list[str]]) -> None:
    source, target, flags = job
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [COMPILER, *flags, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def build() -> Path:
    """Return the program, compiled again if a source is newer: by one process, others wait."""
    built = _built()
    if isinstance(built, Exception):
        raise built
    return built


@cache
def _built() -> Path | Exception:
    """Return the program or, so that not every test tries again, why there is none."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with (OBJECTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return _compiled()
        except (RuntimeError, subprocess.CalledProcessError) as error:
            return error


def _compiled() -> Path:
    program = OBJECTS / "program"
    sources = [*CSRC.iterdir(), *Path(__file__).parent.iterdir(), ROOT / "setup.py"]
    if program.exists():
        built = program.stat().st_mtime
        if all(path.stat().st_mtime <= built for path in sources):
            return program
    jobs = _jobs()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_compile, jobs))
    objects = [str(target) for _, target, _ in jobs]
    subprocess.run(
        [COMPILER, "-static", "-pthread", *objects, "-o", str(program)], check=True, cwd=ROOT
    )
    return program


def _run(cpu: str, *arguments: str) -> str:
    command = [str(emulator()), "-cpu", cpu, str(build()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def levels(cpu: str) -> list[str]:
    """Return the levels that the program finds on one of qemu's CPUs."""
    return _run(cpu).split()


def _argument(value: int | float | Tensor | None) -> bytes:
    if value is None:
        return struct.pack("<qq", NO_ARRAY, 0)
    if isinstance(value, Tensor):
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return struct.pack("<qq", ARRAY, len(data)) + data
    return struct.pack("<qqd" if isinstance(value, float) else "<qqq", NUMBER, 8, value)


def call(
    level: str, name: str, numbers: Sequence[int | float], arrays: Sequence[Tensor | None]
) -> list[Tensor]:
    """Call an operation of program.cpp at a level; return the arrays as they are afterwards.

    None stands for an array that is not there, and is not returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given"), Path(folder, "found")
        given.write_bytes(b"".join(_argument(value) for value in [*numbers, *arrays]))
        _run(CPUS[level], level, name, str(given), str(found))
        data = bytearray(found.read_bytes())
    results, place = [], 0
    for array in arrays:
        if array is not None:
            size = array.numel()
            part = torch.frombuffer(data, dtype=array.dtype, count=size, offset=place)
            results.append(part.view(array.shape).clone())
            place += size * array.itemsize
    assert place == len(data)
    return results
