"""Sequences that grow token by token in a batch, and the logits of the next token of each.

Prompts of a batch may have unequal lengths. They are padded on the right, where causal attention
never looks; from then on each sequence writes at its own length and sees only its own keys.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.kv_cache import KVCache
from gptfast.model import GPT
from gptfast.modules import any_global_hooks, has_hooks

MIN_ROOM_TOKENS = 64
"""New tokens for which there is room at first; the room doubles when it is full."""


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Switch dropout off inside the block, and restore the mode of each module after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def penalised(logits: Tensor, penalty: Tensor) -> Tensor:
    """Return logits made smaller: divided by the penalty if positive, multiplied if negative.

    This is CTRL's repetition penalty (Keskar et al., 2019); logits and penalty broadcast.
    """
    return torch.where(logits < 0, logits * penalty, logits / penalty)


def model_to_call(model: nn.Module) -> GPT | None:
    """Return the GPT in a model, itself or in a wrapper, if a call of it does more than its parts.

    It then has hooks or a forward of its own, which the steps with a cache would leave out.
    """
    gpts = (module for module in model.modules() if isinstance(module, GPT))
    gpt = model if isinstance(model, GPT) else next(gpts, None)
    return gpt if gpt is not None and (any_global_hooks() or has_hooks(gpt)) else None


def whole_logits(model: GPT, tokens: Tensor, length: Tensor) -> Tensor:
    """Return next-token logits (B, V) by calling the model on tokens (B, T), without a cache."""
    logits = model(tokens.clamp(min=0))  # (B, T, V)
    return logits[torch.arange(len(tokens), device=tokens.device), length - 1]


def _head(model: GPT, x: Tensor, last: Tensor) -> Tensor:
    """Return the logits (B, V) at position last[b] of x (B, T, C)."""
    row = torch.arange(x.shape[0], device=x.device)
    return model.head(x[row, last])


def prefill(model: GPT, tokens: Tensor, lengths: Sequence[int], cache: KVCache) -> Tensor:
    """Fill the cache with prompts (B, T), padded after their lengths; return logits (B, V)."""
    length = torch.tensor(lengths, dtype=torch.int64, device=tokens.device)
    logits = _head(model, model.hidden(tokens, cache=cache), length - 1)
    cache.length, cache.longest = length, tokens.shape[1]
    cache.ragged = min(lengths) < tokens.shape[1]
    return logits


def decode_one_token(model: GPT, ids: Tensor, cache: KVCache) -> Tensor:
    """Append ids (B,) to the cache; return the logits (B, V) of the next token."""
    x = model.hidden(ids[:, None], cache=cache)  # (B, 1, C)
    cache.length, cache.longest = cache.length + 1, cache.longest + 1
    return model.head(x[:, 0])


def window_logits(model: GPT, tokens: Tensor, length: Tensor) -> Tensor:
    """Return next-token logits (B, V) from each row's last block_size tokens, positions from 0."""
    block_size = model.config.block_size
    start = (length - block_size).clamp(min=0)
    at = start[:, None] + torch.arange(block_size, device=tokens.device)  # (B, block_size)
    window = tokens.gather(1, at).clamp(min=0)
    whole = model_to_call(model)
    if whole is not None:
        return whole_logits(whole, window, length - start)
    return _head(model, model.hidden(window), length - start - 1)


class Sequences:
    """Prompts and their continuations: tokens (B, room), lengths, and the cache of past keys.

    `logits` and `append` take turns. Memory grows with what is appended. The caller switches
    inference mode and `evaluating` on.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self._hold(prompts, model.device)
        size = min(self.tokens.shape[1], model.config.block_size)
        self._cache = model.new_cache(len(prompts), size)

    def _hold(self, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self._lengths = [len(prompt) for prompt in prompts]
        self.longest = max(self._lengths)  # on the host, so that no step waits for the device
        tokens = torch.zeros(len(prompts), self.longest + MIN_ROOM_TOKENS, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        self.tokens = tokens.to(device)
        self.length = torch.tensor(self._lengths, dtype=torch.int64, device=device)  # (B,)

    def logits(self) -> Tensor:
        """Return next-token logits (B, V)."""
        block_size, cache = self.model.config.block_size, self._cache
        if self.longest > block_size:
            cache.longest = 0
            return window_logits(self.model, self.tokens, self.length)
        whole = model_to_call(self.model)
        if whole is not None:
            cache.longest = 0
            return whole_logits(whole, self.tokens[:, : self.longest], self.length)
        if not cache.longest:
            prompts = self.tokens[:, : self.longest]
            return prefill(self.model, prompts, self._lengths, cache)
        if cache.longest == cache.k[0].shape[2]:
            extra = min(cache.longest, block_size - cache.longest)
            for layers in (cache.k, cache.v):
                layers[:] = [F.pad(past, (0, 0, 0, extra)) for past in layers]
        # A row whose logits were bad holds -1: the caller raises when the ids reach the host.
        last = self.tokens.gather(1, self.length[:, None] - 1)[:, 0].clamp(min=0)  # (B,)
        return decode_one_token(self.model, last, cache)

    def append(self, ids: Tensor) -> None:
        """Add one token to each sequence: ids (B,) int64."""
        if self.longest == self.tokens.shape[1]:
            self.tokens = F.pad(self.tokens, (0, self.longest))
        self.tokens.scatter_(1, self.length[:, None], ids[:, None])
        self.length, self.longest = self.length + 1, self.longest + 1

    def select(self, rows: Tensor) -> None:
        """Replace sequence i by a copy of sequence rows[i]; their number may change."""
        self.tokens, self.length = self.tokens[rows], self.length[rows]
        cache = self._cache
        cache.length = cache.length[rows]
        for layers in (cache.k, cache.v):
            for layer, past in enumerate(layers):
                used = past[:, :, : cache.longest].index_select(0, rows)
                if len(rows) != len(past):
                    layers[layer] = past.new_zeros(len(rows), *past.shape[1:])
                layers[layer][:, :, : cache.longest] = used

    def penalised(self, scores: Tensor, penalty: Tensor) -> Tensor:
        """Return scores (B, V) with those of each sequence's own tokens penalised, by (B,)."""
        time = torch.arange(self.longest, device=scores.device)
        inside = time < self.length[:, None]  # (B, T)
        seen = self.tokens[:, : self.longest].where(inside, self.tokens[:, :1]).clamp(min=0)
        return scores.scatter(1, seen, penalised(scores.gather(1, seen), penalty[:, None]))
