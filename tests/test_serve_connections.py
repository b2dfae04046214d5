"""Connections that are made to hurt the server: none holds it up, or is kept for nothing."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serving import WAIT_S, Running, held, send, server, wait_for

from gptfast import GPT
from gptfast.ops.backend import EXTENSION
from gptfast.serve.guards import BodyLimit
from gptfast.serve.run import server_of

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")


@pytest.fixture(scope="module")
def tiny(byte_model: GPT) -> Iterator[Running]:
    with server(byte_model) as running:
        yield running


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


def test_what_follows_a_reply_has_its_time(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that nobody needed, and bytes that are no request, keep no connection open."""
    pytest.importorskip("httptools", reason="httptools is not installed (the extra serve)")
    from gptfast.serve import connection

    for rest in (b"a", b"\r\n"):
        length = b"Content-Length: 99\r\n" if rest == b"a" else b""
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=WAIT_S) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n")
            found = b""
            while b"status" not in found:
                piece = sock.recv(2**16)
                assert piece
                found += piece
            # Only from here on: the request's own head has its usual time.
            with monkeypatch.context() as patch:
                patch.setattr(connection, "HEAD_TIMEOUT_S", 0.05)
                sock.sendall(rest)
                assert sock.recv(2**16) == b""


UPGRADE = b"GET /health HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"


def test_no_tunnel_is_made(tiny: Running) -> None:
    """A reply that is due comes before the refusal."""
    pytest.importorskip("httptools", reason="httptools is not installed (the extra serve)")
    tunnel = b"CONNECT /x HTTP/1.1\r\n\r\n"
    assert replies(tiny, tunnel + b"a" * 100).startswith(b"HTTP/1.1 400 ")
    found = replies(tiny, UPGRADE + tunnel)
    assert found.startswith(b"HTTP/1.1 200 ") and found.count(b"HTTP/1.1") == 1


def test_a_body_that_is_no_body_is_refused_at_once(tiny: Running) -> None:
    """Its request does not wait for the rest of it; a reply that is due comes before."""
    pytest.importorskip("httptools", reason="httptools is not installed (the extra serve)")
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n"
    assert replies(tiny, chunked).startswith(b"HTTP/1.1 400 ")
    found = replies(tiny, UPGRADE + chunked)
    assert found.startswith(b"HTTP/1.1 200 ") and found.count(b"HTTP/1.1") == 1


class _Transport(asyncio.Transport):
    """The transport of a connection that is fed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def write(self, data: Any) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


@pytest.mark.parametrize("head", [UPGRADE, b"GET /health HTTP/1.1\r\n\r\n"])
def test_requests_in_one_piece_are_not_all_read(head: bytes) -> None:
    """Thousands in 256 KB hold up nobody: the first are answered, and the connection closes."""
    pytest.importorskip("httptools", reason="httptools is not installed (the extra serve)")
    from uvicorn.server import ServerState

    from gptfast.serve.connection import MAX_PIPELINED, Connection

    begun, answered = [0], [0]

    class Counted(Connection):
        def on_message_begin(self) -> None:
            begun[0] += 1
            super().on_message_begin()

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})
        answered[0] += 1

    async def feed() -> None:
        connection = Counted(server_of(answer).config, ServerState(), {})
        transport = _Transport()
        connection.connection_made(transport)
        connection.data_received(head * 4000)
        connection.data_received(head)
        assert not transport.closed
        async with asyncio.timeout(WAIT_S):
            while not transport.closed:
                await asyncio.sleep(0)
        connection.connection_lost(None)

    asyncio.run(feed())
    assert answered[0] == MAX_PIPELINED + 1
    assert begun[0] <= 2 * (MAX_PIPELINED + 2)  # an upgrade is read again without its offer


def test_a_client_that_reads_nothing_is_cut_off(
    tiny: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long reply that waits for it does not stay in memory."""
    pytest.importorskip("httptools", reason="httptools is not installed (the extra serve)")
    from gptfast.serve import connection

    real, made = connection.Connection.connection_made, []

    def connection_made(self: Any, transport: Any) -> None:
        # The kernel would take megabytes.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made.append(transport)
        real(self, transport)

    monkeypatch.setattr(connection.Connection, "connection_made", connection_made)
    monkeypatch.setattr(connection, "UNREAD_TIMEOUT_S", 0.05)
    with send(tiny, {"prompt": "a" * 100_000}, "/tokenize"):
        wait_for(lambda: bool(made) and made[0].is_closing())
        assert made[0].get_write_buffer_size() == 0


def test_a_client_that_reads_slowly_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("httptools", reason="httptools is not installed (the extra serve)")
    from uvicorn.server import ServerState

    from gptfast.serve import connection

    waiting = [300, 200, 100, 100]  # bytes, at each look

    class Unread(_Transport):
        def get_write_buffer_size(self) -> int:
            return waiting.pop(0)

        def abort(self) -> None:
            self.closed = True

    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    async def watch() -> None:
        watched, transport = (
            connection.Connection(server_of(app).config, ServerState(), {}),
            Unread(),
        )
        watched.connection_made(transport)
        watched.pause_writing()
        async with asyncio.timeout(WAIT_S):
            while not transport.closed:
                await asyncio.sleep(0)
        watched.connection_lost(None)

    monkeypatch.setattr(connection, "UNREAD_TIMEOUT_S", 0.0)
    asyncio.run(watch())
    assert waiting == []


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_an_offer_of_another_protocol_is_declined(tiny: Running, pieces: int) -> None:
    """Java's client offers HTTP/2 with its first request, and a body beside it."""
    body = json.dumps({"prompt": "a", "max_tokens": 2, "seed": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    parts = {1: [head + body, last], 2: [head, body, last], 3: [head[:50], head[50:] + body, last]}
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=WAIT_S) as sock:
        for part in parts[pieces]:
            sock.sendall(part)
            time.sleep(0.01)
        found = b""
        while piece := sock.recv(2**16):
            found += piece
    assert found.count(b" 200 OK") == 2 and b'"completion_tokens": 2' in found
    offer = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    assert tiny.request("GET", "/health", headers=offer)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_with_a_request_behind_another(tiny: Running, stream: bool) -> None:
    pytest.importorskip("httptools", reason="httptools is not installed (the extra serve)")
    body = {"prompt": "a", "max_tokens": 120, "ignore_eos": True, "stream": stream}
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n"
    one = f"{head}Content-Type: application/json\r\n\r\n".encode() + raw
    with held(tiny):
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=WAIT_S) as sock:
            sock.sendall(one + one)
            wait_for(lambda: tiny.service.busy == 1)
            time.sleep(0.02)
        running = tiny.service._schedulers[-1]._running
        wait_for(lambda: all(generation.cancelled for generation in [*running]))
    assert tiny.idle()
    # All are answered, one after the other, where the client stays.
    assert replies(tiny, *[one] * 12, b"GET / HTTP/1.0\r\n\r\n").count(b" 200 OK") == 13


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
