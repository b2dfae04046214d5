"""From tokens to batches: split, slide a window, shuffle by (seed, epoch)."""

import copy
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from gptfast.checks import _at_least
from gptfast.data.token_files import Documents, TokenFiles
from gptfast.data.tokens import Source, Tokens, _in_memory, as_tokens
from gptfast.tokenizer.bpe import Tokenizer

SHOWN = 8


class Windows(Dataset):
    """Overlapping windows over tokens: item i is (x, y), both (max_length,) int64, y one ahead."""

    def __init__(self, tokens: Tensor | TokenFiles, max_length: int, stride: int) -> None:
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
        window = _in_memory(self.tokens[start : start + self.max_length + 1])
        return window[:-1], window[1:]

    def describe(self, items: Sequence[int]) -> str:
        """Which windows these are and where they start, also by file if there are files."""
        starts = [i * self.stride for i in items]
        where = f"windows {_listed(items)} at tokens {_listed(starts)}"
        return where + _files_listed(self.tokens, starts)


class Examples(Dataset):
    """Prompts with completions: item i is (x, y), both (t,) int64, y one ahead of x.

    t <= max_length. Where y is the prompt's, it is -100; the last of an example that is not cut
    is end-of-text. Examples without a target in their first max_length tokens are left out:
    `left_out` counts them. `collate` makes a batch, padded with pad_id and -100.
    Raises ValueError if none is left.
    """

    def __init__(self, documents: Documents, max_length: int, pad_id: int) -> None:
        self.documents, self.max_length, self.pad_id = documents, max_length, pad_id
        # The first token of a document is never a target: nothing stands before it.
        first_target = np.maximum(documents.completions - documents.starts[:-1], 1)
        lengths = np.diff(documents.starts)
        kept = (first_target < lengths) & (first_target <= max_length)
        self.kept = np.flatnonzero(kept)
        self.left_out = len(documents) - len(self.kept)
        if not len(self.kept):
            raise ValueError(
                f"no completion begins within max_length {max_length} in {len(documents)} "
                "documents; use a longer context or shorter prompts"
            )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        tokens, completion = self.documents.document(int(self.kept[i]), self.max_length + 1)
        x, y = tokens[:-1], tokens[1:].clone()
        y[: max(completion - 1, 0)] = -100
        return x, y

    def collate(self, examples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(x, y), both (B, T) int64, T the longest example's length."""
        xs, ys = zip(*examples, strict=True)
        return pad_sequence(xs, True, self.pad_id), pad_sequence(ys, True, -100)

    def describe(self, items: Sequence[int]) -> str:
        """The numbers of these documents, from 0 in the whole they are part of, and their files."""
        numbers = self.kept[list(items)]
        starts = self.documents.starts[numbers].tolist()
        where = f"documents {_listed((numbers + self.documents.first).tolist())}"
        return where + _files_listed(self.documents.tokens, starts)


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _files_listed(tokens: Tensor | TokenFiles, starts: Sequence[int]) -> str:
    if not isinstance(tokens, TokenFiles):
        return ""
    places = [tokens.locate(start) for start in starts]
    return f" ({_listed([f'{path.name}:{offset}' for path, offset in places])})"


class BatchOrder(Sampler[list[int]]):
    """Which items form batch b of epoch e: a pure function of (seed, epoch), so nothing to save.

    Each pass over it yields what is left of the current epoch, then moves to the next one.
    """

    def __init__(self, n: int, batch_size: int, shuffle: bool, drop_last: bool, seed: int) -> None:
        self.n, self.batch_size, self.shuffle, self.drop_last = n, batch_size, shuffle, drop_last
        self.seed, self.epoch, self.start = seed, 0, 0
        self._cached: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        whole, rest = divmod(self.n, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def set_position(self, step: int) -> None:
        """Continue with global batch `step`, counted from the first of epoch 0."""
        self.epoch, self.start = divmod(step, len(self))

    def indices(self, step: int) -> list[int]:
        """The items of global batch `step`, counted from the first of epoch 0."""
        epoch, b = divmod(step, len(self))
        return self._batch(self._order(epoch), b)

    def __iter__(self) -> Iterator[list[int]]:
        # Moved on at once: a pass that is broken off does not repeat its epoch.
        epoch, start = self.epoch, self.start
        self.epoch, self.start = epoch + 1, 0
        order = self._order(epoch)
        for b in range(start, len(self)):
            yield self._batch(order, b)

    def _batch(self, order: Tensor, b: int) -> list[int]:
        return order[b * self.batch_size : (b + 1) * self.batch_size].tolist()

    def _order(self, epoch: int) -> Tensor:
        """(n,) int64: the items in the epoch's order. The last one asked for is kept."""
        key = epoch if self.shuffle else 0
        if self._cached is None or self._cached[0] != key:
            self._cached = key, self._permutation(epoch) if self.shuffle else torch.arange(self.n)
        return self._cached[1]

    def _permutation(self, epoch: int) -> Tensor:
        # SeedSequence keeps neighbouring (seed, epoch) pairs apart.
        mixed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(mixed >> 1)
        return torch.randperm(self.n, generator=generator)


def _ignore_interrupts(worker: int) -> None:
    # Signals may go to the whole process group; the trainer still wants its last step's batches.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def create_dataloader(
    text_or_tokens: str | Tokens | Source,
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

    y is x one token later. Of Documents, each item is an example instead (see `Examples`; stride
    has no part in it), padded to the batch's longest with the tokenizer's end-of-text, or the
    documents' own. The order of an epoch is a pure function of seed and epoch; each pass over the
    loader is the next epoch. Raises ValueError for sizes below 1, for too little text for one
    window, and, with drop_last, for too little for one batch.
    """
    batch_size = _at_least(1, "batch_size", batch_size)
    max_length, stride = _at_least(1, "max_length", max_length), _at_least(1, "stride", stride)
    num_workers, seed = _at_least(0, "num_workers", num_workers), _at_least(0, "seed", seed)
    if isinstance(text_or_tokens, Documents):
        if not len(text_or_tokens):
            raise ValueError("there are no documents to make batches of; use more data")
        pad_id = tokenizer.eot if tokenizer else text_or_tokens.eot
        dataset = Examples(text_or_tokens, max_length, pad_id)
        items = f"{len(dataset)} examples"
    else:
        lazy = isinstance(text_or_tokens, TokenFiles)
        tokens = text_or_tokens if lazy else as_tokens(text_or_tokens, tokenizer)
        dataset = Windows(tokens, max_length, stride)
        items = f"{len(dataset)} windows of {max_length} tokens"
    order = BatchOrder(len(dataset), batch_size, shuffle, drop_last, seed)
    if not len(order):
        raise ValueError(
            f"{items} do not fill one batch of {batch_size}; "
            "use more text, a smaller batch_size or drop_last=False"
        )
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=num_workers,
        collate_fn=dataset.collate if isinstance(dataset, Examples) else None,
        worker_init_fn=_ignore_interrupts,
        # One of its own: by default every pass would draw from torch's global generator.
        generator=torch.Generator(),
    )


def describe_batch(loader: DataLoader, step: int) -> str:
    """One line that says what global batch `step`, from 0, of a `create_dataloader` loader held.

    Windows by number, first token and, of token files, file:token; examples by document number.
    Both count from 0, as do epochs. Of a large batch, the first few.
    """
    order = loader.batch_sampler
    items = order.indices(step)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    where = loader.dataset.describe(items[:SHOWN])
    return f"batch {step} (epoch {step // len(order)}): {where}{more}"


def from_start(loader: DataLoader) -> DataLoader:
    """The loader of `create_dataloader` from its first batch on; the one given keeps its place."""
    order = copy.copy(loader.batch_sampler)
    order.set_position(0)
    return DataLoader(
        loader.dataset,
        batch_sampler=order,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),
    )
