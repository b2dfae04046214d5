"""uvicorn's HTTP connection with limits on what comes before a request's body."""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 64 * 1024
"""Bytes of a request's first line and headers, about: what is read at a time is read whole."""
MAX_PIPELINED = 8
"""Requests that are read before the replies to those before them are done."""
HEAD_TIMEOUT_S = 30.0
"""Seconds in which a new connection, or the next request of one, sends them."""


class Connection(HttpToolsProtocol):
    """A connection that is closed where a head is too long or does not come.

    Nobody has shown a key by then, and httptools keeps what has come however long it is. What comes
    after a reply, and is no next head, has as much time.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._head_bytes, self._reads_head, self._is_offer = 0, False, False
        self._timer: asyncio.TimerHandle | None = None
        self._cycles: list[RequestResponseCycle] = []
        self.parser = _Parser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._reads_head and self._head_bytes > MAX_HEAD_BYTES:
            self._end_head()
            if not self.transport.is_closing():
                self.send_400_response("The headers are too long.")
        elif self._timer is None and self.cycle is not None and self.cycle.response_complete:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        is_tunnel = self.parser.get_method() == b"CONNECT"
        self._is_offer = self.parser.should_upgrade() and not is_tunnel
        if self._is_offer:
            return
        super().on_headers_complete()
        self._cycles = [one for one in self._cycles if not one.response_complete] + [self.cycle]
        # uvicorn reads no more until the reply before is done, and so sees no client leave.
        if len(self.pipeline) <= MAX_PIPELINED:
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        if not self._is_offer:
            super().on_message_complete()

    def leave_offer(self, rest: bytes) -> None:
        """Read a request whose client offers another protocol again, without the offer.

        Java's client offers HTTP/2 with its first request, also one with a body, which llhttp takes
        for what follows in the other protocol. rest: what came after the head.
        """
        parser, self._is_offer = self.parser, False
        version = parser.get_http_version().encode()
        head = [b"%s %s HTTP/%s\r\n" % (parser.get_method(), self.url, version)]
        kept = [(name, value) for name, value in self.headers if name != b"upgrade"]
        head += [b"%s: %s\r\n" % one for one in kept]
        self.parser = _Parser(self)
        self.parser.feed_data(b"".join([*head, b"\r\n", rest]))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        # uvicorn tells only the last request.
        for one in self._cycles:
            if not one.response_complete:
                one.disconnected = True
                one.message_event.set()
        self._cycles = []
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._end_head()
        self._head_bytes, self._reads_head = 0, True
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

    def _end_head(self) -> None:
        self._reads_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class _Parser(httptools.HttpRequestParser):
    """A parser of a connection that stays with HTTP/1.1."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._connection = connection
        # What follows a request that is the last one of its connection does not hold up its reply.
        self.set_dangerous_leniencies(lenient_data_after_close=True)

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._connection.leave_offer(data[offer.args[0] :])
