"""What stands before the application: request ids, API keys and the size of bodies.

They are plain ASGI: Starlette's BaseHTTPMiddleware hides a client's disconnection from a handler.
"""

import asyncio
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptfast.serve.protocol import ApiError

OPEN_PATHS = ("/", "/health")
"""Paths that need no key: the page holds nothing but itself, and balancers ask for health."""
BODY_TIMEOUT_S = 60.0
"""Seconds in which a body must come."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def error_response(error: ApiError) -> Response:
    """Return the reply of an error. It is ASCII: what it quotes may be no text in UTF-8."""
    body, kind = json.dumps(error.body).encode(), "application/json"
    return Response(body, error.status, error.headers, kind)


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
            return await error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # All are compared, so that the time tells nothing.
        equal = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(equal) and kind.lower() == "bearer"


class BodyLimit:
    """Refuses bodies of more than so many bytes, and those that take longer to come."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app, self._max, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length[:20]) > self._max:
            return await error_response(self._too_long())(scope, receive, send)
        n, started, whole = 0, False, False
        end = asyncio.get_running_loop().time() + self._timeout_s

        async def counted() -> Message:
            nonlocal n, whole
            if whole:  # from here on it is the client's disconnection that is waited for
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise _Refused(self._too_slow()) from None
            n += len(message.get("body", b""))
            if n > self._max:
                raise _Refused(self._too_long())
            whole = not message.get("more_body", False)
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except _Refused as refused:
            if started:
                raise
            await error_response(refused.error)(scope, receive, send)

    def _too_long(self) -> ApiError:
        message = f"the body is longer than {self._max} bytes; send several shorter requests"
        return ApiError(413, message, headers={"Connection": "close"})

    def _too_slow(self) -> ApiError:
        message = f"the body did not come within {self._timeout_s:g} s; send the request again"
        return ApiError(408, message, headers={"Connection": "close"})


class _Refused(BaseException):
    """The body is refused. FastAPI reports every Exception in reading one as its own error."""

    def __init__(self, error: ApiError) -> None:
        super().__init__()
        self.error = error
