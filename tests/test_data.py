"""Test data: windows and batches against naive ones, order by (seed, epoch), bad texts."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeds import shifted
from torch.utils.data import DataLoader

from gptfast import create_dataloader, get_tokenizer
from gptfast.data.embedded import embedded_text
from gptfast.data.loader import BatchOrder, Examples, Windows, describe_batch
from gptfast.data.prepare import prepare
from gptfast.data.shards import ShardWriter
from gptfast.data.sources import load_data, load_part, prepared_tokenizer
from gptfast.data.token_files import Documents, TokenFiles, write_tokens
from gptfast.data.tokens import as_tokens, fingerprint, split_tokens

VERDICT = Path(__file__).parents[2] / "shared" / "data" / "the-verdict.txt"
FILES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BYTE = get_tokenizer("byte")


def batches(loader: DataLoader) -> list[tuple[list, list]]:
    return [(x.tolist(), y.tolist()) for x, y in loader]


def windows_seen(loader: DataLoader) -> list[int]:
    """Return the first token of each window, in the order of one pass."""
    return [x for first, _ in batches(loader) for x, *_ in first]


def naive(
    tokens: Sequence[int], batch_size: int, max_length: int, stride: int, drop_last: bool
) -> list[tuple[list, list]]:
    xs, ys, start = [], [], 0
    while start + max_length + 1 <= len(tokens):
        xs.append(list(tokens[start : start + max_length]))
        ys.append(list(tokens[start + 1 : start + max_length + 1]))
        start += stride
    out = []
    while xs:
        if len(xs) < batch_size and drop_last:
            break
        out.append((xs[:batch_size], ys[:batch_size]))
        xs, ys = xs[batch_size:], ys[batch_size:]
    return out


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 60),
    batch_size=st.integers(1, 5),
    max_length=st.integers(1, 12),
    stride=st.integers(1, 15),
    drop_last=st.booleans(),
)
def test_windows_and_batches(
    n: int, batch_size: int, max_length: int, stride: int, drop_last: bool
) -> None:
    tokens = [7 * i % 1000 for i in range(n)]
    wanted = naive(tokens, batch_size, max_length, stride, drop_last)

    def loader() -> DataLoader:
        return create_dataloader(
            tokens, batch_size, max_length, stride, shuffle=False, drop_last=drop_last
        )

    if wanted:
        assert batches(loader()) == wanted
        assert len(loader()) == len(wanted)
    else:
        with pytest.raises(ValueError, match="too few|do not fill one batch"):
            loader()


@settings(max_examples=50, deadline=None)
@given(n=st.integers(6, 60), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_shuffle_is_a_permutation_by_seed_and_epoch(n: int, seed: int, epoch: int) -> None:
    def loader() -> DataLoader:
        return create_dataloader(range(n), 2, 5, 1, shuffle=True, drop_last=False, seed=seed)

    walked, placed = loader(), loader()
    for _ in range(epoch):
        list(walked)
    placed.batch_sampler.set_position(epoch * len(placed))
    seen = windows_seen(walked)
    assert sorted(seen) == list(range(n - 5))
    assert seen == windows_seen(placed)


def test_epochs_and_seeds_differ() -> None:
    orders = {}
    for seed in range(4):
        loader = create_dataloader(range(65), 4, 1, 1, seed=seed)
        for epoch in range(4):
            orders[seed, epoch] = tuple(windows_seen(loader))
    # 64 windows have 64! orders: no two of these 16 coincide by chance.
    assert len(set(orders.values())) == 16
    assert all(sorted(order) == list(range(64)) for order in orders.values())


def test_order_does_not_touch_torchs_generator() -> None:
    loader = create_dataloader(range(65), 4, 8, 8)
    torch.manual_seed(shifted(3))
    before = torch.get_rng_state()
    first = batches(loader)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(shifted(4))
    assert batches(create_dataloader(range(65), 4, 8, 8)) == first


@pytest.mark.parametrize("step", [0, 1, 6, 7, 8, 20, 21])
@pytest.mark.parametrize("drop_last", [True, False], ids=["drop-last", "keep-last"])
def test_set_position_resumes_exactly(step: int, drop_last: bool) -> None:
    def loader() -> DataLoader:
        return create_dataloader(range(60), 3, 4, 2, shuffle=True, drop_last=drop_last, seed=9)

    whole = loader()
    stream = [batch for _ in range(5) for batch in batches(whole)]
    resumed = loader()
    resumed.batch_sampler.set_position(step)
    rest = [batch for _ in range(2) for batch in batches(resumed)]
    assert rest == stream[step : step + len(rest)]
    assert len(rest) == 2 * len(whole) - step % len(whole)


def test_a_pass_broken_off_moves_to_the_next_epoch() -> None:
    whole, broken = (create_dataloader(range(65), 4, 8, 8) for _ in range(2))
    epochs = [batches(whole), batches(whole)]
    next(iter(broken))
    assert batches(broken) == epochs[1]


def test_workers_give_the_same_batches() -> None:
    alone, helped = (
        create_dataloader(range(60), 3, 4, 2, num_workers=workers, drop_last=False, seed=2)
        for workers in (0, 2)
    )
    for _ in range(2):
        assert batches(helped) == batches(alone)


def check_book_batches(tokens: torch.Tensor) -> None:
    train, val = split_tokens(tokens)
    loaders = [create_dataloader(part, 2, 256, 256) for part in (train, val)]
    shapes = [[(x.shape, y.shape) for x, y in loader] for loader in loaders]
    assert shapes == [[((2, 256),) * 2] * 9, [((2, 256),) * 2]]


def test_batches_of_5145_tokens() -> None:
    check_book_batches(torch.arange(5145))


@pytest.mark.skipif(not VERDICT.is_file(), reason="the-verdict.txt is not here")
def test_batches_of_the_verdict() -> None:
    tokens = as_tokens(VERDICT.read_bytes().decode(), get_tokenizer("gpt2"))
    assert len(tokens) == 5145
    check_book_batches(tokens)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(30, 500),
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_split_cuts_without_loss(n: int, weights: list[int]) -> None:
    ratios = [w / sum(weights) for w in weights]
    parts = split_tokens(torch.arange(n), ratios)
    assert torch.cat(parts).tolist() == list(range(n))
    for part, ratio in zip(parts, ratios, strict=True):
        assert abs(len(part) - n * ratio) <= 1


def test_split_default_is_nine_to_one() -> None:
    assert [len(part) for part in split_tokens(torch.arange(1000))] == [900, 100]


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ((), "sum to 1"),
        ((0.5, 0.4), "sum to 1, got"),
        ((1.0, 0.0), "positive"),
        ((1.5, -0.5), "positive"),
    ],
    ids=["none", "short", "zero", "negative"],
)
def test_split_refuses_ratios(ratios: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_tokens(torch.arange(100), ratios)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_empty_split(n: int) -> None:
    with pytest.raises(ValueError, match=f"the split of {n} tokens at ratio .* is empty"):
        split_tokens(torch.arange(n))


@pytest.mark.parametrize(
    "tokens",
    [
        [3, 1, 2],
        (3, 1, 2),
        np.array([3, 1, 2], dtype=np.uint16),
        torch.tensor([3, 1, 2], dtype=torch.int32),
    ],
    ids=["list", "tuple", "uint16", "int32"],
)
def test_as_tokens_of_ids(tokens: object) -> None:
    out = as_tokens(tokens)
    assert out.dtype == torch.int64
    assert out.tolist() == [3, 1, 2]


def test_as_tokens_of_text() -> None:
    assert as_tokens("ab", get_tokenizer("byte")).tolist() == [97, 98]


def test_as_tokens_refuses_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"one sequence \(n,\), got shape \(2, 3\)"):
        as_tokens(torch.zeros(2, 3))


def test_dataloader_takes_text() -> None:
    loader = create_dataloader("abcdef", 1, 2, 2, shuffle=False, tokenizer=get_tokenizer("byte"))
    assert batches(loader) == [([[97, 98]], [[98, 99]]), ([[99, 100]], [[100, 101]])]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("max_length", 0),
        ("stride", 0),
        ("stride", -1),
        ("num_workers", -1),
        ("seed", -1),
    ],
)
def test_bad_sizes(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer >= .*got {value}"):
        create_dataloader(range(1000), **{name: value})


@pytest.mark.parametrize("name", ["batch_size", "max_length", "stride", "num_workers", "seed"])
@pytest.mark.parametrize("value", [2.5, "2", None], ids=repr)
def test_sizes_that_are_no_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer >= .*got {value!r}"):
        create_dataloader(range(1000), **{name: value})


@pytest.mark.parametrize("data", [None, b"bytes", [[1], [2, 3]], ["a"], [None], {1: 2}], ids=repr)
def test_wrong_types_of_data(data: Any) -> None:
    with pytest.raises(ValueError, match="tokens must be a string or a sequence of ids, got"):
        create_dataloader(data)


def test_no_documents() -> None:
    with pytest.raises(ValueError, match="there are no documents to make batches of"):
        create_dataloader(make_documents([([1], [2])])[:0])


@pytest.mark.parametrize("n", [0, 1, 8])
def test_too_little_for_one_window(n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} tokens are too few for one window of 8"):
        create_dataloader(range(n), 1, 8, 8)
    assert len(create_dataloader(range(9), 1, 8, 8)) == 1


def test_too_little_for_one_batch() -> None:
    with pytest.raises(ValueError, match="3 windows of 8 tokens do not fill one batch of 4"):
        create_dataloader(range(25), 4, 8, 8)
    assert len(create_dataloader(range(25), 4, 8, 8, drop_last=False)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"text\0text", "is binary: it has a NUL byte at 4"),
        (b"caf\xe9 au lait", "is not UTF-8 text .* at 3"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is not UTF-8"),
    ],
    ids=["empty", "blank", "nul", "latin-1", "png"],
)
def test_bad_files(content: bytes, message: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("some text")
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.txt {message}"):
        load_data([good, bad], BYTE)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.txt"):
        load_data([tmp_path / "nowhere.txt"], BYTE)


def test_embedded_text_is_plenty_of_english() -> None:
    text = embedded_text()
    assert len(text) > 500_000
    assert text.count(" the ") > 5000
    assert ">>>" not in text and "__" not in text
    embedded_text.cache_clear()
    assert text == embedded_text()


def test_embedded_text_has_no_repeated_paragraph() -> None:
    paragraphs = [line for line in embedded_text().split("\n") if line]
    assert len(set(paragraphs)) == len(paragraphs) > 5000


def test_the_end_of_the_embedded_text_is_like_the_rest() -> None:
    """The validation part is no easier: it has as much of the easily predicted white space."""
    text = embedded_text()
    shares = [sum(map(str.isspace, part)) / len(part) for part in (text, text[-len(text) // 10 :])]
    assert abs(shares[0] - shares[1]) < 0.01


def write_shards(directory: Path, tokens: Sequence[int], shard_tokens: int) -> TokenFiles:
    directory.mkdir(exist_ok=True)
    with ShardWriter(directory, "train", shard_tokens) as writer:
        writer.write(np.array(tokens))
    return TokenFiles(writer.paths)


def make_documents(pairs: Sequence[tuple[list[int], list[int]]]) -> Documents:
    """Return documents in memory: (prompt, completion) pairs, completions with end-of-text."""
    starts = np.cumsum([0, *(len(p) + len(c) for p, c in pairs)])
    completions = starts[:-1] + np.array([len(p) for p, _ in pairs], np.int64)
    return Documents(torch.tensor(sum((p + c for p, c in pairs), [])), starts, completions)


def write_documents(
    directory: Path, pairs: Sequence[tuple[list[int], list[int]]], shard_tokens: int
) -> Documents:
    directory.mkdir(exist_ok=True)
    with ShardWriter(directory, "train", shard_tokens) as writer:
        for prompt, completion in pairs:
            writer.write_document(np.array(prompt + completion), len(prompt))
    return Documents.open(writer.paths)


@FILES
@given(
    n=st.integers(10, 80),
    shard_tokens=st.integers(1, 30),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12)),
    seed=st.integers(0, 9),
)
def test_batches_of_token_files(
    n: int, shard_tokens: int, sizes: tuple[int, int, int], seed: int, tmp_path: Path
) -> None:
    tokens = [7 * i % 1000 for i in range(n)]
    files = write_shards(tmp_path, tokens, shard_tokens)
    options = {"drop_last": False, "seed": seed}
    assert batches(create_dataloader(files, *sizes, **options)) == batches(
        create_dataloader(tokens, *sizes, **options)
    )
    for lazy, part in zip(split_tokens(files), split_tokens(torch.tensor(tokens)), strict=True):
        assert isinstance(lazy, TokenFiles)
        assert lazy.tensor().tolist() == part.tolist()
        assert fingerprint(lazy) == fingerprint(part)


# Recorded before the order became a tensor: runs from that time must still resume.
@pytest.mark.parametrize(
    ("options", "first"),
    [
        ((11, 4, True, False, 7), [[4, 2, 0, 6], [7, 8, 5, 0], [3, 6, 4, 1]]),
        (
            (1000, 8, True, True, 1234567),
            [
                [0, 824, 809, 919, 556, 667, 169, 914],
                [521, 489, 844, 552, 799, 879, 166, 647],
                [340, 250, 818, 301, 668, 311, 130, 263],
            ],
        ),
        ((5, 2, False, True, 3), [[0, 1]] * 3),
    ],
    ids=["keep-last", "drop-last", "in-order"],
)
def test_order_equals_the_recorded_one(options: tuple, first: list[list[int]]) -> None:
    order = BatchOrder(*options)
    assert [next(iter(order)) for _ in range(3)] == first


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 7), drop_last=st.booleans())
def test_indices_of_any_batch(n: int, batch_size: int, drop_last: bool) -> None:
    order = BatchOrder(n, min(n, batch_size), True, drop_last, 5)
    walked = [batch for _ in range(3) for batch in order]
    asked = [order.indices(step) for step in range(len(walked))]
    assert asked == walked
    # Reading indices in between does not move the position.
    order.set_position(1)
    passing = iter(order)
    mixed = [(order.indices(len(walked) - 1), next(passing))[1] for _ in range(len(order) - 1)]
    assert mixed == walked[1 : len(order)]


def test_consecutive_batches_share_one_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    order, made = BatchOrder(2**24, 8, True, True, 1), []
    permutation = BatchOrder._permutation

    def counted(self: BatchOrder, epoch: int) -> torch.Tensor:
        made.append(epoch)
        return permutation(self, epoch)

    monkeypatch.setattr(BatchOrder, "_permutation", counted)
    order.set_position(2**21 + 5)
    batch = next(iter(order))
    assert [order.indices(2**21 + i) for i in range(100)][5] == batch
    assert made == [1]


PAIRS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 99), max_size=6),
        st.lists(st.integers(0, 99), max_size=6).map(lambda ids: [*ids, 100]),
    ),
    min_size=1,
    max_size=12,
)


def naive_examples(
    pairs: Sequence[tuple[list[int], list[int]]], max_length: int
) -> dict[int, tuple[list[int], list[int]]]:
    """Return the examples that have a target, by document number."""
    out = {}
    for number, (prompt, completion) in enumerate(pairs):
        x, y = [], []
        tokens = prompt + completion
        for i in range(1, len(tokens)):
            if len(x) < max_length:
                x.append(tokens[i - 1])
                y.append(tokens[i] if i >= len(prompt) else -100)
        if any(target != -100 for target in y):
            out[number] = (x, y)
    return out


@FILES
@given(
    pairs=PAIRS,
    max_length=st.integers(1, 14),
    batch_size=st.integers(1, 4),
    shard_tokens=st.integers(1, 40),
)
def test_examples(
    pairs: list[tuple[list[int], list[int]]],
    max_length: int,
    batch_size: int,
    shard_tokens: int,
    tmp_path: Path,
) -> None:
    wanted = naive_examples(pairs, max_length)
    memory, files = make_documents(pairs), write_documents(tmp_path, pairs, shard_tokens)
    assert fingerprint(memory) == fingerprint(files)
    for source in (memory, files):
        if not wanted:
            with pytest.raises(ValueError, match=f"begins within max_length {max_length} in"):
                create_dataloader(source, batch_size, max_length)
            continue
        loader = create_dataloader(source, batch_size, max_length, shuffle=False, drop_last=False)
        assert loader.dataset.left_out == len(pairs) - len(wanted)
        left = list(wanted.values())
        for x, y in batches(loader):
            group, left = left[:batch_size], left[batch_size:]
            longest = max(len(ids) for ids, _ in group)
            assert x == [ids + [100] * (longest - len(ids)) for ids, _ in group]
            assert y == [ids + [-100] * (longest - len(ids)) for _, ids in group]
        assert not left


def test_padding_is_the_tokenizers_end_of_text() -> None:
    documents = make_documents([([1], [2, 9]), ([1, 2, 3], [9])])
    for tokenizer, pad in ((None, 9), (BYTE, 256)):
        loader = create_dataloader(documents, 2, 8, shuffle=False, tokenizer=tokenizer)
        assert batches(loader) == [([[1, 2, pad], [1, 2, 3]], [[2, 9, -100], [-100, -100, 9]])]


def test_too_few_examples_for_one_batch() -> None:
    documents = make_documents([([1], [9])] * 3)
    with pytest.raises(ValueError, match="3 examples do not fill one batch of 4"):
        create_dataloader(documents, 4, 8)


def test_split_keeps_documents_whole() -> None:
    pairs = [([i] * i, [i, 99]) for i in range(10)]
    parts = split_tokens(make_documents(pairs), (0.6, 0.3, 0.1))
    found = [[part.document(i) for i in range(len(part))] for part in parts]
    wanted = [(p + c, len(p)) for p, c in pairs]
    assert [[(t.tolist(), at) for t, at in part] for part in found] == [
        wanted[:6], wanted[6:9], wanted[9:]
    ]  # fmt: skip
    with pytest.raises(ValueError, match="the split of 2 documents at ratio 0.1 is empty"):
        split_tokens(make_documents(pairs)[:2])


def test_workers_read_files_and_examples(tmp_path: Path) -> None:
    pairs = [([i] * (i % 3), [i, 99]) for i in range(12)]
    for source in (
        write_shards(tmp_path / "shards", range(60), 13),
        write_documents(tmp_path / "documents", pairs, 9),
        make_documents(pairs),
    ):
        alone, helped = (
            create_dataloader(source, 3, 4, 2, num_workers=workers, seed=2) for workers in (0, 2)
        )
        assert batches(helped) == batches(alone)


def test_files_that_change_before_a_worker_opens_them(tmp_path: Path) -> None:
    """A worker that is not forked opens them itself: Python 3.14's, and those of macOS."""
    pairs = [([i] * (i % 3), [i, 99]) for i in range(12)]
    tokens = write_shards(tmp_path / "a", range(60), 13)
    documents = write_documents(tmp_path / "b", pairs, 9)
    pickled = pickle.dumps(tokens), pickle.dumps(documents)
    assert [len(pickle.loads(part)) for part in pickled] == [len(tokens), len(documents)]
    write_shards(tmp_path / "a", range(50), 13)
    write_documents(tmp_path / "b", pairs[1:], 9)
    for part in pickled:
        with pytest.raises(ValueError, match=r"had \d+ tokens when it was opened and has \d+ now"):
            pickle.loads(part)


FAILS = """
import multiprocessing
from gptfast import create_dataloader
pool = multiprocessing.Pool(2)
pool.map(abs, [1])
for _ in create_dataloader(range(60), 3, 4, 2, num_workers=1):
    raise ValueError("after a batch")
"""


def test_a_script_that_fails_in_a_pass_ends() -> None:
    """Its worker, which ignores SIGTERM, is ended too, and a pool of its own ends as ever."""
    process = subprocess.run(
        [sys.executable, "-c", FAILS], capture_output=True, encoding="utf-8", timeout=60
    )
    assert process.returncode == 1
    assert "ValueError: after a batch" in process.stderr and "killed" not in process.stderr


class Interrupting(Windows):
    """Simulates a Ctrl-C that reaches every process of the group in the middle of a batch."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(i)


def test_workers_ignore_interrupts() -> None:
    alone, helped = (create_dataloader(range(60), 3, 4, 2, num_workers=n) for n in (0, 1))
    helped.dataset.__class__ = Interrupting
    assert batches(helped) == batches(alone)


def test_describe_windows() -> None:
    loader = create_dataloader(range(100), 3, 8, 16, seed=4)
    assert len(loader) == 2
    loader.batch_sampler.set_position(5)
    x, _ = next(iter(loader))
    starts = x[:, 0].tolist()
    windows = ", ".join(str(start // 16) for start in starts)
    tokens = ", ".join(map(str, starts))
    assert describe_batch(loader, 5) == f"batch 5 (epoch 2): windows {windows} at tokens {tokens}"


def test_describe_names_files(tmp_path: Path) -> None:
    files = write_shards(tmp_path, range(100), 40)[10:]
    loader = create_dataloader(files, 2, 8, 16, shuffle=False)
    assert describe_batch(loader, 1) == (
        "batch 1 (epoch 0): windows 2, 3 at tokens 32, 48 (train_000001.bin:2, train_000001.bin:18)"
    )


def test_describe_examples(tmp_path: Path) -> None:
    pairs = [([1] * 4 * (i == 3), [2, 9]) for i in range(8)]
    _, part = split_tokens(make_documents(pairs), (0.25, 0.75))
    # Document 3, the second of this part, has no target within 3 tokens.
    loader = create_dataloader(part, 2, 3, shuffle=False)
    assert describe_batch(loader, 0) == "batch 0 (epoch 0): documents 2, 4"
    files = write_documents(tmp_path, pairs, 11)[2:]
    loader = create_dataloader(files, 2, 3, shuffle=False)
    assert describe_batch(loader, 3) == (
        "batch 3 (epoch 1): documents 5, 6 (train_000001.bin:8, train_000002.bin:0)"
    )


def test_describe_is_short() -> None:
    line = describe_batch(create_dataloader(range(9000), 64, 8, 8, shuffle=False), 0)
    assert line == (
        "batch 0 (epoch 0): windows 0, 1, 2, 3, 4, 5, 6, 7 "
        "at tokens 0, 8, 16, 24, 32, 40, 48, 56 and 56 more"
    )


def test_fingerprints_tell_sources_apart() -> None:
    tokens = torch.arange(5000)
    changed, moved = tokens.clone(), make_documents([([1, 2], [3, 9])])
    changed[4321] += 1
    other = make_documents([([1], [2, 3, 9])])
    sources = [tokens, changed, tokens[:-1], tokens[1:], tokens[:0], moved, other, moved.tokens]
    assert len({fingerprint(source) for source in sources}) == len(sources)
    assert fingerprint(changed) == fingerprint(changed.clone())
    # A document's place in its file does not change its fingerprint.
    pairs = [([1], [9]), ([1, 2], [3, 9]), ([4], [9])]
    assert fingerprint(make_documents(pairs)[1:2]) == fingerprint(moved)


def test_fingerprint_samples_a_long_source() -> None:
    tokens = torch.zeros(2**22 + 12345, dtype=torch.int64)
    before = fingerprint(tokens)
    assert fingerprint(torch.zeros(2**22 + 12346, dtype=torch.int64)) != before
    for position in (0, len(tokens) - 1):
        changed = tokens.clone()
        changed[position] = 1
        assert fingerprint(changed) != before


def test_load_embedded_text() -> None:
    wanted = split_tokens(as_tokens(embedded_text(), BYTE), (0.8, 0.2))
    found = load_data([], BYTE, (0.8, 0.2))
    assert [part.tolist() for part in found] == [part.tolist() for part in wanted]


@pytest.mark.skipif(not VERDICT.is_file(), reason="the-verdict.txt is not here")
def test_load_the_verdict() -> None:
    assert [len(part) for part in load_data([VERDICT], get_tokenizer("gpt2"))] == [4630, 515]


def test_load_texts_joined_by_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab\n")
    (tmp_path / "b.jsonl").write_text('{"t": "cd"}\n{"t": "e"}\n')
    for paths in ([tmp_path], [tmp_path / "a.txt", str(tmp_path / "*.jsonl")]):
        (tokens,) = load_data(paths, BYTE, (1.0,), text_field="t")
        assert tokens.tolist() == [97, 98, 10, 256, 99, 100, 256, 101]


def write_bin(path: Path, tokens: Sequence[int], headered: bool = False) -> Path:
    if headered:
        write_tokens(path, tokens)
    else:
        path.write_bytes(np.array(tokens, "<u2").tobytes())
    return path


def loaded(paths: Sequence[Path], split: Sequence[float]) -> list[list[int]]:
    return [part.tensor().tolist() for part in load_data(paths, BYTE, split)]


def test_load_token_files(tmp_path: Path) -> None:
    a = write_bin(tmp_path / "a.bin", range(60))
    b = write_bin(tmp_path / "b.bin", range(60, 100), headered=True)
    assert loaded([a, b], (0.9, 0.1)) == [[*range(90)], [*range(90, 100)]]
    assert loaded([tmp_path / "*.bin"], (0.5, 0.5)) == [[*range(50)], [*range(50, 100)]]


THREE = (0.5, 0.3, 0.2)


@pytest.mark.parametrize(
    ("others", "split", "wanted"),
    [
        ((), (0.9, 0.1), [range(90), range(90, 100)]),
        ((), THREE, [range(50), range(50, 80), range(80, 100)]),
        (("val",), (0.9, 0.1), [range(100), range(201, 206)]),
        # Half and a fifth of the whole are five and two of the seven that are left.
        (("val",), THREE, [range(71), range(201, 206), range(71, 100)]),
        (("test",), THREE, [range(62), range(62, 100), range(211, 216)]),
        (("test",), (0.9, 0.1), [range(90), range(90, 100), range(211, 216)]),
        (("val", "test"), (0.9, 0.1), [range(100), range(201, 206), range(211, 216)]),
        (("val", "test"), THREE, [range(100), range(201, 206), range(211, 216)]),
        (("val",), (1.0,), [range(100), range(201, 206)]),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_load_a_directory_of_parts(
    others: tuple[str, ...], split: tuple[float, ...], wanted: list[range], tmp_path: Path
) -> None:
    # "latest" contains "test", but a name that says training comes first.
    write_bin(tmp_path / "latest_train_000000.bin", range(40), headered=True)
    write_bin(tmp_path / "latest_train_000001.bin", range(40, 100))
    for name, start in (("val", 201), ("test", 211)):
        if name in others:
            write_bin(tmp_path / f"{name}.bin", range(start, start + 5))
    (tmp_path / "input.txt").write_text("not what is trained on")
    assert loaded([tmp_path], split) == [list(part) for part in wanted]


def test_load_one_part(tmp_path: Path) -> None:
    write_bin(tmp_path / "train.bin", range(100))
    write_bin(tmp_path / "test.bin", range(200, 210))
    for part, wanted in (("train", range(100)), ("test", range(200, 210))):
        assert load_part([tmp_path], BYTE, part).tensor().tolist() == [*wanted]
    with pytest.raises(ValueError, match="has no part val, only train, test"):
        load_part([tmp_path], BYTE, "val")
    files = [tmp_path / "train.bin", tmp_path / "test.bin"]
    assert len(load_part(files, BYTE, "val")) == 110


def test_load_a_prepared_directory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 20)
    out = tmp_path / "out"
    prepare([tmp_path / "a.txt"], out, BYTE, split=(0.8, 0.1, 0.1))
    assert prepared_tokenizer([out]) == "byte"
    assert loaded([out], (0.9, 0.1)) == [
        part.tolist() for part in load_data([tmp_path / "a.txt"], BYTE, (0.8, 0.1, 0.1))
    ]
    for data in ([], [tmp_path / "a.txt"], [tmp_path], [out, out], ["none"], [""], ["x" * 300]):
        assert prepared_tokenizer(data) is None
    # Files that are still being written are ignored.
    write_bin(out / ".train_1.bin", [1, 2, 3])
    assert len(load_data([out], BYTE)) == 3
    with pytest.raises(ValueError, match=r"tokenizer byte \(257 tokens\), not gpt2 \(50257\)"):
        load_data([out], get_tokenizer("gpt2"))
    with pytest.raises(ValueError, match="out is a directory of token files; give it alone"):
        load_data([out, tmp_path / "a.txt"], BYTE)
    (out / "test_000000.bin").unlink()
    write_tokens(out / "val_000000.bin", [1])
    with pytest.raises(ValueError, match="has 1 val tokens, but its meta.json says 20; prepare"):
        load_data([out], BYTE)


@pytest.mark.parametrize(
    "meta",
    ["{", "[]", "{}", '{"format": 2}', '{"format": 1, "n_vocab": 257, "tokens": {}}', "\xff"],
    ids="syntax list empty future field latin-1".split(),
)
def test_bad_meta(meta: str, tmp_path: Path) -> None:
    write_bin(tmp_path / "train.bin", range(100))
    (tmp_path / "meta.json").write_text(meta, "latin-1")
    for read in (prepared_tokenizer, lambda paths: load_data(paths, BYTE)):
        with pytest.raises(ValueError, match="meta.json cannot be used .*; prepare the data again"):
            read([tmp_path])


def test_data_prepared_before_vocabularies_were_recorded(tmp_path: Path) -> None:
    write_bin(tmp_path / "train.bin", range(100))
    meta = {"format": 1, "tokenizer": "byte", "n_vocab": 257, "tokens": {"train": 100}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert len(load_data([tmp_path], BYTE)) == 2
    with pytest.raises(ValueError, match="was prepared with tokenizer byte"):
        load_data([tmp_path], get_tokenizer("gpt2"))


def test_parts_with_missing_files(tmp_path: Path) -> None:
    write_bin(tmp_path / "train.bin", range(100))
    meta = {
        "format": 1,
        "tokenizer": "byte",
        "vocabulary": "byte",
        "n_vocab": 257,
        "tokens": {"train": 90, "val": 10},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="has 100 train tokens, but its meta.json says 90"):
        load_data([tmp_path], BYTE)
    meta["tokens"]["train"] = 100
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="has no val files, but its meta.json names some"):
        load_data([tmp_path], BYTE)


def refuse_load(message: str, *paths: Any) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(paths, BYTE)


def test_data_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    write_bin(tmp_path / "a.bin", range(100))
    write_bin(tmp_path / "gpt2.bin", [1, 50256, 3])
    (tmp_path / "none").mkdir()
    refuse_load(
        "a.bin holds tokens, but .*a.txt holds text", tmp_path / "a.txt", tmp_path / "a.bin"
    )
    refuse_load("gpt2.bin has token 50256, out of range for the 257", tmp_path / "gpt2.bin")
    refuse_load("none has no .txt, .* files in it and no", tmp_path / "none")
    refuse_load("no file matches .*x.bin", tmp_path / "*x.bin")
    refuse_load("an empty path names no data", "")
    refuse_load(
        "cannot read x+: (File name too long|it does not exist); give text files", "x" * 300
    )
    refuse_load(f"has token files such as a.bin, .*; name .* {tmp_path}/\\*.bin for all", tmp_path)
    refuse_load("nowhere.txt", tmp_path / "nowhere.txt")
    pairs = '{"prompt": "a", "completion": "b"}'
    (tmp_path / "p.jsonl").write_text(pairs)
    refuse_load("p.jsonl:1 is a prompt", tmp_path / "a.txt", tmp_path / "p.jsonl")


@FILES
@given(content=st.binary(max_size=60))
def test_random_bytes_as_data(content: bytes, tmp_path: Path) -> None:
    for name in ("a.bin", "a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
        try:
            parts = load_data([tmp_path / name], BYTE)
        except ValueError as error:
            assert name in str(error) or "the split of" in str(error)
        else:
            assert sum(map(len, parts)) >= 2


def test_sources_travel_by_path(tmp_path: Path) -> None:
    dataset = Examples(write_documents(tmp_path, [([1], [2, 9])] * 50, 10_000), 8, 9)
    copied = pickle.loads(pickle.dumps(dataset))
    assert [copied[i][1].tolist() for i in range(50)] == [[2, 9]] * 50
