"""The server under many requests: broken off, malformed, the model read again meanwhile.

GPTFAST_TEST_REQUESTS is how many (200 by default; 10,000 take about two minutes).
"""

import asyncio
import contextlib
import json
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import random_ids, random_model, save
from seeds import shifted
from serving import (
    BLOCK,
    BYTE,
    WAIT_S,
    Client,
    Limits,
    Process,
    Running,
    n_ended,
    server,
    text_of,
    wait_for,
)

from gptfast import GPT, Engine
from gptfast.ops.backend import EXTENSION
from gptfast.serve.app import make_app
from gptfast.serve.model import Model

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
N = int(os.environ.get("GPTFAST_TEST_REQUESTS", "200"))
CLIENTS = 32
MAX_GROWTH = 0.02


def request(k: int, rng: random.Random) -> tuple[str, bytes]:
    """Return what a client does ("stay", "leave" or "malformed"), and what it sends."""
    if k % 50 == 7:
        junk = [b"GET\r\n\r\n", rng.randbytes(40) + b"\r\n\r\n", http(b'{"prompt": '), http(b"[1]")]
        return "malformed", rng.choice([*junk, http(b'{"prompt": "a", "n": -1}')])
    body: dict[str, Any] = {"seed": k, "max_tokens": rng.randrange(1, 30), "ignore_eos": True}
    body["prompt"] = random_ids(rng.choice([1, 5, 90]), vocab_size=256, seed=k % 7).tolist()
    body["stream"] = rng.random() < 0.5
    if rng.random() < 0.2:
        body |= {"logprobs": 2, "echo": True}
    return "leave" if k % 5 == 3 else "stay", http(json.dumps(body).encode())


def http(body: bytes) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body


async def client(running: Client, k: int, rng: random.Random) -> str:
    """Send a request; return what became of it. None takes longer than WAIT_S."""
    does, raw = request(k, rng)
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(raw)
        if does == "leave":
            await asyncio.sleep(rng.random() * 0.03)
            writer.transport.abort()
            return does
        reply = await reader.read()
        writer.close()
    status = int(reply.split(maxsplit=2)[1])
    if does == "malformed":
        assert 400 <= status < 500, (raw, reply)
    else:
        assert status == 200, reply
        assert reply.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") or b'"usage"' in reply
    return does


async def clients(
    running: Client, n: int, rng: random.Random, reload: Callable[[], Awaitable[object]]
) -> Counter[str]:
    """Send n requests, CLIENTS at a time, and have the model read again now and then."""
    left, done, one_at_a_time = list(range(n)), Counter[str](), asyncio.Lock()

    async def work() -> None:
        while left:
            k = left.pop()
            if k % max(40, n // 20) == 1:
                async with one_at_a_time:
                    await reload()
            done[await client(running, k, rng)] += 1

    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return done


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def reloaded(running: Running) -> None:
    await asyncio.wrap_future(
        asyncio.run_coroutine_threadsafe(running.service.load(), running.loop)
    )


def test_a_soak(byte_model: GPT) -> None:
    rng = random.Random(shifted(0))
    done = Counter[str]()
    with server(byte_model, max_batch=8, limits=Limits(max_queue=1000)) as running:
        for part in range(5):
            done += asyncio.run(clients(running, N // 5, rng, lambda: reloaded(running)))
            assert running.idle()
            print(f"{part + 1}/5: {dict(done)}")
        assert sum(done.values()) == 5 * (N // 5) and done["stay"] and done["leave"]
        taken = running.metric("gptfast:requests_total")
        wait_for(lambda: n_ended(running) == running.metric("gptfast:requests_total"))
        assert done["stay"] <= taken <= done["stay"] + done["leave"]
        assert running.metric("gptfast:requests_cancelled_total") <= done["leave"]
        assert running.metric("gptfast:requests_failed_total") == 0
        assert running.metric("vllm:num_requests_running") == 0
        assert running.metric("vllm:kv_cache_usage_perc") == 0
        wait_for(lambda: len(running.service._schedulers) == 1)  # replaced models are let go of
        assert sorted(running.service._schedulers[0]._spare) == list(range(8))


class Reloads:
    """Gives a server another model with each SIGHUP, and a broken one now and then."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.engines, self.n = folder, [], 0
        for seed in range(2):
            model = random_model(seed=seed, vocab_size=257, block_size=BLOCK).eval()
            self.engines.append(Engine(model))
            save(model, folder / f"{seed}")
        (folder / "broken").mkdir()
        self.point("0")

    def point(self, name: str) -> None:
        """Have the served path lead to another model, at once."""
        (self.folder / "next").symlink_to(self.folder / name)
        (self.folder / "next").replace(self.folder / "served")

    async def hang_up(self, process: Process) -> None:
        """Reload, and compare a text with that of the model that is there now."""
        self.n += 1
        broken = self.n % 3 == 0
        self.point("broken" if broken else str(self.n % 2))
        said = await asyncio.to_thread(process.hang_up)
        kept = "the model was not read again, the old one stays: "
        assert said.startswith(kept if broken else "the model was read again")
        current = self.n - broken
        fields = {"prompt": [*b"Once"], "max_tokens": 20, "seed": self.n}
        reply = await asyncio.to_thread(process.complete, **fields)
        assert reply["choices"][0]["text"] == text_of(self.engines[current % 2], fields)


def test_a_soak_with_hang_ups(tmp_path: Path) -> None:
    """A process, which reads another model at SIGHUP, drops no request; at the end it drains."""
    rng, reloads = random.Random(shifted(0)), Reloads(tmp_path)
    flags = ("--tokenizer", "byte", "--threads", "1", "--max-batch", "8", "--max-queue", "1000")
    memory = []
    with contextlib.closing(Process(str(tmp_path / "served"), *flags)) as process:
        for part in range(5):
            work = clients(process, N // 5, rng, lambda: reloads.hang_up(process))
            assert sum(asyncio.run(work).values()) == N // 5
            memory.append(resident_bytes(process.process.pid))
            print(f"{part + 1}/5: {reloads.n} reloads, {memory[-1] / 2**20:.1f} MB")
        assert reloads.n >= 4
        wait_for(lambda: process.metric("gptfast:requests_total") == n_ended(process))
        assert process.metric("gptfast:requests_failed_total") == 0
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert process.metric(f"vllm:{name}") == 0
        if N >= 5000:  # before, what is needed once has not all come
            assert memory[-1] <= (1 + MAX_GROWTH) * memory[1], memory
        process.process.terminate()
        assert process.process.wait(WAIT_S) == 0
        assert process.process.stderr is not None and process.process.stderr.read() == ""


GUESSERS = ["lookup", "draft"]


@pytest.fixture(params=GUESSERS)
def guessing(request: pytest.FixtureRequest, byte_model: GPT) -> Iterator[Running]:
    def opened() -> Model:
        # The model itself as its draft: guesses are right, and refused by the seed's draws alone.
        draft = {"draft": Engine(byte_model)}
        guesses: dict[str, Any] = {"lookup": True} if request.param == "lookup" else draft
        return Model(Engine(byte_model, max_batch=4), BYTE, guesses)

    with server(byte_model, open_model=opened) as running:
        yield running


def test_guesses_change_no_text_of_many_clients(guessing: Running, byte_engine: Engine) -> None:
    rng = random.Random(shifted(0))
    asked = []
    for k in range(24):
        piece = [rng.randrange(256) for _ in range(rng.choice([2, 9]))]
        fields: dict[str, Any] = {"prompt": piece * 4, "max_tokens": 30, "seed": k}
        fields["temperature"] = rng.choice([0, 0.2, 1.0])
        asked.append(fields)

    async def texts() -> list[str]:
        done = [asyncio.to_thread(guessing.complete, **fields) for fields in asked]
        return [reply["choices"][0]["text"] for reply in await asyncio.gather(*done)]

    found = asyncio.run(texts())
    assert found == [text_of(byte_engine, fields) for fields in asked]
    # Several tokens came from some steps, so guesses were right.
    counters = guessing.service._schedulers[-1].counters
    assert counters.new_tokens > counters.steps


# Malformed requests, straight into the application: thousands a second.

JUNK = [None, True, -1, 0, 2**80, 1e308, "x", "", [], {}, [[]], [None], {"a": []}, "\x00", [[-1]]]
FIELDS = ["prompt", "n", "max_tokens", "temperature", "top_p", "stop", "seed", "logit_bias"]
FIELDS += ["model", "stream_options", "logprobs", "echo", "top_k", "min_p", "messages", "suffix"]
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/models/x"]


def malformed(rng: random.Random) -> tuple[str, str, bytes]:
    """Return a method, a path and a body that no handler may take."""
    wrong = {rng.choice(FIELDS): rng.choice(JUNK) for _ in range(rng.randrange(1, 4))}
    body = {"prompt": "a", "max_tokens": 1, **wrong, "no such field": rng.choice(JUNK)}
    raw = json.dumps(body).encode()
    if rng.random() < 0.3:
        raw = raw[: rng.randrange(len(raw))] + rng.randbytes(rng.randrange(3))
    return rng.choice(["POST", "POST", "POST", "GET", "PUT"]), rng.choice(PATHS), raw


async def asked_directly(app: Any, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    """Return the status and body that an ASGI application answers."""
    told: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return told.pop() if told else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    scope |= {"scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(one.get("body", b"") for one in sent[1:])


def test_malformed_requests_get_4xx_without_a_trace(byte_model: GPT) -> None:
    rng = random.Random(shifted(0))
    with server(byte_model) as running:
        app = make_app(running.service)

        async def ask_all() -> None:
            for _ in range(10_000):
                method, path, raw = malformed(rng)
                status, text = await asked_directly(app, method, path, raw)
                assert 400 <= status < 500, (method, path, raw, text)
                error = json.loads(text)["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert b"Traceback" not in text and b"/gptfast/" not in text

        asyncio.run_coroutine_threadsafe(ask_all(), running.loop).result(5 * WAIT_S)
        assert running.service.busy == 0
        assert running.metric("gptfast:requests_total") == 0
