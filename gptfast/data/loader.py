"""Tokens to batches: windows or examples, shuffled by (seed, epoch)."""

import copy
import multiprocessing.util
import signal
import weakref
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from gptfast.checks import integer
from gptfast.data.token_files import Documents, TokenFiles
from gptfast.data.tokens import Source, Tokens, as_tokens, in_memory
from gptfast.tokenizer.bpe import Tokenizer

# Items of a batch that `describe_batch` lists.
_MAX_LISTED_ITEMS = 8


class Windows(Dataset):
    """Overlapping windows over tokens: item i is (x, y), both (max_length,) int64, y one ahead."""

    def __init__(self, tokens: Tensor | TokenFiles, max_length: int, stride: int) -> None:
        if len(tokens) <= max_length:
            raise ValueError(
                f"{len(tokens)} tokens are too few for one window of {max_length} and its next "
                f"token; use more text, or windows of at most {max(len(tokens) - 1, 0)} "
                "(--max-length)"
            )
        self.tokens, self.max_length, self.stride = tokens, max_length, stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.max_length - 1) // self.stride + 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        start = i * self.stride
        window = in_memory(self.tokens[start : start + self.max_length + 1])
        return window[:-1], window[1:]

    def describe(self, items: Sequence[int]) -> str:
        """Return the numbers of these windows and where they start, and in which files."""
        starts = [i * self.stride for i in items]
        where = f"windows {_listed(items)} at tokens {_listed(starts)}"
        return where + _files_listed(self.tokens, starts)


class Examples(Dataset):
    """Prompts with completions: item i is (x, y), both (t,) int64, y one ahead of x.

    t <= max_length. y is -100 in the prompt, and end-of-text at the end of an example that is not
    cut. Examples without a target in their first max_length tokens are left out, and `left_out`
    counts them; `cut` counts the others that are longer. `collate` makes a batch, padded with
    pad_id and -100. Raises ValueError if no example is left.
    """

    def __init__(self, documents: Documents, max_length: int, pad_id: int) -> None:
        self.documents, self.max_length, self.pad_id = documents, max_length, pad_id
        # The first token of a document is never a target: nothing stands before it.
        first_target = np.maximum(documents.completions - documents.starts[:-1], 1)
        lengths = np.diff(documents.starts)
        kept = (first_target < lengths) & (first_target <= max_length)
        self.kept = np.flatnonzero(kept)
        self.left_out = len(documents) - len(self.kept)
        self.cut = int((lengths[self.kept] > max_length + 1).sum())
        if not len(self.kept):
            raise ValueError(
                f"no completion begins within max_length {max_length} in {len(documents)} "
                "documents; use a longer context or shorter prompts"
            )

    def __len__(self) -> int:
        return len(self.kept)

    def notes(self) -> list[str]:
        """Return what is to be said of the examples that are too long, in lines."""
        first, lines = f"first {self.max_length} tokens", []
        if self.left_out:
            lines.append(
                f"left out {self.left_out:,} examples without a completion in their {first}"
            )
        if self.cut:
            lines.append(f"cut {self.cut:,} completions that go on after their examples' {first}")
        return lines

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        tokens, completion = self.documents.document(int(self.kept[i]), self.max_length + 1)
        x, y = tokens[:-1], tokens[1:].clone()
        y[: max(completion - 1, 0)] = -100
        return x, y

    def collate(self, examples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return a batch (x, y), both (B, T) int64, with the length T of the longest example."""
        xs, ys = zip(*examples, strict=True)
        return pad_sequence(list(xs), True, self.pad_id), pad_sequence(list(ys), True, -100)

    def describe(self, items: Sequence[int]) -> str:
        """Return the numbers of these documents, counted from 0 in all data, and their files."""
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
    """The items of each batch: a pure function of (seed, epoch), so that no state is saved.

    Each pass over it yields the rest of the current epoch; the next pass is the next epoch.
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
        """Return the items of global batch `step`, counted from the first of epoch 0."""
        epoch, b = divmod(step, len(self))
        return self._batch(self._order(epoch), b)

    def __iter__(self) -> Iterator[list[int]]:
        # Changed before the first batch: a pass that is abandoned does not repeat its epoch.
        epoch, start = self.epoch, self.start
        self.epoch, self.start = epoch + 1, 0
        order = self._order(epoch)
        for b in range(start, len(self)):
            yield self._batch(order, b)

    def _batch(self, order: Tensor, b: int) -> list[int]:
        return order[b * self.batch_size : (b + 1) * self.batch_size].tolist()

    def _order(self, epoch: int) -> Tensor:
        """Return the items in the epoch's order, (n,) int64. The latest order is cached."""
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
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)


_WORKERS: weakref.WeakSet[Any] = weakref.WeakSet()


class _Loader(DataLoader):
    """A loader whose workers are known until they end."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        _WORKERS.update(getattr(iterator, "_workers", ()))  # PyTorch's list of processes
        return iterator


def _end_workers() -> None:
    """End the workers that an interrupted pass left.

    multiprocessing would send SIGTERM, which they ignore, and wait for them for ever.
    """
    left = [process for process in multiprocessing.active_children() if process in _WORKERS]
    if not left:
        return
    if hasattr(signal, "SIGCHLD"):  # PyTorch's handler would report each
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in left:
        process.kill()


# Before multiprocessing waits for daemonic processes, and after pools have ended theirs.
multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)


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
    allowed_special: Collection[str] = (),
) -> DataLoader:
    """Return a loader of batches (x, y), each (batch_size, max_length) int64; y is one token later.

    Items are windows `stride` tokens apart. For Documents they are `Examples` instead, padded to
    the batch's longest with the end-of-text of the tokenizer or, without one, of the documents.
    tokenizer, allowed_special: for a text, as in `as_tokens`. The order of an epoch is a pure
    function of seed and epoch; each pass over the loader is the next epoch.
    Raises ValueError for sizes that are too small and for data too short for one window or batch.
    """
    batch_size = integer("batch_size", batch_size, least=1)
    max_length, stride = integer("max_length", max_length, 1), integer("stride", stride, 1)
    num_workers, seed = integer("num_workers", num_workers, 0), integer("seed", seed, 0)
    dataset: Windows | Examples
    if isinstance(text_or_tokens, Documents):
        if not len(text_or_tokens):
            raise ValueError("there are no documents to make batches of; use more data")
        pad_id = tokenizer.eot if tokenizer else text_or_tokens.eot
        dataset = Examples(text_or_tokens, max_length, pad_id)
        items = f"{len(dataset)} examples"
    else:
        if not isinstance(text_or_tokens, TokenFiles):
            text_or_tokens = as_tokens(text_or_tokens, tokenizer, allowed_special)
        dataset = Windows(text_or_tokens, max_length, stride)
        items = f"{len(dataset)} windows of {max_length} tokens"
    order = BatchOrder(len(dataset), batch_size, shuffle, drop_last, seed)
    if not len(order):
        raise ValueError(
            f"{items} do not fill one batch of {batch_size}; "
            "use more text, a smaller batch_size or drop_last=False"
        )
    return _Loader(
        dataset,
        batch_sampler=order,
        num_workers=num_workers,
        collate_fn=dataset.collate if isinstance(dataset, Examples) else None,
        worker_init_fn=_ignore_interrupts,
        # By default every pass would draw from torch's global generator.
        generator=torch.Generator(),
    )


def describe_batch(loader: DataLoader, step: int) -> str:
    """Return one line that says which items global batch `step` of a loader consists of.

    loader: one of `create_dataloader`. Windows are given by number, first token and, in token
    files, file:token; examples by document number. All counts start at 0; of a large batch only
    the first items are listed.
    """
    order, dataset = loader.batch_sampler, loader.dataset
    assert isinstance(order, BatchOrder) and isinstance(dataset, Windows | Examples)
    items = order.indices(step)
    more = f" and {len(items) - _MAX_LISTED_ITEMS} more" if len(items) > _MAX_LISTED_ITEMS else ""
    where = dataset.describe(items[:_MAX_LISTED_ITEMS])
    return f"batch {step} (epoch {step // len(order)}): {where}{more}"


class _EveryNth(Sampler[list[int]]):
    """Batches first, first + every, ... of an order."""

    def __init__(self, order: BatchOrder, first: int, every: int) -> None:
        self.order, self.first, self.every = order, first, every

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self.order), self.first, None, self.every)


def from_start(loader: DataLoader, *, first: int = 0, every: int = 1) -> DataLoader:
    """Return a copy of a `create_dataloader` loader that begins with the first batch.

    first, every: take batches first, first + every, ... of the epoch only.
    """
    order = copy.copy(loader.batch_sampler)
    assert isinstance(order, BatchOrder)
    order.set_position(0)
    return DataLoader(
        loader.dataset,
        batch_sampler=order if every == 1 else _EveryNth(order, first, every),
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),
    )
