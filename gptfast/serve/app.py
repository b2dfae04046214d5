"""The HTTP application: OpenAI's endpoints by FastAPI, in front of a `Service`."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

import gptfast
from gptfast.serve.group import Group
from gptfast.serve.guards import ApiKeys, BodyLimit, RequestId, error_response
from gptfast.serve.model import Model
from gptfast.serve.protocol import (
    ApiError,
    ChatRequest,
    Common,
    CompletionRequest,
    DetokenizeReply,
    DetokenizeRequest,
    ErrorReply,
    TokenizeReply,
    TokenizeRequest,
    check_refused,
    validation_error,
)
from gptfast.serve.replies import (
    Chat,
    Choice,
    Completions,
    Reply,
    TokenNames,
    to_json,
    usage_of,
)
from gptfast.serve.service import Service
from gptfast.tokenizer.bpe import Tokenizer, encode_continuation, encode_opening, end_of_text

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page takes nothing from elsewhere, and sends nothing there."""
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The reply, whole or in chunks.", "content": {"text/event-stream": {}}}
}
UNREAD_S = 10.0
"""How long after its time a stream waits for a client that does not read."""
LINE_ENDS = "\x85\u2028\u2029"
"""What ends a line in Python's str.splitlines and not in JSON."""
TOKEN_LENGTH = 100
"""A token with its log-probabilities takes the time of so many characters that are encoded."""
T = TypeVar("T")


def make_app(
    service: Service, *, keys: Collection[str] = (), cors_origins: Collection[str] = ()
) -> FastAPI:
    """Return the application of a service."""
    errors: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorReply, "description": "The request is refused."},
        "5XX": {"model": ErrorReply, "description": "The server cannot answer."},
    }
    app = FastAPI(title="gptfast", version=gptfast.__version__, redoc_url=None, responses=errors)
    _add_errors(app)
    _add_generation(app, service)
    _add_models(app, service)
    _add_tokenizer(app, service)
    _add_state(app, service)
    # The last is the first that a request meets.
    app.add_middleware(BodyLimit, max_bytes=service.limits.max_body_bytes)
    if keys:
        app.add_middleware(ApiKeys, keys=keys)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[*cors_origins],
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestId)
    return app


def _add_errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def of_ours(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def of_pydantic(request: Request, error: RequestValidationError) -> Response:
        return error_response(validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        text = {404: "there is no such path; see /docs", 405: "this path has another method"}
        message = text.get(error.status_code, str(error.detail))
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(_Disconnected)
    async def of_nobody(request: Request, error: _Disconnected) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def of_ours_alone(request: Request, error: Exception) -> Response:
        message = "the server failed at this request; its log says more"
        return error_response(ApiError(500, message, kind="server_error"))


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        service.check_model(body.model)
        check_refused(body)
        form = Completions(body.logprobs is not None)
        group = await _unless_disconnected(request, service.completion(body))
        return await _answer(service, form, body, request, group)

    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Write the next message of a chat."""
        service.check_model(body.model)
        check_refused(body)
        group = await _unless_disconnected(request, service.chat(body))
        return await _answer(service, Chat(bool(body.logprobs)), body, request, group)


async def _answer(
    service: Service, form: Completions | Chat, body: Common, request: Request, group: Group
) -> Response:
    """Return the reply of a group: a stream, or all of it at the end."""
    reply = Reply(form, service.name, service.model.engine.dtype)
    if body.stream:
        timeout_s = service.limits.timeout_s
        chunks = _events(service, reply, body, group)
        return EventStream(group, chunks, timeout_s + UNREAD_S)
    try:
        await _unless_disconnected(request, _collect(group, service.limits.timeout_s))
    finally:
        group.cancel()
    usage = usage_of(group.generations, body.n or 1)
    whole = partial(reply.whole, group.choices, usage)
    writing = service.texts.write_in_thread(_length(group.choices), whole)
    content = await _unless_disconnected(request, writing)
    return Response(content, media_type="application/json")


def _length(choices: Sequence[Choice]) -> int:
    return TOKEN_LENGTH * sum(len(choice.tokens) for choice in choices)


async def _collect(group: Group, timeout_s: float) -> None:
    async for choice, update in group.updates(timeout_s):
        choice.add(update)


class _Disconnected(Exception):
    """The client has gone."""


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of work, or raise _Disconnected as soon as the client has gone."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Disconnected
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    """Wait until the client has gone. Its request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _events(
    service: Service, reply: Reply, body: Common, group: Group
) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the chunks of a stream."""
    form, options, n = reply.form, body.stream_options, body.n or 1
    always = options is not None and options.continuous_usage_stats
    asked = options is not None and (options.include_usage or always)

    def chunk(choice: Mapping[str, Any]) -> Mapping[str, Any]:
        usage = usage_of(group.generations, n) if always else None
        return reply.chunk([choice], **({"usage": usage} if asked else {}))

    for choice in group.choices:
        if opening := form.opening(choice.index):
            yield chunk(opening)
    async for choice, update in group.updates(service.limits.timeout_s):
        choice.add(update)
        if choice.text or choice.finish:
            describe = partial(form.choice, choice, streamed=True)
            yield chunk(await service.texts.write_in_thread(_length([choice]), describe))
            choice.clear()
    if options is not None and options.include_usage:
        yield reply.chunk([], usage=usage_of(group.generations, n))


class EventStream(Response):
    """A stream of server-sent events, which ends its generations where the client leaves.

    It ends after limit_s seconds also where the client is there and does not read.
    """

    media_type = "text/event-stream"

    def __init__(
        self, group: Group, chunks: AsyncIterator[Mapping[str, Any]], limit_s: float
    ) -> None:
        self.status_code, self.background = 200, None
        self._group, self._chunks, self._limit_s = group, chunks, limit_s
        # nginx would hold the events back.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait((sending, gone), timeout=self._limit_s, return_when=first)
            if sending.done():
                sending.result()
        finally:
            self._group.cancel()
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for chunk in self._chunks:
                await _send_event(send, to_json(chunk))
            await _send_event(send, "[DONE]")
        except ApiError as error:
            await _send_event(send, json.dumps(error.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: str) -> None:
    if not data.isascii():  # clients in Python break lines at these too
        for character in LINE_ENDS:
            data = data.replace(character, f"\\u{ord(character):04x}")
    event = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": event, "more_body": True})


def _add_models(app: FastAPI, service: Service) -> None:
    def card() -> dict[str, Any]:
        engine = service.model.engine
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "gptfast",
            "max_model_len": engine.config.block_size,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the only model."""
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe the model."""
        service.check_model(name)
        return card()


def _add_state(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """Return 200 if requests are taken, 503 while the model is loaded or the server drains."""
        return JSONResponse({"status": service.state}, 200 if service.state == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/settings")
    async def settings() -> dict[str, Any]:
        """Return what the page shows: the model and what a request leaves out."""
        engine = service.model.engine
        return {
            "model": service.name,
            "dtype": engine.dtype,
            "block_size": engine.config.block_size,
            "template": service.template.write("{prompt}"),
            **vars(service.defaults),
        }

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return Response(PAGE.read_bytes(), media_type="text/html", headers=headers)


def _tokenized(model: Model, body: TokenizeRequest) -> Response:
    encode = encode_opening if body.add_special_tokens else encode_continuation
    special = getattr(model.tokenizer, "special_tokens", {}).get(body.prompt)
    try:
        ids = encode(model.tokenizer, body.prompt) if special is None else [special]
    except ValueError as error:
        raise ApiError(400, str(error), param="prompt") from None
    names = TokenNames(model.tokenizer)
    found = {
        "count": len(ids),
        "max_model_len": model.engine.config.block_size,
        "tokens": ids,
        "token_strs": [names.text(i) for i in ids] if body.return_token_strs else None,
    }
    return JSONResponse(found)


def _detokenized(tokenizer: Tokenizer, ids: Sequence[int]) -> Response:
    for i in ids:
        if not 0 <= i < tokenizer.n_vocab:
            message = f"there is no token {i}: ids are below {tokenizer.n_vocab}"
            raise ApiError(400, message, param="tokens")
    return JSONResponse({"prompt": tokenizer.decode(ids)})


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", response_model=TokenizeReply)
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Return the token ids of a text. The name of a special token alone is that token."""
        service.check_model(body.model)
        work = partial(_tokenized, service.model, body)
        encoding = service.texts.encode_in_thread(len(body.prompt), work)
        return await _unless_disconnected(request, encoding)

    @app.post("/detokenize", response_model=DetokenizeReply)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Return the text of token ids."""
        service.check_model(body.model)
        work = partial(_detokenized, service.model.tokenizer, body.tokens)
        decoding = service.texts.encode_in_thread(len(body.tokens), work)
        return await _unless_disconnected(request, decoding)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Describe the tokenizer, as lm-evaluation-harness asks."""
        model = service.model
        end = end_of_text(model.tokenizer)
        name = None if end is None else TokenNames(model.tokenizer).text(end)
        return {
            "tokenizer_class": type(model.tokenizer).__name__,
            "vocab_size": model.tokenizer.n_vocab,
            "model_max_length": model.engine.config.block_size,
            "eos_token": name,
            "bos_token": name,
            "pad_token": None,
            "eos_token_id": end,
        }
