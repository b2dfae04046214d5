"""HellaSwag (Zellers et al., 2019) and tasks of its form: which ending follows a context?

Each line of JSON has "ctx", "endings" and "label", the index of the true ending. The accuracies are
those of llm.c: acc picks the ending with the least loss, acc_norm that with the least loss per
token.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from gptfast.checks import integer
from gptfast.evaluate.loss import Example, example, padded
from gptfast.generation.decoder import Decoder
from gptfast.generation.model_decoder import as_decoder
from gptfast.model import GPT
from gptfast.tokenizer.bpe import Tokenizer, encode_continuation, encode_opening


@dataclass(frozen=True)
class Accuracy:
    """Shares of the examples in which the true ending was picked."""

    examples: int
    acc: float
    acc_norm: float


def _examples(path: Path) -> Iterator[tuple[str, list[str], int]]:
    """Yield context, endings and label. Raises ValueError naming a line that is no example."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                found = json.loads(raw.decode("utf-8-sig"))
                context, endings, label = (found[k] for k in ("ctx", "endings", "label"))
            except (ValueError, LookupError, TypeError, RecursionError):
                found = None
            if found is None or not _fits(context, endings, label):
                raise ValueError(
                    f'{path}, line {number}: not {{"ctx": text, "endings": [text, ...], '
                    '"label": index of one}'
                )
            yield context, endings, int(label)


def _fits(context: Any, endings: Any, label: Any) -> bool:
    if not isinstance(context, str) or not isinstance(endings, list) or len(endings) < 2:
        return False
    # Some copies have the label as text.
    index = int(label) if isinstance(label, str) and label.isdecimal() else label
    labelled = type(index) is int and 0 <= index < len(endings)
    return labelled and all(isinstance(ending, str) and ending.strip() for ending in endings)


def hellaswag(
    model: GPT | Decoder,
    tokenizer: Tokenizer,
    path: str | PathLike,
    *,
    batch_size: int = 8,
    limit: int | None = None,
) -> Accuracy:
    """Return the accuracy on the first `limit` examples of a .jsonl file (None: on all).

    batch_size examples are computed at a time. Raises ValueError for a line that is no example, an
    empty file, an empty context or ending, and a model whose losses are not finite.
    """
    batch_size = integer("batch_size", batch_size, 1)
    decoder = as_decoder(model)
    examples: list[tuple[int, int]] = []  # the number of endings, and the true one
    losses: list[float] = []  # one for each ending
    norms: list[float] = []  # the same per token

    def measure(endings: list[Example]) -> None:
        sums = decoder.token_losses(*padded(endings)).sum(1).tolist()
        losses.extend(sums)
        norms.extend(s / int((y != -100).sum()) for s, (_, y) in zip(sums, endings, strict=True))

    batch: list[Example] = []
    for context, endings, label in islice(_examples(Path(path)), limit):
        ids = encode_opening(tokenizer, context)
        if not ids:
            raise ValueError(f"{path}: an example has an empty context")
        for ending in endings:
            ending_ids = encode_continuation(tokenizer, f" {ending}")
            # A text that is too long loses its beginning.
            whole = (ids + ending_ids)[-(decoder.config.block_size + 1) :]
            batch.append(example(torch.tensor(whole, dtype=torch.int64), len(ending_ids)))
        examples.append((len(endings), label))
        if len(examples) % batch_size == 0:
            measure(batch)
            batch = []
    if batch:
        measure(batch)
    if not examples:
        raise ValueError(f"{path} has no examples")
    return _accuracy(examples, losses, norms)


def _accuracy(examples: list[tuple[int, int]], losses: list[float], norms: list[float]) -> Accuracy:
    if not all(map(math.isfinite, losses)):
        raise ValueError("the model's losses are not finite; check its weights")
    at, right = 0, [0, 0]
    for n, label in examples:
        for i, values in enumerate((losses, norms)):
            here = values[at : at + n]
            right[i] += here.index(min(here)) == label
        at += n
    return Accuracy(len(examples), right[0] / len(examples), right[1] / len(examples))
