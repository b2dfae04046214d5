"""The generations of one HTTP request, as the event loop sees them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from gptfast.serve.generation import Generation, Update
from gptfast.serve.metrics import Metrics
from gptfast.serve.protocol import ApiError
from gptfast.serve.replies import Choice
from gptfast.serve.scheduler import Scheduler


class Group:
    """The generations of one HTTP request, and what they tell, in the event loop's thread."""

    def __init__(self, generations: Sequence[Generation], choices: Sequence[Choice]) -> None:
        self.generations, self.choices = generations, choices
        self.told: asyncio.Queue[tuple[int, Update] | None] = asyncio.Queue()
        """An index and an update; None at the end of the time that a request has."""
        self.scheduler: Scheduler | None = None

    async def updates(self, timeout_s: float) -> AsyncIterator[tuple[Choice, Update]]:
        """Yield what each choice is told until all have ended.

        Raises ApiError for a failure, and where the updates take more than timeout_s seconds.
        """
        left = len(self.choices)
        # One timer for all of them: asyncio.timeout costs more than the rest of an update.
        timer = asyncio.get_running_loop().call_later(timeout_s, self.told.put_nowait, None)
        try:
            while left:
                told = await self.told.get()
                if told is None:
                    raise _timeout(timeout_s)
                index, update = told
                if update.finish == "failed":
                    raise ApiError(500, update.message, kind="server_error")
                if update.finish == "cancelled":
                    message = "the server is going down; send the request again"
                    raise ApiError(503, message, kind="server_error", headers={"Retry-After": "1"})
                left -= update.finish is not None
                yield self.choices[index], update
        finally:
            timer.cancel()

    def cancel(self) -> None:
        """End what has not ended."""
        # A group and its generations know each other. What is left of them shall hold no model.
        scheduler, self.scheduler = self.scheduler, None
        for one in self.generations:
            if scheduler is not None and one.finish is None:
                scheduler.cancel(one)


def _timeout(seconds: float) -> ApiError:
    message = f"the request took longer than {seconds:g} s; ask for fewer tokens or try again later"
    return ApiError(504, message, kind="timeout_error", code="timeout")


class Mailbox:
    """Carries updates from the engine's thread to an event loop, which wakes once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._updates: deque[tuple[Teller, Update]] = deque()
        self._woken = False

    def put(self, teller: "Teller", update: Update) -> None:
        """Have a teller tell an update in the event loop's thread. For any thread."""
        self._updates.append((teller, update))
        if not self._woken and not self._loop.is_closed():
            self._woken = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First, so that what is put from here on wakes the loop again.
        self._woken = False
        while self._updates:
            teller, update = self._updates.popleft()
            teller.tell(update)


class Teller:
    """Tells a group, and the metrics, the updates of one of its generations."""

    def __init__(self, metrics: Metrics, group: Group, index: int, mailbox: Mailbox) -> None:
        self._metrics, self._group, self._index, self._mailbox = metrics, group, index, mailbox
        self._last: float | None = None

    def __call__(self, update: Update) -> None:
        self._mailbox.put(self, update)

    def tell(self, update: Update) -> None:
        """Tell an update, in the event loop's thread."""
        one = self._group.generations[self._index]
        self._last = self._metrics.told(one, update, self._last)
        self._group.told.put_nowait((self._index, update))
