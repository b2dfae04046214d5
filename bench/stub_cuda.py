"""Run Triton's real driver and launcher without a GPU, over a libcuda that launches nothing.

`install()` builds stub_cuda.c with gcc, loads it in libcuda's place and makes Triton's own
`CudaDriver`, for an H100, the active one. CPU tensors then stand for device memory: Triton compiles
kernels for sm_90, loads them and packs their parameters as on a GPU, and the stub records each
launch. `launches()` returns what it recorded. Nothing is computed: outputs keep what their memory
held.

Call it before anything of kernels/triton is imported, in a process without TRITON_INTERPRET.
"""

import ctypes
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_suffix(".c")
STREAM = 0x5EAF00D
"""The handle of the current stream."""
PARAM = re.compile(r"\.param \.(\w)(\d+)")
RECORDS = 256
"""The launches that the stub remembers."""


class _Record(ctypes.Structure):
    """`Record` of stub_cuda.c."""

    _fields_ = (
        ("function", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("n_bytes", ctypes.c_int32),
        ("stream", ctypes.c_uint64),
        ("bytes", ctypes.c_uint8 * 1024),
    )


@dataclass(frozen=True)
class Launch:
    """A launch that reached the driver; `params` are the parameters' bytes."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    params: tuple[bytes, ...]


def declared(ptx: str) -> list[tuple[str, int]]:
    """Return (kind, bytes) of each parameter that the PTX declares; kind is u, s, b or f."""
    head = ptx[ptx.index(".entry") :]
    return [(kind, int(bits) // 8) for kind, bits in PARAM.findall(head[: head.index("{")])]


class Stub:
    """The loaded library, and the parameters of the kernels that were loaded through it."""

    def __init__(self, path: Path) -> None:
        # By its soname it is now the libcuda.so.1 of whatever is loaded later.
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.library.stub_launches.restype = ctypes.c_uint64
        self.library.stub_record.restype = ctypes.POINTER(_Record)
        self.library.stub_record.argtypes = [ctypes.c_uint64]
        self.library.stub_hide.argtypes = [ctypes.c_uint64]
        self.library.stub_declare.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self.params: dict[int, list[tuple[str, int]]] = {}
        """The declared parameters by function."""

    def loaded(
        self, module: Any, function: int, name: str, files: dict[str, str], key: str
    ) -> None:
        """Tell the stub the sizes of a kernel's parameters; Triton calls this when it loads one."""
        ptx = next(Path(path) for file, path in files.items() if file.endswith(".ptx")).read_text()
        params = self.params[function] = declared(ptx)
        sizes = (ctypes.c_int * len(params))(*(size for _, size in params))
        assert self.library.stub_declare(function, len(params), sizes), f"{name} has too many bytes"

    def count(self) -> int:
        """Return the number of launches so far."""
        return self.library.stub_launches()

    def launches(self, begin: int) -> list[Launch]:
        """Return the launches from number `begin` on; the stub remembers the last RECORDS."""
        end = self.count()
        assert end - begin <= RECORDS, f"the stub remembers {RECORDS} launches of {end - begin}"
        return [self._launch(self.library.stub_record(i).contents) for i in range(begin, end)]

    def _launch(self, record: _Record) -> Launch:
        data, params, at = bytes(record.bytes), [], 0
        for _, size in self.params[record.function]:
            params.append(data[at : at + size])
            at += size
        assert at == record.n_bytes
        return Launch(
            record.function,
            tuple(record.grid),
            tuple(record.block),
            record.shared,
            record.stream,
            tuple(params),
        )


def build(folder: Path) -> Path:
    """Compile the stub in the folder and return its path."""
    import triton.backends.nvidia as nvidia

    path = folder / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    subprocess.run([*command, str(SOURCE), "-o", str(path)], check=True)
    return path


def install(folder: Path) -> Stub:
    """Build the stub in the folder, load it, and activate Triton's driver for NVIDIA over it."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    assert not knobs.runtime.interpret, "the stub is for compiled kernels: unset TRITON_INTERPRET"
    stub = Stub(build(folder))
    knobs.nvidia.libcuda_path = str(folder)
    # torch has no CUDA here; these are what Triton's driver asks it.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    active = CudaDriver()
    active.get_current_stream = lambda device: STREAM
    driver.set_active(active)
    knobs.runtime.kernel_load_end_hook.add(stub.loaded)
    return stub
