"""Text files to tokens, by several processes."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast.data.documents import PIECE, Fields, Record, records
from gptfast.data.token_files import Documents
from gptfast.tokenizer.bpe import Tokenizer


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of consecutive records; of prompts, also where documents and completions start."""

    tokens: np.ndarray  # (n,) int64
    documents: int
    starts: np.ndarray  # (documents,) int64, or (0,) for plain text
    completions: np.ndarray


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.text) + len(record.prompt or "")
        if size >= PIECE // 2:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: list[Record], opening: bool) -> Encoded:
    """The ids of a batch: end-of-text between plain documents, and after each completion.

    opening: nothing stands before this batch.
    """
    ids, starts, completions = [], [], []
    for i, record in enumerate(batch):
        if record.prompt is None:
            if record.first and (i or not opening):
                ids.append(tokenizer.eot)
            ids += tokenizer.encode(record.text)
        else:
            starts.append(len(ids))
            ids += tokenizer.encode(record.prompt)
            completions.append(len(ids))
            ids += tokenizer.encode(record.text)
            ids.append(tokenizer.eot)
    tokens, starts, completions = (np.array(v, np.int64) for v in (ids, starts, completions))
    return Encoded(tokens, sum(record.first for record in batch), starts, completions)


def tokenize(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    fields: Fields,
    workers: int | None = None,
    read: Callable[[int], Any] = lambda n_bytes: None,
) -> Iterator[Encoded]:
    """The ids of files, in order: one end-of-text between plain documents, one after completions.

    Threads, because tiktoken works outside the interpreter's lock; a few pieces for each are
    under way at any time. read is told the bytes as they are read. Raises ValueError naming the
    file, and in .jsonl the line, that cannot be used.
    """
    workers = workers or os.cpu_count() or 1
    waiting, opening = deque(), True
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in _batches(records(files, fields, read)):
                waiting.append(pool.submit(_encode, tokenizer, batch, opening))
                opening = False
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _load_text(files: Sequence[Path], tokenizer: Tokenizer, fields: Fields) -> Tensor | Documents:
    tokens, starts, completions, n = [], [], [], 0
    for encoded in tokenize(files, tokenizer, fields):
        tokens.append(encoded.tokens)
        starts.append(encoded.starts + n)
        completions.append(encoded.completions + n)
        n += len(encoded.tokens)
    starts, completions, tokens = map(np.concatenate, (starts, completions, tokens))
    if len(starts):
        return Documents(torch.from_numpy(tokens), np.append(starts, n), completions)
    return torch.from_numpy(tokens)
