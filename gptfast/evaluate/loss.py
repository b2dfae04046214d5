"""Loss, perplexity and bits per byte of a model, on batches and on text by a sliding window."""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gptfast import ops
from gptfast.data.token_files import TokenFiles
from gptfast.engine.engine import Engine
from gptfast.generation.sequences import evaluating
from gptfast.model import GPT
from gptfast.tokenizer.bpe import Tokenizer


def batch_loss(model: GPT | Engine, x: Tensor, y: Tensor) -> Tensor:
    """Mean loss over the targets y (B, T) that count, nats per token; moves x, y to the model."""
    if isinstance(model, Engine):
        losses = token_losses(model, x, y)
        return losses.sum() / (y != -100).sum()
    device = model.wte.weight.device
    return model(x.to(device), y.to(device))


@torch.no_grad()
def loader_loss(
    model: GPT | Engine, batches: Iterable[tuple[Tensor, Tensor]], max_batches: int | None = None
) -> float:
    """Mean loss per token over batches (the first max_batches if given), without dropout.

    Every token counts the same, whatever the size of its batch. Raises ValueError for no tokens.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for x, y in islice(batches, max_batches):
            n = int((y != -100).sum())
            if n:
                total += batch_loss(model, x, y).item() * n
            count += n
    if not count:
        raise ValueError("no tokens to evaluate: the loader is empty or every target is ignored")
    return total / count


Row = tuple[Tensor, Tensor]
"""Input and targets, each (T,) int64; -100 where a target does not count."""


def row(ids: Tensor, n: int) -> Row:
    """Ids (T + 1,) as input and targets, of which the last n count."""
    y = ids[1:].clone()
    y[: max(0, len(y) - n)] = -100
    return ids[:-1], y


def padded(model: GPT | Engine, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Rows of any lengths as a batch (B, longest), on the model's device; -100 past a row's end."""
    device = torch.device("cpu") if isinstance(model, Engine) else model.wte.weight.device
    x = pad_sequence([x for x, _ in rows], batch_first=True).to(device)
    y = pad_sequence([y for _, y in rows], batch_first=True, padding_value=-100).to(device)
    return x, y


@torch.no_grad()
def target_losses(model: GPT, hidden: Tensor, y: Tensor) -> Tensor:
    """The loss of every target y (B, T) from model.hidden's (B, T, C): fp32 nats, 0 where it is
    -100."""
    device = hidden.device
    # In fp32, of 16-bit models too.
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, dtype=hidden.dtype) if half else nullcontext():
        loss = ops.linear_cross_entropy(hidden, model.head_weight, y, reduction="none")
    return loss.float()


@torch.no_grad()
def token_losses(model: GPT | Engine, x: Tensor, y: Tensor) -> Tensor:
    """The loss of every target y (B, T) behind x (B, T): fp32 nats, 0 where it is -100."""
    if not isinstance(model, Engine):
        return target_losses(model, model.hidden(x), y)
    losses = torch.zeros(y.shape)
    for loss, ids, target in zip(losses, x, y, strict=True):
        asked = (target != -100).nonzero()[:, 0].tolist()
        if asked:
            n = asked[-1] + 1  # what follows is padding
            loss[:n] = model.losses(ids[:n].tolist(), target[:n])
    return losses


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    loss: float
    """Nats per token."""
    nats: float
    """Of all tokens that were predicted."""
    n_tokens: int
    """That were predicted."""
    n_bytes: int
    """Of them as text; end-of-text is none."""

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """The bytes of each token, (vocab_size,) int64; 0 for end-of-text and ids without a token."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    for i in range(min(tokenizer.n_vocab, vocab_size)):
        if i != tokenizer.eot:
            lengths[i] = len(tokenizer.decode_bytes([i]))
    return lengths


def loader_score(
    model: GPT | Engine, batches: Iterable[tuple[Tensor, Tensor]], tokenizer: Tokenizer
) -> Score:
    """`loader_loss` of batches that can be gone through twice, with what bits per byte need."""
    loss = loader_loss(model, batches)
    lengths = byte_lengths(tokenizer, model.config.vocab_size)
    targets = [y[y != -100] for _, y in batches]
    n_bytes, n = sum(int(lengths[y].sum()) for y in targets), sum(map(len, targets))
    return Score(loss, loss * n, n, n_bytes)


def _windows(n: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over n tokens: where each begins and ends, and how many of its tokens are new."""
    before = 0
    for begin in range(0, n, stride):
        end = min(begin + max_length, n)
        yield begin, end, end - before
        before = end
        if end == n:
            return


def sliding_score(
    model: GPT | Engine,
    tokens: Tensor | TokenFiles,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    stride: int,
    batch_size: int = 8,
) -> Score:
    """A long text's score by a sliding window: each window of max_length tokens predicts those that
    the one before has not, stride many, with what stands before them in it as context.

    The loss is that of transformers' documented recipe ("Perplexity of fixed-length models"), which
    weights a window's mean by the number of its new tokens less one. tokens: (n,) int64.
    Raises ValueError for a stride outside [1, max_length], a window longer than block_size and
    fewer than two tokens.
    """
    if not 2 <= max_length <= model.config.block_size:
        raise ValueError(
            f"max_length must be from 2 to block_size={model.config.block_size}, got {max_length}"
        )
    if not 1 <= stride <= max_length:
        raise ValueError(f"stride must be from 1 to max_length={max_length}, got {stride}")
    windows = list(_windows(len(tokens), max_length, stride))
    found, score = _measure(model, tokens, tokenizer, windows, batch_size)
    new = [new - 1 for begin, end, new in windows if end - begin > 1]
    weighted = sum(nats / n * weight for (nats, n), weight in zip(found, new, strict=True))
    return replace(score, loss=weighted / sum(new))


def text_score(
    model: GPT | Engine,
    tokens: Tensor | TokenFiles,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    batch_size: int = 8,
) -> Score:
    """A text's score by windows side by side, as training sees it: max_length inputs each, the last
    as many as are left, so that every token but the first is predicted once. tokens: (n,) int64.

    Raises ValueError for a max_length outside [1, block_size] and fewer than two tokens.
    """
    if not 1 <= max_length <= model.config.block_size:
        raise ValueError(
            f"max_length must be from 1 to block_size={model.config.block_size}, got {max_length}"
        )
    # A window shares its first token, an input only, with the end of the one before.
    windows = list(_windows(len(tokens), max_length + 1, max_length))
    return _measure(model, tokens, tokenizer, windows, batch_size)[1]


def _measure(
    model: GPT | Engine,
    tokens: Tensor | TokenFiles,
    tokenizer: Tokenizer,
    windows: list[tuple[int, int, int]],
    batch_size: int,
) -> tuple[list[tuple[float, int]], Score]:
    """Of each window that predicts something the nats and the number of its predictions; and the
    score of all."""
    if len(tokens) < 2:
        raise ValueError(f"no tokens to evaluate: {len(tokens)} are there, two are needed")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    lengths = byte_lengths(tokenizer, model.config.vocab_size)
    windows = [window for window in windows if window[1] - window[0] > 1]
    found, n_bytes = [], 0
    with torch.no_grad(), evaluating(model):
        for i in range(0, len(windows), batch_size):
            rows = [_row(tokens, *window) for window in windows[i : i + batch_size]]
            x, y = padded(model, rows)
            sums = token_losses(model, x, y).double().sum(1).tolist()
            found += zip(sums, (y != -100).sum(1).tolist(), strict=True)
            n_bytes += int(lengths[y[y != -100].cpu()].sum())
    nats, n = (sum(column) for column in zip(*found, strict=True))
    return found, Score(nats / n, nats, n, n_bytes)


def _row(tokens: Tensor | TokenFiles, begin: int, end: int, new: int) -> Row:
    window = tokens[begin:end]
    return row(window.tensor() if isinstance(window, TokenFiles) else window, new)


def perplexity(loss: float) -> float:
    """exp(loss), loss in nats per token."""
    return math.inf if loss > 700 else math.exp(loss)
