"""The keys and values of past tokens, for generation by a GPT itself."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of past tokens, in preallocated tensors (B, H, size, D) per layer."""

    k: list[Tensor]
    v: list[Tensor]
    length: Tensor  # (B,) int64, tokens in each row
    longest: int  # the largest length, on the host so that no step waits for the device
    ragged: bool  # whether the lengths differ; if not, one slice serves all rows

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, T, D) to a layer's; return all its keys and values so far.

        They are kept in the cache's dtype, to which autocast's narrower ones are converted.
        """
        if k.dtype != self.k[layer].dtype:
            self._widen(layer, k.dtype)
        past_k, past_v = self.k[layer], self.v[layer]
        end = self.longest + k.shape[2]
        if self.ragged:
            time = self.length[:, None] + torch.arange(k.shape[2], device=k.device)  # (B, T)
            row = torch.arange(k.shape[0], device=k.device)[:, None]
            past_k[row, :, time] = k.transpose(1, 2).to(past_k.dtype)
            past_v[row, :, time] = v.transpose(1, 2).to(past_v.dtype)
        else:
            past_k[:, :, self.longest : end] = k
            past_v[:, :, self.longest : end] = v
        return past_k[:, :, :end].to(k.dtype), past_v[:, :, :end].to(v.dtype)

    def _widen(self, layer: int, dtype: torch.dtype) -> None:
        """Keep a layer's keys and values in a dtype that holds theirs and this one."""
        for layers in (self.k, self.v):
            layers[layer] = layers[layer].to(torch.promote_types(layers[layer].dtype, dtype))
