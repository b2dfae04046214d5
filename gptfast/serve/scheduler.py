"""The scheduler of a server: many requests of many clients in the steps of one engine.

One thread computes. Between two steps requests join and leave. A step gives each running request
its next token, and computes a piece of the prompts that are not finished, so that a long prompt
does not hold up the others. Requests are served in the order in which they came, and a prompt's
beginning that another row holds is not computed again.

A token's logits do not depend on what is computed beside it, so a request's tokens are those of
`gptfast.generate` with the same seed, whatever else is running.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gptfast.checks import integer, one_line
from gptfast.engine.engine import Engine
from gptfast.engine.request import Request
from gptfast.engine.rows import MAX_STEP_TOKENS, BaseRows, n_common
from gptfast.engine.task import Part, Sampled, Task
from gptfast.generation.decoder import BAD_LOGITS, Job, SampledToken
from gptfast.generation.options import Options
from gptfast.serve.generation import Generation, Update

MIN_PROMPT_TOKENS = 16
"""Tokens of prompts that a step computes at least, if there are any to compute."""
MIN_SHARED_TOKENS = 16
"""A prompt that shares so many first tokens with one that is being computed waits for it."""
PROMPT_SHARE = 1.7
"""The time that a step spends on prompts, where others wait for their next token, in units of the
time that it takes without prompts. So a step takes at most about 2.7 times as long."""
SMOOTHING = 0.2
"""The weight of the latest measurement in a moving average."""


class QueueFull(Exception):
    """There is no room in the queue. `retry_after` says in how many seconds there may be."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Closed(Exception):
    """The scheduler takes no more requests."""


@dataclass
class Counters:
    """What a scheduler has done."""

    prompt_tokens: int = 0
    """Tokens of prompts, computed or not."""
    cached_tokens: int = 0
    """Those that another request had computed."""
    new_tokens: int = 0
    steps: int = 0


class Scheduler:
    """Runs the requests of many clients on an engine, up to engine.max_batch at a time.

    options: the tokenizer of all requests, and the guesser (lookup or draft) if there is one.
    max_queue: how many requests may wait. on_failure: called with a message, by the engine's
    thread, if the engine fails; every request has then ended as "failed". on_end: called with the
    scheduler, by the engine's thread, when that ends.
    """

    def __init__(
        self,
        engine: Engine,
        options: Options | None = None,
        *,
        max_queue: int = 256,
        on_failure: Callable[[str], None] = lambda message: None,
        on_end: Callable[["Scheduler"], None] = lambda scheduler: None,
    ) -> None:
        self.engine, self.options = engine, options or Options()
        self.max_queue = integer("max_queue", max_queue, 0)
        self.counters = Counters()
        self.failure: str | None = None
        """Why the engine failed, if it did."""
        self._on_failure, self._on_end = on_failure, on_end
        n = engine.max_batch
        vocab_size = engine.config.vocab_size
        self._task = Task(Job([[0]] * n, 1, self.options), engine.device, vocab_size)
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._spare = list(range(n))
        self._changed = threading.Condition()
        self._closed = False
        # Moving averages in seconds: of a step without prompts, of a prompt's token beside it, and
        # of a whole request.
        self._step_time, self._token_time, self._request_time = 0.0, 0.0, 1.0
        self._thread = threading.Thread(target=self._run, name="gptfast-engine", daemon=True)
        self._thread.start()

    # For any thread.

    @property
    def n_running(self) -> int:
        """How many requests are computed."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """How many requests are in the queue."""
        return len(self._waiting)

    @property
    def cache_usage(self) -> float:
        """The share of the KV cache that running requests hold."""
        held = sum(len(one.request.ids) for one in [*self._running] if one.request)
        return held / (self.engine.max_batch * self.engine.config.block_size)

    def submit(self, generations: Sequence[Generation]) -> None:
        """Let generations begin when there is room, all of them or none.

        Raises QueueFull, Closed, and ValueError for a job that does not fit into block_size.
        """
        size = self.engine.config.block_size
        for one in generations:
            if one.n_prompt + one.job.n > size:
                raise ValueError(
                    f"{one.n_prompt} tokens of a prompt and {one.job.n} new ones are more than "
                    f"block_size={size}; shorten the prompt or ask for fewer"
                )
        with self._changed:
            if self._closed:
                raise Closed(self.failure or "the scheduler is closed")
            room = self.max_queue + self.engine.max_batch - len(self._running)
            if len(self._waiting) + len(generations) > room:
                raise QueueFull(
                    f"{len(self._waiting)} requests wait already, and {len(generations)} more are "
                    f"above the limit of {self.max_queue}; try again later",
                    self._retry_after(),
                )
            self._waiting += generations
            self._changed.notify_all()

    def cancel(self, generation: Generation) -> None:
        """End a generation before the next step; in the queue, at once. Does nothing at its end."""
        with self._changed:
            generation.cancelled = True
            if generation not in self._waiting:
                return
            self._waiting.remove(generation)
        self._finish(generation, Update(finish="cancelled"))

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests; the thread ends when those that are here have ended.

        cancel: end them before the next step.
        """
        with self._changed:
            self._closed = True
            for one in [*self._waiting, *self._running] if cancel else ():
                one.cancelled = True
            self._changed.notify_all()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end after `close`; return whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _retry_after(self) -> int:
        """Return about how many seconds pass until the queue has been worked off."""
        rounds = 1 + len(self._waiting) / self.engine.max_batch
        return max(1, min(60, math.ceil(rounds * self._request_time)))

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._has_work():
                self._end_cancelled()
                self._join_waiting()
                if self._running:
                    self._step()
        except BaseException as error:  # also what is no Exception: nobody else could report it
            self._fail(f"the engine failed: {_reason(error)}")
        finally:
            self._on_end(self)

    def _has_work(self) -> bool:
        """Wait for requests; return False if the scheduler was closed and none is left."""
        with self._changed:
            while not self._waiting and not self._running:
                if self._closed:
                    return False
                self._changed.wait()
        return True

    def _end_cancelled(self) -> None:
        for one in [one for one in self._running if one.cancelled]:
            self._leave(one, Update(finish="cancelled"))

    def _join_waiting(self) -> None:
        """Move requests from the queue to free places."""
        while self._spare:
            with self._changed:
                if not self._waiting:
                    return
                one = self._waiting.popleft()
                index = self._spare.pop()
                one.request = Request(index, list(one.job.prompts[0]), one.job.n)
                self._running.append(one)
            self._task.set(index, one.job)
            if one.cancelled:
                self._leave(one, Update(finish="cancelled"))

    def _step(self) -> None:
        start, before = time.perf_counter(), self.counters.prompt_tokens
        cached = self.counters.cached_tokens
        with self.engine.turn() as rows, torch.inference_mode():
            sampled = self._compute(rows)
        n_prompt = self.counters.prompt_tokens - before
        n_prompt -= self.counters.cached_tokens - cached
        self._measure(time.perf_counter() - start, n_prompt, bool(sampled))
        self.counters.steps += 1
        self._deliver(sampled)

    def _compute(self, rows: BaseRows) -> list[Sampled]:
        """Compute the next token of each request, and a piece of the unfinished prompts."""
        decoding: list[Request] = []
        prompts: list[Generation] = []
        for one in self._running:
            assert one.request is not None
            if one.n_new:
                decoding.append(one.request)
            else:
                prompts.append(one)
        room = self._prompt_room(bool(decoding))
        finished, parts, scoring = self._pieces(rows, prompts, room)
        guesses = self._task.guess(decoding, rows)
        tokens = [[request.ids[-1], *g] for request, g in zip(decoding, guesses, strict=True)]
        tokens += [_pending(rows, request) for request in finished]
        guesses = [*guesses, *([] for _ in finished)]
        requests = [*decoding, *finished]
        if not requests and not parts:
            return []
        sampled = self._task.step(rows, requests, tokens, guesses, parts)
        for one, part in scoring:
            one.prompt += part.scored
        return sampled

    def _pieces(
        self, rows: BaseRows, prompts: Sequence[Generation], room: int
    ) -> tuple[list[Request], list[Part], list[tuple[Generation, Part]]]:
        """Return the prompts that this step finishes, and parts of others: `room` tokens in all.

        The parts to be scored come with their prompts. A prompt's last token is in none of them.
        """
        finished: list[Request] = []
        parts: list[Part] = []
        scoring: list[tuple[Generation, Part]] = []
        computing: list[Generation] = []
        for one in prompts:
            request = one.request
            assert request is not None
            if room <= 0:
                break
            if request.row < 0:
                if not one.scored.any and _waits(rows, request.ids, computing):
                    continue
                self._start(rows, one, request)
            computing.append(one)
            pending = _pending(rows, request)
            if one.is_scoring:
                piece = pending[:-1][:room]
                part = Part(request.row, piece, pending[1 : len(piece) + 1], one.scored)
                parts.append(part)
                scoring.append((one, part))
            elif len(pending) <= room:
                piece = pending
                if request.left:
                    finished.append(request)
            else:
                piece = pending[:room]
                parts.append(Part(request.row, piece))
            room -= len(piece)
            self.counters.prompt_tokens += len(piece)
        return finished, parts, scoring

    def _start(self, rows: BaseRows, one: Generation, request: Request) -> None:
        """Give a request a row with as much of its prompt as another row holds."""
        # A prompt that is scored needs all its logits.
        request.row = rows.new() if one.scored.any else rows.start(request.ids)
        one.n_cached = len(rows.ids[request.row])
        self.counters.cached_tokens += one.n_cached
        self.counters.prompt_tokens += one.n_cached

    def _prompt_room(self, others: bool) -> int:
        """Return how many tokens of prompts the next step computes.

        Beside others that wait for their next token, they take PROMPT_SHARE times as long as those.
        """
        if not others:
            return MAX_STEP_TOKENS
        if not self._token_time:
            return MIN_PROMPT_TOKENS
        room = int(PROMPT_SHARE * self._step_time / self._token_time)
        return max(MIN_PROMPT_TOKENS, min(MAX_STEP_TOKENS, room))

    def _measure(self, seconds: float, n_prompt: int, decodes: bool) -> None:
        def mean(before: float, now: float) -> float:
            return now if not before else (1 - SMOOTHING) * before + SMOOTHING * now

        if not n_prompt:
            self._step_time = mean(self._step_time, seconds)
        else:
            beside = min(self._step_time, 0.9 * seconds) if decodes else 0.0
            self._token_time = mean(self._token_time, (seconds - beside) / n_prompt)

    def _deliver(self, sampled: Sequence[Sampled]) -> None:
        """Tell each request its new tokens, and end those that are done."""
        new: dict[int, list[SampledToken]] = {}
        for request, token in sampled:
            new.setdefault(request.index, []).append(token)
        for one in [*self._running]:
            assert one.request is not None
            tokens = new.get(one.request.index, [])
            if not tokens and (one.request.left or one.is_scoring or one.request.row < 0):
                continue
            update = one.take(tokens)
            self.counters.new_tokens += len(tokens)
            if update.finish:
                self._leave(one, update)
            elif update.text or update.tokens or update.prompt:
                one.notify(update)

    def _leave(self, one: Generation, update: Update) -> None:
        """End a running request and free its place."""
        assert one.request is not None
        self.engine.end(self._task, one.request)
        with self._changed:
            self._running.remove(one)
            self._spare.append(one.request.index)
        self._finish(one, update)

    def _finish(self, one: Generation, update: Update) -> None:
        one.finish = update.finish
        if update.finish in ("stop", "length"):
            took = time.monotonic() - one.created
            self._request_time += SMOOTHING * (took - self._request_time)
        one.notify(update)

    def _fail(self, message: str) -> None:
        """End every request with a message, and take no more."""
        with self._changed:
            self.failure, self._closed = message, True
            ended = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for one in ended:
            self._finish(one, Update(finish="failed", message=message))
        self._on_failure(message)


def _reason(error: BaseException) -> str:
    """Return in one line why the engine failed."""
    text = one_line(error)
    # The operators name a row of a step, which says nothing to whoever runs the server.
    return BAD_LOGITS if "NaN, +inf or nothing" in text else f"{type(error).__name__}: {text}"


def _pending(rows: BaseRows, request: Request) -> list[int]:
    """Return the tokens of a request that its row does not hold yet."""
    return request.ids[len(rows.ids[request.row]) :]


def _waits(rows: BaseRows, ids: Sequence[int], computing: Sequence[Generation]) -> bool:
    """Return whether a prompt had better wait: more of it is being computed than any row holds."""
    shared = max((n_common(ids, other.job.prompts[0]) for other in computing), default=0)
    if shared < MIN_SHARED_TOKENS:
        return False
    return shared >= MIN_SHARED_TOKENS + max(n_common(ids, held) for held in rows.ids)
