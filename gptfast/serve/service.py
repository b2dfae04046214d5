"""What a server does for its clients: requests of the protocol to generations, and their ends."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from gptfast.generate import prompt_ids
from gptfast.generation.continuation import checked_job
from gptfast.generation.conversation import Conversation, Template
from gptfast.generation.options import LogprobOptions, Options, next_seed
from gptfast.serve.generation import Generation
from gptfast.serve.group import Group, Mailbox, Teller
from gptfast.serve.limits import Defaults, Limits
from gptfast.serve.metrics import Metrics
from gptfast.serve.model import Model
from gptfast.serve.protocol import ApiError, ChatRequest, Common, CompletionRequest
from gptfast.serve.replies import Choice, TokenNames
from gptfast.serve.scheduler import Closed, QueueFull, Scheduler
from gptfast.serve.texts import TextThreads
from gptfast.serve.threads import in_daemon
from gptfast.tokenizer.bpe import end_of_text

DEFAULT_NEW_TOKENS = 16
"""New tokens of a completion that does not say how many, as at OpenAI."""
T = TypeVar("T")


class Service:
    """A model and what runs on it, made and used by the event loop's thread.

    open_model: reads the model, at the start and for each reload. on_failure: called with a message
    when the engine fails.
    """

    def __init__(
        self,
        name: str,
        open_model: Callable[[], Model],
        *,
        template: Template,
        limits: Limits | None = None,
        defaults: Defaults | None = None,
        new_seed: Callable[[], int],
        on_failure: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.name, self.template, self.limits = name, template, limits or Limits()
        self.defaults = defaults or Defaults()
        self.metrics = Metrics(name)
        self.metrics.watch(
            running=lambda: sum(one.n_running for one in self._schedulers),
            waiting=lambda: sum(one.n_waiting for one in self._schedulers),
            cache_usage=lambda: self._schedulers[-1].cache_usage if self._schedulers else 0.0,
        )
        self.draining = False
        self.created = int(time.time())
        self._open_model, self._new_seed, self._on_failure = open_model, new_seed, on_failure
        self._model: Model | None = None
        self._schedulers: list[Scheduler] = []
        """The last takes requests; those before it finish theirs."""
        self._loading, self._loop = asyncio.Lock(), asyncio.get_running_loop()
        self._mailbox = Mailbox(self._loop)
        self.texts = TextThreads(self.metrics.refused.inc)

    # The model.

    @property
    def state(self) -> str:
        """ "ok", "loading" or "draining"."""
        if self.draining:
            return "draining"
        return "ok" if self._model is not None else "loading"

    async def load(self) -> None:
        """Read the model, or read it again: requests that run end with the one they began with.

        Raises what reading raises, and ValueError for damaged weights; a model that is there then
        stays.
        """
        async with self._loading:
            model = await in_daemon(self._opened)
            options = Options(tokenizer=model.tokenizer, **model.guesses)
            scheduler = Scheduler(
                model.engine,
                options,
                max_queue=self.limits.max_queue,
                on_failure=self._on_failure,
                on_end=self._ended,
            )
            replaced = [*self._schedulers]
            self._schedulers.append(scheduler)
            self._model = model
            for old in replaced:
                old.close()

    def _opened(self) -> Model:
        model = self._open_model()
        model.check()
        return model

    def _ended(self, scheduler: Scheduler) -> None:
        """Let go of a replaced model after its last request, told by its engine's thread."""

        def forget() -> None:
            if scheduler in self._schedulers[:-1]:
                self._schedulers.remove(scheduler)

        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the server
            self._loop.call_soon_threadsafe(forget)

    @property
    def model(self) -> Model:
        """The model. Raises ApiError while it is loaded, and while the server goes down."""
        if self._model is None or self.draining:
            text = "is going down" if self.draining else "is still loading the model"
            raise ApiError(
                503,
                f"the server {text}; try again later",
                kind="server_error",
                headers={"Retry-After": "2"},
            )
        return self._model

    @property
    def busy(self) -> int:
        """How many generations run or wait."""
        return sum(one.n_running + one.n_waiting for one in self._schedulers)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests. cancel: end those that run."""
        self.draining = True
        for scheduler in self._schedulers:
            scheduler.close(cancel=cancel)

    # Requests.

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for the name of another model."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"there is no model {name!r:.100}; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    @property
    def max_choices(self) -> int:
        """How many generations a request may have: more would never fit into the queue."""
        room = self.limits.max_queue + self.model.engine.max_batch
        return min(self.limits.max_choices, room)

    async def completion(self, request: CompletionRequest) -> Group:
        """Return the generations of a request for completions, started."""
        n, top = request.max_tokens, request.logprobs
        logprobs = LogprobOptions(top is not None, top or 0)
        given = self._given(request.prompt)
        length = sum(len(one) for one in given if isinstance(one, str))
        model, prompts = await self._encoded(
            length, lambda model: [self._ids(model, one) for one in given]
        )
        if n == 0 and not request.echo:
            raise ApiError(
                400, "max_tokens must be at least 1 without echo, got 0", param="max_tokens"
            )
        stop = [request.stop] if isinstance(request.stop, str) else request.stop
        options = self._options(model, request, stop or None)
        group = self._group(model, request, prompts, n, DEFAULT_NEW_TOKENS, options, logprobs)
        if request.echo:
            for choice, one in zip(group.choices, group.generations, strict=True):
                place = choice.index // (request.n or 1)
                text, ids = given[place], prompts[place]
                choice.echo = ids
                choice.echo_text = text if isinstance(text, str) else model.tokenizer.decode(ids)
                one.scored = logprobs
        return self._started(group)

    async def chat(self, request: ChatRequest) -> Group:
        """Return the generations of a request for a chat's next message, started."""
        # Each message is encoded by itself, which takes the time of some characters.
        length = sum(20 + len(message.text) for message in request.messages)
        model, conversation = await self._encoded(
            length, lambda model: self.conversation(model, request)
        )
        n = request.max_completion_tokens
        n = request.max_tokens if n is None else n
        if n == 0:
            raise ApiError(400, "max_tokens must be at least 1, got 0", param="max_tokens")
        wanted = bool(request.logprobs)
        if request.top_logprobs and not wanted:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        logprobs = LogprobOptions(wanted, request.top_logprobs or 0 if wanted else 0)
        stop = [request.stop] if isinstance(request.stop, str) else [*(request.stop or ())]
        if self.template.stop is not None:
            stop.append(self.template.stop)
        options = self._options(model, request, stop or None)
        ids = conversation.ids
        room = max(1, model.engine.config.block_size - len(ids))
        return self._started(self._group(model, request, [ids], n, room, options, logprobs))

    def conversation(self, model: Model, request: ChatRequest) -> Conversation:
        """Return the messages in the template. Raises ApiError for an order that it has not."""
        length = sum(len(message.text) for message in request.messages)
        self._check_length(model, length, "messages")
        conversation = Conversation(self.template, model.tokenizer, model.engine.eos_ids)
        messages = [*request.messages]
        opening = []
        while messages and messages[0].role in ("system", "developer"):
            opening.append(messages.pop(0).text)
        for n, message in enumerate(messages):
            wanted = "assistant" if n % 2 else "user"
            if message.role != wanted:
                raise ApiError(
                    400,
                    f"message {n + len(opening)} must be the {wanted}'s, got {message.role}'s: "
                    "after system messages, user and assistant take turns",
                    param="messages",
                )
        if len(messages) % 2 == 0:
            raise ApiError(400, "the last message must be the user's", param="messages")
        try:
            if text := "\n".join(opening):
                conversation.begin(text)
            for message in messages:
                ask = message.role == "user"
                (conversation.ask if ask else conversation.answer)(message.text)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        if not conversation.ids:
            raise ApiError(400, "the messages are empty; write one", param="messages")
        return conversation

    def _given(self, prompt: Any) -> list[str | list[int]]:
        """Return the prompts of a request, whose field holds one or a list of them."""
        if isinstance(prompt, str) or prompt and isinstance(prompt[0], int):
            prompt = [prompt]
        if not prompt:
            raise ApiError(400, "prompt has no prompts; write one", param="prompt")
        if len(prompt) > self.max_choices:
            raise self._too_many(len(prompt))
        return prompt

    def _ids(self, model: Model, prompt: str | list[int]) -> list[int]:
        """Return the ids of a prompt. Raises ApiError for text that cannot be encoded."""
        if not isinstance(prompt, str):
            return prompt
        self._check_length(model, len(prompt), "prompt")
        try:
            return prompt_ids(model.tokenizer, prompt)
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from None

    def _check_length(self, model: Model, length: int, param: str) -> None:
        """Raise ApiError for so many characters that they need not be encoded to be too long."""
        size = model.engine.config.block_size
        if length > size * model.longest:
            raise ApiError(
                400,
                f"This model's maximum context length is {size} tokens, and a prompt of "
                f"{length} characters has more; shorten it",
                param=param,
                code="context_length_exceeded",
            )

    async def _encoded(self, length: int, encode: Callable[[Model], T]) -> tuple[Model, T]:
        """Return the model and what encode makes with it of a text of so many characters."""
        while True:
            model = self.model
            encoded = await self.texts.encode_in_thread(length, partial(encode, model))
            if model is self.model:  # else it was read again meanwhile
                return model, encoded

    def _options(self, model: Model, request: Common, stop: list[str] | None) -> dict[str, Any]:
        """Return the options of `gptfast.generate` that a request asks for, without the seed."""
        ends: Any = list(model.engine.eos_ids) or end_of_text(model.tokenizer)
        options: dict[str, Any] = {"tokenizer": model.tokenizer, "stop": stop}
        options["eos_id"] = None if request.ignore_eos else ends
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            asked = getattr(request, name)
            options[name] = getattr(self.defaults, name) if asked is None else asked
        if options["top_k"] == -1:  # how vLLM's clients switch it off
            options["top_k"] = None
        if request.logit_bias:
            try:
                bias = {int(i): value for i, value in request.logit_bias.items()}
            except ValueError:
                bias = {}
            if [*map(str, bias)] != [*request.logit_bias]:  # also "05" and "1_0"
                raise ApiError(400, "the keys of logit_bias must be token ids", param="logit_bias")
            options["logit_bias"] = bias
        return options

    def _group(
        self,
        model: Model,
        request: Common,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        default: int,
        options: dict[str, Any],
        logprobs: LogprobOptions,
    ) -> Group:
        """Return generations that have not started: n of each prompt, with a seed each."""
        n = request.n or 1
        if len(prompts) * n > self.max_choices:
            raise self._too_many(len(prompts) * n)
        seed = self._new_seed() if request.seed is None else request.seed
        names = TokenNames(model.tokenizer)
        generations: list[Generation] = []
        choices: list[Choice] = []
        group = Group(generations, choices)
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        lengths = [self._new_tokens(model, len(ids), max_tokens, default, param) for ids in prompts]
        try:
            job = checked_job(model.engine, prompts, 0, Options.of(options), logprobs)
        except (ValueError, IndexError) as error:
            raise ApiError(400, str(error)) from None
        for prompt, length in zip(prompts, lengths, strict=True):
            for k in range(n):
                index = len(choices)
                own = replace(job.options, seed=next_seed(seed, k))
                one = replace(job, prompts=[prompt], n=length, options=own)
                notify = Teller(self.metrics, group, index, self._mailbox)
                generations.append(Generation(one, notify))
                choices.append(Choice(index, names, wants_tokens=logprobs.any))
        return group

    def _new_tokens(
        self, model: Model, n_prompt: int, asked: int | None, default: int, param: str
    ) -> int:
        """Return how many tokens may follow a prompt. Raises ApiError if they do not fit."""
        size, limits = model.engine.config.block_size, self.limits
        most = limits.max_prompt_tokens
        if most is not None and n_prompt > most:
            raise ApiError(
                400,
                f"the prompt has {n_prompt} tokens, and this server takes {most}; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        if n_prompt + (1 if asked is None else asked) > size:
            new = "" if asked is None else f", and max_tokens asks for {asked} more"
            raise ApiError(
                400,
                f"This model's maximum context length is {size} tokens, but the prompt has "
                f"{n_prompt}{new}; shorten the prompt{' or lower max_tokens' if asked else ''}",
                param=param,
                code="context_length_exceeded",
            )
        most = limits.max_new_tokens
        if most is not None and asked is not None and asked > most:
            raise ApiError(
                400, f"max_tokens must be at most {most} here, got {asked}", param="max_tokens"
            )
        fallback = min(default, size - n_prompt, size if most is None else most)
        return fallback if asked is None else asked

    def _too_many(self, n: int) -> ApiError:
        return ApiError(
            400,
            f"the request asks for {n} choices (prompts times n), and this server gives at most "
            f"{self.max_choices}; send several requests",
            param="n",
        )

    def _started(self, group: Group) -> Group:
        """Put a group into the queue. Raises ApiError if that is full."""
        scheduler = self._schedulers[-1]
        try:
            scheduler.submit(group.generations)
        except QueueFull as error:
            self.metrics.refused.inc(len(group.generations))
            raise ApiError(
                429,
                str(error),
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(error.retry_after)},
            ) from None
        except Closed as error:
            retry = {"Retry-After": "2"}
            raise ApiError(503, str(error), kind="server_error", headers=retry) from None
        group.scheduler = scheduler
        self.metrics.requests.inc(len(group.generations))
        return group
