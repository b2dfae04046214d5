"""Vocabularies of characters: nanoGPT's meta.pkl read without unpickling, trained on, generated."""

import json
import os
import pickle
import pickletools
import shlex
import shutil
import struct
import time
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SIZES, Capture, done, refused, run
from helpers import random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptfast import GPT, get_tokenizer
from gptfast.data.prepare import prepare
from gptfast.data.sources import load_data, prepared_tokenizer
from gptfast.inert import Inert
from gptfast.tokenizer.bpe import vocabulary
from gptfast.tokenizer.characters import (
    CharacterTokenizer,
    characters_json,
    read_characters,
    read_pickle,
)
from gptfast.weights import convert

TEXT = "The quick brown fox jumps over the lazy dog, then naps; é is in 'café'.\n" * 60
CHARACTERS = sorted(set(TEXT))
TINY = [*SIZES, "--batch-size", 4, "--sample-tokens", 4, "--device", "cpu", "--max-steps", 2]
KEYS = st.integers(1 - 2**60, 2**60 - 1)
PLAIN = st.recursive(
    st.text(max_size=5) | st.integers() | st.none() | st.booleans() | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | KEYS, inner, max_size=4)
        | st.tuples(inner)
        | st.tuples(inner, inner, inner, inner)
    ),
    max_leaves=15,
)


def meta_of(text: str) -> dict[str, Any]:
    """Return what nanoGPT's prepare.py writes for a text."""
    chars = sorted(set(text))
    itos = dict(enumerate(chars))
    return {"vocab_size": len(chars), "itos": itos, "stoi": {c: i for i, c in itos.items()}}


def write_nanogpt(directory: Path, text: str = TEXT, meta: Any = None) -> Path:
    """Write train.bin, val.bin and meta.pkl as nanoGPT does."""
    directory.mkdir()
    stoi = meta_of(text)["stoi"]
    ids = np.array([stoi[c] for c in text], np.uint16)
    ids[: len(ids) * 9 // 10].tofile(directory / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(directory / "val.bin")
    (directory / "meta.pkl").write_bytes(pickle.dumps(meta_of(text) if meta is None else meta))
    return directory


@settings(max_examples=150, deadline=None)
@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL), optimised=st.booleans())
def test_plain_pickles_are_read_as_pickle_does(value: Any, protocol: int, optimised: bool) -> None:
    content = pickle.dumps(value, protocol)
    assert read_pickle(pickletools.optimize(content) if optimised else content) == value


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_pickles(data: st.DataObject) -> None:
    """Anything but a value is a ValueError, and nothing takes long."""
    content = bytearray(pickle.dumps(meta_of(TEXT), data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    try:
        read_pickle(bytes(content))
    except ValueError:
        pass


class Harm:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("harmed",)


def shared_tuples(depth: int) -> bytes:
    """Return a pickle of a dictionary whose key is a tuple of tuples that share their parts."""
    body = b"K\1\x94" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(depth)
    )
    return b"\x80\4}" + body + b"K\1s."


# What people make with other tools than nanoGPT's prepare.py.
OTHER_TYPES = {
    "int64": lambda meta: meta | {"stoi": {c: np.int64(i) for c, i in meta["stoi"].items()}},
    "sizes": lambda meta: meta | {"vocab_size": np.int32(meta["vocab_size"])},
    "uint8": lambda meta: meta | {"itos": {np.uint8(i): c for i, c in meta["itos"].items()}},
    "str_": lambda meta: meta | {"stoi": {np.str_(c): i for c, i in meta["stoi"].items()}},
    "str_ both": lambda meta: meta | {"itos": [np.str_(c) for c in meta["itos"].values()]},
    "ordered": lambda meta: OrderedDict((k, OrderedDict(meta[k])) for k in ("stoi", "itos")),
    "defaultdict": lambda meta: meta | {"stoi": defaultdict(int, meta["stoi"])},
    "counter": lambda meta: meta | {"stoi": Counter(meta["stoi"])},
    "namespace": lambda meta: Namespace(**meta),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_vocabularies_of_other_types(kind: str, protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps(OTHER_TYPES[kind](meta_of(TEXT)), protocol)
    (tmp_path / "meta.pkl").write_bytes(content)
    tokenizer = read_characters(tmp_path / "meta.pkl")
    assert list(tokenizer.characters) == CHARACTERS
    assert {type(c) for c in tokenizer.characters} == {str}
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_number_of_another_byte_order_is_not_misread() -> None:
    content = pickle.dumps(np.int32(1), 2)
    assert read_pickle(content) == 1
    big = read_pickle(content.replace(b"X\1\0\0\0<", b"X\1\0\0\0>"))
    assert isinstance(big, Inert)


def test_an_object_in_its_place_is_named(tmp_path: Path) -> None:
    meta = meta_of(TEXT) | {"itos": np.array(CHARACTERS)}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match=r"its itos is an object, numpy.*write the file again"):
        read_characters(tmp_path / "meta.pkl")


HOSTILE = {
    "a call": pickle.dumps({"stoi": Harm()}),
    "a class": pickle.dumps({"stoi": OrderedDict(a=1)}),
    "a date of numpy's": pickle.dumps({"stoi": {"a": np.datetime64("2020-01-01")}}),
    "an array as ids": pickle.dumps({"stoi": np.arange(3)}),
    "a set": pickle.dumps({"stoi": {"a"}}),
    "a huge memo": b"\x80\4}r" + struct.pack("<I", 2**32 - 1) + b".",
    "a huge text": b"\x80\4\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "a huge bytearray": b"\x80\5\x96" + struct.pack("<Q", 2**40) + b"a.",
    "a huge number": b"\x80\2\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "long digits": b"L" + b"9" * 100_000 + b"L\n.",
    "marks": b"\x80\4" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "shared tuples": shared_tuples(200),
    "nothing": b"",
    "text": b"65 characters",
    "no end": pickle.dumps(meta_of(TEXT))[:-1],
    "an empty stack": b"\x80\4.",
    "a list in itself": b"\x80\4]\x94h\0a.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_unpickled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(HOSTILE[name])
    start = time.perf_counter()
    with pytest.raises(ValueError, match="meta.pkl is no vocabulary of characters: .*--tokenizer"):
        read_characters(tmp_path / "meta.pkl")
    assert not (tmp_path / "harmed").exists()
    # Far from what hashing, or searching anew for each mark, would take.
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stoi": None}, "it has no 'stoi'"),
        ({"stoi": {}}, "its 0 characters"),
        ({"vocab_size": 66}, "its vocab_size is 66, but stoi has 4 characters"),
        ({"itos": {0: "b", 1: "a", 2: "c", 3: "d"}}, "its itos and stoi contradict each other"),
        ({"stoi": {"a": 0, "b": 2}}, "are not 0 to 1, each once"),
        ({"stoi": {"a": 0, "b": 0}}, "are not 0 to 1, each once"),
        ({"stoi": {"the": 0}}, "stoi has 'the', which is not one character"),
        ({"stoi": {"a": "0"}}, "stoi has 'a': '0', not a character and its id"),
        ({"stoi": {1: 0}}, "stoi has 1: 0, not a character and its id"),
        ({"stoi": {"\ud800": 0}}, "not one character|is damaged"),
    ],
)
@pytest.mark.parametrize("file", ["meta.pkl", "characters.json"])
def test_other_vocabularies_are_refused(
    changes: dict[str, Any], message: str, file: str, tmp_path: Path
) -> None:
    meta = {**meta_of("abcd"), **changes}
    if file == "meta.pkl":
        (tmp_path / file).write_bytes(pickle.dumps(meta))
    elif "itos" in changes or 1 in (changes.get("stoi") or {}):
        pytest.skip("JSON has texts as keys only")
    else:
        (tmp_path / file).write_text(json.dumps({k: v for k, v in meta.items() if k != "itos"}))
    with pytest.raises(ValueError, match=f"{file} is no vocabulary of characters: .*{message}"):
        get_tokenizer(str(tmp_path))


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1), others=st.text(max_size=5))
def test_text_there_and_back(text: str, others: str) -> None:
    tokenizer = CharacterTokenizer("name", sorted(set(text)))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert ids == [meta_of(text)["stoi"][c] for c in text]
    assert max(ids) < tokenizer.n_vocab == len(set(text)) == tokenizer.eot
    if unknown := [c for c in others if c not in text]:
        with pytest.raises(ValueError, match="which is not one of the") as caught:
            tokenizer.encode(text + others)
        assert repr(unknown[0]) in str(caught.value)
    with pytest.raises(IndexError, match="out of range"):
        tokenizer.decode([tokenizer.n_vocab])


def test_both_files_are_the_same_vocabulary(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "meta.pkl").write_bytes(pickle.dumps(meta_of(TEXT)))
    a = get_tokenizer(str(tmp_path / "a"))
    assert isinstance(a, CharacterTokenizer) and a.name == str(tmp_path / "a")
    (tmp_path / "b" / "characters.json").write_text(characters_json(a))
    (tmp_path / "c" / "meta.pkl").write_bytes(pickle.dumps(meta_of(TEXT[:9])))
    b, c = (get_tokenizer(str(tmp_path / name)) for name in "bc")
    assert vocabulary(a) == vocabulary(b) != vocabulary(c)


@pytest.mark.parametrize("named", ["directory", "files", "glob"])
def test_meta_pkl_beside_tokens(named: str, tmp_path: Path) -> None:
    data = write_nanogpt(tmp_path / "data")
    paths = {"directory": [data], "files": [data / "train.bin"], "glob": [data / "*.bin"]}[named]
    name = prepared_tokenizer(paths)
    assert name == str(data)
    tokenizer = get_tokenizer(name)
    assert tokenizer.decode(load_data(paths, tokenizer)[0].tensor().tolist()) in TEXT
    for other in ("byte", "gpt2"):
        with pytest.raises(ValueError, match=rf"{data} was prepared with .*not {other} .*--tokeni"):
            load_data(paths, get_tokenizer(other))


def test_trained_and_used(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has as many tokens as there are characters, and the run keeps them."""
    monkeypatch.chdir(tmp_path)
    write_nanogpt(tmp_path / "data")
    done(capsys, "train", "--data", "data", "--out", "run", *TINY)
    assert GPT.from_pretrained("run").config.vocab_size == len(CHARACTERS) < 65
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    (tmp_path / "run").rename(tmp_path / "moved")
    out = done(capsys, "generate", "moved", "--prompt", "The ", "--max-new-tokens", 8)
    assert out.startswith("The ") and set(out.strip("\n")) <= set(CHARACTERS)
    refused(run(capsys, "generate", "moved", "--prompt", "Ω"), "'Ω' at 0", "not one of the")
    assert "bits per byte" in done(capsys, "eval", "moved", "--data", "elsewhere")
    more = ["--out", "moved", "--resume", "--max-steps", 3]
    refused(run(capsys, "train", *more), "has moved, name it (--data)", str(tmp_path / "data"))
    assert "resumed from" in done(capsys, "train", *more, "--data", "elsewhere")
    assert {path.name for path in Path("moved/tokenizer").iterdir()} == {"characters.json"}


@pytest.mark.parametrize("more", [[], ["--dtype", "int8"]], ids=["transformers", "packed"])
def test_a_model_made_of_a_run_keeps_its_characters(
    more: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_nanogpt(tmp_path / "data")
    trained = done(capsys, "train", "--data", "data", "--out", "run", *TINY, "--sample-prompt", "T")
    assert "gptfast generate run --prompt T " in trained
    done(capsys, "convert", "run", "model", *more)
    args = ["--prompt", "The", "--max-new-tokens", 3, "--seed", 1]
    out = done(capsys, "generate", "run", *(more or ["--dtype", "fp32"]), *args)
    shutil.copytree(next(Path("run/checkpoints").glob("step-*")), "checkpoint")
    shutil.rmtree("run")
    shutil.rmtree("data")
    Path("model").rename("moved")
    assert done(capsys, "generate", "moved", *args) == out
    if not more:
        # No id of the model is end-of-text, which characters do not have.
        assert json.loads(Path("moved/config.json").read_text())["eos_token_id"] is None
        assert done(capsys, "generate", "checkpoint", *args) == out


def test_the_last_hint_can_be_typed(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default prompt has letters that the data lacks; the hint has none of them."""
    monkeypatch.chdir(tmp_path)
    write_nanogpt(tmp_path / "dna", "ACGT\n" * 300)
    out = done(capsys, "train", "--data", "dna", "--out", "run", *TINY)
    prompt = shlex.split(out.splitlines()[-1])[4]
    assert prompt and set(prompt) <= set("ACGT\n")


def test_nanogpts_checkpoint_beside_meta_pkl(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_nanogpt(tmp_path / "data")
    model = random_model(vocab_size=len(CHARACTERS))
    convert.save(model.config, model.state_dict(), "ckpt.pt")
    result = run(capsys, "generate", "ckpt.pt", "--prompt", "The", "--max-new-tokens", 3)
    refused(result, "--tokenizer")
    args = ["--prompt", "The", "--max-new-tokens", 3, "--seed", 1]
    out = done(capsys, "generate", "ckpt.pt", "--tokenizer", "data", *args)
    (tmp_path / "meta.pkl").write_bytes((tmp_path / "data" / "meta.pkl").read_bytes())
    assert done(capsys, "generate", "ckpt.pt", *args) == out


def test_another_vocabulary_in_the_run(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_nanogpt(tmp_path / "data")
    write_nanogpt(tmp_path / "other", "ACGT\n" * 300)
    done(capsys, "train", "--data", "data", "--out", "run", *TINY)
    before = Path("run/tokenizer/characters.json").read_text()
    result = run(capsys, "train", "--data", "other", "--out", "run", *TINY)
    refused(result, "another vocabulary than the data", "choose another --out")
    assert Path("run/tokenizer/characters.json").read_text() == before
    # Samples begin with what the vocabulary has: no letter of the default prompt.
    out = done(capsys, "train", "--data", "other", "--out", "dna", *TINY)
    assert "sample: " in out
    # A sample that cannot be written is no reason to lose a run, and its line says why.
    out = done(capsys, "train", "--data", "other", "--out", "x", *TINY, "--sample-prompt", "Hi")
    assert "'H' at 0" in out


def test_characters_have_no_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 50)
    (tmp_path / "b.txt").write_text("cab " * 50)
    tokenizer = CharacterTokenizer("abc", sorted("abc "))
    assert prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer)["tokens"]["train"] == 180
    with pytest.raises(ValueError, match="abc has no end-of-text, .* give one text, or another"):
        prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out2", tokenizer)
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match="abc has no end-of-text"):
        load_data([tmp_path / "c.jsonl"], tokenizer)
