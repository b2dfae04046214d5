"""Text files to token ids, in several threads."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast.data.documents import Fields, Record, read_records
from gptfast.data.token_files import Documents
from gptfast.tokenizer.bpe import (
    Tokenizer,
    borders_of,
    encode_continuation,
    encode_opening,
    end_of_text,
)
from gptfast.tokenizer.characters import CharacterTokenizer
from gptfast.tokenizer.reader import CONFIG

# Characters that a thread tokenises at a time.
BATCH_CHARACTERS = 1 << 19
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The ids of consecutive records and, for prompts, where documents and completions start."""

    tokens: np.ndarray  # (n,) int64
    documents: int
    starts: np.ndarray  # (documents,) int64, or (0,) for plain text
    completions: np.ndarray


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.text) + len(record.prompt or "")
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _separator(tokenizer: Tokenizer, *, needed: bool) -> int:
    """Return the id of end-of-text, -1 if there is none. Raises ValueError if it is needed."""
    eot = end_of_text(tokenizer)
    if eot is None and needed:
        remedy = (
            "" if isinstance(tokenizer, CharacterTokenizer) else f"name its eos_token in {CONFIG}, "
        )
        raise ValueError(
            f"tokenizer {tokenizer.name} has no end-of-text, which separates documents and ends "
            f"completions; {remedy}give one text, or another --tokenizer"
        )
    return -1 if eot is None else eot


def _encode(tokenizer: Tokenizer, batch: list[Record], opening: bool) -> Encoded:
    """Return the ids of a batch, with end-of-text between plain documents and after completions.

    opening: whether this is the first batch. Raises ValueError if end-of-text is needed and the
    tokenizer has none.
    """
    many = any(record.first and (i or not opening) for i, record in enumerate(batch))
    eot = _separator(tokenizer, needed=many or batch[0].prompt is not None)
    ids: list[int] = []
    starts: list[int] = []
    completions: list[int] = []
    for i, record in enumerate(batch):
        if record.prompt is None:
            if record.first and (i or not opening):
                ids.append(eot)
            encode = encode_opening if record.first else encode_continuation
            ids += encode(tokenizer, record.text)
        else:
            starts.append(len(ids))
            ids += encode_opening(tokenizer, record.prompt)
            completions.append(len(ids))
            ids += encode_continuation(tokenizer, record.text)
            ids.append(eot)
    tokens, document_starts, completion_starts = (
        np.array(v, np.int64) for v in (ids, starts, completions)
    )
    documents = sum(record.first for record in batch)
    return Encoded(tokens, documents, document_starts, completion_starts)


def tokenize(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    fields: Fields,
    workers: int | None = None,
    on_bytes: Callable[[int], Any] = lambda n_bytes: None,
) -> Iterator[Encoded]:
    """Yield the ids of files, in order, with end-of-text between documents and after completions.

    workers: threads, None for one per core; tiktoken works outside the interpreter's lock.
    on_bytes: called with the number of bytes after each read. Raises ValueError naming the file,
    and in .jsonl the line, that cannot be used.
    """
    if end_of_text(tokenizer) is None and not isinstance(tokenizer, CharacterTokenizer):
        _LOG.warning(
            "tokenizer %s names no end-of-text (eos_token in %s): one text can be read with it, "
            "and a model that learns from it never ends a text by itself",
            tokenizer.name,
            CONFIG,
        )
    workers = workers or os.cpu_count() or 1
    waiting: deque[Future[Encoded]] = deque()
    opening = True
    with ThreadPoolExecutor(workers) as pool:
        try:
            records = read_records(files, fields, on_bytes, borders_of(tokenizer))
            for batch in _batches(records):
                waiting.append(pool.submit(_encode, tokenizer, batch, opening))
                opening = False
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def load_text(files: Sequence[Path], tokenizer: Tokenizer, fields: Fields) -> Tensor | Documents:
    """Return the tokens of files in memory: (n,) int64, or Documents if they have prompts.

    Raises ValueError as `tokenize` does.
    """
    parts = list(tokenize(files, tokenizer, fields))
    offsets = np.cumsum([0, *(len(part.tokens) for part in parts)])
    tokens = torch.from_numpy(np.concatenate([part.tokens for part in parts]))
    pairs = list(zip(parts, offsets.tolist(), strict=False))
    starts = np.concatenate([part.starts + offset for part, offset in pairs])
    if not len(starts):
        return tokens
    completions = np.concatenate([part.completions + offset for part, offset in pairs])
    return Documents(tokens, np.append(starts, len(tokens)), completions)
