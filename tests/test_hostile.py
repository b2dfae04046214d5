"""Malicious files: no pickle is ever executed, whatever its name, and each of many mutated files
gives a model or CheckpointError."""

import contextlib
import functools
import importlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle import block, entry, field, masked, table, varint
from fuzz_weights import Fuzzer
from helpers import (
    random_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import numpy_generator

from gptfast import GPT, AdamW, get_tokenizer
from gptfast.evaluate.hellaswag import hellaswag
from gptfast.training.checkpoint import load_checkpoint, save_checkpoint
from gptfast.weights.lazy_tensor import CheckpointError
from gptfast.weights.tensor_bundle import read_bundle

FIXTURE = Path(__file__).parent / "fixtures" / "openai"


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def plain_pickle(marker: Path) -> bytes:
    return pickle.dumps({"wte.weight": Hostile(marker)})


def torch_file(marker: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"wte.weight": Hostile(marker), "model": Hostile(marker)}, out)
    return out.getvalue()


def legacy_file(marker: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"x": Hostile(marker)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def behind_the_state(marker: Path) -> bytes:
    """Complete weights with a pickle in the place of nanoGPT's settings."""
    out = io.BytesIO()
    state = {f"transformer.{k}": v for k, v in random_model().state_dict().items()}
    torch.save({"model": state, "model_args": {}, "config": Hostile(marker)}, out)
    return out.getvalue()


def as_npy(marker: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Hostile(marker)], object), allow_pickle=True)
    return out.getvalue()


KINDS = [plain_pickle, torch_file, legacy_file, behind_the_state, as_npy]


def test_these_pickles_do_harm(tmp_path: Path) -> None:
    """Unpickling any of these makes its file, so a missing file proves that nothing was run."""
    for i, kind in enumerate(KINDS):
        marker = tmp_path / f"marker{i}"
        content = io.BytesIO(kind(marker))
        if kind is plain_pickle:
            pickle.load(content)
        elif kind is as_npy:
            np.load(content, allow_pickle=True)
        else:
            torch.load(content, weights_only=False)
        assert marker.exists()


def model_directory(path: Path) -> Path:
    random_model().save_pretrained(path)
    return path


def sharded_directory(path: Path) -> Path:
    model_directory(path)
    (path / "model.safetensors").rename(path / "part.safetensors")
    shutil.copy(path / "part.safetensors", path / "part.bin")
    for stem, part in (
        ("model.safetensors", "part.safetensors"),
        ("pytorch_model.bin", "part.bin"),
    ):
        index = {"weight_map": {"transformer.wte.weight": part}}
        (path / f"{stem}.index.json").write_text(json.dumps(index))
    return path


def openai_directory(path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, path))


def empty_directory(path: Path) -> Path:
    path.mkdir()
    return path


def only_pickles(path: Path) -> Path:
    model_directory(path)
    (path / "model.safetensors").unlink()
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("make", "file"),
    [
        (model_directory, "model.safetensors"),
        (model_directory, "config.json"),
        (only_pickles, "pytorch_model.bin"),
        (sharded_directory, "part.safetensors"),
        (sharded_directory, "model.safetensors.index.json"),
        (openai_directory, "hparams.json"),
        (openai_directory, "model.ckpt.index"),
        (openai_directory, "model.ckpt.data-00000-of-00001"),
        (empty_directory, "ckpt.pt"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_no_pickle_is_executed_in_a_directory(
    kind: Callable[[Path], bytes], make: Callable[[Path], Path], file: str, tmp_path: Path
) -> None:
    path, marker = make(tmp_path / "model"), tmp_path / "marker"
    (path / file).write_bytes(kind(marker))
    with pytest.raises(CheckpointError):
        GPT.from_pretrained(path)
    assert not marker.exists()


def test_no_pickle_is_executed_in_a_shard(tmp_path: Path) -> None:
    path, marker = sharded_directory(tmp_path / "model"), tmp_path / "marker"
    (path / "model.safetensors.index.json").unlink()
    (path / "part.bin").write_bytes(torch_file(marker))
    with pytest.raises(CheckpointError, match="part.bin was not read: it asks for"):
        GPT.from_pretrained(path)
    assert not marker.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["m.pth", "m.pt", "m.bin", "m.safetensors", "m.npz", "m"])
def test_no_pickle_is_executed_as_a_file(
    kind: Callable[[Path], bytes], name: str, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / name).write_bytes(kind(marker))
    with pytest.raises(CheckpointError):
        GPT.from_pretrained(tmp_path / name)
    assert not marker.exists()


def test_no_pickle_is_executed_in_a_checkpoint(tmp_path: Path) -> None:
    model, marker = random_model(), tmp_path / "marker"
    optimizer = AdamW(model.parameters())
    for file in ("optimizer.safetensors", "state.json", "model.safetensors", "config.json"):
        path = save_checkpoint(tmp_path / file, model, optimizer, {"step": 1}, keep=1)
        (path / file).write_bytes(torch_file(marker))
        with pytest.raises(CheckpointError):
            load_checkpoint(path, model, optimizer)
    assert not marker.exists()


def test_no_pickle_is_executed_as_vocabulary_or_data(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for names in (["vocab.bpe", "encoder.json"], ["merges.txt", "vocab.json"], ["tokenizer.json"]):
        directory = tmp_path / names[0]
        directory.mkdir()
        for name in names:
            (directory / name).write_bytes(plain_pickle(marker))
        with pytest.raises(ValueError):
            get_tokenizer(str(directory))
    (tmp_path / "tasks.jsonl").write_bytes(plain_pickle(marker))
    with pytest.raises(ValueError):
        hellaswag(random_model(), get_tokenizer("byte"), tmp_path / "tasks.jsonl")
    assert not marker.exists()


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


@given(st.integers(0, 2**32))
@settings(max_examples=2000, deadline=2000)
def test_mutated_files(fuzzer: Fuzzer, seed: int) -> None:
    """`make fuzz` does the same with many more files and limited memory."""
    assert fuzzer.one(seed) in ("loaded", "refused")


# A mutation hardly ever makes this: an index with right checksums and wrong sizes.


def bundle_of(tmp_path: Path, entries: list[tuple[bytes, bytes]]) -> Path:
    (tmp_path / "m.index").write_bytes(table([(b"", field(1, 1)), *entries]))
    (tmp_path / "m.data-00000-of-00001").write_bytes(bytes(64))
    return tmp_path / "m"


ARRAY = np.zeros(16, "f4")
LYING = {
    "far offset": (entry(ARRAY, 2**62), "truncated"),
    "huge shape": (
        field(1, 1) + field(2, field(2, field(1, 2**40))) + field(5, 2**42),
        "truncated",
    ),
    "overflowing shape": (
        field(1, 1) + field(2, field(2, field(1, 2**40)) * 200) + field(5, 64),
        "cannot have 64 bytes",
    ),
    "many dimensions": (field(1, 1) + field(2, field(2, b"") * 300), "more than 254 dimensions"),
    "other size": (entry(ARRAY, 0)[:-5] + field(5, 60), "cannot have 60 bytes"),
    "a shard that is not there": (entry(ARRAY, 0, shard=7), "cannot read .*data-00007-of-00001"),
    "slices": (entry(ARRAY, 0) + field(7, b""), "is saved in slices"),
    "wrong wire type": (field(1, b"\1"), "has the wrong type"),
    "group": (varint(1 << 3 | 3), "a field has the unknown kind 3"),
    "long number": (varint(1 << 3) + b"\xff" * 11, "more than ten bytes"),
}


@pytest.mark.parametrize("what", LYING)
def test_an_index_that_lies(what: str, tmp_path: Path) -> None:
    value, message = LYING[what]
    with pytest.raises(CheckpointError, match=message):
        stored = read_bundle(bundle_of(tmp_path, [(b"x", value)]))
        stored["x"].load()


def test_an_index_that_would_grow(tmp_path: Path) -> None:
    """A small file that unpacks to a large one (repeated blocks, names from names) is refused."""
    prefix = bundle_of(tmp_path, [])
    first = block([(b"", field(1, 1)), (b"k" * 900, b"")])
    again = block([(bytes([i]), varint(0) + varint(len(first) - 5)) for i in range(200)], 1)
    content = first + again
    footer = (varint(0) * 2 + varint(len(first)) + varint(len(again) - 5)).ljust(40, b"\0")
    (tmp_path / "m.index").write_bytes(
        content + footer + (0xDB4775248B80FB57).to_bytes(8, "little")
    )
    with pytest.raises(CheckpointError, match="its blocks overlap"):
        read_bundle(prefix)
    bundle_of(tmp_path, [(b"k" * 2000, b"")])
    with pytest.raises(CheckpointError, match="a name has 2000 bytes"):
        read_bundle(prefix)
    with (tmp_path / "m.index").open("r+b") as file:
        file.truncate(2**27)
    with pytest.raises(CheckpointError, match="it has 134217728 bytes"):
        read_bundle(prefix)


def test_a_compressed_or_big_endian_index(tmp_path: Path) -> None:
    prefix = bundle_of(tmp_path, [(b"x", entry(ARRAY, 0))])
    assert read_bundle(prefix)["x"].load().equal(torch.zeros(16))
    content = (tmp_path / "m.index").read_bytes()
    part = block([(b"", field(1, 1)), (b"x", entry(ARRAY, 0))])
    compressed = part[:-5] + b"\1" + masked(part[:-5] + b"\1").to_bytes(4, "little")
    assert content.startswith(part)
    (tmp_path / "m.index").write_bytes(compressed + content[len(part) :])
    with pytest.raises(CheckpointError, match="blocks are compressed"):
        read_bundle(prefix)
    (tmp_path / "m.index").write_bytes(table([(b"", field(1, 1) + field(2, 1))]))
    with pytest.raises(CheckpointError, match="big-endian"):
        read_bundle(prefix)


@pytest.mark.parametrize("n", [1, 100])
def test_many_blocks(n: int, tmp_path: Path) -> None:
    """An index may have one entry per block, as large models do, or all entries in one block."""
    rng = numpy_generator(0)
    from bundle import write

    arrays = {f"a/{i:03}": rng.standard_normal((3, i)).astype("f4") for i in range(60)}
    arrays["half"] = rng.standard_normal(7).astype("f2")
    arrays["step"] = np.array(5)
    write(tmp_path / "m", arrays, per_block=n)
    stored = read_bundle(tmp_path / "m")
    assert set(stored) == arrays.keys() - {"step"}
    assert all(np.array_equal(stored[k].load().numpy(), arrays[k]) for k in stored)


def test_tensors_that_are_not_plain(tmp_path: Path) -> None:
    """A tensor that claims more than is stored of it is refused, and so is a sparse one."""
    state = {k: v for k, v in random_model().state_dict().items()}
    for odd in (torch.zeros(1).expand(10**6, 10**6), torch.eye(3).to_sparse()):
        torch.save({**state, "wte.weight": odd}, tmp_path / "m.pth")
        with pytest.raises(CheckpointError, match="not dense|was not read"):
            GPT.from_pretrained(tmp_path / "m.pth")


def test_a_zip_file_that_is_none_of_torchs(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as file:
        file.writestr("archive/data.pkl", b"not a pickle")
    with pytest.raises(CheckpointError, match="is damaged, or torch.save did not write it"):
        GPT.from_pretrained(tmp_path / "m.pth")


def zipped_pickle(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3")
        file.writestr("archive/byteorder", "little")
    return path


class Large:
    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (2**36,)


def test_small_files_that_ask_for_much(tmp_path: Path) -> None:
    """Missing data is noticed before anything is allocated, inflated or built."""
    asking = zipped_pickle(tmp_path / "a.pth", pickle.dumps({"a": Large()}, 2))
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        GPT.from_pretrained(asking)
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"a": Large()}, 2))
    with pytest.raises(CheckpointError, match="a pickle, but not one of torch.save"):
        GPT.from_pretrained(tmp_path / "b.pth")
    bomb = zipped_pickle(tmp_path / "c.pth", bytes(10**7), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="it is compressed"):
        GPT.from_pretrained(bomb)
    one = torch.zeros(10**5)
    torch.save({f"h.{i}.ln_1.weight": one for i in range(100)}, tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match="its tensors need more bytes than it has"):
        GPT.from_pretrained(tmp_path / "d.pth")


def test_many_missing_layers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"wte.weight": torch.zeros(1, 1), "wpe.weight": torch.zeros(1, 1)}
    tensors |= {f"h.{i}.ln_1.weight": torch.zeros(1) for i in (0, 9999)}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="no tensor 'h.0.attn.c_attn.weight'"):
        GPT.from_pretrained(tmp_path / "m.safetensors", n_head=1)


def test_an_index_of_many_entries(tmp_path: Path) -> None:
    prefix = bundle_of(tmp_path, [(f"{i:06}".encode(), b"") for i in range(21_000)])
    with pytest.raises(CheckpointError, match="more than 20000 entries"):
        read_bundle(prefix)


@pytest.mark.parametrize(
    "name",
    ["a" * 5000, "", "a\0b", "a\ud800", "gpt3", "."],
    ids=["long", "", "nul", "lone", "gpt3", "."],
)
def test_names_of_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        GPT.from_pretrained(name)


@pytest.mark.parametrize("named", ["a" * 5000, "/", "..", "/../", "x/y"], ids=lambda x: x[:5])
def test_names_in_files(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = openai_directory(tmp_path / "model")
    (path / "checkpoint").write_text(f'model_checkpoint_path: "{named}"\n')
    shutil.copy(path / "model.ckpt.index", path / "other.index")
    monkeypatch.chdir(path)
    with pytest.raises(CheckpointError):
        GPT.from_pretrained(".")
    sharded = sharded_directory(tmp_path / "sharded")
    index = {"weight_map": {"transformer.wte.weight": named}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        GPT.from_pretrained(sharded)


def test_a_pipe_in_the_place_of_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match="it is not a file"):
        GPT.from_pretrained(tmp_path / "m.bin")


@pytest.mark.parametrize("sums", [{}, None, [], {"config.json": 1}], ids=str)
def test_a_state_that_names_no_sums(sums: Any, tmp_path: Path) -> None:
    from gptfast.files import json_text
    from gptfast.weights.checkpoint import digest

    path = save_checkpoint(tmp_path, random_model(), None, {"step": 1}, keep=1)
    state = json.loads((path / "state.json").read_text()) | {"sha256": sums}
    state["digest"] = digest(state)
    (path / "state.json").write_text(json_text(state))
    with pytest.raises(CheckpointError, match="state.json is damaged: it has no SHA-256"):
        GPT.from_pretrained(path)


# Pickles are read as data


def saved_state() -> dict[str, Any]:
    return {f"transformer.{name}": t for name, t in random_model(n_embd=64).state_dict().items()}


class Called:
    """Unpickled, it calls a function with these arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


@pytest.mark.parametrize(
    "function",
    [eval, exec, os.system, os.remove, subprocess.Popen, subprocess.run, importlib.import_module],
    ids=lambda function: function.__name__,
)
def test_a_pickle_that_asks_for_harm_is_refused(function: Any, tmp_path: Path) -> None:
    torch.save({"model": saved_state(), "x": Called(function, "1/0")}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="was not read: it asks for .*, which no model needs"):
        GPT.from_pretrained(tmp_path / "m.pt")


def test_no_class_of_a_file_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are read although the module of a class beside them does harm when imported."""
    marker = tmp_path / "marker"
    (tmp_path / "harmless_name.py").write_text("class Config: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("harmless_name")
    torch.save({"model": saved_state(), "config": module.Config()}, tmp_path / "m.pt")
    monkeypatch.delitem(sys.modules, "harmless_name")
    (tmp_path / "harmless_name.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    assert GPT.from_pretrained(tmp_path / "m.pt").config.n_layer == 2
    assert "harmless_name" not in sys.modules and not marker.exists()


def test_calls_that_no_list_foresees_are_not_made(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    calls = (
        Called(Path.touch, marker),
        Called(marker.touch),
        Called(functools.partial(marker.write_text, "x")),
        Called(shutil.copy, __file__, marker),
        Called(getattr, marker, "touch"),
        Called(torch.load, str(marker)),
        Called(io.open, marker, "w"),
    )
    for i, call in enumerate(calls):
        torch.save({"model": saved_state(), "x": call}, tmp_path / f"{i}.pt")
        with contextlib.suppress(CheckpointError):
            GPT.from_pretrained(tmp_path / f"{i}.pt")
    assert not marker.exists()


def with_opcodes(path: Path, opcodes: bytes) -> Path:
    """Write weights whose pickle has these opcodes, which must leave one value, as {"config": .}"""
    torch.save({"model": saved_state(), "config": "HERE"}, path)
    with zipfile.ZipFile(path) as old:
        parts = {record.filename: old.read(record) for record in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, part in parts.items():
            new.writestr(name, part.replace(b"X\x04\x00\x00\x00HERE", opcodes))
    return path


NESTED = {
    "doubled tuples": b")" + b"2\x86" * 60,
    "doubled lists": b"]" + b"q\xf0](h\xf0h\xf0e" * 60,
    "deep lists": b"]" * 5000 + b"a" * 4999,
    "a list in itself": b"]q\xf0h\xf0a",
    "a dictionary in itself": b"}q\xf0X\x01\x00\x00\x00ah\xf0s",
    "a doubled tuple as a key": b"})" + b"2\x86" * 60 + b"Ns",
    "a list as a key": b"}]Ns",
    "integers of one hash": b"}" + b"\x8a\x10" + (2**61 - 1 << 60).to_bytes(16, "little") + b"Ns",
    "a far memo": b"Nr\xff\xff\xff\xff",
    "a state for a number": b"K\x01}b",
    "a call of a number": b"K\x01)R",
    "too few items": b"\x87",
    "no mark": b"e",
    "a registered extension": b"\x82\x01",
    "large bytes": b"\x96\xff\xff\xff\xff\xff\x00\x00\x00",
    "a large unicode": b"\x8d\xff\xff\xff\xff\xff\x00\x00\x00",
}


@pytest.mark.parametrize("kind", NESTED)
def test_pickles_that_would_grow_or_hang(kind: str, tmp_path: Path) -> None:
    """A pickle of some bytes is read or refused at once, whatever its values would unfold to."""
    path = with_opcodes(tmp_path / "m.pt", NESTED[kind])
    start = time.process_time()
    with contextlib.suppress(CheckpointError):
        GPT.from_pretrained(path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
def test_a_pickle_whose_tensors_lie_outside_its_file(legacy: bool, tmp_path: Path) -> None:
    state = saved_state()
    path = tmp_path / "m.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    name = b"transformer.wpe.weight"
    number = content.index(b"M\x00\x04", content.index(name))  # 16 x 64 elements, as BININT2
    path.write_bytes(content[:number] + b"M\xff\xff" + content[number + 3 :])
    with pytest.raises(CheckpointError, match="is damaged|not dense"):
        GPT.from_pretrained(path)
