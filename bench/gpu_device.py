"""The device of bench/gpu.py: a GPU, or with --smoke the CPU and Triton's interpreter.

Import this module before Triton and gptfast: it sets what they read when they are imported.
"""

import os
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
