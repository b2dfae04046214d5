"""What stands before the application: request ids, API keys and the size of bodies.

They are plain ASGI: Starlette's BaseHTTPMiddleware hides a client's disconnection from a handler.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptfast.serve.protocol import ApiError

OPEN_PATHS = ("/", "/health")
"""Paths that need no key: the page holds nothing but itself, and balancers ask for health."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestId:
    """Gives each reply an x-request-id: the client's, or else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(16)}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKeys:
    """Refuses requests without one of the keys, which are compared in constant time."""

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._knows(scope):
            error = ApiError(
                401,
                "no valid API key; send one of the server's keys as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            response = JSONResponse(error.body, error.status, error.headers)
            return await response(scope, receive, send)
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # All are compared, so that the time tells nothing.
        equal = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(equal) and kind.lower() == "bearer"


class BodyLimit:
    """Refuses bodies of more than so many bytes, by their header or as they come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length[:20]) > self._max:
            return await self._refuse(scope, receive, send)
        n, started = 0, False

        async def counted() -> Message:
            nonlocal n
            message = await receive()
            n += len(message.get("body", b""))
            if n > self._max:
                raise _TooLong
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except _TooLong:
            if started:
                raise
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(
            413, f"the body is longer than {self._max} bytes; send several shorter requests"
        )
        response = JSONResponse(error.body, error.status, {"Connection": "close"})
        await response(scope, receive, send)


class _TooLong(BaseException):
    """The body is too long. FastAPI reports every Exception in reading one as its own error."""
