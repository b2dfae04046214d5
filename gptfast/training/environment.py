"""Where a run computes: versions, device and kernels, kept in environment.json by its metrics."""

import os
import platform
from pathlib import Path

import torch

from gptfast.installed import commit, version
from gptfast.ops.backend import EXTENSION


def environment(device: torch.device) -> dict[str, str]:
    """Return what describes this process and its machine, by name. It names no user and no path."""
    found = {"gptfast": version()}
    if sources := commit():
        found["commit"] = sources
    found |= {
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
        "C++ kernels": "none" if EXTENSION is None else EXTENSION.build_info()["isa"],
    }
    return found


def _cpu() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # another system than Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
