"""The process of a server: its socket, its signals and its end."""

import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Collection, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from gptfast.checks import one_line
from gptfast.serve.app import make_app
from gptfast.serve.service import Service

KEEP_ALIVE_S = 75
"""Seconds for which an idle connection is kept: longer than clients and proxies keep theirs, as
nginx does for 60, so that none sends a request into a connection that is just being closed."""
POLL_S = 0.05
"""Seconds between two looks at whether all requests have ended."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens at a host and port; port 0 takes a free one.

    Raises ValueError for a place that is taken or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = None
    try:
        # By the protocol's number asyncio knows that it may switch Nagle's delay off.
        made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(2048)
    except (OSError, TypeError) as error:  # TypeError: a name that IDNA cannot write
        if made is not None:
            made.close()
        raise ValueError(
            f"cannot listen at {host:.100}, port {port}: "
            f"{getattr(error, 'strerror', None) or error}; choose another --host or --port"
        ) from None
    made.set_inheritable(True)
    return made


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _protocol() -> Any:
    """Return what reads requests: uvicorn's own, h11, limits their heads itself."""
    if importlib.util.find_spec("httptools") is None:
        return "h11"
    from gptfast.serve.connection import Connection

    return Connection


def server_of(app: ASGIApp) -> uvicorn.Server:
    """Return a server that logs nothing of the requests."""
    config = uvicorn.Config(
        app,
        http=_protocol(),
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=5,
    )
    return _Server(config)


async def serve(
    make_service: Callable[[Callable[[str], None]], Service],
    sock: socket.socket,
    *,
    keys: Collection[str] = (),
    cors_origins: Collection[str] = (),
    drain_timeout_s: float = 60.0,
    say: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT, or until the engine fails.

    make_service: takes what is to be called when the engine fails. SIGTERM and SIGINT drain: no
    request is taken, and those that run have drain_timeout_s seconds; a second one ends them.
    SIGHUP reads the model again. Raises RuntimeError if the engine fails, and at the start what
    reading the model raises.
    """
    # It warns where a client leaves between two events, which is no fault.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    process = _Process(make_service, drain_timeout_s, say)
    app = make_app(process.service, keys=keys, cors_origins=cors_origins)
    await process.run(server_of(app), sock)


class _Process:
    """A service and what happens to it: signals, and the engine's failure."""

    def __init__(
        self,
        make_service: Callable[[Callable[[str], None]], Service],
        drain_timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[str] = self._loop.create_future()
        self._told = asyncio.Event()
        self._reloads: set[asyncio.Task[None]] = set()
        self._drain_timeout_s, self._say = drain_timeout_s, say
        self.service = make_service(self._on_failure)

    async def run(self, server: uvicorn.Server, sock: socket.socket) -> None:
        """Serve until a signal or a failure."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        serving = asyncio.ensure_future(server.serve([sock]))
        loading = asyncio.ensure_future(_load(self.service, sock, self._say))
        stopping = asyncio.ensure_future(self._told.wait())
        waits: list[asyncio.Future[Any]] = [serving, self._failed, stopping]
        try:
            await asyncio.wait([*waits, loading], return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                await self._drain()
            if self._failed.done():
                await asyncio.sleep(POLL_S)  # the clients are being told
                raise RuntimeError(self._failed.result())
        finally:
            self.service.close(cancel=True)
            server.should_exit = True
            with contextlib.suppress(SystemExit):
                await serving
            stopping.cancel()

    def _on_failure(self, message: str) -> None:
        """Note, in the engine's thread, that it failed."""

        def fail() -> None:
            if not self._failed.done():
                self._failed.set_result(message)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(fail)

    def _stop(self) -> None:
        if self._told.is_set():
            self.service.close(cancel=True)
        self._told.set()

    def _reload(self) -> None:
        # One reads, and one that has not begun will read what is there now.
        if self.service.state != "draining" and len(self._reloads) < 2:
            task = self._loop.create_task(_reload(self.service, self._say))
            self._reloads.add(task)
            task.add_done_callback(self._reloads.discard)

    async def _drain(self) -> None:
        """Take no more requests, and wait for those that run, up to a time."""
        self.service.close()
        end = self._loop.time() + self._drain_timeout_s
        while self.service.busy and not self._failed.done():
            if self._loop.time() > end:
                self._say(f"{self.service.busy} requests were ended after --drain-timeout")
                self.service.close(cancel=True)
                await asyncio.sleep(POLL_S)
                return
            await asyncio.sleep(POLL_S)


async def _load(service: Service, sock: socket.socket, say: Callable[[str], None]) -> None:
    await service.load()
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"serving {service.name} at http://{shown}:{port}")


async def _reload(service: Service, say: Callable[[str], None]) -> None:
    try:
        await service.load()
    except Exception as error:
        say(f"the model was not read again, the old one stays: {one_line(error)}")
    else:
        say("the model was read again")
