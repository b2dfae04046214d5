"""Texts that take long to encode or to write, which few threads do beside the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gptfast.serve.protocol import ApiError

LONG_TEXT = 20_000
"""Characters of a text that takes a thread: megabytes take seconds."""
ENCODING_THREADS = 2
"""Threads that encode: each one more takes its share of Python's time from the event loop."""
WRITING_THREADS = 1
"""Threads that write replies, which do not wait for texts that are encoded."""
MAX_WAITING_TEXTS = 64
"""Texts that may wait to be encoded."""
RETRY_AFTER_S = 5
"""Seconds after which a client may send a refused text again."""
T = TypeVar("T")


class TextThreads:
    """Threads that encode requests' texts, and threads that write replies' texts.

    on_refused: called for each text that is refused.
    """

    def __init__(self, on_refused: Callable[[], None]) -> None:
        self._on_refused = on_refused
        self._encoding = _Threads(ENCODING_THREADS, "gptfast-encode")
        self._writing = _Threads(WRITING_THREADS, "gptfast-write")

    async def encode_in_thread(self, length: int, encode: Callable[[], T]) -> T:
        """Return what encode makes of so many characters. Raises ApiError if too many texts wait.

        Few characters are encoded at once.
        """
        if length <= LONG_TEXT:
            return encode()
        if self._encoding.n_waiting >= MAX_WAITING_TEXTS:
            self._on_refused()
            raise ApiError(
                429,
                f"{self._encoding.n_waiting} long texts wait already to be encoded; try again "
                "later",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        return await self._encoding.run(encode)

    async def write_in_thread(self, length: int, write: Callable[[], T]) -> T:
        """Return what write makes of so many characters. Few are written at once."""
        return write() if length <= LONG_TEXT else await self._writing.run(write)


class _Threads:
    """A number of threads, and the work that waits for one."""

    def __init__(self, n: int, name: str) -> None:
        self.n_waiting = 0
        self._free, self._executor = asyncio.Semaphore(n), ThreadPoolExecutor(n, name)

    async def run(self, work: Callable[[], T]) -> T:
        """Return what work returns. It does not begin if the caller is cancelled before."""
        self.n_waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.n_waiting -= 1
        running = asyncio.get_running_loop().run_in_executor(self._executor, work)
        # A thread cannot be cancelled: it is free when it is done, whoever still waits for it.
        running.add_done_callback(lambda _: self._free.release())
        return await asyncio.shield(running)
