"""Requests that are made to hurt the server: none ends it, holds it up or takes its memory."""

import asyncio
import contextlib
import json
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import ValidationError
from serving import WAIT_S, Limits, Running, send, server, wait_for

from gptfast import GPT
from gptfast.ops.backend import EXTENSION
from gptfast.serve import app, texts
from gptfast.serve.protocol import (
    MAX_BIASES,
    MAX_PENALTY,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
)
from gptfast.serve.replies import Choice, Completions
from gptfast.serve.texts import ENCODING_THREADS

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


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_of_seconds_is_written_beside_the_event_loop(
    tiny: Running, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    class Noted(Completions):
        def choice(self, choice: Choice, *, streamed: bool) -> dict[str, Any]:
            if len(choice.tokens) >= 50:
                threads.append(threading.current_thread())
            return super().choice(choice, streamed=streamed)

    monkeypatch.setattr(app, "Completions", Noted)
    monkeypatch.setattr(texts, "LONG_TEXT", 50 * app.TOKEN_LENGTH)
    body = {"prompt": ["a" * 60] * 2, "echo": True, "logprobs": 1, "max_tokens": 2}
    status, _, raw = tiny.request("POST", "/v1/completions", {**body, "stream": stream})
    assert status == 200 and raw.count(b"text_offset") >= 2
    loop = asyncio.run_coroutine_threadsafe(_thread(), tiny.loop).result(WAIT_S)
    assert len(threads) == 2 and loop not in threads


def test_few_threads_encode_long_texts(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them takes Python's time from the event loop: sixteen held others up for seconds."""
    at_once, most, lock = [0], [0], threading.Lock()

    def encode(tokenizer: Any, text: str) -> list[int]:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        with lock:
            at_once[0] -= 1
        return [1]

    monkeypatch.setattr(app, "encode_opening", encode)
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(tiny.post, "/tokenize", {"prompt": "a" * 30_000}) for _ in range(12)]
        assert all(one.result(WAIT_S)["tokens"] == [1] for one in asked)
    assert 1 <= most[0] <= ENCODING_THREADS


def long_text(character: str) -> dict[str, str]:
    return {"prompt": character * (texts.LONG_TEXT + 1)}


@contextlib.contextmanager
def long_texts(running: Running, patch: pytest.MonkeyPatch, n: int) -> Iterator[list[str]]:
    """Send n long texts, none of which is encoded before the context ends; yield those that are."""
    begun: list[str] = []
    allowed = threading.Event()

    def encode(tokenizer: Any, text: str) -> list[int]:
        begun.append(text)
        assert allowed.wait(WAIT_S)
        return [1]

    patch.setattr(app, "encode_opening", encode)
    encoding = running.service.texts._encoding
    with contextlib.ExitStack() as stack:
        stack.callback(wait_for, lambda: encoding._free._value == ENCODING_THREADS)
        stack.callback(allowed.set)
        for _ in range(n):
            stack.enter_context(send(running, long_text("a"), "/tokenize"))
        wait_for(lambda: len(begun) + encoding.n_waiting == n)
        yield begun


def test_a_long_reply_waits_for_no_text(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with long_texts(tiny, monkeypatch, ENCODING_THREADS + 2):
        monkeypatch.setattr(app, "TOKEN_LENGTH", texts.LONG_TEXT)
        assert tiny.complete("a", max_tokens=4, logprobs=1, ignore_eos=True)["choices"]


def test_many_waiting_texts_are_refused(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_WAITING_TEXTS", 3)
    before = tiny.metric("gptfast:requests_refused_total")
    with long_texts(tiny, monkeypatch, ENCODING_THREADS + 3):
        for path in ("/tokenize", "/v1/completions"):
            status, headers, raw = tiny.request("POST", path, long_text("a"))
            assert status == 429 and int(headers["retry-after"]) > 0
            assert json.loads(raw)["error"]["code"] == "queue_full"
        assert tiny.metric("gptfast:requests_refused_total") == before + 2
        assert tiny.complete("a", max_tokens=1)["choices"]


def test_the_text_of_a_client_that_left_is_not_encoded(
    tiny: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = tiny.service.texts._encoding
    with long_texts(tiny, monkeypatch, ENCODING_THREADS + 3) as begun:
        with send(tiny, long_text("b"), "/tokenize"):
            wait_for(lambda: waiting.n_waiting == 4)
        wait_for(lambda: waiting.n_waiting == 3)
    assert len(begun) >= ENCODING_THREADS and all(text[0] == "a" for text in begun)


async def _thread() -> threading.Thread:
    return threading.current_thread()


def test_no_character_of_a_stream_ends_a_line(tiny: Running) -> None:
    """Clients in Python that break lines as str.splitlines does read whole events too."""
    body = {"prompt": "a\x85\u2028\u2029b\x0c\x1c", "echo": True, "max_tokens": 1, "stream": True}
    raw = tiny.request("POST", "/v1/completions", body)[2].decode()
    events = [line for line in raw.splitlines() if line]
    assert all(line.startswith("data: ") for line in events) and events.pop() == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in events)
    assert text.startswith(body["prompt"])


def test_a_request_that_never_fits_is_not_told_to_come_again(byte_model: GPT) -> None:
    with server(byte_model, max_batch=2, limits=Limits(max_queue=1)) as running:
        for body in ({"prompt": "a", "n": 4}, {"prompt": ["a"] * 4}):
            error = running.error("/v1/completions", body)
            assert (
                "asks for 4 choices (prompts times n), and this server gives at most 3"
                in (error["message"])
            )
        assert len(running.complete("a", n=3)["choices"]) == 3


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
