"""The architecture that kernels are compiled for; launchers choose their tiles by it."""

import triton
from triton.runtime import driver


def arch() -> str:
    """Return "sm_80", "sm_90" or "sm_100" (each also for its successors), or "gfx942" for AMD GPUs.

    Triton's interpreter, which has no hardware, uses the tiles of sm_90.
    """
    if triton.knobs.runtime.interpret:
        return "sm_90"
    target = driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return "sm_100" if target.arch >= 100 else "sm_90" if target.arch >= 90 else "sm_80"
