"""Drawing tokens by the model itself, which defines what generation gives: one loop, `steps_of`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gptfast import ops
from gptfast.generation.decoder import Row, Told, check_drawn, tops
from gptfast.generation.options import Options
from gptfast.generation.sequences import Sequences, evaluating
from gptfast.generation.stop import Stops, id_stream
from gptfast.model import GPT


def steps_of(
    sequences: Sequences, n: int, options: Options, told: Told
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Draw up to n tokens: after each, the ids (B,) and what is to be told of them.

    Options are checked by the call. Between two tokens the caller and the model are in their own
    modes, whatever those are.
    """
    sampling, penalty = options.sampling(sequences.tokens), options.penalty(sequences.tokens)

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = sequences.logits()  # (B, V)
        scores = logits if penalty is None else sequences.penalised(logits.float(), penalty)
        ids = ops.sample(scores, position=sequences.length, **sampling)  # (B,)
        sequences.append(ids)
        return ids, told(logits, ids)

    def steps() -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        for _ in range(n):
            with torch.inference_mode(), evaluating(sequences.model):
                drawn = step()
            yield drawn

    return steps()


def draw_rows(
    model: GPT, prompts: list[list[int]], n: int, options: Options, stops: Stops, told: Told
) -> list[Row]:
    """Rows of up to n tokens; those that end early go on until all have ended."""
    sequences = Sequences(model, prompts)
    ends = [id_stream(options.tokenizer, stops) for _ in prompts]
    done = torch.zeros_like(sequences.length, dtype=torch.bool)
    drawn, of_drawn = [], []
    for step, (ids, of_ids) in enumerate(steps_of(sequences, n, options, told)):
        drawn.append(ids)
        of_drawn.append(of_ids)
        if stops.texts or stops.ids:
            on_host = ids.tolist()
            check_drawn(on_host)
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
        check_drawn(row)
    columns = [torch.stack(column, 1) for column in zip(*of_drawn, strict=True)]  # (B, n, ...)
    if not columns:
        return [Row(row, [], []) for row in rows]
    logprobs, top = columns[0].tolist(), columns[1:]
    of_rows = [tops(*row) for row in zip(*top, strict=True)] if top else [[] for _ in rows]
    return [Row(*row) for row in zip(rows, logprobs, of_rows, strict=True)]
