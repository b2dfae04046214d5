"""What the kernels are compiled for, by which launchers choose their tiles."""

import triton
from triton.runtime import driver


def arch() -> str:
    """ "sm_80", "sm_90", "sm_100" (each stands for its successors too) or "gfx942" (any AMD GPU).

    Triton's interpreter, which has no hardware, takes the tiles of sm_90.
    """
    if triton.knobs.runtime.interpret:
        return "sm_90"
    target = driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return "sm_100" if target.arch >= 100 else "sm_90" if target.arch >= 90 else "sm_80"
