"""Token files of other integers than uint16: read as what they are, or refused; never misread."""

import gzip
import io
import json
import lzma
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptfast import get_tokenizer
from gptfast.data.sources import load_data, load_part
from gptfast.data.token_files import TokenFiles, read_index, write_tokens
from gptfast.data.token_layout import MIN_ZEROS, token_layout

BYTE = get_tokenizer("byte")
FILES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Each is read as what it is: text by GPT-2, bytes, characters, bases of DNA, Llama's ids.
VOCABULARIES = {"gpt2": 50257, "bytes": 257, "characters": 65, "bases": 4, "large": 128_000}


def ids_of(name: str, n: int = 3000, seed: int = 0) -> np.ndarray:
    """Return ids as a text has them: low ones often, high ones seldom, from all of a vocabulary."""
    V, rng = VOCABULARIES[name], np.random.default_rng(seed)
    ids = np.minimum(rng.pareto(0.5, n).astype(np.int64), V - 1)
    return np.where(rng.random(n) < 0.4, rng.integers(0, V, n), ids)


@pytest.mark.parametrize("n", [MIN_ZEROS, 100, 200_000])
@pytest.mark.parametrize("name", [name for name in VOCABULARIES if name != "large"])
@pytest.mark.parametrize("dtype", ["<u2", "<i2", "<i4", "<u4", "<i8", "<u8"])
def test_integers_of_every_width(dtype: str, name: str, n: int, tmp_path: Path) -> None:
    """nanoGPT's files, written by np.array(ids, dtype).tofile."""
    ids = ids_of(name, n)
    if dtype == "<i2":
        ids = ids % 32768
    ids.astype(dtype).tofile(tmp_path / "a.bin")
    files = TokenFiles(tmp_path / "a.bin")
    assert len(files) == n
    assert files.tensor().tolist() == ids.tolist()
    assert files[n // 2 :].tensor().tolist() == ids[n // 2 :].tolist()


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i8"])
def test_ids_beyond_16_bits(dtype: str, tmp_path: Path) -> None:
    ids = ids_of("large")
    assert ids.max() > 65535
    ids.astype(dtype).tofile(tmp_path / "a.bin")
    assert TokenFiles(tmp_path / "a.bin").tensor().tolist() == ids.tolist()


@FILES
@given(ids=st.lists(st.integers(0, 50256), min_size=40, max_size=200))
def test_uint16_stays_uint16(ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    np.array(ids, "<u2").tofile(path)
    try:
        found = TokenFiles(path).tensor().tolist()
    except ValueError as error:  # ids that nothing but other types have
        assert "a.bin" in str(error)
        swapped = [(i & 255) << 8 | i >> 8 for i in ids]
        few = [i for i in ids if i >> 8 > 127 or i & 255 > 127]
        assert max(swapped[::2]) < 16 or max(ids[1::2]) < 16 or len(few) <= 0.04 * len(ids)
    else:
        high_words = ids[1::2]
        assert found == ids or not any(high_words) or max(high_words) < 16


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (">i4", "big-endian integers of 32 bits"),
        (">i8", "big-endian integers of 64 bits"),
        ("<f4", "floating-point numbers of 32 bits"),
        ("<f8", "floating-point numbers of 64 bits"),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "bytes", "characters"])
def test_types_that_are_refused(dtype: str, message: str, name: str, tmp_path: Path) -> None:
    ids_of(name).astype(dtype).tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=f"a.bin has {message}; write its tokens as 16-bit"):
        TokenFiles(tmp_path / "a.bin")


def test_negative_ids(tmp_path: Path) -> None:
    for dtype, bits in (("<i4", 32), ("<i8", 64)):
        ids = ids_of("gpt2")
        ids[100:200] = -100  # what transformers pads labels with
        ids.astype(dtype).tofile(tmp_path / "a.bin")
        with pytest.raises(ValueError, match=f"a.bin has {bits}-bit tokens, one of them -100"):
            TokenFiles(tmp_path / "a.bin")


def test_a_wide_file_that_is_cut_off(tmp_path: Path) -> None:
    content = ids_of("gpt2").astype("<i4").tobytes()
    (tmp_path / "a.bin").write_bytes(content[:-2])
    with pytest.raises(ValueError, match="tokens of 32 bits and 11998 bytes, .* cut off"):
        TokenFiles(tmp_path / "a.bin")


@pytest.mark.parametrize("content", ["text", "characters"])
def test_8_bits(content: str, tmp_path: Path) -> None:
    """Text under a token file's name, and ids as np.uint8."""
    data = b"It is a text, and no tokens at all. " * 200
    if content == "characters":
        data = ids_of("characters").astype(np.uint8).tobytes()
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(ValueError, match="a.bin looks like text or like tokens of 8 bits"):
        TokenFiles(tmp_path / "a.bin")


@pytest.mark.parametrize("dtype", ["u1", "<i2", "<u2", ">u2", "<i4", ">i4", "<u4", "<i8", "<u8"])
@pytest.mark.parametrize("name", ["a.npy", "saved.bin"])
def test_numpy_arrays(name: str, dtype: str, tmp_path: Path) -> None:
    """An array says what it holds."""
    ids = ids_of("characters")
    with (tmp_path / name).open("wb") as file:
        np.save(file, ids.astype(dtype))
    files = TokenFiles(tmp_path / name)
    assert files.tensor().tolist() == ids.tolist()
    assert load_data([tmp_path / name], BYTE, (1.0,))[0].tensor().tolist() == ids.tolist()
    copied = pickle.loads(pickle.dumps(files[5:]))
    assert copied.tensor().tolist() == ids[5:].tolist()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(10.0), "has float64 values; tokens are integers"),
        (np.zeros(10, bool), "has bool values"),
        (np.arange(10).reshape(2, 5), r"has shape \(2, 5\); tokens are one sequence"),
        (np.array(["a"]), "has <U1 values"),
        (np.array([{}]), "cannot be read as a NumPy array"),
        (np.zeros((), int), "has shape"),
        (np.zeros(0, int), "is empty|cannot be read"),
    ],
    ids="float bool 2-d text objects scalar empty".split(),
)
def test_arrays_that_hold_no_tokens(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=f"a.npy {message}"):
        TokenFiles(tmp_path / "a.npy")


def test_damaged_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(1000))
    content = (tmp_path / "a.npy").read_bytes()
    for damaged in (
        content[:7],
        content[:40],
        content[:2000],
        content[:9] + b"\xff" + content[10:],
    ):
        (tmp_path / "a.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match="a.npy cannot be read as a NumPy array"):
            TokenFiles(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(b"\1\0\2\0" * 50)
    with pytest.raises(ValueError, match="a.npy is no NumPy array, as its name says"):
        TokenFiles(tmp_path / "a.npy")


def test_parts_as_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.arange(100))
    np.save(tmp_path / "val.npy", np.arange(50))
    assert [len(part) for part in load_data([tmp_path], BYTE)] == [100, 50]
    assert load_part([tmp_path], BYTE, "val").tensor().tolist() == list(range(50))
    write_tokens(tmp_path / "train.bin", range(100))
    with pytest.raises(ValueError, match="has tokens as .bin and as .npy, perhaps the same twice"):
        load_data([tmp_path], BYTE)


def test_files_of_several_types_are_one_sequence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was found out about a file is said, once for each type."""
    parts = {"a.bin": "<u2", "b.bin": "<i4", "c.bin": "<i4", "d.bin": "<i8"}
    for i, (name, dtype) in enumerate(parts.items()):
        ids_of("bytes", 100, i).astype(dtype).tofile(tmp_path / name)
    (source,) = load_data([tmp_path / "*.bin"], BYTE, (1.0,))
    wanted = np.concatenate([ids_of("bytes", 100, i) for i in range(4)])
    assert source.tensor().tolist() == wanted.tolist()
    said = [line for line in caplog.messages if "are read as" in line]
    assert sorted(said) == [
        f"{tmp_path / name}: its tokens are read as {dtype}, which its bytes are"
        for name, dtype in (("b.bin", "int32"), ("d.bin", "int64"))
    ]


def test_a_header_is_believed(tmp_path: Path) -> None:
    """A file of llm.c's form is uint16 whatever its tokens look like."""
    ids = [7, 0] * 100
    write_tokens(tmp_path / "a.bin", ids)
    assert TokenFiles(tmp_path / "a.bin").tensor().tolist() == ids
    assert token_layout(tmp_path / "a.bin").dtype == np.dtype("<u2")


@pytest.mark.parametrize("name", [name for name in VOCABULARIES if name != "large"])
@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i8", "<u8"])
@pytest.mark.parametrize("n", range(1, 16))
def test_short_files(n: int, dtype: str, name: str, tmp_path: Path) -> None:
    """A short file is read as what it is, or refused; never misread."""
    ids = 1 + ids_of(name, n) % 60000
    ids.astype(dtype).tofile(tmp_path / "a.bin")
    if np.dtype(dtype).itemsize == 8 and n >= 6:
        assert TokenFiles(tmp_path / "a.bin").tensor().tolist() == ids.tolist()
    else:
        bits = 8 * np.dtype(dtype).itemsize
        with pytest.raises(ValueError, match=f"too few to tell {n} tokens of {bits} bits .*npy"):
            TokenFiles(tmp_path / "a.bin")
    # The remedies help.
    np.save(tmp_path / "a.npy", ids.astype(dtype))
    assert TokenFiles(tmp_path / "a.npy").tensor().tolist() == ids.tolist()
    write_tokens(tmp_path / "a.bin", ids)
    assert TokenFiles(tmp_path / "a.bin").tensor().tolist() == ids.tolist()


@pytest.mark.parametrize("n", range(1, 16))
@pytest.mark.parametrize("low", [0, 20])
def test_short_files_of_16_bits(low: int, n: int, tmp_path: Path) -> None:
    ids = np.random.default_rng(n).integers(max(low, 1), 50257, n)
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    assert TokenFiles(tmp_path / "a.bin").tensor().tolist() == ids.tolist()
    np.array([0] * n, "<u2").tofile(tmp_path / "a.bin")
    assert TokenFiles(tmp_path / "a.bin").tensor().tolist() == [0] * n


def test_short_files_of_two_readings(tmp_path: Path) -> None:
    for n in range(1, MIN_ZEROS):
        np.array([1, 0] * n, "<u2").tofile(tmp_path / "a.bin")
        with pytest.raises(ValueError, match="too few to tell"):
            TokenFiles(tmp_path / "a.bin")
        np.array([1, 0] * n + [1], "<u2").tofile(tmp_path / "a.bin")
        assert len(TokenFiles(tmp_path / "a.bin")) == 2 * n + 1


def test_megatrons_index(tmp_path: Path) -> None:
    ids_of("gpt2").astype("<u2").tofile(tmp_path / "a.bin")
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\0\0" + bytes(100))
    with pytest.raises(ValueError, match="a.idx is Megatron's index"):
        read_index(tmp_path / "a.bin", 3000)


@pytest.mark.parametrize("made", ["named", "directory", "glob"])
def test_low_ids_only(made: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ids of characters under GPT-2's vocabulary: nothing says whose they are, so this is said."""
    gpt2 = get_tokenizer("gpt2")
    ids_of("characters", 5000).astype("<u2").tofile(tmp_path / "train.bin")
    path = {"named": "train.bin", "directory": "", "glob": "*.bin"}[made]
    load_data([tmp_path / path], gpt2)
    unknown, line = caplog.messages
    assert "do not say which tokenizer made them" in unknown
    assert "has no token above 64, but tokenizer gpt2 has 50257 tokens" in line
    assert "--tokenizer" in line
    caplog.clear()
    ids_of("gpt2", 5000).astype("<u2").tofile(tmp_path / "train.bin")
    load_data([tmp_path / path], gpt2)
    assert not any("has no token above" in message for message in caplog.messages)


@pytest.mark.parametrize("named", ["train.bin", "*.bin"])
def test_files_named_one_by_one_have_the_directorys_tokenizer(named: str, tmp_path: Path) -> None:
    meta: dict[str, Any] = {"format": 1, "tokenizer": "byte", "n_vocab": 257, "vocabulary": "byte"}
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "tokens": {"train": 3000}}))
    ids_of("bytes").astype("<u2").tofile(tmp_path / "train.bin")
    assert len(load_data([tmp_path / named], BYTE)) == 2
    with pytest.raises(ValueError, match="was prepared with tokenizer byte .*--tokenizer"):
        load_data([tmp_path / named], get_tokenizer("gpt2"))


@pytest.mark.parametrize("name", ["a.bin", "a.npy"])
@pytest.mark.parametrize("kind", ["npz", "gz", "xz"])
def test_packed_files_are_no_tokens(kind: str, name: str, tmp_path: Path) -> None:
    tokens, buffer = np.arange(999, dtype=np.uint16), io.BytesIO()
    np.savez(buffer, tokens)
    packed = {"gz": gzip.compress, "xz": lzma.compress}
    path = tmp_path / name
    path.write_bytes(packed[kind](tokens.tobytes()) if kind in packed else buffer.getvalue())
    with pytest.raises(ValueError, match=f"{name} is a compressed file, or an archive"):
        TokenFiles(path)
