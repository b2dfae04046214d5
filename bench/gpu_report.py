"""The results of a GPU run: printed as they come, and written to a file after each."""

import datetime
import json
import platform
import time
from pathlib import Path

import torch
import triton
from gpu_device import SMOKE

from gptfast.files import replacing


def machine() -> dict[str, object]:
    """Return what describes this machine; a figure without it means nothing."""
    gpu = {"gpu": "none (smoke run)"}
    if not SMOKE:
        properties = torch.cuda.get_device_properties()
        gpu = {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9),
            "cuda": torch.version.cuda,
        }
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return gpu | versions | {"python": platform.python_version()}


class Report:
    """The results so far. Each section is written at once, so that a time limit loses none."""

    def __init__(self, out: Path, deadline: float) -> None:
        name = "smoke" if SMOKE else torch.cuda.get_device_name().replace(" ", "-").lower()
        stem = f"{name}-{datetime.date.today():%Y-%m-%d}"
        self.path, self.deadline = out / f"{stem}.json", deadline
        self.results: dict[str, object] = {"machine": machine()}
        out.mkdir(parents=True, exist_ok=True)

    def add(self, section: str, result: object) -> None:
        self.results[section] = result
        with replacing(self.path) as file:
            file.write(json.dumps(self.results, indent=1) + "\n")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()
