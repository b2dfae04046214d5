"""uvicorn's HTTP connection with limits on what comes before a request's body."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""Bytes of a request's first line and headers, about: what is read at a time is read whole."""
HEAD_TIMEOUT_S = 30.0
"""Seconds in which a new connection, or the next request of one, sends them."""


class Connection(HttpToolsProtocol):
    """A connection that is closed where a head is too long or does not come.

    Nobody has shown a key by then, and httptools keeps what has come however long it is.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._head_bytes, self._reads_head = 0, False
        self._timer: asyncio.TimerHandle | None = None

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

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._end_head()
        self._head_bytes, self._reads_head = 0, True
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

    def _end_head(self) -> None:
        self._reads_head = False
        if self._timer is not None:
            self._timer.cancel()

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
