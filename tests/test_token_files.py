"""Test token files: layouts byte by byte, views against lists, 2^31 tokens, damaged files."""

import copy
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptfast.data.loader import Windows, create_dataloader
from gptfast.data.shards import ShardWriter, truncate_shards
from gptfast.data.token_files import Documents, TokenFiles, index_path, open_tokens, write_tokens
from gptfast.data.tokens import fingerprint

FILES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
IDS = st.lists(st.integers(0, 65535), min_size=1, max_size=40)


def llm_c(tokens: Sequence[int], count: int | None = None, version: int = 1) -> bytes:
    """Write a file by hand in the layout of llm.c's data scripts."""
    header = np.zeros(256, dtype=np.int32)
    header[0], header[1] = 20240520, version
    header[2] = len(tokens) if count is None else count
    return header.astype("<i4").tobytes() + np.array(tokens, dtype="<u2").tobytes()


def nanogpt(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, dtype="<u2").tobytes()


def shards(directory: Path, parts: Sequence[Sequence[int]]) -> list[Path]:
    """Write one file for each part, in llm.c's and nanoGPT's layout by turns.

    A few 16-bit ids without a header may be wider ones, unless their number is odd.
    """
    paths = []
    for i, part in enumerate(parts):
        path = directory / f"part{i}.bin"
        path.write_bytes(nanogpt(part) if i % 2 and len(part) % 2 else llm_c(part))
        paths.append(path)
    return paths


def write_documents(
    directory: Path, documents: Sequence[tuple[list[int], list[int]]], shard_tokens: int
) -> list[Path]:
    with ShardWriter(directory, "train", shard_tokens) as writer:
        for prompt, completion in documents:
            writer.write_document(np.array(prompt + completion), len(prompt))
    return writer.paths


@pytest.mark.parametrize("layout", [llm_c, nanogpt])
def test_reads_both_layouts(layout: object, tmp_path: Path) -> None:
    tokens = [50256, 0, 65535, 7, 308]
    path = tmp_path / "a.bin"
    path.write_bytes(layout(tokens))
    assert TokenFiles(path).tensor().tolist() == tokens


def test_writes_llm_cs_layout(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", [1, 2, 65535])
    assert (tmp_path / "a.bin").read_bytes() == llm_c([1, 2, 65535])


@FILES
@given(parts=st.lists(IDS, min_size=1, max_size=4), data=st.data())
def test_views_are_slices(parts: list[list[int]], data: st.DataObject, tmp_path: Path) -> None:
    files, wanted = TokenFiles(shards(tmp_path, parts)), sum(parts, [])
    places = [
        (path, i) for path, part in zip(files.paths, parts, strict=True) for i in range(len(part))
    ]
    for _ in range(3):
        edge = st.none() | st.integers(-len(wanted) - 2, len(wanted) + 2)
        part = slice(data.draw(edge), data.draw(edge))
        files, wanted, places = files[part], wanted[part], places[part]
        assert len(files) == len(wanted)
        assert files.tensor().tolist() == wanted
        assert [files.locate(i) for i in range(len(files))] == places
        assert pickle.loads(pickle.dumps(files)).tensor().tolist() == wanted
        assert copy.deepcopy(files).tensor().tolist() == wanted


def test_pickled_by_path(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", np.arange(50_000))
    assert len(pickle.dumps(TokenFiles(tmp_path / "a.bin"))) < 500


def test_indexing_is_by_slices_of_step_one(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", [1, 2, 3])
    files = TokenFiles(tmp_path / "a.bin")
    with pytest.raises(TypeError, match=r"sliced, tokens\[a:b\], got \[1\]"):
        files[1]
    with pytest.raises(ValueError, match="steps of 1, got 2"):
        files[::2]
    with pytest.raises(IndexError, match="token 3 is out of range for 3"):
        files.locate(3)
    documents = Documents.open(write_documents(tmp_path, [([1], [2])] * 3, 10))
    with pytest.raises(TypeError, match=r"sliced, documents\[a:b\], got \[1\]"):
        documents[1]
    with pytest.raises(ValueError, match="steps of 1, got -1"):
        documents[::-1]


@FILES
@given(content=st.binary(max_size=60) | st.binary(max_size=12).map(lambda b: llm_c([])[:4] + b))
def test_random_bytes_are_tokens_or_a_value_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "random.bin"
    path.write_bytes(content)
    try:
        files = TokenFiles(path)
    except ValueError as error:
        assert "random.bin" in str(error)
    else:
        assert files.tensor().tolist() == np.frombuffer(content, "<u2").tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.bin is empty; write it again"),
        (llm_c([]), "a.bin is empty: its header says 0 tokens"),
        (b"\1\2\3", "a.bin has 3 bytes, an odd number"),
        (llm_c([1, 2, 3])[:-2], "1028 bytes, but its header says 3 tokens, 1030 bytes: it is cut"),
        (llm_c([1, 2, 3]) + b"\0\0", "1032 bytes, but its header says 3 tokens, 1030 bytes"),
        (llm_c([1], count=-1), "its header says -1 tokens"),
        (llm_c([1, 2])[:500], "500 bytes, but its header says 2 tokens"),
        (llm_c([1], version=2), "a.bin has version 2 of llm.c's header; only 1 can be read"),
        (np.array([20240801, 7, 1, 5], "<i4").tobytes(), "Llama 3's 32-bit tokens"),
    ],
    ids="empty no-tokens odd cut trailing negative header-cut version llama".split(),
)
def test_bad_token_files(content: bytes, message: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.bin", tmp_path / "a.bin"
    write_tokens(good, [1, 2])
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TokenFiles([good, bad])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read .*none.bin: No such file"):
        TokenFiles(tmp_path / "none.bin")
    with pytest.raises(ValueError, match="cannot read .*: Is a directory"):
        TokenFiles(tmp_path)
    with pytest.raises(ValueError, match="no token files given"):
        TokenFiles([])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "1 to 2147483647 tokens, got 0"), ([65536], "token 65536"), ([3, -1], "token -1")],
    ids=["none", "large", "negative"],
)
def test_refuses_to_write(tokens: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_tokens(tmp_path / "a.bin", tokens)
    assert not (tmp_path / "a.bin").exists()


@FILES
@given(blocks=st.lists(IDS, min_size=1, max_size=5), shard_tokens=st.integers(1, 50))
def test_shards_hold_what_was_written(
    blocks: list[list[int]], shard_tokens: int, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path, "train", shard_tokens) as writer:
        for block in blocks:
            writer.write(np.array(block))
    wanted = sum(blocks, [])
    assert TokenFiles(writer.paths).tensor().tolist() == wanted
    assert writer.tokens == len(wanted)
    cut = [wanted[i : i + shard_tokens] for i in range(0, len(wanted), shard_tokens)]
    assert [path.read_bytes() for path in writer.paths] == [llm_c(part) for part in cut]
    assert [path.name for path in writer.paths] == [f"train_{i:06d}.bin" for i in range(len(cut))]


DOCUMENTS = st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=6), IDS), min_size=1)


@FILES
@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 60), data=st.data())
def test_documents_come_back_whole(
    documents: list[tuple[list[int], list[int]]],
    shard_tokens: int,
    data: st.DataObject,
    tmp_path: Path,
) -> None:
    paths = write_documents(tmp_path, documents, shard_tokens)
    opened = open_tokens(paths)
    assert isinstance(opened, Documents)
    start = data.draw(st.integers(0, len(documents) - 1))
    stop = data.draw(st.integers(start + 1, len(documents)))
    for part in (opened[start:stop], pickle.loads(pickle.dumps(opened[start:stop]))):
        assert len(part) == stop - start
        found = [part.document(i) for i in range(len(part))]
        wanted = [(p + c, len(p)) for p, c in documents[start:stop]]
        assert [(tokens.tolist(), completion) for tokens, completion in found] == wanted
        assert part.span().tensor().tolist() == sum((tokens for tokens, _ in wanted), [])
    for path in paths:
        n = len(TokenFiles(path))
        assert n <= shard_tokens or len(Documents.open([path])) == 1


@FILES
@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 60), data=st.data())
def test_truncated_shards(
    documents: list[tuple[list[int], list[int]]],
    shard_tokens: int,
    data: st.DataObject,
    tmp_path: Path,
) -> None:
    paths = write_documents(tmp_path, documents, shard_tokens)
    kept = data.draw(st.integers(1, len(documents)))
    n = sum(len(p) + len(c) for p, c in documents[:kept])
    left = truncate_shards(paths, n)
    assert [path.is_file() for path in paths] == [path in left for path in paths]
    assert [index_path(path).is_file() for path in paths] == [path in left for path in paths]
    found = Documents.open(left)
    assert [found.document(i)[0].tolist() for i in range(len(found))] == [
        p + c for p, c in documents[:kept]
    ]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "has 0 bytes, not 16 for each document"),
        ([0, 1, 5], "has 24 bytes, not 16 for each"),
        ([1, 2, 5, 6], "document 0 is out of order or out of range"),
        ([0, 2, 5, 4], "document 1 is out of order"),
        ([0, 5, 5, 6], "document 0 is out of order"),
        ([0, 2, 5, 10], "document 1 is out of order"),
        ([0, 2, 12, 13], "document 0 is out of order or out of range"),
        ([0, 2, 5, 2**62], "document 1 is out of order"),
        ([0, 2, -5, -4], "document 0 is out of order"),
    ],
    ids="empty size start early no-completion no-eot past huge negative".split(),
)
def test_bad_sidecars(index: list[int], message: str, tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", range(10))
    (tmp_path / "a.idx").write_bytes(np.array(index, "<i8").tobytes())
    with pytest.raises(ValueError, match=f"a.idx .*{message}.*prepare the data again"):
        open_tokens([tmp_path / "a.bin"])


@FILES
@given(content=st.binary(max_size=64))
def test_random_bytes_as_a_sidecar(content: bytes, tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", range(10))
    (tmp_path / "a.idx").write_bytes(content)
    try:
        documents = open_tokens([tmp_path / "a.bin"])
    except ValueError as error:
        assert "a.idx" in str(error)
    else:
        assert documents.span().tensor().tolist() == list(range(10))


def test_sidecars_for_all_or_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tokens(tmp_path / f"{name}.bin", range(10))
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    assert isinstance(open_tokens(paths), TokenFiles)
    (tmp_path / "a.idx").write_bytes(np.array([0, 3], "<i8").tobytes())
    with pytest.raises(ValueError, match=re.escape("b.bin has no b.idx beside it")):
        open_tokens(paths)
    with pytest.raises(ValueError, match="cannot read .*b.idx"):
        Documents.open(paths)


def sparse(path: Path, n: int, headered: bool, near_end: Sequence[int]) -> Path:
    """Write a sparse file of n tokens that takes no room: zeros, then `near_end`."""
    offset = 1024 if headered else 0
    with path.open("wb") as file:
        file.write(llm_c([], count=n) if headered else b"")
        file.truncate(offset + 2 * n)
        file.seek(offset + 2 * (n - len(near_end)))
        file.write(nanogpt(near_end))
    # st_blocks counts blocks of 512 bytes that the file really takes.
    assert os.stat(path).st_blocks * 512 < 2**20
    return path


@pytest.mark.parametrize("headered", [False, True], ids=["one-nanogpt-file", "llm.c-shards"])
def test_more_than_2_to_the_31_tokens(headered: bool, tmp_path: Path) -> None:
    n, last = 2**31 + 5000, list(range(1, 5001))
    if headered:
        sizes = [2**30, 2**30 - 100, n - 2**31 + 100]
        paths = [
            sparse(tmp_path / f"{i}.bin", size, True, last if i == 2 else [i + 1])
            for i, size in enumerate(sizes)
        ]
    else:
        sizes, paths = [n], [sparse(tmp_path / "0.bin", n, False, last)]
    files = TokenFiles(paths)
    assert len(files) == n
    assert files[2**31 :].tensor().tolist() == last
    assert files.locate(n - 1) == (paths[-1], sizes[-1] - 1)
    loader = create_dataloader(files, 2, 8, 2**29, shuffle=False, drop_last=False)
    *_, (x, y) = loader
    # The fifth window starts at token 2^31.
    assert len(loader.dataset) == 5
    assert (x.tolist(), y.tolist()) == ([last[:8]], [last[1:9]])
    if headered:
        assert files[2**30 - 1 : 2**30 + 1].tensor().tolist() == [1, 0]
        assert files[2**31 - 101 : 2**31 - 99].tensor().tolist() == [2, 0]
    train, val = files[: 2**31 - 7], files[2**31 - 7 :]
    assert val.tensor().tolist() == [0] * 7 + last
    assert Windows(train, 8, 2**30)[1][0].tolist() == [0] * 8
    assert len({fingerprint(part) for part in (files, train, val)}) == 3
