"""Builds gptfast._C from csrc/.

The wrappers (<op>.cpp) include ATen and are compiled once. The loops (<op>_loops.cpp) include none
of it, take a second each, and are compiled once per instruction-set level. The module chooses the
level when it is loaded. Without a compiler the package installs too and runs on the PyTorch
reference. GPTFAST_SKIP_EXTENSION=1 leaves the extension out, GPTFAST_SANITIZE=1 builds it for
`make sanitize`.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class Level(NamedTuple):
    """An instruction-set level: a C++ namespace. csrc/level.cpp has a row for each, too."""

    namespace: str
    flags: str
    loops: tuple[str, ...] = ("*_loops.cpp",)
    """The loops it compiles; for the others it runs those of the level below."""


AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
# Loops with dot products of bytes or of bf16.
PRODUCTS = ("engine_loops.cpp", "matmul_bf16_loops.cpp")
AVX512_BF16 = f"{AVX512} -mavx512vnni -mavx512bf16"
LEVELS = [Level("generic", ""), Level("amx_emulated", "-DGPTFAST_EMULATED_TILES", PRODUCTS)]
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS += [
        Level("avx2", AVX2),
        Level("avx512", AVX512),
        Level("avx512_vnni", f"{AVX512} -mavx512vnni", ("engine_loops.cpp",)),
        Level("avx512_bf16", AVX512_BF16, PRODUCTS),
        Level("amx", f"{AVX512_BF16} -DGPTFAST_TILES", PRODUCTS),
    ]
CSRC = Path("csrc")
TABLE = CSRC / "loops_table.cpp"
WRAPPERS = sorted({*CSRC.glob("*.cpp")} - {*CSRC.glob("*_loops.cpp"), TABLE})
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-fvisibility=hidden", "-fPIC", "-g0"]
SANITIZE = []
if os.environ.get("GPTFAST_SANITIZE") == "1":
    # Python's own flags have -fwrapv, under which a signed overflow is not an error.
    SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    SANITIZE += ["-fno-wrapv", "-g1"]
FLAGS += SANITIZE


def extension() -> Extension:
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    return Extension(
        "gptfast._C",
        sources=[str(path) for path in WRAPPERS],
        depends=[str(path) for path in CSRC.iterdir()],
        include_dirs=["csrc", *include_paths(), pybind11.get_include()],
        library_dirs=library_paths(),
        libraries=["c10", "torch", "torch_cpu", "torch_python"],
        define_macros=[("_GLIBCXX_USE_CXX11_ABI", str(int(torch._C._GLIBCXX_USE_CXX11_ABI)))],
        extra_link_args=["-fopenmp", *SANITIZE],
        language="c++",
    )


class BuildExtension(build_ext):
    """Compiles wrappers and loops in parallel, the loops once per level."""

    def build_extension(self, ext: Extension) -> None:
        jobs = [([source], FLAGS, "wrappers") for source in ext.sources]
        for level in LEVELS:
            # No exceptions and no inline std:: code: see csrc/vectors.h.
            flags = [*FLAGS, *level.flags.split(), f"-DGPTFAST_LEVEL={level.namespace}"]
            flags += ["-fno-exceptions", "-Wno-psabi"]
            flags += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
            sources = [TABLE, *(path for loops in level.loops for path in CSRC.glob(loops))]
            jobs += [([str(path)], flags, level.namespace) for path in sources]

        def compile(job: tuple[list[str], list[str], str]) -> list[str]:
            sources, flags, folder = job
            return self.compiler.compile(
                sources,
                output_dir=os.path.join(self.build_temp, folder),
                macros=ext.define_macros,
                include_dirs=ext.include_dirs if folder == "wrappers" else ["csrc"],
                extra_postargs=flags,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for batch in pool.map(compile, jobs) for o in batch]
        ext.sources, ext.extra_objects = [], objects
        super().build_extension(ext)


def extensions() -> list[Extension]:
    if os.environ.get("GPTFAST_SKIP_EXTENSION") == "1":
        return []
    try:
        built = extension()
    except ImportError as error:
        print(
            f"gptfast: no C++ kernels, {error}; install torch and pybind11 first", file=sys.stderr
        )
        return []
    built.optional = not SANITIZE  # a failed build must not leave the tests to the usual one
    return [built]


setup(
    packages=[
        "gptfast",
        "gptfast.cli",
        "gptfast.data",
        "gptfast.engine",
        "gptfast.evaluate",
        "gptfast.generation",
        "gptfast.ops",
        "gptfast.optim",
        "gptfast.search",
        "gptfast.serve",
        "gptfast.tokenizer",
        "gptfast.training",
        "gptfast.weights",
        "gptfast.kernels",
        "gptfast.kernels.reference",
        "gptfast.kernels.triton",
    ],
    package_dir={"gptfast": "gptfast", "gptfast.kernels": "kernels"},
    package_data={"gptfast": ["py.typed"], "gptfast.serve": ["page.html"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
