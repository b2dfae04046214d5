"""The server under many requests: broken off, malformed, the model read again meanwhile.

GPTFAST_TEST_REQUESTS is how many (200 by default; 10,000 take about a minute).
"""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import random_ids
from seeds import shifted
from serving import BYTE, WAIT_S, Limits, Running, n_ended, server, text_of, wait_for

from gptfast import GPT, Engine
from gptfast.ops.backend import EXTENSION
from gptfast.serve.app import make_app
from gptfast.serve.service import Model

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


async def client(running: Running, k: int, rng: random.Random) -> str:
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


async def clients(running: Running, n: int, rng: random.Random) -> Counter[str]:
    """Send n requests, CLIENTS at a time, and read the model again now and then."""
    left, done = list(range(n)), Counter[str]()

    async def work() -> None:
        while left:
            k = left.pop()
            if k % max(40, n // 20) == 1:
                reload = asyncio.run_coroutine_threadsafe(running.service.load(), running.loop)
                await asyncio.wrap_future(reload)
            done[await client(running, k, rng)] += 1

    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return done


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_soak(byte_model: GPT) -> None:
    rng = random.Random(shifted(0))
    done = Counter[str]()
    with server(byte_model, max_batch=8, limits=Limits(max_queue=1000)) as running:
        memory = []
        for part in range(5):
            done += asyncio.run(clients(running, N // 5, rng))
            assert running.idle()
            memory.append(resident_bytes())
            print(f"{part + 1}/5: {dict(done)}, {memory[-1] / 2**20:.1f} MB")
        assert sum(done.values()) == 5 * (N // 5) and done["stay"] and done["leave"]
        taken = running.metric("gptfast:requests_total")
        wait_for(lambda: n_ended(running) == running.metric("gptfast:requests_total"))
        assert done["stay"] <= taken <= done["stay"] + done["leave"]
        assert running.metric("gptfast:requests_cancelled_total") <= done["leave"]
        assert running.metric("gptfast:requests_failed_total") == 0
        assert running.metric("vllm:num_requests_running") == 0
        assert running.metric("vllm:kv_cache_usage_perc") == 0
        assert all(sorted(one._spare) == list(range(8)) for one in running.service._schedulers)
        if N >= 5000:  # before, what is needed once has not all come
            assert memory[-1] <= (1 + MAX_GROWTH) * memory[1], memory


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
