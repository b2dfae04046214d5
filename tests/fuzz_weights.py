"""Load damaged files of every form: each must load or be refused with CheckpointError.

    make fuzz          # 100,000 mutated files; N=1000000 make fuzz sets another number

Files are mutated as bytes. A TensorFlow index and a safetensors header are also mutated before
their checksums and lengths are computed, so that the code behind those checks runs too.
test_hostile.py runs some mutations in CI.
"""

import argparse
import importlib.util
import io
import logging
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bundle import table, trailer, varint, write_openai

from gptfast import GPT, GPTConfig, get_tokenizer
from gptfast.weights.convert import save
from gptfast.weights.lazy_tensor import CheckpointError

SHARDED = Path(__file__).parent / "fixtures" / "openai_sharded"
SECONDS = 10  # the time limit for one file
EXTRA_BYTES = 2**31  # how much the address space of the process may grow


def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(11, 4, 1, 1, 8))


class Form:
    """A directory with a complete model, and the names of its files that are mutated."""

    def __init__(self, path: Path, load: Path, files: list[str]) -> None:
        self.path, self.load = path, load
        self.contents = {name: (path / name).read_bytes() for name in files}
        GPT.from_pretrained(load)


def forms(directory: Path) -> dict[str, Form]:
    """Return a model in each form that has a reader of its own."""
    model, made = tiny_model(), {}
    for name in ("openai", "hf", "shards", "llmc"):
        (directory / name).mkdir()
    write_openai(directory / "openai", model)
    data = "model.ckpt.data-00000-of-00001"
    files = ["model.ckpt.index", data, "hparams.json"]
    made["openai"] = Form(directory / "openai", directory / "openai", files)
    sharded = directory / "sharded"
    shutil.copytree(SHARDED, sharded)
    made["sharded"] = Form(sharded, sharded, ["model.ckpt.index", "hparams.json", "checkpoint"])
    model.save_pretrained(directory / "hf")
    made["hf"] = Form(directory / "hf", directory / "hf", ["model.safetensors", "config.json"])
    shards = directory / "shards"
    model.save_pretrained(shards)
    (shards / "model.safetensors").rename(shards / "a.safetensors")
    names = ",".join(f'"{n}":"a.safetensors"' for n in ["transformer.wte.weight"])
    (shards / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{names}}}}}')
    made["shards"] = Form(shards, shards, ["model.safetensors.index.json", "a.safetensors"])
    save(model.config, model.state_dict(), directory / "llmc" / "m.bin")
    made["llmc"] = Form(directory / "llmc", directory / "llmc" / "m.bin", ["m.bin"])
    content = {"model": model.state_dict(), "config": Namespace(n_head=1), "set": {1, "a"}}
    for name in ("zip", "legacy"):
        path = directory / name / f"{name}.pt"
        path.parent.mkdir()
        torch.save(content, path, _use_new_zipfile_serialization=name == "zip")
        made[name] = Form(path.parent, path, [path.name])
    if importlib.util.find_spec("gguf"):  # which writes it
        of_bytes = GPT(GPTConfig(257, 4, 1, 1, 8))
        (directory / "gguf").mkdir()
        path = directory / "gguf" / "m.gguf"
        save(of_bytes.config, of_bytes.state_dict(), path, tokenizer="byte")
        made["gguf"] = Form(path.parent, path, [path.name])
    return made


_NUMBERS = [0, 1, 2, 7, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
_WORDS = [
    b"0",
    b"-1",
    b"1e999",
    b"99999999999999999999",
    b"null",
    b'"',
    b"[",
    b"{",
    b"}",
    b"\\u0000",
]
_WORDS += [b"(", b")", b"l", b"}", b"R", b"b", b"s", b"u", b"a", b"0", b"2", b"h\x01", b"q\x02"]
_WORDS += [b"F64", b"BF16", b"I8", b"F8_E4M3", b"BOOL", b"U64", b"transformer.", b"h.0.", b"\xff"]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Make one to eight changes: flip bits, write numbers or words, cut or repeat parts."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        # Most changes are near the beginning, where the headers are.
        at = rng.randrange(min(len(out), rng.choice((16, 1200, len(out) + 1))) + 1)
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(_NUMBERS) % 2 ** (8 * size)
            out[at : at + size] = number.to_bytes(size, "little")
        elif kind == 2:
            out[at : at + rng.randrange(8)] = rng.choice(_WORDS)
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + rng.randrange(1, 64)]
        elif kind == 5:
            out[at:at] = out[at : at + rng.randrange(1, 200)]
        elif kind == 6:
            out[at:at] = rng.randbytes(rng.randrange(1, 16))
        else:
            out[at:at] = varint(rng.choice(_NUMBERS))
    return bytes(out)


def mutate_index(content: bytes, rng: random.Random) -> bytes:
    """Mutate the block of a TensorFlow index but keep its checksums and handles right."""
    payload = mutate(content[: _first_block(content)], rng)
    block = payload + trailer(payload)
    handle = varint(0) + varint(len(payload))
    rest = table([])  # the footer of an empty table is used
    index_payload = varint(0) + varint(1) + varint(len(handle)) + b"z" + handle
    index_payload += struct.pack("<II", 0, 1)
    if rng.random() < 0.2:
        index_payload = mutate(index_payload, rng)
    index = index_payload + trailer(index_payload)
    footer = varint(0) + varint(0) + varint(len(block)) + varint(len(index_payload))
    return block + index + footer.ljust(40, b"\0") + rest[-8:]


@cache
def _first_block(table_bytes: bytes) -> int:
    """Return the length of a table's first block: the one whose trailer is right."""
    for size in range(8, len(table_bytes) - 5):
        if table_bytes[size : size + 5] == trailer(table_bytes[:size]):
            return size
    raise AssertionError("no block")


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Mutate the header but keep its stated length right."""
    n = int.from_bytes(content[:8], "little")
    header = mutate(content[8 : 8 + n], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + n :]


def mutate_zip(content: bytes, rng: random.Random) -> bytes:
    """Mutate the pickle of torch.save's zip file but keep its checksums right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for record in old.infolist():
            part = old.read(record)
            is_pickle = record.filename.endswith("data.pkl")
            new.writestr(record.filename, mutate(part, rng) if is_pickle else part)
    return out.getvalue()


class Fuzzer:
    """Mutates one file at a time in its own directory."""

    def __init__(self, directory: Path) -> None:
        self.forms = forms(directory)
        self.names = list(self.forms)

    def one(self, seed: int) -> str:
        """Mutate the file that the seed selects; return whether it "loaded" or was "refused"."""
        rng = random.Random(seed)
        form = self.forms[self.names[seed % len(self.names)]]
        file = rng.choice(list(form.contents))
        change = mutate
        if rng.random() < 0.7 and file.endswith(".index"):
            change = mutate_index
        if rng.random() < 0.7 and file.endswith(".safetensors"):
            change = mutate_safetensors
        if rng.random() < 0.7 and file == "zip.pt":
            change = mutate_zip
        path = form.path / file
        path.write_bytes(change(form.contents[file], rng))
        try:
            model = GPT.from_pretrained(form.load)
            assert all(p.device.type == "cpu" for p in model.parameters())
            if model.tokenizer_name and form.load.suffix == ".gguf":
                read_vocabulary(model.tokenizer_name)
            return "loaded"
        except CheckpointError as error:
            assert str(error) and "\n" not in str(error)
            return "refused"
        finally:
            path.write_bytes(form.contents[file])


def read_vocabulary(name: str) -> None:
    """Read the vocabulary of a file: there is a tokenizer, or one line that says why not."""
    try:
        get_tokenizer(name)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


def limit_memory() -> None:
    """Limit the memory of the process, so that a file that takes more raises MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + EXTRA_BYTES, hard))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()  # what is assumed about files that load
    torch.set_num_threads(1)
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None

    def hang(*_: Any) -> None:
        raise TimeoutError(f"a file took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    counts: Counter[str] = Counter()
    slowest, start = 0.0, time.perf_counter()
    with tempfile.TemporaryDirectory(dir=shared) as directory:
        fuzzer = Fuzzer(Path(directory))
        limit_memory()
        for seed in range(args.seed, args.seed + args.n):
            signal.alarm(SECONDS)
            begin = time.perf_counter()
            try:
                counts[fuzzer.one(seed)] += 1
            except BaseException:
                print(f"seed {seed}: neither loaded nor refused", file=sys.stderr)
                raise
            slowest = max(slowest, time.perf_counter() - begin)
        signal.alarm(0)
    seconds = time.perf_counter() - start
    found = ", ".join(f"{n:,} {what}" for what, n in sorted(counts.items()))
    print(f"{args.n:,} files in {seconds:.0f} s: {found}; the slowest took {slowest * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
