"""The process of a server: its socket, its signals and its end."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Collection, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from gptfast.checks import one_line
from gptfast.serve.app import make_app
from gptfast.serve.service import Service

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
    # By the protocol's number asyncio knows that it may switch Nagle's delay off.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(2048)
    except OSError as error:
        made.close()
        raise ValueError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}; choose another "
            "--host or --port"
        ) from None
    made.set_inheritable(True)
    return made


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_of(app: ASGIApp) -> uvicorn.Server:
    """Return a server that logs nothing of the requests."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="off",
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
    SIGHUP reads the model again. Raises RuntimeError if the engine fails, and what reading the
    model raises at the start.
    """
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[str] = loop.create_future()

    def fail(message: str) -> None:
        if not failed.done():
            failed.set_result(message)

    def on_failure(message: str) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(fail, message)

    service = make_service(on_failure)
    app = make_app(service, keys=keys, cors_origins=cors_origins)
    server = server_of(app)
    told = asyncio.Event()
    reloads: set[asyncio.Task[None]] = set()

    def stop() -> None:
        if told.is_set():
            service.close(cancel=True)
        told.set()

    def reload() -> None:
        if service.state == "ok":
            task = loop.create_task(_reload(service, say))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    serving = asyncio.ensure_future(server.serve([sock]))
    loading = asyncio.ensure_future(_load(service, sock, say))
    stopping = asyncio.ensure_future(told.wait())
    waits: list[asyncio.Future[Any]] = [serving, failed, stopping]
    try:
        await asyncio.wait([*waits, loading], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            await _drain(service, drain_timeout_s, failed, say)
        if failed.done():
            await asyncio.sleep(POLL_S)  # the clients are being told
            raise RuntimeError(failed.result())
    finally:
        service.close(cancel=True)
        server.should_exit = True
        with contextlib.suppress(SystemExit):
            await serving
        stopping.cancel()


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


async def _drain(
    service: Service, timeout_s: float, failed: asyncio.Future[str], say: Callable[[str], None]
) -> None:
    """Take no more requests, and wait for those that run, up to a time."""
    service.close()
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    while service.busy and not failed.done():
        if loop.time() > end:
            say(f"{service.busy} requests were ended after --drain-timeout")
            service.close(cancel=True)
            await asyncio.sleep(POLL_S)
            return
        await asyncio.sleep(POLL_S)
