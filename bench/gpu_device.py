"""The device of bench/gpu.py: a GPU, or with --smoke the CPU and Triton's interpreter.

Import this module before Triton and gptfast: it sets what they read when they are imported.
"""

import contextlib
import os
import subprocess
import sys

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # noqa: E402 - the environment is set before CUDA starts

DEVICE = "cpu" if SMOKE else "cuda"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if not SMOKE:
    DTYPES["bf16"] = torch.bfloat16


def synchronize() -> None:
    if not SMOKE:
        torch.cuda.synchronize()


def on_device() -> contextlib.AbstractContextManager:
    """Return a context in which new tensors are made on the device, for making data and checking.

    No measurement may run in it: there, each call of torch goes through Python once more.
    """
    return torch.device(DEVICE)


def kernels() -> contextlib.AbstractContextManager:
    """Return a context in which gptfast runs its Triton kernels on this device."""
    from gptfast import use_backend

    # Not use_backend("auto") on a GPU: torch.compile refuses to work inside a dispatch mode.
    return use_backend("triton") if SMOKE else contextlib.nullcontext()


# What decides about times besides the GPU's model; nvidia-smi's names for them.
ASKED = ("driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
ASKED += ("temperature.gpu", "mig.mode.current", "ecc.mode.current")


def _nvidia_smi() -> dict[str, str]:
    """Return what nvidia-smi says of the GPU, or nothing without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in said.partition("\n")[0].split(",")]
    return dict(zip(ASKED, values, strict=False)) if len(values) == len(ASKED) else {}


def machine() -> dict[str, object]:
    """Return what describes this machine; a figure without it means nothing."""
    import platform

    import triton

    gpu: dict[str, object] = {"gpu": "smoke"}
    if not SMOKE:
        properties = torch.cuda.get_device_properties()
        gpu = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9),
            "cuda": torch.version.cuda,
            **_nvidia_smi(),
        }
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return gpu | versions | {"python": platform.python_version()}
