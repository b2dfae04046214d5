"""The options that the requests of one call share, and how they turn logits into tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptfast.engine.gpu_rows import rows_of
from gptfast.engine.request import Request
from gptfast.engine.rows import BaseRows, sample
from gptfast.engine.speculate import MAX_GUESSES, DraftModel, Guesser, PromptLookup
from gptfast.generation.decoder import Job, SampledToken, check_sampled, top_logprobs
from gptfast.generation.options import SAMPLING
from gptfast.generation.sequences import penalised

Sampled = tuple[Request, SampledToken]


class Task:
    """One call's options, with a value for each prompt, and the guesser of all its requests."""

    def __init__(self, job: Job, device: torch.device, vocab_size: int) -> None:
        options, batch = job.options, len(job.prompts)
        sampling = options.sampling(batch, device)
        self._sampling = [sampling[name] for name in SAMPLING]
        self._penalty = options.penalty(batch, device)
        self._lacking = options.lacking(vocab_size, device)
        self._logprobs = job.logprobs
        # The sampling parameters of the last step, and the prompts that they are of: the GPU's rows
        # recognise the same object and then do not read it again.
        self._index: list[int] = []
        self._chosen: list[Tensor] = []
        self.guesser: Guesser | None = None
        if options.draft is not None:
            draft = rows_of(options.draft.packed, 1)
            if draft.device != device:
                raise ValueError(
                    f"draft is on {draft.device}, but the model is on {device}; make both engines "
                    "from models on one device"
                )
            self.guesser = DraftModel(draft, self._sampling)
        elif options.lookup:
            self.guesser = PromptLookup()

    def guess(self, live: Sequence[Request], rows: BaseRows) -> list[list[int]]:
        """Return the guessed next tokens of each request, none without a guesser."""
        if self.guesser is None:
            return [[] for _ in live]
        first = self.guesser.FIRST_GUESSES
        limits = []
        for request in live:
            # The last token is sampled without a guess, and all tokens must fit into block_size.
            room = rows.block_size - len(rows.ids[request.row]) - 1
            limits.append(max(0, min(request.n_guesses or first, request.left - 1, room)))
        return self.guesser.guess(live, limits)

    def step(
        self,
        rows: BaseRows,
        requests: Sequence[Request],
        tokens: Sequence[list[int]],
        guesses: Sequence[list[int]],
    ) -> list[Sampled]:
        """Append tokens, which end with the guesses, to the requests' rows; return the new tokens.

        Each request gets a token sampled after its last known token, and one after each guess as
        long as guesses are right.
        """
        held = [len(rows.ids[request.row]) for request in requests]
        logits, ids = self._sample(rows, requests, tokens, guesses)
        of_step = self._logprobs.tensors(logits, ids.to(logits.device))
        logprobs = of_step[0].tolist() if of_step else []
        top = top_logprobs(*of_step[1:]) if self._logprobs.top else []
        on_host = ids.tolist()
        check_sampled(on_host)
        sampled: list[Sampled] = []
        at = 0
        for request, guess, n_held in zip(requests, guesses, held, strict=True):
            new = self._accept(rows, request, guess, n_held, on_host[at : at + len(guess) + 1])
            for j, i in enumerate(new, at):
                token = SampledToken(i, logprobs[j] if logprobs else None, top[j] if top else None)
                sampled.append((request, token))
            at += len(guess) + 1
        return sampled

    def _sample(
        self,
        rows: BaseRows,
        requests: Sequence[Request],
        tokens: Sequence[list[int]],
        guesses: Sequence[list[int]],
    ) -> tuple[Tensor, Tensor]:
        """Return logits (M, V) and sampled ids (M,) after each request's last token and guesses."""
        index: list[int] = []
        positions: list[int] = []
        for request, guess in zip(requests, guesses, strict=True):
            index += [request.index] * (len(guess) + 1)
            positions += range(len(request.ids), len(request.ids) + len(guess) + 1)
        if index != self._index:
            self._index, self._chosen = index, [one[index] for one in self._sampling]
        row = [request.row for request in requests]
        wanted = [len(guess) + 1 for guess in guesses]
        if self._penalty is None:
            return rows.forward(row, tokens, wanted, self._chosen, positions, self._lacking)
        logits, _ = rows.forward(row, tokens, wanted)
        scores = self._penalised(logits, self._penalty, requests, guesses)
        return logits, sample(scores, self._chosen, positions, self._lacking)

    def _accept(
        self, rows: BaseRows, request: Request, guess: list[int], n_held: int, ids: list[int]
    ) -> list[int]:
        """Return the sampled ids that stand: those up to the first that differs from its guess.

        They are added to the request, and wrong guesses are taken out of its row, which held n_held
        tokens before the step.
        """
        n = 0
        while n < len(guess) and guess[n] == ids[n]:
            n += 1
        new = ids[: n + 1]
        request.ids += new
        request.left -= len(new)
        if request.seen is not None:
            request.seen[new] = True
        if guess and self.guesser:
            rows.truncate(request.row, n_held + n + 1)
            if n == len(guess):
                request.n_guesses = min(2 * max(n, self.guesser.FIRST_GUESSES // 2), MAX_GUESSES)
            else:
                request.n_guesses = max(self.guesser.MIN_GUESSES, n + 1)
        return new

    def _penalised(
        self,
        logits: Tensor,
        penalty: Tensor,
        requests: Sequence[Request],
        guesses: Sequence[list[int]],
    ) -> Tensor:
        """Return logits (M, V) with those of tokens that precede them penalised, guesses too."""
        scores, row = logits.clone(), 0
        for request, guess in zip(requests, guesses, strict=True):
            if request.seen is None:
                request.seen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
                request.seen[request.ids] = True
            seen = request.seen.clone()
            for i in (None, *guess):
                if i is not None:
                    seen[i] = True
                smaller = penalised(scores[row], penalty[request.index])
                scores[row] = torch.where(seen, smaller, scores[row])
                row += 1
        return scores
