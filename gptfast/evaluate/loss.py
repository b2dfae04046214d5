"""Loss, perplexity and bits per byte of a model, on batches and on text by a sliding window."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gptfast.checks import integer
from gptfast.data.token_files import TokenFiles
from gptfast.generation.decoder import Decoder
from gptfast.generation.model_decoder import as_decoder
from gptfast.model import GPT
from gptfast.tokenizer.bpe import Tokenizer, end_of_text


def loader_loss(
    model: GPT | Decoder, batches: Iterable[tuple[Tensor, Tensor]], max_batches: int | None = None
) -> float:
    """Return the mean loss per token over batches, without dropout, in nats.

    batches: pairs of x and y, each (B, T) int64; with max_batches only the first of them. Each
    token counts the same, whatever the size of its batch. Raises ValueError without any tokens.
    """
    decoder = as_decoder(model)
    total: Tensor | float = 0.0
    count = 0
    for x, y in islice(batches, max_batches):
        n = int((y != -100).sum())
        if n:
            # Read after the last batch only: a GPU need not wait for the host in between.
            total = total + decoder.mean_loss(x, y).double() * n
        count += n
    if not count:
        raise ValueError("no tokens to evaluate: the loader is empty or every target is ignored")
    return float(total) / count


Example = tuple[Tensor, Tensor]
"""Input and targets, each (T,) int64; -100 where a target does not count."""


def example(ids: Tensor, n: int) -> Example:
    """Return ids (T + 1,) as input and targets, of which the last n count."""
    y = ids[1:].clone()
    y[: max(0, len(y) - n)] = -100
    return ids[:-1], y


def padded(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Return examples of any lengths as one batch x, y (B, longest), with -100 after their ends."""
    x = pad_sequence([x for x, _ in examples], batch_first=True)
    y = pad_sequence([y for _, y in examples], batch_first=True, padding_value=-100)
    return x, y


def token_losses(model: GPT | Decoder, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of every target y (B, T) after x (B, T): fp32 nats, 0 where it is -100."""
    return as_decoder(model).token_losses(x, y)


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    loss: float
    """Nats per token."""
    nats: float
    """The sum of the losses of all predicted tokens."""
    n_tokens: int
    """How many tokens were predicted."""
    n_bytes: int
    """The bytes of their text; end-of-text has none."""

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of text, NaN for no text."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Return the bytes of each token, (vocab_size,) int64; 0 for end-of-text and unused ids."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    eot = end_of_text(tokenizer)
    for i in range(min(tokenizer.n_vocab, vocab_size)):
        if i != eot:
            lengths[i] = len(tokenizer.decode_bytes([i]))
    return lengths


def loader_score(
    model: GPT | Decoder, batches: Iterable[tuple[Tensor, Tensor]], tokenizer: Tokenizer
) -> Score:
    """Return the score of batches, which can be iterated twice: their `loader_loss` and bytes."""
    loss = loader_loss(model, batches)
    lengths = byte_lengths(tokenizer, model.config.vocab_size)
    targets = [y[y != -100] for _, y in batches]
    n_bytes, n = sum(int(lengths[y].sum()) for y in targets), sum(map(len, targets))
    return Score(loss, loss * n, n, n_bytes)


def window_length(max_length: int | None, block_size: int, *, least: int = 1) -> int:
    """Return how many tokens a window has: max_length, or block_size for None.

    Raises ValueError unless max_length is an integer in [least, block_size].
    """
    n = block_size if max_length is None else integer("max_length", max_length)
    if not least <= n <= block_size:
        raise ValueError(f"max_length must be from {least} to block_size={block_size}, got {n}")
    return n


def _windows(n: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows over n tokens: begin, end, and how many tokens the one before did not have."""
    before = 0
    for begin in range(0, n, stride):
        end = min(begin + max_length, n)
        yield begin, end, end - before
        before = end
        if end == n:
            return


def sliding_score(
    model: GPT | Decoder,
    tokens: Tensor | TokenFiles,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    stride: int,
    batch_size: int = 8,
) -> Score:
    """Return the score of a long text, tokens (n,) int64, by a sliding window.

    Each window of max_length tokens predicts its last `stride` tokens, which the window before it
    did not have; the tokens before them are context. The loss is that of transformers' documented
    recipe ("Perplexity of fixed-length models"), which weights a window's mean by the number of its
    new tokens less one. Raises ValueError for a stride outside [1, max_length], a max_length
    outside [2, block_size], and fewer than two tokens.
    """
    max_length = window_length(max_length, model.config.block_size, least=2)
    if not 1 <= stride <= max_length:
        raise ValueError(f"stride must be from 1 to max_length={max_length}, got {stride}")
    windows = list(_windows(len(tokens), max_length, stride))
    found, score = _measure(model, tokens, tokenizer, windows, batch_size)
    new = [new - 1 for begin, end, new in windows if end - begin > 1]
    weighted = sum(nats / n * weight for (nats, n), weight in zip(found, new, strict=True))
    return replace(score, loss=weighted / sum(new))


def text_score(
    model: GPT | Decoder,
    tokens: Tensor | TokenFiles,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    batch_size: int = 8,
) -> Score:
    """Return the score of a text, tokens (n,) int64, by windows side by side, as training has them.

    Each window has max_length inputs, the last one as many as are left, so that every token but the
    first is predicted once. Raises ValueError for a max_length outside [1, block_size]
    and for fewer than two tokens.
    """
    max_length = window_length(max_length, model.config.block_size)
    # A window shares its first token, an input only, with the end of the one before.
    windows = list(_windows(len(tokens), max_length + 1, max_length))
    return _measure(model, tokens, tokenizer, windows, batch_size)[1]


def _measure(
    model: GPT | Decoder,
    tokens: Tensor | TokenFiles,
    tokenizer: Tokenizer,
    windows: list[tuple[int, int, int]],
    batch_size: int,
) -> tuple[list[tuple[float, int]], Score]:
    """Return each window's nats and number of predictions, if it has any, and the score of all."""
    if len(tokens) < 2:
        raise ValueError(f"evaluation needs at least two tokens, got {len(tokens)}; use more text")
    batch_size = integer("batch_size", batch_size, 1)
    lengths = byte_lengths(tokenizer, model.config.vocab_size)
    windows = [window for window in windows if window[1] - window[0] > 1]
    sums: list[Tensor] = []
    counts: list[int] = []
    n_bytes = 0
    decoder = as_decoder(model)
    for i in range(0, len(windows), batch_size):
        x, y = padded([_example(tokens, *window) for window in windows[i : i + batch_size]])
        sums.append(decoder.token_losses(x, y).double().sum(1))
        counts += (y != -100).sum(1).tolist()
        n_bytes += int(lengths[y[y != -100]].sum())
    found = list(zip(torch.cat(sums).tolist(), counts, strict=True))
    nats, n = sum(nats for nats, _ in found), sum(n for _, n in found)
    return found, Score(nats / n, nats, n, n_bytes)


def _example(tokens: Tensor | TokenFiles, begin: int, end: int, new: int) -> Example:
    window = tokens[begin:end]
    return example(window.tensor() if isinstance(window, TokenFiles) else window, new)


def rounding_cost(rounded: Score, plain: Score) -> str:
    """Say by how many per cent rounded weights raise the perplexity of the same text."""
    cost = math.expm1(rounded.loss - plain.loss)
    return (
        f"{cost:.2%} of perplexity, {perplexity(plain.loss):.2f} in fp32, "
        f"on {plain.n_tokens:,} tokens"
    )


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats per token, infinity where it overflows."""
    return math.inf if loss > 700 else math.exp(loss)
