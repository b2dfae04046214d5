"""The scheduler of a server gives each request what `generate` gives it alone, to the bit, whatever
joins, leaves or is broken off beside it; it loses no place and says when it cannot go on."""

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from helpers import random_ids
from seeds import shifted

from gptfast import GPT, Engine, generate, get_tokenizer
from gptfast.generation.continuation import checked_job
from gptfast.generation.decoder import SampledToken
from gptfast.generation.options import LogprobOptions, Options
from gptfast.generation.stop import TextStream
from gptfast.ops.backend import EXTENSION
from gptfast.serve import scheduler as module
from gptfast.serve.generation import Generation, Update
from gptfast.serve.scheduler import Closed, QueueFull, Scheduler

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
BYTE = get_tokenizer("byte")
BLOCK = 128
"""The context of `byte_model`."""
WAIT_S = 60


@dataclass
class Client:
    """A request and all that it was told."""

    generation: Generation = field(init=False)
    updates: list[Update] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def notify(self, update: Update) -> None:
        assert not self.ended.is_set()
        self.updates.append(update)
        if update.finish:
            self.ended.set()

    def result(self) -> "Client":
        assert self.ended.wait(WAIT_S)
        return self

    @property
    def finish(self) -> str | None:
        return self.updates[-1].finish

    @property
    def text(self) -> str:
        return "".join(update.text for update in self.updates)

    @property
    def tokens(self) -> list[SampledToken]:
        return [token for update in self.updates for token in update.tokens]


@dataclass
class Asked:
    """A request: a prompt, its length, and options."""

    prompt: list[int]
    n: int
    options: dict[str, Any]
    top: int = 0

    def client(self, engine: Engine, scored: LogprobOptions | None = None) -> Client:
        options = Options.of({"tokenizer": BYTE, "eos_id": 256, **self.options})
        logprobs = LogprobOptions(True, self.top)
        client = Client()
        job = checked_job(engine, [self.prompt], self.n, options, logprobs)
        client.generation = Generation(job, client.notify, scored or LogprobOptions())
        return client

    def check(self, client: Client, byte_engine: Engine) -> None:
        """Compare what a client got with what `generate` gives."""
        options = {"tokenizer": BYTE, "eos_id": 256, **self.options}
        given: Any = generate(
            byte_engine, [self.prompt], self.n, logprobs=True, top_logprobs=self.top, **options
        )
        ids = given[0][0][len(self.prompt) :]
        assert [token.id for token in client.tokens] == ids
        assert [token.logprob for token in client.tokens] == given[1][0]
        if self.top:
            assert [token.top_logprobs for token in client.tokens] == given[2][0]
        stops = Options.of(options).stops(257)
        text = TextStream(BYTE, stops)
        job = checked_job(byte_engine, [self.prompt], self.n, Options.of(options))
        pieces = [text.feed(token.id) for token in until_end(byte_engine.decode_stream(job), text)]
        assert client.finish == ("stop" if text.ended else "length")
        assert client.text == "".join(pieces) + text.finish()


def until_end(tokens: Iterator[SampledToken], text: TextStream) -> Iterator[SampledToken]:
    """Yield tokens until the text has ended."""
    for token in tokens:
        yield token
        if text.ended:
            return


def random_request(rng: random.Random) -> Asked:
    length = rng.choice([1, 2, 5, 17, 40, 70])
    prompt = [rng.randrange(257) for _ in range(length)]
    if rng.random() < 0.4:  # a beginning that others have too
        prompt = random_ids(40, vocab_size=257, seed=rng.randrange(2)).tolist() + prompt
    n = rng.randrange(1, 24)
    prompt = prompt[: BLOCK - n]
    options: dict[str, Any] = {"seed": rng.randrange(100)}
    options["temperature"] = rng.choice([0.0, 0.7, 1.0, 1.5])
    options["top_k"] = rng.choice([None, 1, 20])
    options["top_p"] = rng.choice([None, 0.5, 0.9])
    options["min_p"] = rng.choice([None, 0.05])
    options["repetition_penalty"] = rng.choice([1.0, 1.0, 1.3])
    options["logit_bias"] = rng.choice([None, None, {101: 5.0, 32: -100}])
    options["stop"] = rng.choice([None, ["e"], ["a", "bc"], [[7, 8], "\ufffd"]])
    return Asked(prompt, n, options, rng.choice([0, 0, 1, 5]))


@pytest.mark.parametrize("guesses", [False, True], ids=["plain", "lookup"])
def test_each_request_gets_what_it_gets_alone(
    byte_model: GPT, byte_engine: Engine, guesses: bool
) -> None:
    rng = random.Random(shifted(0))
    engine = Engine(byte_model, max_batch=4)
    scheduler = Scheduler(engine, Options(tokenizer=BYTE, lookup=guesses), max_queue=1000)
    requests = [random_request(rng) for _ in range(60)]
    scored = [rng.choice([None, None, LogprobOptions(True, 1)]) for _ in requests]
    clients = [asked.client(engine, one) for asked, one in zip(requests, scored, strict=True)]
    broken_off = set(rng.sample(range(60), 12))
    for at in range(0, 60, 5):
        scheduler.submit([client.generation for client in clients[at : at + 5]])
        time.sleep(rng.choice([0, 0.005]))
        for k in broken_off & set(range(at + 5)):
            scheduler.cancel(clients[k].generation)
    for k, (asked, client) in enumerate(zip(requests, clients, strict=True)):
        client.result()
        if k not in broken_off:
            asked.check(client, byte_engine)
    scheduler.close()
    assert scheduler.join(WAIT_S)
    assert_all_is_free(scheduler)


def assert_all_is_free(scheduler: Scheduler) -> None:
    rows, engine = scheduler.engine.rows, scheduler.engine
    assert not scheduler.n_running and not scheduler.n_waiting
    assert sorted(scheduler._spare) == list(range(engine.max_batch))
    with engine.turn():
        for row in [*engine._ended]:
            rows.release(row)
        engine._ended.clear()
    assert rows._n_slots == len(rows._free) and len(rows._spare) == len(rows.ids)


def test_a_long_prompt_does_not_hold_up_the_others(byte_model: GPT, monkeypatch: Any) -> None:
    monkeypatch.setattr(Scheduler, "_prompt_room", lambda self, others: 8)
    engine = Engine(byte_model)
    scheduler = Scheduler(engine, Options(tokenizer=BYTE))
    order: list[str] = []
    short = Asked([1], 40, {"eos_id": None, "seed": 1}).client(engine)
    long = Asked(random_ids(90, vocab_size=257).tolist(), 2, {"eos_id": None}).client(engine)
    for name, client in (("short", short), ("long", long)):
        client.generation.notify = lambda update, name=name, notify=client.notify: (
            order.extend([name] * len(update.tokens)),
            notify(update),
        )[0]
    scheduler.submit([short.generation, long.generation])
    short.result(), long.result()
    # 7 + 8 * 10 + 3 tokens of the long prompt: eleven or twelve steps, each with a short's token.
    assert order.index("long") >= 11
    scheduler.close()


def test_a_beginning_is_computed_once(byte_model: GPT) -> None:
    engine = Engine(byte_model)
    scheduler = Scheduler(engine, Options(tokenizer=BYTE))
    prompt = random_ids(80, vocab_size=257).tolist()
    asked = [Asked([*prompt, i], 5, {"seed": i}) for i in range(6)]
    clients = [one.client(engine) for one in asked]
    scheduler.submit([client.generation for client in clients])
    for client in clients:
        client.result()
    scheduler.close()
    assert [client.generation.n_cached for client in clients] == [0] + [80] * 5
    assert scheduler.counters.prompt_tokens == 6 * 81
    assert scheduler.counters.cached_tokens == 5 * 80


def test_a_step_reads_the_weights_once(byte_model: GPT, monkeypatch: Any) -> None:
    """Also where prompts are scored beside a request that waits for its next token."""
    monkeypatch.setattr(Scheduler, "_prompt_room", lambda self, others: 30)
    engine, passes = Engine(byte_model), []
    forward = engine.rows.forward
    monkeypatch.setattr(
        engine.rows, "forward", lambda *args: (passes.append(len(args[0])), forward(*args))[1]
    )
    scheduler = Scheduler(engine, Options(tokenizer=BYTE))
    prompts = [random_ids(length, vocab_size=257, seed=4).tolist() for length in (1, 20, 20, 70)]
    asked = [Asked(prompt, 12, {"eos_id": None, "seed": 2}) for prompt in prompts]
    every = LogprobOptions(True, 1)
    clients = [one.client(engine, every if len(one.prompt) > 1 else None) for one in asked]
    scheduler.submit([client.generation for client in clients])
    for client in clients:
        assert len(client.result().tokens) == 12
    scheduler.close()
    assert scheduler.join(WAIT_S)
    assert len(passes) == scheduler.counters.steps and max(passes) >= 3


@pytest.mark.parametrize("n", [0, 3])
def test_prompts_are_scored(byte_model: GPT, byte_engine: Engine, n: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(Scheduler, "_prompt_room", lambda self, others: 7)
    engine = Engine(byte_model, max_batch=2)
    scheduler = Scheduler(engine, Options(tokenizer=BYTE))
    prompts = [random_ids(length, vocab_size=257, seed=3).tolist() for length in (1, 2, 40, 60)]
    asked = [Asked(prompt, n, {"seed": 5, "eos_id": None}, top=2) for prompt in prompts]
    clients = [one.client(engine, LogprobOptions(True, 2)) for one in asked]
    scheduler.submit([client.generation for client in clients])
    for one, client in zip(asked, clients, strict=True):
        scored = [token for update in client.result().updates for token in update.prompt]
        logprobs = byte_engine.logits(one.prompt).log_softmax(-1)
        assert [token.id for token in scored] == one.prompt[1:]
        found = [logprobs[at, i].item() for at, i in enumerate(one.prompt[1:])]
        assert [token.logprob for token in scored] == found
        for at, token in enumerate(scored):
            values, ids = logprobs[at].topk(2)
            assert token.top_logprobs == list(zip(ids.tolist(), values.tolist(), strict=True))
        if n:
            one.check(client, byte_engine)
        else:
            assert client.finish == "length" and not client.tokens
    scheduler.close()


def test_the_queue_is_bounded(byte_model: GPT) -> None:
    engine = Engine(byte_model, max_batch=1)
    scheduler = Scheduler(engine, Options(tokenizer=BYTE), max_queue=2)
    with engine.turn():  # nothing is computed meanwhile
        clients = [Asked([1, 2], 3, {"seed": i}).client(engine) for i in range(5)]
        scheduler.submit([clients[0].generation])
        deadline = time.monotonic() + WAIT_S
        while scheduler.n_running < 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        scheduler.submit([clients[1].generation, clients[2].generation])
        with pytest.raises(QueueFull, match="above the limit of 2; try again later") as full:
            scheduler.submit([clients[3].generation])
        assert 1 <= full.value.retry_after <= 60
        scheduler.cancel(clients[1].generation)  # in the queue: it ends at once
        assert clients[1].finish == "cancelled"
        scheduler.submit([clients[3].generation])
    for k in (0, 2, 3):
        assert clients[k].result().finish in ("stop", "length")
    scheduler.close()
    with pytest.raises(Closed):
        scheduler.submit([clients[4].generation])
    assert scheduler.join(WAIT_S)
    assert_all_is_free(scheduler)


def test_a_request_too_long_is_refused(byte_model: GPT) -> None:
    engine = Engine(byte_model)
    scheduler = Scheduler(engine)
    with pytest.raises(ValueError, match="block_size=128; shorten the prompt or ask for fewer"):
        scheduler.submit([Asked([1] * 122, 7, {}).client(engine).generation])
    scheduler.close()


def test_close_with_cancel_ends_what_runs(byte_model: GPT) -> None:
    engine = Engine(byte_model, max_batch=2)
    scheduler = Scheduler(engine, Options(tokenizer=BYTE))
    clients = [Asked([1], 90, {"eos_id": None, "seed": i}).client(engine) for i in range(6)]
    with engine.turn():
        scheduler.submit([client.generation for client in clients])
        scheduler.close(cancel=True)
    assert {client.result().finish for client in clients} == {"cancelled"}
    assert scheduler.join(WAIT_S)
    assert_all_is_free(scheduler)


def test_a_failing_engine_ends_every_request(byte_model: GPT, monkeypatch: Any) -> None:
    engine, told = Engine(byte_model, max_batch=2), []
    scheduler = Scheduler(engine, Options(tokenizer=BYTE), on_failure=told.append)
    clients = [Asked([1], 90, {"eos_id": None, "seed": i}).client(engine) for i in range(5)]

    def fail(*args: Any) -> None:
        raise RuntimeError("no memory")

    with engine.turn():
        scheduler.submit([client.generation for client in clients])
        monkeypatch.setattr(engine.rows, "forward", fail)
    for client in clients:
        assert client.result().finish == "failed"
        assert client.updates[-1].message == "the engine failed: RuntimeError: no memory"
    assert scheduler.join(WAIT_S)
    assert told == ["the engine failed: RuntimeError: no memory"]
    with pytest.raises(Closed, match="no memory"):
        scheduler.submit([Asked([1], 1, {}).client(engine).generation])


def test_a_step_with_prompts_takes_less_than_three_times_as_long(byte_model: GPT) -> None:
    scheduler = Scheduler(Engine(byte_model))
    assert scheduler._prompt_room(False) == module.MAX_STEP_TOKENS
    for _ in range(100):
        scheduler._measure(0.010, 0, True)
        scheduler._measure(0.015, 50, True)
    assert scheduler._prompt_room(True) == pytest.approx(100 * module.PROMPT_SHARE, abs=2)
    assert 1 + module.PROMPT_SHARE < 3
    scheduler.close()
