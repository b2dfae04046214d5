"""Which conflicts of a launch can change a result.

A tile may have fewer numbers than the CTA has threads. Other warps then repeat the loads of the
warp whose numbers they are, perhaps after it has stored; what they hold is never stored. Such a
write after a read by another warp is harmless if no result depends on what the other warps read. To
see that, the launch runs again from the same memory, and those reads return wrong numbers: all
memory must be the same in the end, bit for bit.
"""

import numpy as np

from ptx.faults import Fault
from ptx.machine import Kernel, Launch
from ptx.shadow import BY_WARP, LATE_WRITE
from ptx.values import Array

Tensors = list[tuple[int, int, str]]
LATE = f"global {LATE_WRITE} {BY_WARP}"
"""The conflicts that are looked into; all others are serious."""


def run(
    kernel: Kernel, grid: tuple[int, ...], args: list[int], tensors: Tensors
) -> tuple[Launch, list[str]]:
    """Launch a kernel; return the launch and its serious findings, a line each."""
    running = Launch(kernel, grid, args, tensors)
    before = running.memory.saved()
    running.run()
    late = {found for found in running.findings if found[1].startswith(LATE)}
    if late and _same_results(running, before, args, tensors):
        kept = {found: n for found, n in running.findings.items() if found not in late}
    else:
        kept = running.findings
    return running, [f"{kind}: {text} ({n} times)" for (kind, text), n in kept.items()]


def _same_results(running: Launch, before: list[Array], args: list[int], tensors: Tensors) -> bool:
    """Return whether a launch has the same results if the reads that race return wrong numbers."""
    results = running.memory.saved()
    again = Launch(running.kernel, running.grid, args, tensors)
    again.memory.restore(before)
    again.memory.distrust(running.memory.shadow.races)
    try:
        again.run()
    except Fault:  # for example an address that was computed from such a number
        same = False
    else:
        found = again.memory.saved()
        same = all(np.array_equal(*pair) for pair in zip(found, results, strict=True))
    running.memory.restore(results)
    return same and again.findings == running.findings
