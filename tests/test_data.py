"""Data: windows and batches against a naive construction, order by (seed, epoch), bad texts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gptfast import create_dataloader, get_tokenizer
from gptfast.data import as_tokens, embedded_text, read_text, split_tokens

VERDICT = Path(__file__).parents[2] / "shared" / "data" / "the-verdict.txt"


def batches(loader: DataLoader) -> list[tuple[list, list]]:
    return [(x.tolist(), y.tolist()) for x, y in loader]


def windows_seen(loader: DataLoader) -> list[int]:
    """The first token of each window, in the order of one pass."""
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
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = batches(loader)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
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
    tokens = as_tokens(read_text([VERDICT]), get_tokenizer("gpt2"))
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
    with pytest.raises(ValueError, match=f"{name} must be >= .*got {value}"):
        create_dataloader(range(1000), **{name: value})


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
        read_text([good, bad])


def test_read_text_joins_files(tmp_path: Path) -> None:
    for name, text in (("a", "one\n"), ("b", "zwei ü")):
        (tmp_path / name).write_text(text, "utf-8")
    assert read_text([tmp_path / "a", tmp_path / "b"]) == "one\n\n\nzwei ü"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.txt"):
        read_text([tmp_path / "nowhere.txt"])


def test_embedded_text_is_plenty_of_english() -> None:
    text = embedded_text()
    assert len(text) > 300_000
    assert text.count(" the ") > 2000
    assert text == embedded_text()
