"""A cache of compiled Triton kernels that travels to a machine with a GPU.

python bench/gpu_cache.py [--arch sm_90] [--ops OP,...] [--tests]

It compiles, without a GPU, the cases of the compile audit and, with --tests, what the operations'
tests launch, into CACHE, with Triton's launchers in C; and it packs that folder as ARCHIVE, which
bench/gpu.py unpacks at the same place: Triton's files name one another by absolute paths. They
serve the same version of Triton, for the same Python, on the same sources; any other kernel is
compiled as usual.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path("/tmp/gptfast-triton-cache")
ARCHIVE = ROOT / "build" / "triton-cache.tar.xz"
MAX_BYTES = 64 << 20
XZ_PRESET = 1


def unpack() -> None:
    """Let Triton use CACHE, with what ARCHIVE has if it is there and was not unpacked yet."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    if CACHE.exists() or not ARCHIVE.exists():
        return
    try:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(CACHE.parent, filter="data")
    except (OSError, tarfile.TarError) as error:
        print(f"{ARCHIVE.name} was not unpacked ({error}): kernels are compiled here")


def pack() -> int:
    """Pack CACHE and return the size of the archive."""
    ARCHIVE.parent.mkdir(exist_ok=True)
    with tarfile.open(ARCHIVE, "w:xz", preset=XZ_PRESET) as archive:
        archive.add(CACHE, CACHE.name)
    return ARCHIVE.stat().st_size


def build_launchers(arch: str) -> None:
    """Let Triton's compilations build the launchers too, for NVIDIA's GPUs.

    Triton calls the driver by C code that a compiler builds: one module for all kernels, and before
    Triton 3.7 another one for each signature. It is built over a libcuda that launches nothing.
    Call this before `compile_only`.
    """
    if not arch.startswith("sm_"):
        return
    import stub_cuda
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    stub_cuda.install(Path(tempfile.mkdtemp()))
    stub, real = driver.active, JITFunction.run

    def run(self, *args, **options):  # type: ignore[no-untyped-def]
        compiled = real(self, *args, **options)
        compiler = driver.active
        driver.set_active(stub)
        stub.launcher_cls(compiled.src, compiled.metadata)
        driver.set_active(compiler)
        return compiled

    JITFunction.run = run  # type: ignore[method-assign]


def compile_audit_cases(arch: str, ops: list[str] | None) -> None:
    """Compile the cases of the compile audit, of all operations or of some."""
    from compile_audit import OPS, audit

    print(f"{len(audit(arch, ops or OPS))} kernels of the audit's cases", flush=True)


def compile_tests(arch: str, ops: list[str] | None) -> None:
    """Compile what the operations' tests launch; that they pass is not needed."""
    from gpu_checks import TESTS

    command = [sys.executable, "-m", "pytest", "-p", "gpu_cache", "-m", "triton", "--tb=no"]
    command += ["-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in ops or TESTS)]
    path = os.pathsep.join((str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")))
    environment = {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "GPU_CACHE_ARCH": arch}
    subprocess.run(command, cwd=ROOT, env=os.environ | environment)


def pytest_configure(config) -> None:  # type: ignore[no-untyped-def]
    """Make pytest compile each launch for a GPU that is not there; the reference computes."""
    from compile_audit import compile_only

    from gptfast.ops import backend, library

    build_launchers(os.environ["GPU_CACHE_ARCH"])
    compile_only(os.environ["GPU_CACHE_ARCH"])
    backend._interpreted = lambda: True
    launch = library._Launcher.__call__

    def compile_and_refer(self, *args):  # type: ignore[no-untyped-def]
        launch(self, *args)
        return self.reference(*args)

    library._Launcher.__call__ = compile_and_refer  # type: ignore[method-assign]


def pytest_collection_modifyitems(config) -> None:  # type: ignore[no-untyped-def]
    """Let the tests on the Triton kernels run with bf16 too."""
    from gptfast import use_backend

    def with_triton(request):  # type: ignore[no-untyped-def]
        with use_backend("triton"):
            yield "triton"

    conftest = config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    conftest._with_triton = with_triton


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90", help="the GPU's architecture")
    parser.add_argument("--ops", type=lambda x: x.split(","), help="some operations (default: all)")
    parser.add_argument("--tests", action="store_true", help="what the tests launch, too")
    args = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    build_launchers(args.arch)
    compile_audit_cases(args.arch, args.ops)
    if args.tests:
        compile_tests(args.arch, args.ops)
    size = pack()
    print(f"{ARCHIVE}: {size / 2**20:.0f} MB of at most {MAX_BYTES >> 20}")
    if size > MAX_BYTES:
        raise SystemExit("the archive is too large to travel: leave --tests out")


if __name__ == "__main__":
    main()
