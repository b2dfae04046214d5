"""The generations of one HTTP request, as the event loop sees them."""

import asyncio
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
        self.told: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self.scheduler: Scheduler | None = None

    async def updates(self) -> AsyncIterator[tuple[Choice, Update]]:
        """Yield what each choice is told until all have ended. Raises ApiError for a failure."""
        left = len(self.choices)
        while left:
            index, update = await self.told.get()
            if update.finish == "failed":
                raise ApiError(500, update.message, kind="server_error")
            if update.finish == "cancelled":
                message = "the server is going down; send the request again"
                raise ApiError(503, message, kind="server_error", headers={"Retry-After": "1"})
            left -= update.finish is not None
            yield self.choices[index], update

    def cancel(self) -> None:
        """End what has not ended."""
        for one in self.generations:
            if self.scheduler is not None and one.finish is None:
                self.scheduler.cancel(one)


class Teller:
    """Carries the updates of a generation from the engine's thread to the event loop."""

    def __init__(
        self, metrics: Metrics, group: Group, index: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._metrics, self._group, self._index, self._loop = metrics, group, index, loop
        self._last: float | None = None

    def __call__(self, update: Update) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell, update)

    def _tell(self, update: Update) -> None:
        one = self._group.generations[self._index]
        self._last = self._metrics.told(one, update, self._last)
        self._group.told.put_nowait((self._index, update))
