"""Builds gptfast._C from csrc/.

The wrappers (<op>.cpp) include PyTorch's stable C interface and are compiled once; what they make
runs with every PyTorch from OLDEST_TORCH on, whichever one's headers they saw. The loops
(<op>_loops.cpp) include none of it, take a second each, and are compiled once per instruction-set
level. The module chooses the level when it is loaded. The headers and the library to link with are
those of the PyTorch in the environment that pip installs into, also where pip hides that from the
build. Where nothing can be compiled the package installs too and
runs on the PyTorch reference; gptfast/built.json keeps the reason. GPTFAST_SKIP_EXTENSION=1 leaves
the extension out, GPTFAST_REQUIRE_EXTENSION=1 fails without it, and GPTFAST_SANITIZE=1 builds it
for `make sanitize`. GPTFAST_TORCH names the folder of another PyTorch, which is not run: one for
another Python or, beside a cross compiler, for another machine (`make wheel` and `make wheel-arm`).
"""

import atexit
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info
from setuptools.errors import CompileError

if int(setuptools.__version__.partition(".")[0]) < 77:  # as pyproject.toml says, but not to all
    raise SystemExit(
        f"gptfast is built by setuptools 77 or newer, got {setuptools.__version__}; run pip "
        "install -U setuptools, or leave out --no-build-isolation"
    )


class Level(NamedTuple):
    """An instruction-set level: a C++ namespace. csrc/level.cpp has a row for each, too."""

    namespace: str
    flags: str
    loops: tuple[str, ...] = ("*_loops.cpp",)
    """The loops it compiles; for the others it runs those of the level below."""


AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
# Loops with dot products of bytes or of bf16, and those that also run on tiles.
PRODUCTS = ("engine_loops.cpp", "matmul_bf16_loops.cpp", "matmul_parts_loops.cpp")
TILES = (*PRODUCTS, "attention_*_loops.cpp")
AVX512_BF16 = f"{AVX512} -mavx512vnni -mavx512bf16"
NEON_DOT = "-march=armv8.2-a+dotprod"


def compiler() -> list[str]:
    """Return the words of the command that compiles C++."""
    return (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++").split()


def target_machine() -> str:
    """Return the machine that is compiled for, named as by platform.machine()."""
    machine = sysconfig.get_platform().rpartition("-")[2]  # _PYTHON_HOST_PLATFORM if that is set
    return platform.machine() if machine == "universal2" else machine


def levels_of(machine: str) -> list[Level]:
    """Return the levels for a machine, named as by platform.machine()."""
    emulated = Level("amx_emulated", "-DGPTFAST_EMULATED_TILES", TILES)
    if machine in ("aarch64", "arm64"):
        return [
            Level("neon", ""),  # which every such CPU has
            emulated,
            Level("neon_dot", NEON_DOT, ("engine_loops.cpp",)),
            Level("neon_bf16", f"{NEON_DOT}+bf16+i8mm", PRODUCTS),
        ]
    if machine.lower() not in ("x86_64", "amd64"):
        return [Level("generic", ""), emulated]
    return [
        Level("generic", ""),
        emulated,
        Level("avx2", AVX2),
        Level("avx512", AVX512),
        Level("avx512_vnni", f"{AVX512} -mavx512vnni", ("engine_loops.cpp",)),
        Level("avx512_bf16", AVX512_BF16, PRODUCTS),
        Level("amx", f"{AVX512_BF16} -DGPTFAST_TILES", TILES),
    ]


LEVELS = levels_of(target_machine())
CSRC = Path("csrc")
TABLE = CSRC / "loops_table.cpp"
WRAPPERS = sorted({*CSRC.glob("*.cpp")} - {*CSRC.glob("*_loops.cpp"), TABLE})
# Apple's compiler knows OpenMP only by its front end; the library is the one that torch brings.
MACOS = sys.platform == "darwin"
OPENMP = ["-Xpreprocessor", "-fopenmp"] if MACOS else ["-fopenmp"]
FLAGS = ["-std=c++20", "-O3", *OPENMP, "-fvisibility=hidden", "-fPIC", "-g0"]
if MACOS:
    # Python may be one for two machines; the levels are for one.
    os.environ.setdefault("ARCHFLAGS", f"-arch {target_machine()}")
SANITIZE = []
if os.environ.get("GPTFAST_SANITIZE") == "1":
    # Python's own flags have -fwrapv, under which a signed overflow is not an error.
    SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    # -O1 compiles three times as fast as -O3.
    SANITIZE += ["-fno-wrapv", "-g1", "-O1"]
FLAGS += SANITIZE
OLDEST_GLIBC = [] if MACOS else ["-include", "oldest_glibc.h"]
"""For a module, which meets another machine's glibc; not for a program that has its own."""


def instructions(flags: str) -> set[str]:
    """Return the macros by which the compiler tells what instructions some flags let it use."""
    command = [*compiler(), *flags.split(), "-dM", "-E", "-x", "c++", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name for name in re.findall(r"#define (\w+)", told) if name.startswith("__")}


def of_this_cpu(levels: list[Level]) -> list[Level]:
    """Return the levels, without the loops of those that need more than this CPU has."""
    has = instructions("") | instructions("-march=native")
    return [x if instructions(x.flags) <= has else x._replace(loops=()) for x in levels]


def loop_flags(level: Level) -> list[str]:
    """Return what compiles loops for a level, beyond FLAGS."""
    # No exceptions and no inline std:: code: see csrc/vectors.h.
    flags = [*level.flags.split(), f"-DGPTFAST_LEVEL={level.namespace}", "-fno-exceptions"]
    if not MACOS:  # an option of GCC's
        flags.append("-Wno-maybe-uninitialized")
    return [*flags, "-Wno-psabi", "-Wno-uninitialized"]


def loop_sources(level: Level) -> list[Path]:
    return [TABLE, *(path for loops in level.loops for path in sorted(CSRC.glob(loops)))]


SKIPPED = os.environ.get("GPTFAST_SKIP_EXTENSION") == "1"
OLDEST_TORCH = (2, 11)
"""As in gptfast/torch_private.py."""
AGAIN = "run pip install --force-reinstall --no-deps . in the sources of gptfast"

ASK_TORCH = "import torch; print(torch.__version__); print(torch.__path__[0])"


def named_torch(folder: Path) -> tuple[str, Path]:
    """Return version and folder of the PyTorch that GPTFAST_TORCH names."""
    text = (folder / "version.py").read_text("utf-8") if (folder / "version.py").is_file() else ""
    version = re.search(r"^__version__ = ['\"](.+)['\"]$", text, re.MULTILINE)
    if version is None:
        raise SystemExit(
            f"GPTFAST_TORCH is {folder}, which has no version.py of PyTorch; name the folder torch "
            "of an installed or unpacked one"
        )
    return version[1], folder


def installed_torch() -> tuple[str, Path]:
    """Return version and folder of the PyTorch that gptfast is going to be installed beside."""
    reason = ""
    # pip hides the environment from the build by PYTHONPATH, which -I ignores.
    for isolated in ([], ["-I"]):
        command = [sys.executable, *isolated, "-c", ASK_TORCH]
        asked = subprocess.run(command, capture_output=True, text=True, cwd=os.sep)
        if asked.returncode == 0:
            version, folder = asked.stdout.splitlines()[-2:]
            return version, Path(folder)
        reason = asked.stderr.strip().rpartition("\n")[2]
    raise SystemExit(
        f"gptfast: its C++ kernels are compiled with torch's headers, and the "
        f"Python that builds says: {reason}; run pip install torch, then install "
        f"gptfast again (uv needs --no-build-isolation, build --no-isolation), or leave these "
        f"kernels out with GPTFAST_SKIP_EXTENSION=1"
    )


def find_torch() -> Path:
    """Return the folder of the PyTorch with whose headers and library the module is made."""
    named = os.environ.get("GPTFAST_TORCH")
    version, folder = named_torch(Path(named)) if named else installed_torch()
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(
            f"gptfast needs torch {oldest} or newer, got {version}; run pip install -U torch, then "
            "install gptfast again"
        )
    return folder


def record(folder: Path, missing: str) -> None:
    """Write gptfast/built.json in a folder, which gptfast/installed.py reads.

    missing: why there are no C++ kernels, or "".
    """
    (folder / "gptfast").mkdir(parents=True, exist_ok=True)
    text = json.dumps({"missing": missing}, indent=2) + "\n"
    (folder / "gptfast" / "built.json").write_text(text, "utf-8")


def errors_of(output: str) -> str:
    """Return on one line what compilers ended with: the first two errors, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line] or lines[-1:]
    return " | ".join(errors[:2])


@contextmanager
def redirected(fd: int, to: int) -> Iterator[None]:
    """Let what this process and its children write to fd go to another file, and then to fd too."""
    kept = os.dup(fd)
    os.dup2(to, fd)
    try:
        yield
    finally:
        os.dup2(kept, fd)
        os.close(kept)
        os.lseek(to, 0, os.SEEK_SET)
        while part := os.read(to, 1 << 16):
            os.write(fd, part)


class Metadata(dist_info):
    """What pip asks for first. Without torch it ends here, before pip fetches what we need."""

    def run(self) -> None:
        if not SKIPPED:
            find_torch()
        super().run()


class BuildPackage(build_py):
    """Copies the Python files. For a build without the extension it is the only step."""

    def run(self) -> None:
        super().run()
        if SKIPPED:
            folder = Path(__file__).parent if self.editable_mode else Path(self.build_lib)
            record(folder, f"GPTFAST_SKIP_EXTENSION=1 was set when gptfast was installed; {AGAIN}")


class BuildExtension(build_ext):
    """Compiles wrappers and loops in parallel, the loops once per level."""

    def build_extension(self, ext: Extension) -> None:
        in_place = self.inplace or self.editable_mode
        folder = Path(__file__).parent if in_place else Path(self.build_lib)
        torch = find_torch()
        # torch brings pybind11's headers.
        ext.include_dirs += ["csrc", str(torch / "include")]
        ext.library_dirs.append(str(torch / "lib"))
        self.force = True  # else a module stays that an earlier setup.py made
        # Not self.compiler's methods: their names differ from one setuptools to the next.
        with tempfile.TemporaryFile() as said, redirected(2, said.fileno()):
            try:
                self.compile_all(ext)
            except Exception as error:
                said.seek(0)
                reason = errors_of(said.read().decode(errors="replace")) or f"{error}"[:200]
                record(folder, f"they could not be compiled: {reason}; mend that, then {AGAIN}")
                raise
        record(folder, "")

    def compile_all(self, ext: Extension) -> None:
        if os.name == "posix" and shutil.which(compiler()[0]) is None:
            raise CompileError(f"there is no compiler {compiler()[0]} (on Debian, apt install g++)")
        common = [*FLAGS, *OLDEST_GLIBC]
        jobs = [([source], common, "wrappers") for source in ext.sources]
        # What no test runs is not compiled with sanitizers, which takes longer.
        for level in of_this_cpu(LEVELS) if SANITIZE else LEVELS:
            flags = [*common, *loop_flags(level)]
            jobs += [([str(path)], flags, level.namespace) for path in loop_sources(level)]

        # The longest are compiled first, so that no core is left alone with one at the end.
        jobs.sort(key=lambda job: Path(job[0][0]).stat().st_size, reverse=True)

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
        sources, ext.sources, ext.extra_objects = ext.sources, [], objects
        super().build_extension(ext)
        ext.sources = sources


def extensions() -> list[Extension]:
    if SKIPPED:
        return []
    extension = Extension(
        "gptfast._C",
        sources=[str(path) for path in WRAPPERS],
        depends=[str(path) for path in CSRC.iterdir()],
        define_macros=[("_GLIBCXX_USE_CXX11_ABI", "1")],  # as torch is built
        libraries=["torch_cpu", *(["omp"] if MACOS else [])],
        extra_link_args=[*([] if MACOS else OPENMP), *SANITIZE],
        language="c++",
    )
    # A failed build must not leave `make sanitize` to the usual one, nor `make wheel` without any.
    extension.optional = not (SANITIZE or os.environ.get("GPTFAST_REQUIRE_EXTENSION") == "1")
    return [extension]


def package_page() -> str:
    """Return README.md as it can stand alone: without pictures and links to files beside it.

    A comment that begins with "package page:" is text of that page alone; what stands between
    "repository" and "end of repository" is not on it.
    """
    text = Path("README.md").read_text("utf-8")
    text = re.sub(r"<!-- repository -->.*?<!-- end of repository -->", "", text, flags=re.DOTALL)
    text = re.sub(r"<!-- package page:\n(.*?)-->", r"\1", text, flags=re.DOTALL)
    picture = r"!\[[^\]]*\]\([^)]*\)"
    text = re.sub(rf"\[{picture}\]\([^)]*\)|{picture}|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\((?!https?://|#)[^)]*\)", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text)


def folders() -> dict[str, dict[str, str]]:
    """Return options by which a build writes elsewhere where the sources are read-only."""
    if os.access(Path(__file__).parent, os.W_OK):
        return {}
    elsewhere = tempfile.mkdtemp(prefix="gptfast-build-")
    atexit.register(shutil.rmtree, elsewhere, ignore_errors=True)
    return {"build": {"build_base": elsewhere}, "egg_info": {"egg_base": elsewhere}}


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
    long_description=package_page(),
    long_description_content_type="text/markdown",
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage, "dist_info": Metadata},
    options=folders(),
)
