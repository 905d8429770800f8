"""Blocking core calls under trio: never abandoned, but told to end when the operation is cancelled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import trio

from gpurestore.core import Cancel

T = TypeVar("T")
# Every task, worker thread and hook may block at once; memory workers have a budget of their own.
_MAX_THREADS = 1024


class Blocking:
    """Runs blocking calls in threads; ``cancel`` is set as soon as the scope around it is cancelled."""

    def __init__(self) -> None:
        self.cancel = Cancel()
        self._threads = trio.CapacityLimiter(_MAX_THREADS)

    async def run(self, call: Callable[..., T], *args: object) -> T:
        """``call(*args)`` in a thread. Waits for its end even when cancelled: it may own a task or a mapping."""
        return await trio.to_thread.run_sync(partial(call, *args), limiter=self._threads)

    async def all(self, calls: Sequence[Callable[[], object]], at_once: int) -> None:
        """All ``calls``, at most ``at_once`` of them at the same time; the first failure ends the others."""
        places = trio.CapacityLimiter(at_once)

        async def one(call: Callable[[], object]) -> None:
            async with places:
                await self.run(call)

        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(one, call)


@asynccontextmanager
async def blocking_calls() -> AsyncIterator[Blocking]:
    """A scope whose cancellation reaches the C core within milliseconds."""
    blocking = Blocking()
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            try:
                await trio.sleep_forever()
            finally:
                blocking.cancel.set()

        nursery.start_soon(watch)
        yield blocking
        nursery.cancel_scope.cancel()
