"""The server over a real socket: requests of the official client, streams, errors and limits."""

import asyncio
import gc
import http.client
import json
import math
import os
import random
import re
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from seeds import shifted
from serving import (
    BLOCK,
    BYTE,
    WAIT_S,
    Limits,
    Running,
    expected,
    held,
    n_ended,
    send,
    server,
    text_of,
    wait_for,
)

from gptfast import GPT, Engine, generate
from gptfast.ops.backend import EXTENSION
from gptfast.serve.app import EventStream
from gptfast.serve.group import Group
from gptfast.serve.run import is_loopback

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")


@pytest.fixture(scope="module")
def tiny(byte_model: GPT) -> Iterator[Running]:
    with server(byte_model) as running:
        yield running


@pytest.fixture
def client(tiny: Running) -> Any:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{tiny.port}/v1", api_key="none")


# Completions.


def test_completions_by_the_official_client(client: Any, byte_engine: Engine) -> None:
    options = {"temperature": 0.7, "top_p": 0.9, "seed": 5}
    reply = client.completions.create(
        model="tiny", prompt=["Once", "upon"], n=2, max_tokens=20, stop=["qq"], **options
    )
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-")
    for choice in reply.choices:
        prompt, seed = ["Once", "upon"][choice.index // 2], 5 + choice.index % 2
        wanted = expected(byte_engine, prompt, 20, stop=["qq"], **{**options, "seed": seed})
        assert choice.text == wanted
        assert choice.finish_reason in ("stop", "length") and choice.logprobs is None
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage.prompt_tokens == 8
    assert reply.usage.total_tokens == 8 + reply.usage.completion_tokens


def test_every_option_reaches_generate(tiny: Running, byte_engine: Engine) -> None:
    options = {"temperature": 1.2, "top_k": 30, "top_p": 0.8, "min_p": 0.01, "seed": -9}
    options["repetition_penalty"] = 1.2
    bias = {"logit_bias": {"101": 3.5, "32": -100}}
    got = tiny.complete([72, 105], max_tokens=30, ignore_eos=True, **options, **bias)
    wanted = generate(
        byte_engine, [[72, 105]], 30, tokenizer=BYTE, logit_bias={101: 3.5, 32: -100}, **options
    )
    assert got["choices"][0]["text"] == BYTE.decode(wanted[0][2:])
    assert got["choices"][0]["finish_reason"] == "length"
    assert got["usage"]["completion_tokens"] == 30


def test_an_empty_prompt_begins_a_text(tiny: Running, byte_engine: Engine) -> None:
    got = tiny.complete("", seed=1)
    assert got["choices"][0]["text"] == expected(byte_engine, "", 16, seed=1)
    assert got["usage"]["prompt_tokens"] == 1


def test_a_seed_repeats_a_text_and_none_does_not(tiny: Running) -> None:
    def text(**fields: Any) -> str:
        return tiny.complete("a", max_tokens=30, **fields)["choices"][0]["text"]

    assert text(seed=3) == text(seed=3)
    assert len({text() for _ in range(4)}) > 1


def test_prompts_and_new_tokens_are_scored_in_one_pass(tiny: Running, byte_engine: Engine) -> None:
    """As lm-evaluation-harness asks and reads: prompt + 1 entries, the first of them null."""
    prompt = [*b"The value of a thing"]
    fields = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    reply = tiny.complete([prompt, prompt[:1]], **fields)
    logprobs = byte_engine.logits(prompt).log_softmax(-1)
    found = reply["choices"][0]["logprobs"]
    assert len(found["token_logprobs"]) == len(prompt) + 1
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for at, i in enumerate(prompt[1:]):
        assert found["token_logprobs"][at + 1] == logprobs[at, i].item()
        top = found["top_logprobs"][at + 1]
        assert max(top.values()) == logprobs[at].max().item()
        assert top[chr(i)] == logprobs[at, i].item()
    assert found["token_logprobs"][-1] == logprobs[-1].max().item()
    assert found["tokens"][: len(prompt)] == [chr(i) for i in prompt]
    assert found["text_offset"][: len(prompt)] == [*range(len(prompt))]
    assert len(reply["choices"][1]["logprobs"]["token_logprobs"]) == 2
    only = tiny.complete("abc", echo=True, max_tokens=0, logprobs=0)
    assert only["choices"][0]["text"] == "abc" and only["usage"]["completion_tokens"] == 0
    assert len(only["choices"][0]["logprobs"]["tokens"]) == 3
    assert tiny.complete("abc", echo=True, seed=1)["choices"][0]["text"].startswith("abc")
    # A prompt that ends within a character: the new text begins after what stands for it.
    halves = {"echo": True, "max_tokens": 1, "logprobs": 0, "logit_bias": {"169": 100}}
    (choice,) = tiny.complete([0x61, 0xC3], **halves)["choices"]
    assert choice["text"] == "a\ufffd\ufffd" and choice["logprobs"]["text_offset"] == [0, 1, 2]


def test_lm_evaluation_harness_reads_its_scores(tiny: Running, byte_engine: Engine) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    contexts = [[*b"One two"], [*b"A"]]
    reply = tiny.complete(
        [[*context, *b" three"] for context in contexts],
        **{"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234},
    )
    lengths = [len(context) for context in contexts]
    parsed = LocalCompletionsAPI.parse_logprobs(reply, ctxlens=lengths)
    for context, (logprob, greedy) in zip(contexts, parsed, strict=True):
        whole = [*context, *b" three"]
        logprobs = byte_engine.logits(whole).log_softmax(-1)[len(context) - 1 : -1]
        each = [row[i].item() for row, i in zip(logprobs, b" three", strict=True)]
        assert logprob == pytest.approx(sum(each), abs=1e-4)
        assert greedy == (logprobs.argmax(-1).tolist() == [*b" three"])


@pytest.mark.parametrize("concurrent", [1, 3])
def test_lm_evaluation_harness_gets_what_eval_gets(
    tiny: Running, byte_model: GPT, concurrent: int
) -> None:
    """Its local-completions, with the server's tokenizer, scores as `gptfast eval --tasks` does."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    for module in ("aiohttp", "tenacity"):
        pytest.importorskip(module, reason=f"{module}, of lm_eval[api], is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from gptfast.evaluate.lm_eval import GPTFastLM

    url = f"http://127.0.0.1:{tiny.port}/v1/completions"
    settings = {"max_length": BLOCK, "batch_size": 2, "num_concurrent": concurrent}
    theirs = LocalCompletionsAPI(base_url=url, model="tiny", **settings)
    assert theirs.tokenizer_backend == "remote"
    assert theirs.eot_token_id == 256
    ours = GPTFastLM(byte_model, BYTE)
    pairs = [("the value of", " a name"), ("", "x"), ("ab ", "c"), ("a" * 90, " tail")]
    asked = [Instance("loglikelihood", {}, pair, k) for k, pair in enumerate(pairs)]
    found = theirs.loglikelihood(asked, disable_tqdm=True)
    for got, wanted in zip(found, ours.loglikelihood(asked, True), strict=True):
        assert got[0] == pytest.approx(wanted[0], abs=1e-4) and got[1] == wanted[1]
    until = {"until": ["e"], "max_gen_toks": 12, "temperature": 0}
    asked = [Instance("generate_until", {}, ("the v", dict(until)), k) for k in range(2)]
    texts = theirs.generate_until(asked, disable_tqdm=True)
    asked = [Instance("generate_until", {}, ("the v", dict(until)), k) for k in range(2)]
    assert texts == ours.generate_until(asked, True)


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_stream_is_the_reply_in_pieces(tiny: Running, kind: str) -> None:
    chat = kind == "chat"
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body: dict[str, Any] = {
        "max_tokens": 40,
        "seed": 8,
        "n": 2,
        "stop": ["e", "\ufffd\ufffd\ufffd"],
    }
    body |= {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi"}
    body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    whole = tiny.post(path, body)
    chunks = tiny.events(path, body)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all("usage" not in chunk for chunk in chunks)
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert [one["finish_reason"] for one in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        if chat:
            assert mine[0]["delta"]["role"] == "assistant"
            text = "".join(one["delta"].get("content", "") for one in mine)
            assert text == choice["message"]["content"]
            logs = [entry for one in mine[1:] for entry in one["logprobs"]["content"]]
            assert logs == choice["logprobs"]["content"]
            assert all(len(entry["top_logprobs"]) == 2 for entry in logs)
        else:
            assert "".join(one["text"] for one in mine) == choice["text"]
            for name, values in choice["logprobs"].items():
                assert [v for one in mine for v in one["logprobs"][name]] == values
        assert "e" not in (choice["message"]["content"] if chat else choice["text"])


def test_usage_in_streams_only_when_asked(tiny: Running) -> None:
    body = {"prompt": "Hi", "max_tokens": 5, "ignore_eos": True, "seed": 1}
    asked = {**body, "stream_options": {"include_usage": True}}
    *chunks, last = tiny.events("/v1/completions", asked)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5
    each = {"include_usage": True, "continuous_usage_stats": True}
    chunks = tiny.events("/v1/completions", {**body, "stream_options": each})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 5


LOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "vllm bench serve": (
        "/v1/completions",
        {
            "prompt": "Once",
            "repetition_penalty": 1.0,
            "temperature": 0.0,
            "max_tokens": 7,
            "logprobs": None,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "guidellm": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "max_completion_tokens": 7,
            "max_tokens": 7,
            "stop": None,
            "ignore_eos": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
}


@pytest.mark.parametrize("name", LOADS)
def test_requests_of_load_generators(tiny: Running, name: str) -> None:
    """They count the tokens of the last usage, and take the time of the first chunk with text."""
    path, body = LOADS[name]
    chunks = tiny.events(path, {"model": "tiny", **body})
    assert chunks[-1]["usage"]["completion_tokens"] == 7 and chunks[-1]["choices"] == []
    assert all(chunk["choices"] for chunk in chunks[:-1])
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_streams_by_the_official_client(client: Any, byte_engine: Engine) -> None:
    stream = client.completions.create(
        model="tiny", prompt="Once", max_tokens=30, seed=2, stream=True
    )
    assert "".join(c.choices[0].text for c in stream) == expected(byte_engine, "Once", 30, seed=2)
    messages = [{"role": "user", "content": "Hi"}]
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=9, seed=2, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == expected(byte_engine, "Q: Hi\nA:", 9, seed=2, stop=["\nQ:"])


# Chats.


def test_a_chat_is_written_in_the_template(tiny: Running, byte_engine: Engine) -> None:
    messages = [
        {"role": "system", "content": "Facts."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": " Two."},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]
    reply = tiny.post("/v1/chat/completions", {"messages": messages, "seed": 4, "max_tokens": 20})
    prompt = "Facts.\nQ: One?\nA: Two.\nQ: And?\nA:"
    assert reply["usage"]["prompt_tokens"] == len(prompt)
    text = expected(byte_engine, prompt, 20, seed=4, stop=["\nQ:"])
    assert reply["choices"][0]["message"] == {
        "role": "assistant",
        "content": text,
        "refusal": None,
    }
    # Without max_tokens there is room up to the end of the context.
    reply = tiny.post("/v1/chat/completions", {"messages": messages[:2], "seed": 4})
    assert reply["usage"]["total_tokens"] <= BLOCK


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["assistant"], "message 0 must be the user's, got assistant's"),
        (["system", "user", "user"], "message 2 must be the assistant's, got user's"),
        (["user", "assistant"], "the last message must be the user's"),
        (["system"], "the last message must be the user's"),
    ],
)
def test_messages_out_of_order(tiny: Running, roles: list[str], message: str) -> None:
    messages = [{"role": role, "content": "x"} for role in roles]
    error = tiny.error("/v1/chat/completions", {"messages": messages})
    assert message in error["message"] and error["param"] == "messages"


# Errors.

BAD = {
    "unknown field": ({"prompt": "a", "frob": 1}, "Unrecognized request argument supplied: frob"),
    "temperature": ({"prompt": "a", "temperature": -1}, "temperature: input should be greater"),
    "text for a number": ({"prompt": "a", "top_p": "1"}, "top_p: input should be a valid number"),
    "prompt": ({"prompt": {"a": 1}}, "prompt: must be a string, a list of strings, a list of"),
    "mixed prompt": ({"prompt": ["a", 1]}, "prompt: must be a string, a list of strings"),
    "no prompt": ({"prompt": []}, "prompt has no prompts; write one"),
    "empty ids": ({"prompt": [[]]}, "prompt 0 is empty"),
    "id": ({"prompt": [257]}, "token id 257, out of range for a vocabulary of 257"),
    "negative id": ({"prompt": [-1], "echo": True}, "token id -1"),
    "stop": ({"prompt": "a", "stop": [1]}, "stop: must be a string or a list of strings"),
    "empty stop": ({"prompt": "a", "stop": [""]}, "stop has an empty string"),
    "suffix": ({"prompt": "a", "suffix": "b"}, "suffix is not supported; leave it out"),
    "best_of": ({"prompt": "a", "best_of": 3}, "best_of is not supported; leave it out"),
    "penalty": ({"prompt": "a", "presence_penalty": 1}, "presence_penalty is not supported"),
    "bias key": ({"prompt": "a", "logit_bias": {"x": 1}}, "keys of logit_bias must be token ids"),
    "odd bias key": ({"prompt": "a", "logit_bias": {"1_0": 1}}, "keys of logit_bias must be token"),
    "bias key twice": (
        {"prompt": "a", "logit_bias": {"5": 1, "05": 2}},
        "logit_bias must be token",
    ),
    "bias id": ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias has token id 999"),
    "bias": ({"prompt": "a", "logit_bias": {"9": 101}}, "less than or equal to 100"),
    "no tokens": ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1 without echo"),
    "too many": ({"prompt": "a", "n": 1000}, "asks for 1000 choices (prompts times n), and"),
    "too long": ({"prompt": "a" * 100, "max_tokens": 29}, "maximum context length is 128 tokens"),
    "far too long": ({"prompt": "a" * 10**6}, "maximum context length is 128 tokens, and a prompt"),
    "surrogate": ({"prompt": "\ud800"}, "lone surrogate"),
    "huge": ({"prompt": "a", "seed": 2**70}, "seed: "),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_value_and_remedy(tiny: Running, name: str) -> None:
    body, message = BAD[name]
    error = tiny.error("/v1/completions", body)
    assert message in error["message"] and error["type"] == "invalid_request_error"


def test_other_errors(tiny: Running) -> None:
    assert "JSON object" in tiny.error("/v1/completions", b"{")["message"]
    assert "JSON object" in tiny.error("/v1/completions", b"[1]")["message"]
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    tiny.error("/v1/completions", deep)
    error = tiny.error("/v1/completions", {"prompt": "a", "model": "other"}, 404)
    assert error["code"] == "model_not_found" and "'tiny'" in error["message"]
    assert tiny.error("/nowhere", {}, 404)["message"].startswith("there is no such path")
    assert tiny.request("GET", "/v1/completions")[0] == 405
    error = tiny.error("/v1/completions", {"prompt": "a", "temperature": math.nan})
    assert error["param"] == "temperature"
    chat = {"messages": [{"role": "user", "content": "a"}]}
    error = tiny.error("/v1/chat/completions", {**chat, "tools": [{}]})
    assert error["message"] == "tools is not supported; leave it out: a GPT-2 calls no tools"
    error = tiny.error("/v1/chat/completions", {**chat, "top_logprobs": 2})
    assert error["message"] == "top_logprobs needs logprobs: true"
    form = {"type": "json_schema", "json_schema": {"name": "a"}}
    error = tiny.error("/v1/chat/completions", {**chat, "response_format": form})
    assert error["message"].startswith("response_format is not supported; leave it out")
    long = [{"role": "user", "content": "a" * 130}]
    assert tiny.error("/v1/chat/completions", {"messages": long})["param"] == "messages"


def test_errors_by_the_official_client(client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="maximum context length") as refused:
        client.completions.create(model="tiny", prompt="a" * 200, max_tokens=5)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="a")
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "gptfast"


def test_the_official_client_tries_again_where_the_queue_is_full(
    byte_model: GPT, byte_engine: Engine
) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    with server(byte_model, max_batch=1, limits=Limits(max_queue=0)) as running:
        url = f"http://127.0.0.1:{running.port}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=9)
        asked: dict[str, Any] = {"prompt": "a", "max_tokens": 9, "seed": 3}
        with ThreadPoolExecutor(2) as pool:
            with held(running):
                first = pool.submit(running.complete, **asked)
                wait_for(lambda: running.service.busy == 1)
                create = client.completions.create
                again = pool.submit(create, model="tiny", extra_body={"top_k": 5}, **asked)
                wait_for(lambda: running.metric("gptfast:requests_refused_total") >= 1)
            assert first.result(WAIT_S)["choices"]
            text = again.result(WAIT_S).choices[0].text
        assert text == expected(byte_engine, "a", 9, seed=3, top_k=5)


@pytest.mark.parametrize("seed", range(3))
def test_malformed_requests_get_4xx_and_leak_nothing(tiny: Running, seed: int) -> None:
    rng = random.Random(shifted(seed))
    junk = [None, True, -1, 0, 2**80, 1e308, "x", "", [], {}, [[]], [None], {"a": []}, "\x00"]
    names = ["prompt", "n", "max_tokens", "temperature", "top_p", "stop", "seed", "logit_bias"]
    names += ["stream_options", "logprobs", "echo", "top_k", "min_p", "messages", "frob"]
    connection = http.client.HTTPConnection("127.0.0.1", tiny.port, timeout=WAIT_S)
    for _ in range(150):
        body = {"prompt": "a", "max_tokens": 1}
        body |= {rng.choice(names): rng.choice(junk) for _ in range(rng.randrange(1, 4))}
        raw = json.dumps(body).encode()
        if rng.random() < 0.3:
            raw = raw[: rng.randrange(len(raw))] + rng.randbytes(rng.randrange(3))
        path = rng.choice(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        assert response.status == 200 or 400 <= response.status < 500, (body, text)
        if response.status != 200:
            assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
        assert "Traceback" not in text and "/gptfast/" not in text
    connection.close()
    assert tiny.idle()


# Others.


def test_tokenizer_endpoints(tiny: Running) -> None:
    found = tiny.post("/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert found == {
        "count": 3,
        "max_model_len": BLOCK,
        "tokens": [*"hé".encode()],
        "token_strs": ["h", "bytes:\\xc3", "bytes:\\xa9"],
    }
    assert tiny.post("/detokenize", {"tokens": found["tokens"]}) == {"prompt": "hé"}
    assert "there is no token 257" in tiny.error("/detokenize", {"tokens": [257]})["message"]
    # The name of a special token alone is the token: so lm-evaluation-harness learns its id.
    assert tiny.post("/tokenize", {"prompt": "<|endoftext|>"})["tokens"] == [256]
    assert tiny.post("/tokenize", {"prompt": "<|endoftext|>a"})["tokens"] == [*b"<|endoftext|>a"]
    info = json.loads(tiny.request("GET", "/tokenizer_info")[2])
    assert info["eos_token"] == "<|endoftext|>" and info["eos_token_id"] == 256
    for path in ("/docs", "/openapi.json", "/settings", "/"):
        assert tiny.request("GET", path)[0] == 200


def test_the_openapi_document_names_the_fields_of_tokens(tiny: Running) -> None:
    document = json.loads(tiny.request("GET", "/openapi.json")[2])
    asked = {"/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [97]}}
    for path, body in asked.items():
        reply = document["paths"][path]["post"]["responses"]["200"]
        name = reply["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert {*document["components"]["schemas"][name]["properties"]} == {*tiny.post(path, body)}


def test_the_page_takes_nothing_from_elsewhere(tiny: Running) -> None:
    status, headers, raw = tiny.request("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"http://" not in raw and b"https://" not in raw


def test_request_ids(tiny: Running) -> None:
    given = tiny.request("GET", "/health", headers={"x-request-id": "my-id.1"})[1]
    assert given["x-request-id"] == "my-id.1"
    bad = tiny.request("GET", "/health", headers={"x-request-id": "a b" * 90})[1]
    assert re.fullmatch("req-[0-9a-f]{32}", bad["x-request-id"])


def test_keys(byte_model: GPT) -> None:
    with server(byte_model, keys=("one", "two")) as running:
        body = {"prompt": "a", "max_tokens": 1}
        for header in ({}, {"Authorization": "Bearer on"}, {"Authorization": "one"}):
            status, headers, raw = running.request("POST", "/v1/completions", body, header)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert json.loads(raw)["error"]["code"] == "invalid_api_key"
        for key in ("one", "two"):
            header = {"Authorization": f"Bearer {key}"}
            assert running.request("POST", "/v1/completions", body, header)[0] == 200
        assert running.request("GET", "/health")[0] == 200
        assert running.request("GET", "/")[0] == 200
        assert running.request("GET", "/metrics")[0] == 401
        assert "access-control-allow-origin" not in running.request("GET", "/health")[1]


def test_cors_is_for_named_origins(byte_model: GPT) -> None:
    with server(byte_model, cors_origins=("https://a.example",)) as running:
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            headers = running.request("GET", "/health", headers={"Origin": origin})[1]
            assert ("access-control-allow-origin" in headers) == allowed


def test_a_body_too_long(byte_model: GPT) -> None:
    with server(byte_model, limits=Limits(max_body_bytes=1000)) as running:
        body = {"prompt": "a" * 1000}
        assert "longer than 1000 bytes" in running.error("/v1/completions", body, 413)["message"]
        with socket.create_connection(("127.0.0.1", running.port), timeout=WAIT_S) as sock:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            sock.sendall(head + b"Content-Type: application/json\r\n\r\n")
            sock.sendall(b"800\r\n" + b" " * 0x800 + b"\r\n")
            assert b" 413 " in sock.recv(4096)


def test_limits(byte_model: GPT) -> None:
    limits = Limits(max_choices=2, max_prompt_tokens=5, max_new_tokens=9, timeout_s=0.0)
    with server(byte_model, limits=limits) as running:
        path = "/v1/completions"
        assert "at most 2" in running.error(path, {"prompt": "a", "n": 3})["message"]
        assert "takes 5; shorten" in running.error(path, {"prompt": "abcdef"})["message"]
        assert "at most 9" in running.error(path, {"prompt": "a", "max_tokens": 10})["message"]
        with held(running):
            error = running.error(path, {"prompt": "a"}, 504)
            assert error["code"] == "timeout"
            status, _, raw = running.request("POST", path, {"prompt": "a", "stream": True})
            assert status == 200 and b'"code": "timeout"' in raw and b"[DONE]" not in raw
        assert running.idle()


def test_a_full_queue_and_clients_that_leave(byte_model: GPT) -> None:
    limits = Limits(max_queue=2)
    long = {"prompt": "a", "max_tokens": 120, "ignore_eos": True}
    with server(byte_model, max_batch=2, limits=limits) as running:
        scheduler = running.service._schedulers[0]
        with held(running):
            leaving = [send(running, {**long, "stream": bool(k % 2)}) for k in range(2)]
            wait_for(lambda: running.service.busy == 2)
            waiting = [send(running, {**long, "stream": bool(k % 2)}) for k in range(2)]
            wait_for(lambda: running.service.busy == 4)
            status, headers, raw = running.request("POST", "/v1/completions", long)
            assert status == 429 and 1 <= int(headers["retry-after"]) <= 60
            assert "above the limit of 2" in json.loads(raw)["error"]["message"]
            counted = [running.metric(f"vllm:num_requests_{x}") for x in ("running", "waiting")]
            assert 1 <= counted[0] <= 2 and sum(counted) == 4
            waiting[0].close(), waiting[1].close()
            wait_for(lambda: running.service.busy == 2)
            steps = scheduler.counters.steps
            leaving[0].close(), leaving[1].close()
            # The one that a step computes now stays until its end.
            wait_for(lambda: all(one.cancelled for one in [*scheduler._running]))
            wait_for(lambda: scheduler.n_waiting == 0)
        assert running.idle()
        assert scheduler.counters.steps <= steps + 1
        assert running.metric("gptfast:requests_cancelled_total") == 4
        assert running.metric("gptfast:requests_refused_total") == 1


def test_many_requests_with_mixed_options_and_disconnects(
    byte_model: GPT, byte_engine: Engine
) -> None:
    """Each text is that of `generate` alone, and the metrics add up.

    There are 200 requests, or up to 500 with GPTFAST_TEST_REQUESTS.
    """
    n = min(500, int(os.environ.get("GPTFAST_TEST_REQUESTS", "200")))
    rng = random.Random(shifted(0))

    def request(k: int) -> tuple[dict[str, Any], bool]:
        fields: dict[str, Any] = {"seed": k, "max_tokens": rng.randrange(1, 25)}
        fields["prompt"] = [rng.randrange(256) for _ in range(rng.choice([1, 3, 20, 90]))]
        if rng.random() < 0.5:
            fields["temperature"] = rng.choice([0, 0.5, 1.5])
        if rng.random() < 0.3:
            fields |= {"top_k": rng.randrange(1, 50), "repetition_penalty": 1.3}
        if rng.random() < 0.3:
            fields |= {"top_p": 0.7, "stop": ["e", "th"], "min_p": 0.01}
        if rng.random() < 0.2:
            fields["logit_bias"] = {"101": 4}
        fields["stream"] = rng.random() < 0.5
        return fields, rng.random() < 0.2

    requests = [request(k) for k in range(n)]
    order = rng.sample(range(n), n)
    with server(byte_model, max_batch=8, limits=Limits(max_queue=1000)) as running:
        leave = threading.Lock()

        def answer(k: int) -> None:
            fields, leaves = requests[k]
            if leaves:
                with leave:
                    sock = send(running, fields)
                time.sleep(rng.random() * 0.01)
                sock.close()
                return
            asked = {name: value for name, value in fields.items() if name != "stream"}
            if fields["stream"]:
                chunks = running.events("/v1/completions", asked)
                text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            else:
                text = running.complete(**asked)["choices"][0]["text"]
            texts[k] = text

        texts: dict[int, str] = {}
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(answer, order))
        assert running.idle()
        wait_for(lambda: n_ended(running) == running.metric("gptfast:requests_total"))
        assert running.metric("gptfast:requests_total") >= len(texts)
        assert running.metric("gptfast:requests_failed_total") == 0
        scheduler = running.service._schedulers[0]
        assert sorted(scheduler._spare) == list(range(8))
    for k, text in texts.items():
        assert text == text_of(byte_engine, requests[k][0]), requests[k]
    assert len(texts) > 0.6 * n


def test_a_reload_drops_no_request(byte_model: GPT) -> None:
    with server(byte_model, max_batch=2) as running:
        before = running.service.model
        body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "seed": 1}
        with ThreadPoolExecutor(4) as pool:
            with held(running):
                replies = [pool.submit(running.complete, **body) for _ in range(4)]
                wait_for(lambda: running.service.busy == 4)
                load = asyncio.run_coroutine_threadsafe(running.service.load(), running.loop)
                load.result(WAIT_S)
                assert running.service.model is not before
                new = running.complete(**body)
            texts = {reply.result()["choices"][0]["text"] for reply in replies}
        assert texts == {new["choices"][0]["text"]}


def test_a_replaced_model_is_let_go_of(byte_model: GPT) -> None:
    """At once, also where nothing collects garbage: both may just fit into memory."""
    with server(byte_model) as running:
        running.complete("a", n=3, seed=1), running.events("/v1/completions", {"prompt": "a"})
        gc.collect()
        gc.disable()
        try:
            before = weakref.ref(running.service.model.engine)
            for stream in (False, True):
                running.request("POST", "/v1/completions", {"prompt": "a", "stream": stream})
            load = asyncio.run_coroutine_threadsafe(running.service.load(), running.loop)
            load.result(WAIT_S)
            running.complete("b")
            wait_for(lambda: before() is None)
        finally:
            gc.enable()


def test_while_loading_and_draining(byte_model: GPT) -> None:
    with server(byte_model, load=False) as running:
        assert running.request("GET", "/health")[0] == 503
        assert "loading" in running.error("/v1/completions", {"prompt": "a"}, 503)["message"]
        asyncio.run_coroutine_threadsafe(running.service.load(), running.loop).result(WAIT_S)
        assert running.request("GET", "/health")[0] == 200
        running.loop.call_soon_threadsafe(running.service.close)
        wait_for(lambda: running.service.draining)
        status, headers, raw = running.request("GET", "/health")
        assert status == 503 and json.loads(raw) == {"status": "draining"}
        status, headers, _ = running.request("POST", "/v1/completions", {"prompt": "a"})
        assert status == 503 and headers["retry-after"] == "2"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "192.0.2.1", "x"])
def test_loopback(host: str) -> None:
    assert is_loopback(host) == (host in ("127.0.0.1", "::1", "localhost"))


def test_schemathesis_finds_no_fault(tiny: Running) -> None:
    """What the OpenAPI document allows, and what it does not, gets the replies that it names."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import given, settings
    from schemathesis import checks

    wanted = ("not_a_server_error", "status_code_conformance", "response_schema_conformance")
    checks.load_all_checks()
    chosen = checks.CHECKS.get_by_names([*wanted, "content_type_conformance"])
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{tiny.port}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:
        modes = [*schemathesis.GenerationMode] if operation.body else [None]
        for mode in modes:  # without a body there is nothing to get wrong
            kind = {} if mode is None else {"generation_mode": mode}

            @settings(max_examples=10, database=None)
            @given(case=operation.as_strategy(**kind))
            def check(case: Any) -> None:
                case.call_and_validate(checks=chosen, timeout=WAIT_S)

            check()
    assert tiny.idle()


def test_a_stream_that_nobody_reads_ends() -> None:
    """Its generations end with its time, though the client neither reads nor leaves."""
    ended = []

    class Unread(Group):
        def cancel(self) -> None:
            ended.append(self)

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        while True:
            yield {}

    async def forever(*_: Any) -> Any:
        await asyncio.Event().wait()

    stream = EventStream(Unread([], []), chunks(), limit_s=0.05)
    asyncio.run(stream({"type": "http"}, forever, forever))
    assert len(ended) == 1
