"""From text to batches: read, encode, split, slide a window, shuffle by (seed, epoch)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gptfast.tokenizer import Tokenizer, get_tokenizer

Tokens = Sequence[int] | np.ndarray | Tensor


def embedded_text() -> str:
    """About half a megabyte of English that every CPython carries: the prose of `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def read_text(paths: Sequence[str | Path]) -> str:
    """The texts of UTF-8 files, joined by a blank line. ValueError for empty or binary ones."""
    texts = []
    for path in paths:
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}; give text files") from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error.reason} at {error.start})"
            ) from None
        if "\0" in text:
            raise ValueError(f"{path} is binary: it has a NUL byte at {text.index(chr(0))}")
        if not text.strip():
            raise ValueError(f"{path} is empty; training needs text")
        texts.append(text)
    return "\n\n".join(texts)


def split_tokens(tokens: Tensor, ratios: Sequence[float] = (0.9, 0.1)) -> list[Tensor]:
    """Cut (n,) tokens into consecutive parts, e.g. training, validation and test.

    ratios are positive and sum to 1. Raises ValueError for ratios that do not, or an empty part.
    """
    if not ratios or not min(ratios) > 0 or not abs(sum(ratios) - 1.0) <= 1e-6:
        raise ValueError(f"split ratios must be positive and sum to 1, got {tuple(ratios)}")
    edges = [round(len(tokens) * sum(ratios[:i])) for i in range(len(ratios) + 1)]
    parts = [tokens[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    for part, ratio in zip(parts, ratios, strict=True):
        if not len(part):
            raise ValueError(
                f"the split of {len(tokens)} tokens at ratio {ratio} is empty; add text"
            )
    return parts


class Windows(Dataset):
    """Overlapping windows over tokens: item i is (x, y), both (max_length,) int64, y one ahead."""

    def __init__(self, tokens: Tensor, max_length: int, stride: int) -> None:
        if len(tokens) <= max_length:
            raise ValueError(
                f"{len(tokens)} tokens are too few for one window of {max_length} and its next "
                f"token; use more text or a context of at most {max(len(tokens) - 1, 0)}"
            )
        self.tokens, self.max_length, self.stride = tokens, max_length, stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.max_length - 1) // self.stride + 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        start = i * self.stride
        window = self.tokens[start : start + self.max_length + 1]
        return window[:-1], window[1:]


class BatchOrder(Sampler[list[int]]):
    """Which windows form batch b of epoch e: a pure function of (seed, epoch), so nothing to save.

    Each pass over it yields what is left of the current epoch, then moves to the next one.
    """

    def __init__(self, n: int, batch_size: int, shuffle: bool, drop_last: bool, seed: int) -> None:
        self.n, self.batch_size, self.shuffle, self.drop_last = n, batch_size, shuffle, drop_last
        self.seed, self.epoch, self.start = seed, 0, 0

    def __len__(self) -> int:
        whole, rest = divmod(self.n, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def set_position(self, step: int) -> None:
        """Continue with global batch `step`, counted from the first of epoch 0."""
        self.epoch, self.start = divmod(step, len(self))

    def __iter__(self) -> Iterator[list[int]]:
        # Moved on at once: a pass that is broken off does not repeat its epoch.
        epoch, start = self.epoch, self.start
        self.epoch, self.start = epoch + 1, 0
        order = list(range(self.n))
        if self.shuffle:
            # SeedSequence keeps neighbouring (seed, epoch) pairs apart.
            mixed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0])
            generator = torch.Generator().manual_seed(mixed >> 1)
            order = torch.randperm(self.n, generator=generator).tolist()
        for b in range(start, len(self)):
            yield order[b * self.batch_size : (b + 1) * self.batch_size]


def as_tokens(text_or_tokens: str | Tokens, tokenizer: Tokenizer | None = None) -> Tensor:
    """(n,) int64 ids of a text (by `tokenizer`, GPT-2's if None) or of a sequence of ids."""
    if isinstance(text_or_tokens, str):
        text_or_tokens = (tokenizer or get_tokenizer("gpt2")).encode(text_or_tokens)
    if isinstance(text_or_tokens, np.ndarray):
        text_or_tokens = text_or_tokens.astype(np.int64)
    tokens = torch.as_tensor(text_or_tokens)
    if tokens.dim() != 1:
        raise ValueError(f"tokens must be one sequence (n,), got shape {tuple(tokens.shape)}")
    if tokens.numel() and (tokens.is_floating_point() or tokens.min() < 0):
        raise ValueError("tokens must be integers >= 0, got floating-point or negative ones")
    return tokens.to(torch.int64)


def create_dataloader(
    text_or_tokens: str | Tokens,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> DataLoader:
    """Batches (x, y), each (batch_size, max_length) int64, of windows `stride` tokens apart.

    y is x one token later. The order of an epoch is a pure function of seed and epoch; each pass
    over the loader is the next epoch. Raises ValueError for sizes below 1, for too little text for
    one window, and, with drop_last, for too little for one batch.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    for name, value in (("num_workers", num_workers), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    windows = Windows(as_tokens(text_or_tokens, tokenizer), max_length, stride)
    order = BatchOrder(len(windows), batch_size, shuffle, drop_last, seed)
    if not len(order):
        raise ValueError(
            f"{len(windows)} windows of {max_length} tokens do not fill one batch of {batch_size}; "
            "use more text, a smaller batch_size or drop_last=False"
        )
    # A generator of its own: by default every pass would draw from torch's global one.
    return DataLoader(
        windows, batch_sampler=order, num_workers=num_workers, generator=torch.Generator()
    )
