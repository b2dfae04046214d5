"""Prompts continued, whole or token by token."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gptfast.engine.engine import Engine, engine_for
from gptfast.generation.beam import beam_search
from gptfast.generation.decoder import Row, Told, Top, check_drawn, tops
from gptfast.generation.model_decoder import draw_rows, steps_of
from gptfast.generation.options import Options, check_logprobs, new_tokens, token_ids
from gptfast.generation.sequences import Sequences, evaluating
from gptfast.generation.stop import Stops, TextStream, id_stream
from gptfast.model import GPT
from gptfast.tokenizer.bpe import Tokenizer


def _draw_by_engine(
    engine: Engine, prompts: list[list[int]], n: int, options: Options, stops: Stops, told: Told
) -> list[Row]:
    """Rows of up to n tokens; where one ends, the next prompt takes its place."""
    rows = [Row([], [], []) for _ in prompts]
    ends = [id_stream(options.tokenizer, stops) for _ in prompts]
    watched = stops != Stops()
    for request, i, logprob, top in engine.draw(prompts, n, options, told):
        row, end = rows[request.index], ends[request.index]
        row.ids.append(i)
        row.logprobs.append(logprob)
        row.top.append(top)
        if watched:
            end.feed(i)
            request.done = end.ended
    return rows


def _search(
    model: GPT | Engine, prompts: list[list[int]], n: int, options: Options, stops: Stops
) -> list[Row]:
    like = torch.empty(len(prompts), 0, device=_device(model))
    settings = {
        "vocab_size": model.config.vocab_size,
        "num_beams": options.num_beams,
        "length_penalty": float(options.length_penalty),
        "repetition_penalty": options.penalty(like),
        "stops": stops,
        "tokenizer": options.tokenizer,
    }
    with torch.inference_mode():
        if isinstance(model, Engine):
            with model.sequences(prompts) as sequences:
                found = beam_search(sequences, n, **settings)
        else:
            with evaluating(model):
                found = beam_search(Sequences(model, prompts), n, **settings)
    return [Row(ids, logprobs, []) for ids, logprobs in found]


def _device(model: GPT | Engine) -> torch.device:
    return model.rows.device if isinstance(model, Engine) else model.wte.weight.device


def _needs_engine(options: Options) -> None:
    if options.lookup or options.draft is not None:
        name = "lookup" if options.lookup else "draft"
        raise ValueError(f"{name} needs an engine: generate with gptfast.Engine(model)")


def _continue(
    model: GPT | Engine,
    prompts: list[list[int]],
    max_new_tokens: int,
    options: Options,
    stops: Stops,
    told: Told,
) -> list[Row]:
    """Of each prompt the new tokens, what ends the row included."""
    n = new_tokens(max_new_tokens)
    check_logprobs(*told, model.config.vocab_size)
    options.check_beams(model.config.vocab_size)
    if told.top and options.num_beams != 1:
        raise ValueError("top_logprobs are of what is drawn; leave it out or take num_beams=1")
    like = torch.empty(len(prompts), 0, device=_device(model))
    options.sampling(like), options.penalty(like)
    if not prompts or n == 0:
        return [Row([], [], []) for _ in prompts]
    if not isinstance(model, Engine):
        _needs_engine(options)
    model = engine_for(model, n) or model
    if options.num_beams != 1:
        return _search(model, prompts, n, options, stops)
    if isinstance(model, Engine):
        return _draw_by_engine(model, prompts, n, options, stops, told)
    with torch.inference_mode(), evaluating(model):
        return draw_rows(model, prompts, n, options, stops, told)


def _raw_stream(
    model: GPT | Engine,
    prompt: Sequence[int],
    max_new_tokens: int,
    options: Options,
    told: Told,
) -> Iterator[tuple[int, float | None, Top | None]]:
    """The tokens of one row as they are drawn; where it ends is for the caller to see."""
    prompts, n = token_ids([prompt], model.config.vocab_size), new_tokens(max_new_tokens)
    check_logprobs(*told, model.config.vocab_size)
    like = torch.empty(1, 0, device=_device(model))
    options.sampling(like), options.penalty(like)
    if not isinstance(model, Engine):
        _needs_engine(options)
    if engine := engine_for(model, n):
        return (drawn[1:] for drawn in engine.draw(prompts, n, options, told))
    steps = steps_of(Sequences(model, prompts), n, options, told)

    def tokens() -> Iterator[tuple[int, float | None, Top | None]]:
        for ids, of_ids in steps:
            drawn = ids.tolist()
            check_drawn(drawn)
            logprob = of_ids[0].item() if of_ids else None
            yield drawn[0], logprob, tops(*of_ids[1:])[0] if told.top else None

    return tokens()


def _streamed(options: dict[str, Any], vocab_size: int) -> Options:
    checked = Options.of(options)
    checked.check_beams(vocab_size)
    if checked.num_beams != 1:
        raise ValueError(
            f"num_beams={checked.num_beams} cannot be streamed: no token of a beam search is "
            "certain before its end; use generate or generate_text"
        )
    return checked


def text_pieces(
    model: GPT | Engine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    **options: Any,
) -> Iterator[str]:
    """`stream_text` for a prompt that is ids already."""
    checked = _streamed({**options, "tokenizer": tokenizer}, model.config.vocab_size)
    text = TextStream(tokenizer, checked.stops(model.config.vocab_size))
    raw = _raw_stream(model, prompt_ids, max_new_tokens, checked, Told())

    def pieces() -> Iterator[str]:
        for i, *_ in raw:
            if piece := text.feed(i):
                yield piece
            if text.ended:
                return
        if piece := text.finish():
            yield piece

    return pieces()
