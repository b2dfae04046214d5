"""PTX programs of a few lines for the tests of single instructions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx.machine import Kernel, Launch
from ptx.values import Array

NAMES = "abcdefgh"


def module(body: str, n_params: int, n_threads: int) -> str:
    """Return a module with one kernel and registers %p, %rs, %r and %rd of its own."""
    params = ", ".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(n_params))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet({params})
.reqntid {n_threads}
{{
.reg .pred %p<40>;
.reg .b16 %rs<40>;
.reg .b32 %r<400>;
.reg .b64 %rd<60>;
{body}
ret;
}}
"""


def launch(
    body: str,
    *tensors: Array,
    threads: int = 32,
    shared: int = 0,
    grid: tuple[int, ...] = (1,),
) -> Launch:
    """Run a body whose parameters p0, p1, ... are the addresses of arrays; return the launch."""
    kernel = Kernel(module(body, len(tensors), threads), shared)
    regions = [(t.ctypes.data, t.nbytes, f"p{i}") for i, t in enumerate(tensors)]
    running = Launch(kernel, grid, [t.ctypes.data for t in tensors], regions)
    running.run()
    return running


def kinds(running: Launch) -> set[str]:
    """Return the kinds of what a launch found."""
    return {kind for kind, _ in running.findings}


def aligned(x: Any, dtype: Any) -> Array:
    """Return a copy of an array that begins at a multiple of 256 bytes."""
    x = np.ascontiguousarray(x, dtype)
    memory = np.zeros(x.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    out = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def addresses(n: int) -> str:
    """Return lines that put parameter i, as an address, in %rd(20 + i)."""
    return "\n".join(f"ld.param.b64 %rd{20 + i}, [p{i}];" for i in range(n))


def element(parameter: int, size: int, register: int) -> str:
    """Return lines that put the address of this thread's element of a parameter in a %rd."""
    return f"""mov.u32 %r39, %tid.x;
mad.wide.u32 %rd{register}, %r39, {size}, %rd{20 + parameter};"""


def evaluate(body: str, out: Any, *inputs: tuple[Sequence[Any] | Array, Any]) -> Array:
    """Return d of a body, for each element of its inputs a, b, c, ...: (values, numpy type).

    A type of bool stands for the predicate p as a result.
    """
    n = len(inputs[0][0])
    threads = -(-n // 32) * 32
    arrays = [aligned(np.resize(np.array(x, dtype), threads), dtype) for x, dtype in inputs]
    width = np.dtype("u4") if out is bool else np.dtype(out)
    result = aligned(np.zeros(threads, width), width)
    lines = [addresses(len(arrays) + 1), ".reg .pred p, q;"]
    for i, array in enumerate(arrays):
        bits = 8 * array.itemsize
        lines += [element(i, array.itemsize, 1), f".reg .b{max(16, bits)} {NAMES[i]};"]
        lines.append(f"ld.global.b{bits} {NAMES[i]}, [%rd1];")
    lines += [f".reg .b{max(16, 8 * width.itemsize)} out;", body.replace("$d", "out")]
    if out is bool:
        lines.append("selp.b32 out, 1, 0, p;")
    lines += [element(len(arrays), width.itemsize, 2)]
    lines.append(f"st.global.b{8 * width.itemsize} [%rd2], out;")
    running = launch("\n".join(lines), *arrays, result, threads=threads)
    assert not running.findings
    return result[:n].astype(bool) if out is bool else result[:n]
