"""What the requests of one call share, and how a step's logits become their tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptfast import ops
from gptfast.engine.gpu_rows import rows_of
from gptfast.engine.request import Drawn, Request
from gptfast.engine.rows import Rows
from gptfast.engine.speculate import MOST, DraftModel, Guesser, PromptLookup
from gptfast.generation.decoder import Told, check_drawn, tops
from gptfast.generation.options import SAMPLING, Options


class Task:
    """What all requests of one call share: options by row, and what is to be told of each token."""

    def __init__(self, options: Options, like: Tensor, told: Told) -> None:
        sampling = options.sampling(like)
        self._sampling = [sampling[name] for name in SAMPLING]
        self._penalty = options.penalty(like)
        self._told = told
        self._index: list[int] = []
        self._chosen: list[Tensor] = []
        self.guesser: Guesser | None = None
        if options.draft is not None:
            draft = rows_of(options.draft.packed, 1)
            if draft.device != like.device:
                raise ValueError(
                    f"draft is on {draft.device}, the model on {like.device}; make both engines of "
                    "models on one device"
                )
            self.guesser = DraftModel(draft, self._sampling)
        elif options.lookup:
            self.guesser = PromptLookup()

    def guess(self, live: Sequence[Request], rows: Rows) -> list[list[int]]:
        if self.guesser is None:
            return [[] for _ in live]
        first = self.guesser.FIRST
        # One fewer than may come: the last is drawn without a guess. Room is for all of them.
        most = [
            max(0, min(r.most or first, r.left - 1, rows.block_size - len(rows.ids[r.row]) - 1))
            for r in live
        ]
        return self.guesser.guess(live, most)

    def step(
        self,
        rows: Rows,
        requests: Sequence[Request],
        tokens: Sequence[list[int]],
        guesses: Sequence[list[int]],
    ) -> list[Drawn]:
        """Append tokens, of which the last ones are guesses, and draw behind each that stands."""
        index, positions = [], []
        for request, guess in zip(requests, guesses, strict=True):
            index += [request.index] * (len(guess) + 1)
            positions += range(len(request.ids), len(request.ids) + len(guess) + 1)
        if index != self._index:
            self._index, self._chosen = index, [one[index] for one in self._sampling]
        held = [len(rows.ids[request.row]) for request in requests]
        row = [request.row for request in requests]
        wanted = [len(guess) + 1 for guess in guesses]
        if self._penalty is None:
            logits, ids = rows.forward(row, tokens, wanted, self._chosen, positions)
        else:
            logits, _ = rows.forward(row, tokens, wanted)
            scores = self._penalised(logits, requests, guesses)
            ids = ops.sample(
                scores,
                position=torch.tensor(positions, device=logits.device),
                **dict(zip(SAMPLING, self._chosen, strict=True)),
            )
        told = self._told(logits, ids.to(logits.device))
        logprobs = told[0].tolist() if told else []
        top = tops(*told[1:]) if self._told.top else []
        on_host = ids.tolist()
        check_drawn(on_host)
        drawn = self._accepted(rows, requests, guesses, held, on_host)
        return [
            Drawn(request, i, logprobs[at] if logprobs else None, top[at] if top else None)
            for request, i, at in drawn
        ]

    def _accepted(
        self,
        rows: Rows,
        requests: Sequence[Request],
        guesses: Sequence[list[int]],
        held: Sequence[int],
        ids: Sequence[int],
    ) -> list[tuple[Request, int, int]]:
        """Of the ids drawn behind each token those that stand, and where: up to the first that is
        not the guess."""
        drawn: list[tuple[Request, int, int]] = []
        at = 0
        for request, guess, before in zip(requests, guesses, held, strict=True):
            n = 0
            while n < len(guess) and guess[n] == ids[at + n]:
                n += 1
            new = ids[at : at + n + 1]
            drawn += [(request, i, at + j) for j, i in enumerate(new)]
            request.ids += new
            request.left -= len(new)
            if request.seen is not None:
                request.seen[new] = True
            if guess:
                rows.truncate(request.row, before + n + 1)
                if n == len(guess):
                    request.most = min(2 * max(n, self.guesser.FIRST // 2), MOST)
                else:
                    request.most = max(self.guesser.FEWEST, n + 1)
            at += len(guess) + 1
        return drawn

    def _penalised(
        self, logits: Tensor, requests: Sequence[Request], guesses: Sequence[list[int]]
    ) -> Tensor:
        """Logits with those of tokens that are there already made smaller; behind a guess, as if it
        were there."""
        scores, row = logits.clone(), 0
        for request, guess in zip(requests, guesses, strict=True):
            if request.seen is None:
                request.seen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
                request.seen[request.ids] = True
            seen, penalty = request.seen.clone(), self._penalty[request.index]
            for i in (None, *guess):
                if i is not None:
                    seen[i] = True
                at = scores[row]
                smaller = torch.where(at < 0, at * penalty, at / penalty)
                scores[row] = torch.where(seen, smaller, at)
                row += 1
        return scores
