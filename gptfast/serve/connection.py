"""uvicorn's HTTP connection with limits on a request's head and on a reply that nobody reads."""

import asyncio
from collections import deque
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 64 * 1024
"""Bytes of a request's first line and headers, about: what is read at a time is read whole."""
READ_AHEAD = 8
"""Requests that may wait for the replies before theirs while the connection is still read."""
MAX_PIPELINED = 64
"""Requests that may wait for the replies before theirs: what is read at a time may hold thousands,
which would hold up the event loop."""
HEAD_TIMEOUT_S = 30.0
"""Seconds in which a new connection, or the next request of one, sends them."""
UNREAD_TIMEOUT_S = 60.0
"""Seconds after which a client that took nothing of what waits for it is cut off, as by nginx."""


class Connection(HttpToolsProtocol):
    """A connection that is closed where a head is too long or does not come.

    Nobody has shown a key by then, and httptools keeps what has come however long it is. What comes
    after a reply, and is no next head, has as much time. A connection that refuses a request writes
    the replies that are due, reads no other request, and closes. One whose client takes nothing of
    a long reply is cut off, because closing it would wait for the client with the reply in memory.
    """

    parser: "_Parser"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._head_bytes, self._reads_head, self._is_offer = 0, False, False
        self._refuses = False
        self._timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._cycles: deque[RequestResponseCycle] = deque()
        self.parser = _Parser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self._refuses:
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self._refuses:
            return
        if self._reads_head and self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The headers are too long.")
        elif self._timer is None and self.cycle is not None and self.cycle.response_complete:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse the request that is being read, after the replies that are due, and close."""
        if self._refuses or self.transport.is_closing():
            return
        self._refuses = True
        self._end_head()
        due = [one for one in self._cycles if not (one.response_complete or one.more_body)]
        if due:
            due[-1].keep_alive = False
        else:
            super().send_400_response(msg)

    def on_headers_complete(self) -> None:
        self._end_head()
        if self.parser.get_method() == b"CONNECT":
            self._refuse("This server is no proxy.")
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse("Too many requests wait for the replies before theirs.")
        self._is_offer = self.parser.should_upgrade()
        if self._is_offer:
            return
        super().on_headers_complete()
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        self._cycles.append(self.cycle)
        # uvicorn reads no more until the reply before is done, and so sees no client leave.
        if len(self.pipeline) <= READ_AHEAD:
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        if not self._is_offer:
            super().on_message_complete()

    def decline_upgrade(self, rest: bytes) -> bytes:
        """Return a request whose client offers another protocol, without the offer, to be parsed.

        Java's client offers HTTP/2 with its first request, also one with a body, which llhttp takes
        for what follows in the other protocol. rest: what came after the head.
        """
        parser, self._is_offer = self.parser, False
        version = parser.get_http_version().encode()
        head = [b"%s %s HTTP/%s\r\n" % (parser.get_method(), self.url, version)]
        kept = [(name, value) for name, value in self.headers if name != b"upgrade"]
        head += [b"%s: %s\r\n" % one for one in kept]
        self.parser = _Parser(self)
        return b"".join([*head, b"\r\n", rest])

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        self._end_unread()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_unread()
        # uvicorn tells only the last request.
        for one in self._cycles:
            if not one.response_complete:
                one.disconnected = True
                one.message_event.set()
        self._cycles.clear()
        super().connection_lost(exc)

    def _refuse(self, message: str) -> None:
        """Refuse the request that is being read, and end the parser. Raises ValueError."""
        self.send_400_response(message)
        raise ValueError(message)

    def _expect_head(self) -> None:
        self._end_head()
        self._head_bytes, self._reads_head = 0, True
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

    def _end_head(self) -> None:
        self._reads_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_unread(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._unread_timer = self.loop.call_later(UNREAD_TIMEOUT_S, self._check_unread, size)

    def _check_unread(self, before: int) -> None:
        """Cut the client off if it took nothing since so many bytes waited for it."""
        if self.transport.get_write_buffer_size() < before:
            self._watch_unread()
        else:
            self.transport.abort()

    def _end_unread(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

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
        rest = self.feed(data)
        while rest:
            rest = self._connection.parser.feed(rest)

    def feed(self, data: bytes) -> bytes:
        """Parse data. Return what the connection's next parser is to parse."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            return self._connection.decline_upgrade(data[offer.args[0] :])
        return b""
