"""Prompts continued by a decoder: checked, decoded, and cut at their stops."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.generation.beam import beam_search
from gptfast.generation.decoder import Continuation, Decoder, Job, TopLogprobs
from gptfast.generation.options import LogprobOptions, Options, new_tokens, token_ids
from gptfast.generation.stop import TextStream, id_stream
from gptfast.tokenizer.bpe import Tokenizer, end_of_text

Generated = (
    list[list[int]]
    | tuple[list[list[int]], list[list[float]]]
    | tuple[list[list[int]], list[list[float]], list[list[TopLogprobs]]]
)
"""Ids of each prompt; with log-probabilities, lists of those of each prompt's new tokens too."""


def checked_job(
    decoder: Decoder,
    idx: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    options: Options,
    logprobs: LogprobOptions | None = None,
) -> Job:
    """Return the checked arguments as a job.

    Raises ValueError for an option out of range or that the decoder does not have, and for an empty
    prompt; IndexError for an id outside the vocabulary.
    """
    V, device, logprobs = decoder.config.vocab_size, decoder.device, logprobs or LogprobOptions()
    stops = options.stops(V)
    try:
        prompts = token_ids(idx, V)
    except IndexError as error:
        known = options.tokenizer
        if known is None or known.n_vocab <= V:
            raise
        raise IndexError(
            f"{error}: the tokenizer has {known.n_vocab} tokens; leave that one out of the prompt, "
            "or use the model's own tokenizer"
        ) from None
    n = new_tokens(max_new_tokens)
    logprobs.check(V)
    options.check_beams(V)
    if logprobs.top and options.num_beams != 1:
        raise ValueError(
            f"beam search has no top_logprobs: leave out top_logprobs={logprobs.top} or take "
            "num_beams=1"
        )
    options.sampling(len(prompts), device)
    options.penalty(len(prompts), device)
    options.bias(V, device)
    if not decoder.can_guess:
        options.refuse_guesses()
    return Job(prompts, n, options.with_seeds(prompts), stops, logprobs)


def checked_stream_job(
    decoder: Decoder,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    options: Options,
    logprobs: LogprobOptions | None = None,
) -> Job:
    """Return the job of one streamed prompt. Raises what `checked_job` raises, and for beams."""
    job = checked_job(decoder, [prompt_ids], max_new_tokens, options, logprobs)  # type: ignore[list-item]
    if options.num_beams != 1:
        raise ValueError(
            f"num_beams={options.num_beams} cannot be streamed: no token of a beam search is "
            "certain before its end; use generate or generate_text"
        )
    return job


def continuations(decoder: Decoder, job: Job) -> list[Continuation]:
    """Return the new tokens of each prompt, with what ends them and possibly more after that."""
    if not job.prompts or job.n == 0:
        return [Continuation() for _ in job.prompts]
    if job.options.num_beams == 1:
        return decoder.decode(job)
    with torch.inference_mode(), decoder.sequences(job.prompts) as sequences:
        return beam_search(sequences, job, decoder.config.vocab_size)


def generate(decoder: Decoder, job: Job) -> Generated:
    """Return each prompt with its new ids, and the log-probabilities that the job asks for."""
    rows: list[list[int]] = []
    logprobs: list[list[float]] = []
    top: list[list[TopLogprobs]] = []
    for prompt, continuation in zip(job.prompts, continuations(decoder, job), strict=True):
        end = id_stream(job.options.tokenizer, job.stops)
        end.read(continuation.ids)
        rows.append(prompt + continuation.ids[: end.kept])
        logprobs.append(continuation.logprobs[: end.kept])
        top.append(continuation.top_logprobs[: end.kept])
    if job.logprobs.top:
        return rows, logprobs, top
    return (rows, logprobs) if job.logprobs.logprobs else rows


def stream_job(decoder: Decoder, job: Job) -> Iterator[Any]:
    """Yield the new ids of a job's only prompt, or tuples with the log-probabilities asked for.

    An id that may turn out to be part of a stop is held back until it is certain.
    """
    # Outside the generator, so that the call raises errors, not the first token.
    tokens = decoder.decode_stream(job)

    def ids() -> Iterator[Any]:
        end = id_stream(job.options.tokenizer, job.stops)
        new: list[Any] = []
        sent = 0
        for token in tokens:
            if job.logprobs.top:
                new.append(tuple(token))
            else:
                new.append((token.id, token.logprob) if job.logprobs.logprobs else token.id)
            end.feed(token.id)
            yield from new[sent : end.kept]
            sent = end.kept
            if end.ended:
                return
        end.finish()
        yield from new[sent : end.kept]

    return ids()


def stream(
    decoder: Decoder, prompt_ids: Sequence[int] | Tensor, max_new_tokens: int, **options: Any
) -> Iterator[int]:
    """Return the new ids of a prompt one by one. Bad input is refused by the call."""
    job = checked_stream_job(decoder, prompt_ids, max_new_tokens, Options.of(options))
    return stream_job(decoder, job)


def stream_pieces(decoder: Decoder, job: Job) -> Iterator[str]:
    """Yield the text of a streamed job's new tokens in pieces as it becomes certain."""
    tokens = decoder.decode_stream(job)

    def pieces() -> Iterator[str]:
        text = TextStream(job.options.tokenizer, job.stops)
        for token in tokens:
            if piece := text.feed(token.id):
                yield piece
            if text.ended:
                return
        if piece := text.finish():
            yield piece

    return pieces()


def text_options(
    tokenizer: Tokenizer, options: dict[str, Any], eos_ids: Sequence[int] = ()
) -> Options:
    """Return the options of generation from text.

    eos_ids: the ends that the model's files name; without any it is the tokenizer's end-of-text.
    """
    ends = list(eos_ids) or end_of_text(tokenizer)
    return Options.of({"eos_id": ends, **options, "tokenizer": tokenizer})
