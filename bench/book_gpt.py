"""GPT-2 as Raschka's *Build a Large Language Model (From Scratch)* builds it, as a peer.

Three layers make queries, keys and values; the attention matrix is computed in full under a mask
kept as a buffer; layer norm and GELU are written out; the head is a layer of its own, not tied.
This is our own code under the book's parameter names, so that its files load here. The benchmark
trains it with `torch.optim.AdamW`, as chapter 5 does.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast import GPTConfig


class Norm(nn.Module):
    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(n_embd)), nn.Parameter(torch.zeros(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=False)
        return self.scale * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.shift


class Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))
        return 0.5 * x * (1 + torch.tanh(inner))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, T = config.n_embd, config.block_size
        self.n_head = config.n_head
        bias = config.qkv_bias
        self.W_query, self.W_key, self.W_value = (nn.Linear(C, C, bias) for _ in range(3))
        self.out_proj = nn.Linear(C, C)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("mask", torch.triu(torch.ones(T, T), diagonal=1))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            layer(x).view(B, T, self.n_head, -1).transpose(1, 2)
            for layer in (self.W_query, self.W_key, self.W_value)
        )  # (B, H, T, D)
        scores = q @ k.transpose(2, 3)  # (B, H, T, T)
        scores.masked_fill_(self.mask.bool()[:T, :T], -torch.inf)
        weights = self.dropout(torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1))
        return self.out_proj((weights @ v).transpose(1, 2).contiguous().view(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(C, 4 * C), Gelu(), nn.Linear(4 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.att, self.norm1, self.norm2 = Attention(config), Norm(C), Norm(C)
        self.ff = FeedForward(C)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.att(self.norm1(x)))
        return x + self.drop(self.ff(self.norm2(x)))


class BookGPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.trf_blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
        self.final_norm = Norm(config.n_embd)
        self.out_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, target: Tensor | None = None) -> Tensor:
        x = self.drop(self.tok_emb(idx) + self.pos_emb(torch.arange(idx.shape[1])))
        logits = self.out_head(self.final_norm(self.trf_blocks(x)))  # (B, T, V)
        if target is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())
