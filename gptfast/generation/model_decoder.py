"""Generation by the model itself, in one loop, `decode_steps`. It defines what generation gives."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.device import moved
from gptfast.generation.decoder import (
    Continuation,
    Decoder,
    Job,
    SampledToken,
    TopLogprobs,
    check_sampled,
    top_logprobs,
)
from gptfast.generation.sequences import Sequences, evaluating, model_to_call
from gptfast.generation.stop import id_stream
from gptfast.model import GPT
from gptfast.modules import is_plain
from gptfast.ops.cross_entropy import fp32_linear_cross_entropy

HOST_CHECK_INTERVAL = 8
"""Tokens between two looks at whether all rows have ended, each of which waits for the device."""


def _losses(logits: Tensor, y: Tensor) -> Tensor:
    """Return `target_losses` from logits (B, T, V)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return ops.cross_entropy(logits, y.reshape(-1), reduction="none").view(y.shape).float()


def target_losses(model: GPT, hidden: Tensor, y: Tensor) -> Tensor:
    """Return the loss of every target y (B, T) from model.hidden's (B, T, C).

    fp32 in nats, for models in 16 bits too; 0 where the target is -100. There is no gradient.
    """
    with torch.no_grad():
        weight = model.weight_of_plain_head()
        if is_plain(weight):
            return fp32_linear_cross_entropy(hidden, weight, y, reduction="none").float()
        return _losses(model.head(hidden), y)


class ModelDecoder(Decoder):
    """Generation and losses from a GPT as it is, on its device and in its dtype.

    The model's modes, training or not, are restored after each token and each loss.
    """

    can_guess = False

    def __init__(self, model: GPT) -> None:
        self.model = model

    @property
    def config(self) -> GPTConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return getattr(self.model, "eos_ids", ())  # a wrapper has none

    def decode(self, job: Job) -> list[Continuation]:
        """Sample until every continuation has ended; those that end early go on until then."""
        with torch.inference_mode(), evaluating(self.model):
            return _decode(Sequences(self.model, job.prompts), job)

    def decode_stream(self, job: Job) -> Iterator[SampledToken]:
        steps = decode_steps(Sequences(self.model, job.prompts), job)

        def tokens() -> Iterator[SampledToken]:
            for sampled, logprobs in steps:
                ids = sampled.tolist()
                check_sampled(ids)
                logprob = logprobs[0].item() if logprobs else None
                top = top_logprobs(*logprobs[1:])[0] if job.logprobs.top else None
                yield SampledToken(ids[0], logprob, top)

        return tokens()

    @contextmanager
    def sequences(self, prompts: Sequence[Sequence[int]]) -> Iterator[Sequences]:
        with evaluating(self.model):
            yield Sequences(self.model, prompts)

    def token_losses(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad(), evaluating(self.model):
            x, y = moved(x, self.device), moved(y, self.device)
            whole = model_to_call(self.model)
            if whole is not None:
                return _losses(whole(x), y)
            return target_losses(self.model, self.model.hidden(x), y)

    def mean_loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad(), evaluating(self.model):
            return self.model(moved(x, self.device), moved(y, self.device))


def as_decoder(model: GPT | Decoder) -> Decoder:
    """Return a decoder as it is, and a model in a `ModelDecoder`."""
    return model if isinstance(model, Decoder) else ModelDecoder(model)


def decode_steps(sequences: Sequences, job: Job) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Sample up to n tokens per sequence: yield ids (B,) and `LogprobOptions.tensors` of each step.

    Options are checked by the call. Between two tokens the caller and the model are in their own
    modes again.
    """
    batch, device = len(sequences.tokens), sequences.tokens.device
    sampling, penalty = job.options.sampling(batch, device), job.options.penalty(batch, device)
    vocab_size = sequences.model.config.vocab_size
    bias, lacking = job.options.bias(vocab_size, device), job.options.lacking(vocab_size, device)

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = sequences.logits()  # (B, V)
        scores = logits if penalty is None else sequences.penalised(logits.float(), penalty)
        if bias is not None:
            scores = scores.float() + bias
        if lacking is not None:
            scores = scores.masked_fill(lacking, -math.inf)
        ids = ops.sample(scores, position=sequences.length, **sampling)  # (B,)
        sequences.append(ids)
        return ids, job.logprobs.tensors(logits, ids)

    def steps() -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        for _ in range(job.n):
            with torch.inference_mode(), evaluating(sequences.model):
                sampled = step()
            yield sampled

    return steps()


def _decode(sequences: Sequences, job: Job) -> list[Continuation]:
    stops = job.stops
    ends = [id_stream(job.options.tokenizer, stops) for _ in job.prompts]
    done = torch.zeros_like(sequences.length, dtype=torch.bool)
    steps: list[Tensor] = []
    logprobs_of_steps: list[tuple[Tensor, ...]] = []
    for step, (ids, logprobs) in enumerate(decode_steps(sequences, job)):
        steps.append(ids)
        logprobs_of_steps.append(logprobs)
        if stops.texts or stops.ids:
            on_host = ids.tolist()
            check_sampled(on_host)
            for end, i in zip(ends, on_host, strict=True):
                if not end.ended:
                    end.feed(i)
            if all(end.ended for end in ends):
                break
        elif stops.eos_ids:
            for eos_id in stops.eos_ids:
                done |= ids == eos_id
            if (step + 1) % HOST_CHECK_INTERVAL == 0 and done.all():
                break
    rows = torch.stack(steps, 1).tolist()
    for row in rows:
        check_sampled(row)
    columns = [torch.stack(column, 1) for column in zip(*logprobs_of_steps, strict=True)]
    if not columns:
        return [Continuation(row) for row in rows]
    logprobs_of_rows = columns[0].tolist()  # (B, n)
    top: list[list[TopLogprobs]] = [[] for _ in rows]
    if job.logprobs.top:
        top = [top_logprobs(*row) for row in zip(*columns[1:], strict=True)]  # from (B, n, top)
    return [Continuation(*row) for row in zip(rows, logprobs_of_rows, top, strict=True)]
