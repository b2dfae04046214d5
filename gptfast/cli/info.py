"""`gptfast info`: show what is installed and which kernels run each operation."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import gptfast
from gptfast.ops.backend import EXTENSION, MISSING
from gptfast.ops.library import backend_of, operators


@dataclass(frozen=True)
class Info:
    """Show version, CPU level, matrix engine, threads, GPU, and the backend of each operation."""

    def run(self) -> None:
        python = f"Python {platform.python_version()}"
        system = platform.platform()
        print(f"gptfast {gptfast.__version__}, torch {torch.__version__}, {python}, {system}")
        print(f"installed in {Path(gptfast.__file__).parent}")
        if EXTENSION is None:
            print(f"C++ kernels: none ({MISSING}); the CPU runs the PyTorch reference")
        else:
            build = EXTENSION.build_info()
            print(
                f"C++ kernels: level {build['isa']} of {', '.join(build['isa_supported'])}; "
                f"g++ {build['compiler']}, OpenMP {'on' if build['openmp'] else 'OFF: serial'}"
            )
            print(f"matrix engine: {build['matrix_engine']}")
            if len(build["openmp_runtimes"]) > 1:
                print(f"warning: several OpenMP runtimes: {', '.join(build['openmp_runtimes'])}")
            if unknown := build["unknown_settings"]:
                print(f"warning: this torch's default counts, whatever is set by {unknown}")
        print(f"threads: {torch.get_num_threads()}")
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        print(f"GPU: {gpu}")
        print(f"{'operation':<32}{'cpu':<12}cuda")
        for op in operators():
            name = op.name().removeprefix("gptfast::")
            print(f"{name:<32}{backend_of(op, 'cpu'):<12}{backend_of(op, 'cuda')}")
