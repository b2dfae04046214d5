"""Requests that are made to hurt the server: none ends it, holds it up or takes its memory."""

import asyncio
import json
import socket
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError
from serving import WAIT_S, Running, send, server, wait_for

from gptfast import GPT
from gptfast.ops.backend import EXTENSION
from gptfast.serve.guards import BodyLimit
from gptfast.serve.protocol import (
    MAX_BIASES,
    MAX_PENALTY,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
)

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")


@pytest.fixture(scope="module")
def tiny(byte_model: GPT) -> Iterator[Running]:
    with server(byte_model) as running:
        yield running
        assert running.service._schedulers[-1].failure is None
        assert running.complete("a", seed=1)["choices"]


EXTREMES: dict[str, Any] = {
    "temperature": [0, 1e-320, 1e-45, 1e-38, 3e38, 1e39, 1e308],
    "top_p": [1e-320, 1e-60, 1e-45, 1e-38, 1 - 1e-16, 1],
    "min_p": [1e-320, 1e-45, 1 - 1e-16, 1],
    "top_k": [-1, 0, 1, 2**62, 2**63 - 1],
    "repetition_penalty": [1e-320, 1e-45, 1e-38, 0.01, 1 / MAX_PENALTY, MAX_PENALTY, 1e38, 1e308],
    "seed": [-(2**63), 2**63 - 1],
    "logit_bias": [{str(i): sign * 100 for i in range(257)} for sign in (-1, 1)],
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_options_fail_no_engine(tiny: Running, name: str) -> None:
    """Values that are 0 or infinite in float32 are refused or mean what they say."""
    for value in EXTREMES[name]:
        body = {"prompt": [*range(100)], "max_tokens": 4, "n": 2, name: value, "logprobs": 2}
        status, _, raw = tiny.request("POST", "/v1/completions", body)
        assert status in (200, 400), (value, raw)
        if status == 400:
            assert name in json.loads(raw)["error"]["message"]


# What is no text in UTF-8, wherever it may stand.

LONE = "\ud800"
UNENCODABLE = [
    ("/v1/completions", {"prompt": LONE}),
    ("/v1/completions", {"prompt": "a", LONE: 1}),
    ("/v1/completions", {"prompt": "a", "stop": LONE}),
    ("/v1/completions", {"prompt": "a", "model": LONE}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {LONE: 1}}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {LONE: LONE}}),
    ("/v1/completions", {"prompt": "a", "stream_options": {LONE: 1}}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONE}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", LONE: 1}]}),
    ("/v1/chat/completions", {"messages": [{"role": LONE, "content": "a"}]}),
    ("/tokenize", {"prompt": LONE}),
    ("/tokenize", {"prompt": "a", LONE: 1}),
]


@pytest.mark.parametrize("n", range(len(UNENCODABLE)))
def test_half_characters_are_refused(tiny: Running, n: int) -> None:
    path, body = UNENCODABLE[n]
    status = 404 if "model" in body else 400
    assert tiny.error(path, body, status)["message"]


def test_numbers_without_end(tiny: Running) -> None:
    for value in ("9" * 5000, "-" + "9" * 5000, "1e999", "-1e999"):
        for name in ("seed", "temperature", "prompt"):
            tiny.error("/v1/completions", f'{{"prompt": "a", "{name}": {value}}}'.encode())
    tiny.error("/v1/completions", {"prompt": [2**80]})
    tiny.error("/v1/completions", {"prompt": [[1], [-(2**80)]]})
    tiny.error("/detokenize", {"tokens": [2**80]})
    tiny.error("/v1/completions", {"prompt": "a", "logit_bias": {"9" * 5000: 1}})


# A million mistakes in one request.

MANY = 100_000
ITEMS: list[Any] = [None] * MANY
MISTAKES: list[tuple[Any, Any]] = [
    (CompletionRequest, {"prompt": ITEMS}),
    (CompletionRequest, {"prompt": [1] * MANY + [None]}),
    (CompletionRequest, {"prompt": [ITEMS]}),
    (CompletionRequest, {"prompt": [[]] * MANY}),
    (CompletionRequest, {"prompt": ["a"] * MANY}),
    (CompletionRequest, {"prompt": "a", "stop": ITEMS}),
    (CompletionRequest, {"prompt": "a", "stop": ["a"] * MANY}),
    (CompletionRequest, {"prompt": "a", "logit_bias": {str(i): None for i in range(MANY)}}),
    (CompletionRequest, {"prompt": "a", **{f"field{i}": i for i in range(MANY)}}),
    (ChatRequest, {"messages": ITEMS}),
    (ChatRequest, {"messages": [{"role": "user"}] * MANY}),
    (ChatRequest, {"messages": [{"role": "user", "content": ITEMS}]}),
    (ChatRequest, {"messages": [{"role": "user"}], "metadata": {str(i): i for i in range(MANY)}}),
    (ChatRequest, {"messages": [{"role": "user"}], "modalities": ITEMS}),
    (DetokenizeRequest, {"tokens": ITEMS}),
]


@pytest.mark.parametrize("n", range(len(MISTAKES)))
def test_many_mistakes_cost_as_much_as_one(n: int) -> None:
    model, body = MISTAKES[n]
    tracemalloc.start()
    with pytest.raises(ValidationError) as raised:
        model.model_validate(body)
    assert raised.value.error_count() < 10
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_limits_of_lists_are_named(tiny: Running) -> None:
    bias = {str(i): 0 for i in range(MAX_BIASES + 1)}
    error = tiny.error("/v1/completions", {"prompt": "a", "logit_bias": bias})
    assert error["message"] == "logit_bias: logit_bias must have at most 1024 entries, got 1025"
    error = tiny.error("/v1/completions", {"prompt": "a", "stop": ["a"] * 65})
    assert "at most 64, of at most 1000 characters each" in error["message"]
    tiny.error("/v1/completions", {"prompt": "a", "stop": "a" * 1001})
    error = tiny.error("/v1/completions", {"prompt": "a", "stream_options": {}})
    assert error["message"] == "stream_options needs stream: true; set it or leave it out"


# Connections.


def replies(running: Running, *parts: bytes, wait_s: float = WAIT_S) -> bytes:
    """Send parts of a request; return all that comes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=wait_s) as sock:
        found = b""
        try:
            for part in parts:
                sock.sendall(part)
            while piece := sock.recv(2**16):
                found += piece
        except ConnectionError:
            pass  # it was closed while we sent
        return found


@pytest.mark.parametrize("head", ["a header", "headers", "the path"])
def test_a_head_without_end_is_refused(tiny: Running, head: str) -> None:
    pytest.importorskip("httptools", reason="httptools is not installed (the extra serve)")
    start, piece = b"GET /health HTTP/1.1\r\nHost: x\r\n", b"X-A: b\r\n" * 1000
    if head == "a header":
        start, piece = start + b"X-A: ", b"b" * 8000
    elif head == "the path":
        start, piece = b"GET /", b"b" * 8000
    before = time.monotonic()
    found = replies(tiny, start, *[piece] * 2000)  # 16 MB
    assert not found or b" 400 " in found
    assert time.monotonic() - before < WAIT_S / 2
    assert tiny.request("GET", "/health")[0] == 200


def test_a_silent_connection_is_closed(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("httptools", reason="httptools is not installed (the extra serve)")
    from gptfast.serve import connection

    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.05)
    assert replies(tiny) == b""
    assert replies(tiny, b"GET /health HTTP/1.1\r\nHost:") == b""
    # The time of a head is not that of a request.
    sock = send(tiny, {"prompt": "a", "max_tokens": 100, "ignore_eos": True})
    assert b" 200 " in sock.recv(2**16)
    sock.close()


def test_a_body_that_does_not_come(byte_model: GPT) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def never() -> Any:
        await asyncio.Event().wait()

    sent: list[Any] = []

    async def note(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": []}
    asyncio.run(BodyLimit(app, 100, timeout_s=0.01)(scope, never, note))
    assert sent[0]["status"] == 408
    assert b"the body did not come within 0.01 s" in sent[1]["body"]


def test_balancers_may_ask_with_head(tiny: Running) -> None:
    for path in ("/health", "/"):
        status, _, raw = tiny.request("HEAD", path)
        assert status == 200 and raw == b""


def test_a_reply_goes_back_as_a_message(tiny: Running) -> None:
    """Also as people write it: with all the empty fields of OpenAI's client."""
    empty = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", **empty},
        {"role": "user", "content": "c"},
    ]
    assert tiny.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})["choices"]
    messages[1]["tool_calls"] = [{}]
    error = tiny.error("/v1/chat/completions", {"messages": messages})
    assert error["param"] == "messages.1.tool_calls"


def test_a_client_that_leaves_at_once(tiny: Running) -> None:
    """Before it can have got anything, in any state of its request."""
    for cut in (1, 30, 90, 10**6):
        for _ in range(5):
            raw = json.dumps({"prompt": "a" * 50, "max_tokens": 60, "stream": True}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n"
            sock = socket.create_connection(("127.0.0.1", tiny.port), timeout=WAIT_S)
            whole = f"{head}Content-Type: application/json\r\n\r\n".encode() + raw
            sock.sendall(whole[:cut])
            sock.close()
    wait_for(lambda: not tiny.service.busy)
