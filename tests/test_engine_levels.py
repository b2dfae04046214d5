"""With weights in bf16, int8 and int4 a token has the same logits, bit for bit, at every level:
prompts by tiles, single tokens by vectors, on the thread or the process that comes."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ENGINE_LEVELS, at_level
from helpers import random_ids, random_model
from torch import Tensor

from gptfast import GPT
from gptfast.engine import Engine
from gptfast.ops.backend import EXTENSION

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
LEVELS = [*ENGINE_LEVELS, *(EXTENSION.build_info()["isa_emulated"] if EXTENSION else [])]
WITHOUT_FUSED = ("default", "amx_emulated")
TILES = [level for level in LEVELS if level.startswith("amx")]
SHAPES = {
    "D=64": {"n_embd": 128},
    "C=50": {"n_head": 5, "n_embd": 50},
    "untied, V prime": {"n_embd": 48, "tie_weights": False, "vocab_size": 257},
}
LENGTHS = (1, 2, 4, 5, 8, 15, 16, 17, 31, 32, 33, 47, 49, 64, 70)


def small_model(**shape: int | bool) -> GPT:
    return random_model(std=0.08, **{"block_size": 80, "vocab_size": 211, **shape}).eval()


def of_prompts(engine: Engine) -> list[Tensor]:
    vocab_size = engine.config.vocab_size
    return [engine.logits(random_ids(n, vocab_size=vocab_size, seed=n).tolist()) for n in LENGTHS]


def in_batches(engine: Engine) -> list[Tensor]:
    """Return logits of rows that begin together, then get one token or several guesses each."""
    vocab_size, rows = engine.config.vocab_size, engine.rows
    texts = [random_ids(70, vocab_size=vocab_size, seed=n).tolist() for n in range(6)]
    held, found = [rows.new() for _ in texts], []
    cuts = [[0] * 6, [1, 40, 3, 17, 5, 33], [2, 41, 4, 18, 6, 34], [7, 42, 9, 30, 11, 34 + 6]]
    with torch.inference_mode():
        for begin, end in zip(cuts, cuts[1:], strict=False):
            parts = [text[a:b] for text, a, b in zip(texts, begin, end, strict=True)]
            found.append(rows.forward(held, parts, [min(5, len(part)) for part in parts])[0])
    for row in held:
        rows.release(row)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_the_same_bits_at_every_level(dtype: str, shape: str) -> None:
    """In fp32 this holds for levels with fused multiply-adds."""
    engine = Engine(small_model(**SHAPES[shape]), dtype)
    levels = [level for level in LEVELS if dtype != "fp32" or level not in WITHOUT_FUSED]
    wanted = None
    for n, level in enumerate(levels):
        with at_level(level):
            torch.set_num_threads(1 + n % 3)
            found = [*of_prompts(engine), *in_batches(engine)]
        wanted = wanted or found
        for a, b in zip(found, wanted, strict=True):
            assert a.isfinite().all() and torch.equal(a, b), level


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("factor", [1e-37, 1e-30, 1e30])
def test_the_same_bits_at_the_edges_of_the_range(dtype: str, factor: float) -> None:
    """The smallest inputs and weights are no normal numbers; the largest sums overflow."""
    model = small_model()
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.mul_(factor)
        model.ln_f.weight.mul_(factor)
        model.h[1].attn.c_proj.bias[3] = 1e-40
    engine, wanted = Engine(model, dtype), None
    for level in LEVELS:
        with at_level(level):
            found = torch.cat(
                [engine.logits(random_ids(n, vocab_size=211).tolist()) for n in (1, 20)]
            )
        wanted = found if wanted is None else wanted
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num()), level


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("level", TILES)
def test_tiles_with_threads(level: str, threads: int) -> None:
    for dtype in ("bf16", "int8"):
        engine = Engine(small_model(), dtype)
        wanted = of_prompts(engine)
        with at_level(level):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, of_prompts(engine), wanted))


@pytest.mark.parametrize("level", TILES)
def test_tiles_in_new_threads_after_a_fork_and_beside_onednn(level: str) -> None:
    """Each of them has, or makes, shapes of tiles that are not the engine's."""
    prompt = random_ids(40, vocab_size=211).tolist()
    x, w = (torch.randn(64, 64, dtype=torch.bfloat16) for _ in range(2))
    for dtype in ("bf16", "int8"):
        engine = Engine(small_model(), dtype)
        wanted = engine.logits(prompt)
        with at_level(level):
            torch.set_num_threads(2)
            found = []
            for _ in range(2):
                torch.nn.functional.linear(x, w)
                found.append(engine.logits(prompt))
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(engine.logits, prompt).result())
            assert len(found) == 3 and all(torch.equal(one, wanted) for one in found)
            torch.set_num_threads(1)
            child = os.fork()
            if not child:
                os._exit(0 if torch.equal(engine.logits(prompt), wanted) else 1)
            assert os.waitpid(child, 0)[1] == 0


# Denies arch_prctl(ARCH_REQ_XCOMP_PERM), by which a process asks for tiles.
DENY = """
import ctypes, struct
def step(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER, ARCH, FIRST_ARGUMENT = 0, 4, 16
program = b"".join([
    step(LOAD, 0, 0, ARCH), step(EQUAL, 0, 5, 0xC000003E),
    step(LOAD, 0, 0, NUMBER), step(EQUAL, 0, 3, 158),
    step(LOAD, 0, 0, FIRST_ARGUMENT), step(EQUAL, 0, 1, 0x1023),
    step(RETURN, 0, 0, 0x00050001), step(RETURN, 0, 0, 0x7FFF0000),
])
class Filter(ctypes.Structure):
    _fields_ = [("n", ctypes.c_ushort), ("steps", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
filter = Filter(len(program) // 8, program)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(filter)):
    raise SystemExit(77)
assert libc.syscall(158, 0x1023, 18) == -1 and ctypes.get_errno() == 1
"""
COMPUTE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from helpers import random_ids
from test_engine_levels import Engine, small_model
from gptfast.ops.backend import EXTENSION
info = EXTENSION.build_info()
logits = Engine(small_model(), "bf16").logits(random_ids(40, vocab_size=211).tolist())
print(info["isa"], info["matrix_engine"].replace(" ", "_"), logits.view(torch.int32).sum().item())
"""


@pytest.mark.skipif(sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8, reason="Linux")
def test_refused_tiles_are_a_fallback() -> None:
    here = Path(__file__).parent

    def run(before: str) -> tuple[str, str, str]:
        # -P: the kernels of PYTHONPATH, as this process has them, before those in this directory.
        command = [sys.executable, "-P", "-c", before + COMPUTE, str(here)]
        env = {**os.environ, "GPTFAST_ISA": ""}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode == 77:
            pytest.skip("this system has no seccomp")
        assert not done.returncode, done.stderr
        level, engine, bits = done.stdout.split()
        return level, engine, bits

    level, engine, bits = run("")
    denied_level, denied_engine, denied_bits = run(DENY)
    assert denied_bits == bits and denied_level != "amx"
    has_tiles = "amx_tile" in Path("/proc/cpuinfo").read_text()
    assert denied_engine == ("AMX,_refused_by_the_system" if has_tiles else "none")
    if engine == "AMX":
        assert level == "amx" and denied_level == "avx512_bf16"
