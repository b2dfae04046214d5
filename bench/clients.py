"""Clients of a server that speaks OpenAI's protocol: they stream completions and note the times.

All clients run in one event loop and read the events without parsing them, so that they take little
of the cores that the server needs.
"""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import PeerDied
from timing import OWN_PROCESSES, OtherLoad

HOST = "127.0.0.1"
START_TIMEOUT_S = 300


@dataclass
class Times:
    """When a request was sent and when its events with text came, in seconds."""

    sent: float
    events: list[float]

    @property
    def first(self) -> float:
        """From the request to its first text."""
        return self.events[0] - self.sent

    def between(self, tokens: int) -> float:
        """The mean time between tokens after the first. An event may hold several tokens."""
        return (self.events[-1] - self.events[0]) / max(1, tokens - 1)


@dataclass
class Answered:
    """The times of a load of prompts, and the share of all cores that others used meanwhile."""

    times: list[Times]
    other_load: float


class Server:
    """A server in a process of its own, which is stopped (SIGSTOP) while it is not used.

    Raises PeerDied where its process has ended.
    """

    def __init__(self, command: Sequence[str | Path], port: int, fields: Mapping[str, Any]) -> None:
        self.port, self.fields = port, fields
        self._command = list(map(str, command))
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        OWN_PROCESSES.add(self.process.pid)
        self._wait()
        self.process.send_signal(signal.SIGSTOP)

    def _wait(self) -> None:
        """Return once the server answers."""
        end = time.monotonic() + START_TIMEOUT_S
        url = f"http://{HOST}:{self.port}/v1/models"
        while time.monotonic() < end:
            self._check()
            try:
                urllib.request.urlopen(url, timeout=5).read()
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise RuntimeError(f"{self.name} did not answer in {START_TIMEOUT_S} s")

    @property
    def name(self) -> str:
        """What its process runs."""
        return " ".join(self._command[:3])

    def _check(self) -> None:
        if (code := self.process.poll()) is not None:
            raise PeerDied(f"{self.name} ended with code {code}; its error, if any, is above")

    def answer(self, prompts: Sequence[str], tokens: int, clients: int) -> Answered:
        """Send all prompts, as many at a time as there are clients; return when what came."""
        bodies = [{"prompt": prompt, "max_tokens": tokens, **self.fields} for prompt in prompts]
        self._check()
        self.process.send_signal(signal.SIGCONT)
        load = OtherLoad()
        try:
            times = asyncio.run(_all(self.port, bodies, clients))
        except (OSError, RuntimeError):
            self._check()
            raise
        finally:
            self.process.send_signal(signal.SIGSTOP)
        return Answered(times, load.share())

    def close(self) -> None:
        OWN_PROCESSES.discard(self.process.pid)
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return sock.getsockname()[1]


def python(*argv: object) -> list[str]:
    """Return a command of this Python."""
    return [sys.executable, *map(str, argv)]


async def _all(port: int, bodies: Sequence[Mapping[str, Any]], clients: int) -> list[Times]:
    waiting = list(enumerate(bodies))[::-1]
    times: list[Times | None] = [None] * len(bodies)

    async def client() -> None:
        while waiting:
            place, body = waiting.pop()
            times[place] = await _stream(port, body)

    await asyncio.gather(*(client() for _ in range(clients)))
    return times


async def _stream(port: int, body: Mapping[str, Any]) -> Times:
    """Send a request and read its events. Raises RuntimeError unless all of them come."""
    reader, writer = await asyncio.open_connection(HOST, port)
    raw = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n"
    times = Times(time.perf_counter(), [])
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + raw)
    tail, length = b"", False
    while b"data: [DONE]" not in tail:
        part = await reader.read(2**16)
        if not part:
            raise RuntimeError(f"a stream broke off after {tail!r}")
        if b'"text"' in part:
            times.events.append(time.perf_counter())
        tail = (tail + part)[-4096:]
        length = length or b'"length"' in tail
    if not length:
        raise RuntimeError(f"a stream did not give all its tokens: {tail!r}")
    writer.close()
    return times
