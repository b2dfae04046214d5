"""Compile every Triton kernel ahead of time, without a GPU, and table what the compilers report.

python bench/compile_audit.py [--arch sm_90,gfx942] [--store]

The launchers themselves run, on tensors without storage, with every launch turned into a
compilation for the architecture asked for: what is audited is what would run, specialised as it
would be (alignment, integers divisible by 16). One process per architecture, as a compiler that
aborts takes its process along. The cases of bench/audit_cases.py reach every tile configuration of
every launcher.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from audit_cases import all_cases

from gptfast.files import replacing

REPORT = Path(__file__).parent / "results" / "compile_audit.md"
RESULTS = REPORT.with_suffix(".json")
"""The kernels of the report as data, beside the digest of what they were compiled from."""
HEADING = "What Triton {} makes of the kernels"
INTRODUCTION = """\
`make audit` writes this page on a machine without a GPU, and tests/test_compile_audit.py compares
it. Each kernel is compiled as its launcher calls it, once for each set of constants; `case` is the
first case that needs this set.

- sm_89 (and sm_86) and sm_120 have the tiles of sm_80: only kernels with products are listed
- shared: bytes of shared memory for each program
- spills: bytes of stack for each thread (gfx942: registers); 0 where no register spills
- programs/SM: how many programs fit on one multiprocessor (AMD: compute unit)
- products: the number of `tl.dot`s, and on sm_90 how many of them are wgmma
- load: the widest load from global memory"""


@dataclass(frozen=True)
class Chip:
    """The resources of a multiprocessor (AMD: compute unit) and the limits of one program."""

    backend: str
    arch: int | str
    warp: int
    shared_limit: int  # bytes a program
    shared: int  # bytes in all
    registers: int  # 32-bit ones, in all
    threads: int
    programs: int
    shared_reserved: int = 1024  # bytes per program that the system takes


# The figures of NVIDIA's table of technical specifications per compute capability.
CHIPS = {
    "sm_75": Chip("cuda", 75, 32, 64 << 10, 64 << 10, 65536, 1024, 16, 0),
    "sm_80": Chip("cuda", 80, 32, 163 << 10, 164 << 10, 65536, 2048, 32),
    "sm_89": Chip("cuda", 89, 32, 99 << 10, 100 << 10, 65536, 1536, 24),
    "sm_90": Chip("cuda", 90, 32, 227 << 10, 228 << 10, 65536, 2048, 32),
    "sm_100": Chip("cuda", 100, 32, 227 << 10, 228 << 10, 65536, 2048, 32),
    "sm_120": Chip("cuda", 120, 32, 99 << 10, 100 << 10, 65536, 1536, 24),
    "gfx942": Chip("hip", "gfx942", 64, 64 << 10, 64 << 10, 4 * 512 * 64, 2048, 32, 0),
}


# GPUs with the tiles of sm_80, on which only the cases with products are compiled: only these may
# fill the shared memory.
LIKE_SM_80 = ("sm_89", "sm_120")
WITH_PRODUCTS = re.compile(r"attention (?!decode)|linear_cross_entropy|decode_linear .* N=\d\d")


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel; registers and spills are a thread's, the latter in bytes of stack (AMD:
    registers)."""

    case: str
    kernel: str
    arch: str
    tile: str
    num_warps: int
    num_stages: int
    registers: int
    shared: int
    spills: int
    # Products of 16-bit matrices, of 64 rows or more, and how many of them did not become wgmma.
    large_dots: int
    slow_dots: int
    dots: int
    # The widest load from global memory, in bits.
    load_bits: int

    @property
    def programs(self) -> int:
        """Programs that fit a multiprocessor at once."""
        chip = CHIPS[self.arch]
        threads = self.num_warps * chip.warp
        # Registers are handed out to the threads of a warp by eights.
        per_warp = max(8, -(-self.registers // 8) * 8) * chip.warp
        return min(
            chip.programs,
            chip.threads // threads,
            chip.registers // (per_warp * self.num_warps),
            chip.shared // max(1, self.shared + chip.shared_reserved),
        )


class Compiler:
    """A driver for an absent chip: Triton compiles for it and launches nothing."""

    def __init__(self, chip: Chip) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(chip.backend, chip.arch, chip.warp)
        self.chip = chip

    @property
    def utils(self) -> "Compiler":
        """What Triton asks for the properties of a device."""
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.chip.shared_limit}

    def get_current_target(self):  # type: ignore[no-untyped-def]
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only(arch: str) -> list[tuple[dict, object]]:
    """Turn every launch into a compilation; return a list to which each adds its options and what
    was compiled."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Compiler(CHIPS[arch]))
    launched: list[tuple[dict, object]] = []
    real = JITFunction.run

    def run(self, *args, grid, warmup, **options):  # type: ignore[no-untyped-def]
        compiled = real(self, *args, grid=grid, warmup=True, **options)
        launched.append((options, compiled))
        return compiled

    JITFunction.run = run
    return launched


def audit(arch: str, ops: Iterable[str]) -> list[Kernel]:
    """Compile all cases for one architecture: each kernel once, under its first case."""
    launched = compile_only(arch)
    kernels, seen = [], set()
    for case, call in all_cases():
        if case.split()[0] not in ops or (arch in LIKE_SM_80 and not WITH_PRODUCTS.match(case)):
            continue
        launched.clear()
        call()
        for options, compiled in launched:
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                kernels.append(_report(case, arch, options, compiled))
    return kernels


def _report(case: str, arch: str, options: dict, compiled) -> Kernel:  # type: ignore[no-untyped-def]
    metadata, asm = compiled.metadata, compiled.asm
    tile = "x".join(str(v) for k, v in options.items() if k.startswith("BLOCK"))
    if "ptx" in asm:
        registers, spills = _resources(asm["cubin"])
        loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)", asm["ptx"])
        widths = [int(n or 1) * int(bits) for n, bits in loads]
    else:
        listing = asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", listing)[1])
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", listing)[1])
        loads = re.findall(
            r"(?:global|buffer)_load_(?:dword(?:x(\d))?|([us](?:byte|short)))", listing
        )
        widths = [16 if small else 32 * int(n or 1) for n, small in loads]
    # %c = tt.dot %a, %b, ... : tensor<MxKxbf16> * tensor<KxNxbf16> -> ...
    dots = re.findall(r"tt\.dot .*?: tensor<(\d+)x\d+x(\w+)>", asm["ttir"])
    large = [m for m, dtype in dots if dtype in ("bf16", "f16") and int(m) >= 64]
    slow = re.findall(r" = tt\.dot .*?: tensor<(\d+)x\d+x(?:bf16|f16)", asm["ttgir"])
    return Kernel(
        case,
        metadata.name,
        arch,
        tile,
        metadata.num_warps,
        metadata.num_stages,
        registers,
        metadata.shared,
        spills,
        len(large),
        sum(int(m) >= 64 for m in slow),
        len(dots),
        max(widths, default=0),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack per thread; ptxas spills to the stack."""
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(nvidia.__file__).parent / "bin" / "cuobjdump", "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))


OPS = ("attention", "cross_entropy", "linear_cross_entropy", "adamw", "sampling", "embedding")
OPS += ("decode_linear", "linear", "mlp")


def audit_all(archs: Iterable[str], ops: Iterable[str] = OPS) -> list[Kernel]:
    """Audit each architecture in a process of its own, as many at once as there are cores."""
    # The parent may be interpreting Triton; what compiles must not.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def run(arch: str) -> list[Kernel]:
        command = [sys.executable, __file__, "--json", "--arch", arch, "--ops", ",".join(ops)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"compiling for {arch} failed:\n{done.stdout}\n{done.stderr}")
        return [Kernel(**row) for row in json.loads(done.stdout)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for kernels in pool.map(run, archs) for kernel in kernels]


def code(path: Path) -> str:
    """Return a file's tokens without comments and docstrings, which no compiler sees."""
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    kept, starts_line = [], True
    for token in tokens:
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING):
            continue
        if token.type != tokenize.STRING or not starts_line:
            kept.append(token.string)
        starts_line = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT) or (
            starts_line and token.type == tokenize.STRING
        )
    return "".join(kept)


def inputs_digest() -> str:
    """Return the SHA-256 of all that decides the report: the kernels, the cases, this file and the
    version of Triton."""
    import triton

    here = Path(__file__).parent
    kernels = (here.parent / "kernels").rglob("*.py")
    files = [*sorted(kernels), here / "audit_cases.py", Path(__file__)]
    digest = hashlib.sha256(triton.__version__.encode())
    for path in files:
        digest.update(f"\n{path.name}\n{code(path)}".encode())
    return digest.hexdigest()


def stored_kernels() -> list[Kernel] | None:
    """Return the kernels that `make audit` stored, or None if they are of other inputs."""
    if not RESULTS.exists():
        return None
    stored = json.loads(RESULTS.read_text())
    if stored["inputs"] != inputs_digest():
        return None
    return [Kernel(**row) for row in stored["kernels"]]


def store(kernels: list[Kernel]) -> None:
    """Write the report and the data behind it."""
    rows = ",\n".join(json.dumps(asdict(kernel)) for kernel in kernels)
    with replacing(REPORT) as page, replacing(RESULTS) as data:
        page.write(report(kernels))
        data.write(f'{{"inputs": "{inputs_digest()}", "kernels": [\n{rows}\n]}}\n')


def table(kernels: Iterable[Kernel]) -> str:
    """Return the kernels as a Markdown table."""
    head = "arch case kernel tile warps stages registers shared spills programs/SM products load"
    lines = ["| " + " | ".join(head.split()) + " |", "|" + "---|" * 12]
    for k in kernels:
        dots = "" if not k.dots else str(k.dots)
        if k.dots and k.arch == "sm_90":
            dots += f", {k.large_dots - k.slow_dots} wgmma"
        cells = (k.arch, k.case, k.kernel, k.tile, k.num_warps, k.num_stages, k.registers)
        cells += (k.shared, k.spills, k.programs, dots, f"{k.load_bits} bit")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def report(kernels: list[Kernel]) -> str:
    """Return the text of compile_audit.md."""
    import triton

    parts = [f"# {HEADING.format(triton.__version__)}", INTRODUCTION, table(kernels)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(CHIPS), help="some of " + ", ".join(CHIPS))
    parser.add_argument("--ops", default=",".join(OPS), help="some of " + ", ".join(OPS))
    parser.add_argument("--json", action="store_true", help="one architecture, to standard output")
    parser.add_argument("--store", action="store_true", help=f"rewrite {REPORT.name} and its data")
    args = parser.parse_args()
    archs, ops = args.arch.split(","), args.ops.split(",")
    if args.json:
        print(json.dumps([asdict(kernel) for kernel in audit(archs[0], ops)]))
        return
    kernels = audit_all(archs, ops)
    if args.store:
        store(kernels)
    else:
        print(report(kernels))


if __name__ == "__main__":
    main()
