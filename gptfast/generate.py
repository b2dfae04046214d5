"""Generation: whole rows or one token at a time, ids or text, drawn or searched for.

One loop, `_steps`, draws every token there is; `beam_search` is the other way to go on.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.beam import beam_search
from gptfast.model import GPT
from gptfast.options import Number, Options, check_logprobs, new_tokens, token_ids
from gptfast.sequences import Sequences, evaluating
from gptfast.stop import Stop, Stops, TextStream, id_stream
from gptfast.tokenizer import Tokenizer

# Of each row, the new ids and their log-probabilities, what ends the row included.
_Rows = list[tuple[list[int], list[float]]]


def _steps(
    sequences: Sequences, n: int, options: Options, logprobs: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Draw up to n tokens: after each, the ids (B,) and, if asked for, their log-probabilities.

    Options are checked by the call. Between two tokens the caller and the model are in their own
    modes, whatever those are.
    """
    sampling, penalty = options.sampling(sequences.tokens), options.penalty(sequences.tokens)

    def step() -> tuple[Tensor, Tensor | None]:
        logits = sequences.logits()  # (B, V)
        scores = logits if penalty is None else sequences.penalised(logits.float(), penalty)
        ids = ops.sample(scores, position=sequences.length, **sampling)  # (B,)
        sequences.append(ids)
        if not logprobs:
            return ids, None
        at = ids.clamp(min=0)[:, None]
        return ids, logits.float().log_softmax(-1).gather(1, at)[:, 0]

    def steps() -> Iterator[tuple[Tensor, Tensor | None]]:
        for _ in range(n):
            with torch.inference_mode(), evaluating(sequences.model):
                drawn = step()
            yield drawn

    return steps()


def _check_drawn(ids: Sequence[int]) -> None:
    if -1 in ids:
        raise ValueError("the model's logits had NaN, +inf or nothing but -inf; check its weights")


def _draw(
    model: GPT, prompts: list[list[int]], n: int, options: Options, stops: Stops, logprobs: bool
) -> _Rows:
    """Rows of up to n tokens; those that end early go on until all have ended."""
    sequences = Sequences(model, prompts)
    ends = [id_stream(options.tokenizer, stops) for _ in prompts]
    done = torch.zeros_like(sequences.length, dtype=torch.bool)
    drawn, of_drawn = [], []
    for step, (ids, of_ids) in enumerate(_steps(sequences, n, options, logprobs)):
        drawn.append(ids)
        of_drawn.append(of_ids)
        if stops.texts or stops.ids:
            on_host = ids.tolist()
            _check_drawn(on_host)
            for end, i in zip(ends, on_host, strict=True):
                if not end.ended:
                    end.feed(i)
            if all(end.ended for end in ends):
                break
        elif stops.eos_id is not None:
            done |= ids == stops.eos_id
            # Asking the device waits for it, so not at every token.
            if step % 8 == 7 and done.all():
                break
    rows = torch.stack(drawn, 1).tolist()
    for row in rows:
        _check_drawn(row)
    if not logprobs:
        return [(row, []) for row in rows]
    return list(zip(rows, torch.stack(of_drawn, 1).tolist(), strict=True))


def _continue(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    options: Options,
    stops: Stops,
    logprobs: bool = False,
) -> _Rows:
    """Of each prompt the new tokens, what ends the row included."""
    n = new_tokens(max_new_tokens)
    check_logprobs(logprobs)
    options.check_beams(model.config.vocab_size)
    like = torch.empty(len(prompts), 0, device=model.wte.weight.device)
    options.sampling(like), options.penalty(like)
    if not prompts or n == 0:
        return [([], []) for _ in prompts]
    if options.num_beams == 1:
        with torch.inference_mode(), evaluating(model):
            return _draw(model, prompts, n, options, stops, logprobs)
    return beam_search(
        model,
        prompts,
        n,
        num_beams=options.num_beams,
        length_penalty=float(options.length_penalty),
        repetition_penalty=options.penalty(like),
        stops=stops,
        tokenizer=options.tokenizer,
    )


def generate(
    model: GPT,
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
) -> list[list[int]] | tuple[list[list[int]], list[list[float]]]:
    """Continue prompts by up to max_new_tokens tokens each.

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

    A prompt gets the same ids alone, in a batch of any prompts, streamed or without a cache, unless
    rounding (products of matrices of other shapes) moves a logit over the very edge of a choice.

    Returns one list of ids per prompt, the prompt in front; with logprobs=True also, per row, one
    float for each new token returned: the log-softmax in fp32 of the model's own logits, before
    penalty, temperature and truncation.

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
    )
    prompts = token_ids(idx, model.config.vocab_size)
    stops = options.stops(model.config.vocab_size)
    continued = _continue(model, prompts, max_new_tokens, options, stops, logprobs)
    rows, of_rows = [], []
    for prompt, (new, of_new) in zip(prompts, continued, strict=True):
        end = id_stream(tokenizer, stops)
        end.read(new)
        rows.append(prompt + new[: end.kept])
        of_rows.append(of_new[: end.kept])
    return (rows, of_rows) if logprobs else rows


def _raw_stream(
    model: GPT, prompt: Sequence[int], max_new_tokens: int, options: Options, logprobs: bool = False
) -> Iterator[tuple[int, float | None]]:
    """The tokens of one row as they are drawn; where it ends is for the caller to see."""
    prompts, n = token_ids([prompt], model.config.vocab_size), new_tokens(max_new_tokens)
    check_logprobs(logprobs)
    sequences = Sequences(model, prompts)
    steps = _steps(sequences, n, options, logprobs)

    def tokens() -> Iterator[tuple[int, float | None]]:
        for ids, of_ids in steps:
            drawn = ids.tolist()
            _check_drawn(drawn)
            yield drawn[0], of_ids.item() if logprobs else None

    return tokens()


def stream(
    model: GPT,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    logprobs: bool = False,
    **options: Any,
) -> Iterator[int] | Iterator[tuple[int, float]]:
    """`generate` for one prompt, its new ids one by one; with logprobs=True, (id, logprob) pairs.

    All of `generate`'s options but beams. An id that may turn out to be part
    of a stop is held back until it is not. Bad input is refused by the call, not by the first id.
    """
    checked = _streamed(options, model.config.vocab_size)
    end = id_stream(checked.tokenizer, checked.stops(model.config.vocab_size))
    raw = _raw_stream(model, prompt_ids, max_new_tokens, checked, logprobs)

    def ids() -> Iterator[Any]:
        new, sent = [], 0
        for i, of_i in raw:
            new.append((i, of_i) if logprobs else i)
            end.feed(i)
            yield from new[sent : end.kept]
            sent = end.kept
            if end.ended:
                return
        end.finish()
        yield from new[sent : end.kept]

    return ids()


def _streamed(options: dict[str, Any], vocab_size: int) -> Options:
    checked = Options.of(options)
    checked.check_beams(vocab_size)
    if checked.num_beams != 1:
        raise ValueError(
            f"num_beams={checked.num_beams} cannot be streamed: no token of a beam search is "
            "certain before its end; use generate or generate_text"
        )
    return checked


def _encode(
    tokenizer: Tokenizer, prompt: str, allowed_special: Collection[str], options: dict[str, Any]
) -> list[int]:
    options.setdefault("eos_id", tokenizer.eot)
    return tokenizer.encode(prompt, allowed_special)


def stream_text(
    model: GPT,
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


def text_pieces(
    model: GPT, tokenizer: Tokenizer, prompt_ids: Sequence[int], max_new_tokens: int, **options: Any
) -> Iterator[str]:
    """`stream_text` for a prompt that is ids already."""
    checked = _streamed({**options, "tokenizer": tokenizer}, model.config.vocab_size)
    text = TextStream(tokenizer, checked.stops(model.config.vocab_size))
    raw = _raw_stream(model, prompt_ids, max_new_tokens, checked)

    def pieces() -> Iterator[str]:
        for i, _ in raw:
            if piece := text.feed(i):
                yield piece
            if text.ended:
                return
        if piece := text.finish():
            yield piece

    return pieces()


def generate_text(
    model: GPT,
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
    continued = _continue(model, prompt_ids, max_new_tokens, checked, stops)
    texts = [
        p + TextStream(tokenizer, stops).read(new)
        for p, (new, _) in zip(prompts, continued, strict=True)
    ]
    return texts[0] if isinstance(prompt, str) else texts
