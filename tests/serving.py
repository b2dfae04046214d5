"""Servers with a tiny model of bytes, in a thread or a process, and what tests ask them."""

import asyncio
import contextlib
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from gptfast import GPT, Engine, get_tokenizer
from gptfast.generate import generate_text
from gptfast.generation import continuation
from gptfast.generation.conversation import QUESTIONS, Template
from gptfast.generation.stop import TextStream

for _module in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(_module, reason=f"{_module} is not installed (the extra serve)")

from gptfast.serve.app import make_app  # noqa: E402
from gptfast.serve.limits import Defaults, Limits  # noqa: E402
from gptfast.serve.model import Model  # noqa: E402
from gptfast.serve.run import bound_socket, server_of  # noqa: E402
from gptfast.serve.service import Service  # noqa: E402

BYTE = get_tokenizer("byte")
BLOCK = 128
"""The context of `byte_model`, a fixture of conftest.py."""
WAIT_S = 60


class Client:
    """A client of the server at a port."""

    port: int

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            given = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, raw, given)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any) -> Any:
        status, _, raw = self.request("POST", path, body)
        assert status == 200, raw
        return json.loads(raw)

    def complete(self, prompt: Any, **fields: Any) -> Any:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def error(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        got, _, raw = self.request("POST", path, body)
        assert got == status, raw
        error = json.loads(raw)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def events(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        status, headers, raw = self.request("POST", path, {**body, "stream": True})
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        parts = raw.decode().split("\n\n")
        assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
        assert parts.pop() == "data: [DONE]"
        return [json.loads(part.removeprefix("data: ")) for part in parts]

    def metric(self, name: str, labels: str = "") -> float:
        text = self.request("GET", "/metrics")[2].decode()
        found = re.search(rf"^{re.escape(name)}{{[^}}]*{labels}[^}}]*}} (\S+)$", text, re.M)
        assert found, (name, text)
        return float(found[1])


@dataclass
class Running(Client):
    """A server in a thread."""

    service: Service
    port: int
    loop: asyncio.AbstractEventLoop

    def idle(self) -> bool:
        deadline = time.monotonic() + WAIT_S
        while self.service.busy and time.monotonic() < deadline:
            time.sleep(0.002)
        return not self.service.busy


class Process(Client):
    """A server in a process of its own."""

    def __init__(self, *argv: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "gptfast", "serve", *argv, "--port", str(port)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.first = self.line()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.first)
        self.port = int(found[1]) if found else 0

    def line(self) -> str:
        """Return the next line of stderr."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def hang_up(self) -> str:
        """Send SIGHUP; return what the server says of it."""
        self.process.send_signal(signal.SIGHUP)
        return self.line()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return the status and the JSON of a reply."""
        status, _, raw = self.request(method, path, body)
        return status, json.loads(raw)

    def opened_stream(self, body: Any) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}), headers)
        return connection.getresponse()

    def stream(self, body: Any) -> Sequence[str]:
        """Return the events of a stream, or its error."""
        return self.opened_stream(body).read().decode().strip().split("\n\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def server(
    model: GPT,
    *,
    max_batch: int = 4,
    limits: Limits | None = None,
    keys: tuple[str, ...] = (),
    load: bool = True,
    open_model: Callable[[], Model] | None = None,
    template: str = QUESTIONS,
    defaults: Defaults | None = None,
    **app: Any,
) -> Iterator[Running]:
    """Run a server of a model in a thread."""

    def opened() -> Model:
        return Model(Engine(model, max_batch=max_batch), BYTE)

    sock = bound_socket("127.0.0.1", 0)
    started: list[Any] = []
    ready = threading.Event()

    async def run() -> None:
        seeds = random.Random(0)
        service = Service(
            "tiny",
            open_model or opened,
            template=Template.parse(template),
            limits=limits,
            defaults=defaults,
            new_seed=lambda: seeds.randrange(10**9),
        )
        if load:
            await service.load()
        uvicorn_server = server_of(make_app(service, keys=keys, **app))
        started.extend([service, asyncio.get_running_loop(), uvicorn_server])
        ready.set()
        await uvicorn_server.serve([sock])

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert ready.wait(WAIT_S)
    service, loop, uvicorn_server = started
    try:
        yield Running(service, sock.getsockname()[1], loop)
    finally:
        service.close(cancel=True)
        uvicorn_server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


def expected(alone: Engine, prompt: str, n: int, **options: Any) -> str:
    text = generate_text(alone, BYTE, prompt, n, **options)
    assert isinstance(text, str)
    return text[len(prompt) :]


def held(running: Running) -> Any:
    """Return a context in which the engine computes nothing."""
    return running.service.model.engine.turn()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def send(running: Running, body: Mapping[str, Any], path: str = "/v1/completions") -> socket.socket:
    raw = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", running.port), timeout=WAIT_S)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n"
    sock.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + raw)
    return sock


def n_ended(running: Client) -> float:
    stopped = running.metric("vllm:request_success_total", 'finished_reason="stop"')
    full = running.metric("vllm:request_success_total", 'finished_reason="length"')
    return stopped + full + running.metric("gptfast:requests_cancelled_total")


def text_of(alone: Engine, fields: Mapping[str, Any]) -> str:
    """Return what `generate_text` gives for the fields of a request."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed")
    options = {name: fields[name] for name in names if name in fields}
    options["logit_bias"] = {int(i): b for i, b in fields.get("logit_bias", {}).items()}
    checked = continuation.text_options(BYTE, options)
    job = continuation.checked_job(alone, [fields["prompt"]], fields["max_tokens"], checked)
    (found,) = continuation.continuations(alone, job)
    return TextStream(BYTE, job.stops).read(found.ids)
