"""Generation: prefill, sample, decode one token, repeat.

Rows of a batch may have unequal lengths. Prompts are padded on the right, where causal attention
never looks; from then on each row writes at its own length and sees its own keys only.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import ops
from gptfast.model import GPT, KVCache
from gptfast.ops.sampling import per_row
from gptfast.tokenizer import Tokenizer


def _head(model: GPT, x: Tensor, last: Tensor) -> Tensor:
    """Logits (B, V) of position last[b] of x (B, T, C)."""
    row = torch.arange(x.shape[0], device=x.device)
    return F.linear(x[row, last], model.head_weight)


def prefill(model: GPT, tokens: Tensor, lengths: Sequence[int], cache: KVCache) -> Tensor:
    """Run prompts (B, T), padded behind their lengths; next-token logits (B, V)."""
    length = torch.tensor(lengths, device=tokens.device)
    logits = _head(model, model.hidden(tokens, cache=cache), length - 1)
    cache.length, cache.longest = length, tokens.shape[1]
    cache.ragged = min(lengths) < tokens.shape[1]
    return logits


def decode_one_token(model: GPT, ids: Tensor, cache: KVCache) -> Tensor:
    """Append ids (B,) to the cache; next-token logits (B, V)."""
    x = model.hidden(ids[:, None], cache=cache)  # (B, 1, C)
    cache.length, cache.longest = cache.length + 1, cache.longest + 1
    return F.linear(x[:, 0], model.head_weight)


def window_logits(model: GPT, tokens: Tensor, length: Tensor) -> Tensor:
    """Next-token logits (B, V) from each row's last block_size tokens, at positions from 0."""
    block_size = model.config.block_size
    start = (length - block_size).clamp(min=0)
    width = min(block_size, tokens.shape[1])
    at = start[:, None] + torch.arange(width, device=tokens.device)  # (B, width)
    window = tokens.gather(1, at.clamp(max=tokens.shape[1] - 1))
    return _head(model, model.hidden(window), length - start - 1)


def _prompts(idx: Tensor | Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    if isinstance(idx, Tensor) and idx.dim() != 2:
        raise ValueError(f"idx must be (B, T) or a list of prompts, got shape {tuple(idx.shape)}")
    if not isinstance(idx, Tensor) and not all(isinstance(p, Sequence | Tensor) for p in idx):
        raise ValueError("idx must be (B, T) or a list of prompts, each a list of token ids")
    prompts = [list(p) for p in (idx.tolist() if isinstance(idx, Tensor) else idx)]
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; start it with at least one token")
        for i in prompt:
            if not 0 <= i < vocab_size:
                raise IndexError(
                    f"prompt {row} has token id {i}, out of range for a vocabulary of {vocab_size}"
                )
    return prompts


@torch.inference_mode()
def generate(
    model: GPT,
    idx: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    eos_id: int | None = None,
    seed: int | Tensor = 0,
) -> list[list[int]]:
    """Continue prompts by up to max_new_tokens tokens each.

    idx: (B, T) int64, or a list of prompts of unequal length. The sampling parameters are
    `ops.sample`'s; temperature 0 is greedy. A row stops after eos_id, which it keeps. Past
    block_size, each token comes from the last block_size tokens at positions from 0.

    Returns one list of ids per prompt, the prompt in front. Raises ValueError for an empty prompt
    or a parameter out of range, IndexError for an id outside the vocabulary.
    """
    prompts = _prompts(idx, model.config.vocab_size)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
    if not prompts or max_new_tokens == 0:
        return prompts
    was_training = model.training
    model.eval()
    try:
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        rows = _decode(model, prompts, max_new_tokens, eos_id, seed, options)
    finally:
        model.train(was_training)
    return [_cut(row, len(prompt), eos_id) for row, prompt in zip(rows, prompts, strict=True)]


def _decode(
    model: GPT,
    prompts: list[list[int]],
    n: int,
    eos_id: int | None,
    seed: int | Tensor,
    options: dict,
) -> list[list[int]]:
    device, block_size = model.wte.weight.device, model.config.block_size
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    tokens = torch.zeros(len(prompts), longest + n, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    length = torch.tensor(lengths, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache = model.new_cache(len(prompts), min(longest + n, block_size))
    if longest <= block_size:
        logits = prefill(model, tokens[:, :longest], lengths, cache)
    else:
        logits = window_logits(model, tokens, length)
    options = per_row(logits, seed=seed, **options)
    for step in range(n):
        ids = ops.sample(logits, position=length, **options)  # (B,)
        tokens.scatter_(1, length[:, None], ids[:, None])
        length = length + 1
        if step + 1 == n:
            break
        if eos_id is not None:
            done |= ids == eos_id
            # Asking the device waits for it, so not at every token.
            if step % 8 == 7 and done.all():
                break
        # A row that could not be sampled holds -1, raised below when the ids reach the host.
        ids = ids.clamp(min=0)
        if cache.longest and cache.longest < block_size:
            logits = decode_one_token(model, ids, cache)
        else:
            cache.longest = 0
            logits = window_logits(model, tokens.clamp(min=0), length)
    rows = [row[:end] for row, end in zip(tokens.tolist(), length.tolist(), strict=True)]
    if any(-1 in row for row in rows):
        raise ValueError("the model's logits had NaN, +inf or nothing but -inf; check its weights")
    return rows


def _cut(row: list[int], prompt_length: int, eos_id: int | None) -> list[int]:
    if eos_id is None or eos_id not in row[prompt_length:]:
        return row
    return row[: row.index(eos_id, prompt_length) + 1]


def generate_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, **sampling: float | None
) -> str:
    """Text to text: encode, `generate`, decode; stops at the tokenizer's end-of-text."""
    sampling.setdefault("eos_id", tokenizer.eot)
    ids = generate(model, [tokenizer.encode(prompt)], max_new_tokens, **sampling)[0]
    # End-of-text is not text, and a model may have more ids than its tokenizer has tokens.
    return tokenizer.decode([i for i in ids if i < tokenizer.n_vocab and i != tokenizer.eot])
