"""Generation: ids or text, whole or one token at a time, drawn or searched for.

Each function checks its arguments, picks a decoder (`decoder_for`) and lets it do the work.
`import gptfast` imports this file, so models and decoders are imported only by a call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from gptfast.generation.continuation import Generated
    from gptfast.generation.decoder import Decoder, Job
    from gptfast.generation.options import Draft, Number
    from gptfast.generation.stop import Ends, Stop
    from gptfast.model import GPT
    from gptfast.tokenizer.bpe import Tokenizer


def generate(
    model: GPT | Decoder,
    idx: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: Number = 1.0,
    top_k: Number | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    eos_id: Ends = None,
    stop: Stop | None = None,
    seed: Number | None = None,
    tokenizer: Tokenizer | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    lookup: bool = False,
    draft: Draft | None = None,
) -> Generated:
    """Return each prompt with up to max_new_tokens more tokens, as one list of ids per prompt.

    model: a GPT, or an Engine, which repeated calls should share: a GPT on the CPU is packed anew
    for each call where that pays. idx: (B, T) int64, or a list of prompts of any lengths; past
    block_size, each token comes from the last block_size tokens, at positions from 0. The options
    from temperature to draft are described in `gptfast.generation.options.Options`.
    logprobs, top_logprobs=k: return (ids, logprobs) or (ids, logprobs, top_logprobs), with a float
    and k (id, float) pairs per new token, as `gptfast.generation.options.LogprobOptions` says.
    Raises ValueError for an empty prompt or an option out of range, IndexError for an unknown id.
    """
    from gptfast.generation import continuation
    from gptfast.generation.model_decoder import as_decoder
    from gptfast.generation.options import LogprobOptions, Options

    options = Options.of(
        dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        | dict(repetition_penalty=repetition_penalty, length_penalty=length_penalty)
        | dict(logit_bias=logit_bias)
        | dict(num_beams=num_beams, eos_id=eos_id, stop=stop, tokenizer=tokenizer)
        | dict(lookup=lookup, draft=draft)
    )
    asked = LogprobOptions(logprobs, top_logprobs)
    job = continuation.checked_job(as_decoder(model), idx, max_new_tokens, options, asked)
    return continuation.generate(_decoder(model, job), job)


def _decoder(model: GPT | Decoder, job: Job) -> Decoder:
    from gptfast.engine.choice import decoder_for

    return decoder_for(model, job.n if job.prompts else 0)


def stream(
    model: GPT | Decoder,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    logprobs: bool = False,
    top_logprobs: int = 0,
    **options: Any,
) -> Iterator[Any]:
    """Return the new ids of one prompt, (T,) or a list, one by one as they become certain.

    With logprobs=True they are (id, log-probability) pairs, with top_logprobs=k triples, the third
    of which is the k likeliest (id, log-probability) pairs. Takes `generate`'s options without
    beams, and raises what it raises, by the call and not by the first id. An id that may turn out
    to be part of a stop is held back until it is certain.
    """
    from gptfast.generation import continuation
    from gptfast.generation.model_decoder import as_decoder
    from gptfast.generation.options import LogprobOptions, Options

    asked = LogprobOptions(logprobs, top_logprobs)
    decoder, checked = as_decoder(model), Options.of(options)
    job = continuation.checked_stream_job(decoder, prompt_ids, max_new_tokens, checked, asked)
    return continuation.stream_job(_decoder(model, job), job)


def stream_text(
    model: GPT | Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    allowed_special: Collection[str] = (),
    **options: Any,
) -> Iterator[str]:
    """Return the text that `generate_text` puts after the prompt, in pieces as it becomes certain.

    A piece is whole characters, and never any part of a stop string.
    """
    from gptfast.generation import continuation
    from gptfast.generation.model_decoder import as_decoder

    ids = prompt_ids(tokenizer, prompt, allowed_special)
    decoder = as_decoder(model)
    checked = continuation.text_options(tokenizer, options, decoder.eos_ids)
    job = continuation.checked_stream_job(decoder, ids, max_new_tokens, checked)
    return continuation.stream_pieces(_decoder(model, job), job)


def prompt_ids(
    tokenizer: Tokenizer, prompt: str, allowed_special: Collection[str] = ()
) -> list[int]:
    """Return the ids of a prompt; those of an empty one are end-of-text, where a new text begins.

    In training, a text follows the end of the one before. Raises ValueError for an empty one if the
    vocabulary has no end-of-text.
    """
    from gptfast.tokenizer.bpe import encode_opening, end_of_text

    if ids := encode_opening(tokenizer, prompt, allowed_special):
        return ids
    end = end_of_text(tokenizer)
    if end is None or end >= tokenizer.n_vocab:
        raise ValueError(
            "the prompt is empty, and this vocabulary has no end-of-text to start from; write one"
        )
    return [end]


def generate_text(
    model: GPT | Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    max_new_tokens: int,
    *,
    allowed_special: Collection[str] = (),
    **options: Any,
) -> str | list[str]:
    """Return a prompt and its continuation as text; for a list of prompts, a list of texts.

    Takes `generate`'s options; ends at the ids that the model's files name,
    else at the tokenizer's end-of-text, unless eos_id says otherwise.
    End-of-text and ids that only the model has are not part of the text. With `stop`, the text ends
    where the stop begins, even inside a token. allowed_special: names of special tokens that the
    prompt may hold; any other name is plain text. An empty prompt starts from end-of-text. Raises
    what `generate` raises.
    """
    from gptfast.generation import continuation
    from gptfast.generation.model_decoder import as_decoder
    from gptfast.generation.stop import TextStream

    if not isinstance(prompt, Sequence):
        raise ValueError(f"prompt must be a string or a list of strings, got {prompt!r}")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    ids = [prompt_ids(tokenizer, p, allowed_special) for p in prompts]
    decoder = as_decoder(model)
    checked = continuation.text_options(tokenizer, options, decoder.eos_ids)
    job = continuation.checked_job(decoder, ids, max_new_tokens, checked)
    found = continuation.continuations(_decoder(model, job), job)
    texts = [
        p + TextStream(tokenizer, job.stops).read(new.ids)
        for p, new in zip(prompts, found, strict=True)
    ]
    return texts[0] if isinstance(prompt, str) else texts
