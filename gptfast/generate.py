"""Generation: whole rows or one token at a time, ids or text, drawn or searched for.

By an engine, where there is one (`engine_for`), else by the model itself (`gptfast.decode`), which
defines what comes out. `beam_search` is the other way to go on.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor

from gptfast.engine.engine import Engine
from gptfast.generation.continuation import _continue, _raw_stream, _streamed, text_pieces
from gptfast.generation.decoder import Told, Top
from gptfast.generation.options import Number, Options, token_ids
from gptfast.generation.stop import Stop, TextStream, id_stream
from gptfast.model import GPT
from gptfast.tokenizer.bpe import Tokenizer


def generate(
    model: GPT | Engine,
    idx: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: Number = 1.0,
    top_k: Number | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    eos_id: int | None = None,
    stop: Stop | None = None,
    seed: Number = 0,
    tokenizer: Tokenizer | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    lookup: bool = False,
    draft: Engine | None = None,
) -> list[list[int]] | tuple[list[list[int]], list[list[float]], *tuple[list[list[Top]], ...]]:
    """Continue prompts by up to max_new_tokens tokens each.

    model: a GPT or an Engine. For a GPT on the CPU that is asked for more than a few tokens, an
    engine is packed for the call, which takes its weights once more in memory; who generates again
    and again keeps an Engine.

    idx: (B, T) int64, or a list of prompts of unequal length. Past block_size, each token comes
    from the last block_size tokens at positions from 0.

    temperature, top_k, top_p, min_p, seed: `ops.sample`'s; temperature 0 is greedy.
    repetition_penalty: CTRL's (Keskar et al., 2019), before the temperature: logits of tokens
    already in the row, prompt included, are divided by it if positive, else multiplied; 1 is off.
    Each is a number, or B of them, a tensor or a list, so that rows may differ.

    num_beams > 1: beam search (see `gptfast.beam`) instead of drawing; the result is the hypothesis
    with the highest sum of log-probabilities / its new tokens ** length_penalty. There the
    repetition penalty applies to log-probabilities, and seed means nothing.

    eos_id: a row stops after it and keeps it. stop: a string, or a list of strings and id lists,
    looked for among the new tokens. A row ends before its stop: no token that holds a part of the
    stop is returned. Strings need `tokenizer`. Of several stops the one complete first counts.

    A prompt gets the same ids alone, in a batch of any prompts, streamed or without a cache: by an
    Engine always, else unless rounding (products of matrices of other shapes) moves a logit over
    the very edge of a choice.

    lookup, draft: let what followed the last tokens where they stood before, or an Engine of a
    smaller model with the same vocabulary, guess at several tokens, which the engine then checks
    at once. The tokens are the same, drawn or greedy; it only is faster where guesses come true.

    Returns one list of ids per prompt, the prompt in front; with logprobs=True also, per row, one
    float for each new token returned: the log-softmax in fp32 of the model's own logits, before
    penalty, temperature and truncation. top_logprobs=k: also, per row and new token, the k
    likeliest (id, log-probability) there, from the likeliest down.

    Raises ValueError for an empty prompt or a parameter out of range, IndexError for an id outside
    the vocabulary.
    """
    options = Options(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        length_penalty=length_penalty,
        eos_id=eos_id,
        stop=stop,
        seed=seed,
        tokenizer=tokenizer,
        lookup=lookup,
        draft=draft,
    )
    prompts = token_ids(idx, model.config.vocab_size)
    stops = options.stops(model.config.vocab_size)
    told = Told(logprobs, top_logprobs)
    continued = _continue(model, prompts, max_new_tokens, options, stops, told)
    rows, of_rows, tops_of_rows = [], [], []
    for prompt, row in zip(prompts, continued, strict=True):
        end = id_stream(tokenizer, stops)
        end.read(row.ids)
        rows.append(prompt + row.ids[: end.kept])
        of_rows.append(row.logprobs[: end.kept])
        tops_of_rows.append(row.top[: end.kept])
    if top_logprobs:
        return rows, of_rows, tops_of_rows
    return (rows, of_rows) if logprobs else rows


def stream(
    model: GPT | Engine,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    logprobs: bool = False,
    top_logprobs: int = 0,
    **options: Any,
) -> Iterator[int] | Iterator[tuple[int, float]] | Iterator[tuple[int, float, Top]]:
    """`generate` for one prompt, its new ids one by one; with logprobs=True, (id, logprob) pairs;
    with top_logprobs=k, (id, logprob, the k likeliest).

    All of `generate`'s options but beams. An id that may turn out to be part
    of a stop is held back until it is not. Bad input is refused by the call, not by the first id.
    """
    checked = _streamed(options, model.config.vocab_size)
    end = id_stream(checked.tokenizer, checked.stops(model.config.vocab_size))
    told = Told(logprobs, top_logprobs)
    raw = _raw_stream(model, prompt_ids, max_new_tokens, checked, told)

    def ids() -> Iterator[Any]:
        new, sent = [], 0
        for drawn in raw:
            new.append(drawn if told.top else drawn[:2] if logprobs else drawn[0])
            end.feed(drawn[0])
            yield from new[sent : end.kept]
            sent = end.kept
            if end.ended:
                return
        end.finish()
        yield from new[sent : end.kept]

    return ids()


def _encode(
    tokenizer: Tokenizer, prompt: str, allowed_special: Collection[str], options: dict[str, Any]
) -> list[int]:
    options.setdefault("eos_id", tokenizer.eot)
    return tokenizer.encode(prompt, allowed_special)


def stream_text(
    model: GPT | Engine,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    allowed_special: Collection[str] = (),
    **options: Any,
) -> Iterator[str]:
    """The text that `generate_text` puts behind the prompt, in pieces as it becomes certain.

    A piece is whole characters, and never any part of a stop string.
    """
    ids = _encode(tokenizer, prompt, allowed_special, options)
    return text_pieces(model, tokenizer, ids, max_new_tokens, **options)


def generate_text(
    model: GPT | Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    max_new_tokens: int,
    *,
    allowed_special: Collection[str] = (),
    **options: Any,
) -> str | list[str]:
    """A prompt and its continuation as text; of a list of prompts, a list.

    Takes `generate`'s options; stops at the tokenizer's end-of-text unless eos_id says otherwise.
    End-of-text is not text, nor are ids that the model has and the tokenizer has not. With `stop`,
    the text ends where the stop begins, be it inside a token. allowed_special: names of special
    tokens that the prompt may hold; any other is plain text.
    """
    if not isinstance(prompt, Sequence):
        raise ValueError(f"prompt must be a string or a list of strings, got {prompt!r}")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    ids = [_encode(tokenizer, p, allowed_special, options) for p in prompts]
    checked = Options.of({**options, "tokenizer": tokenizer})
    stops = checked.stops(model.config.vocab_size)
    prompt_ids = token_ids(ids, model.config.vocab_size)
    continued = _continue(model, prompt_ids, max_new_tokens, checked, stops, Told())
    texts = [
        p + TextStream(tokenizer, stops).read(row.ids)
        for p, row in zip(prompts, continued, strict=True)
    ]
    return texts[0] if isinstance(prompt, str) else texts
