"""Blocking core calls under trio: never abandoned, but told to end when the operation is cancelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import trio
from outcome import Error, Outcome, Value

from gpurestore.core import Cancel

T = TypeVar("T")
# Every task, worker thread and hook may block at once; memory workers have a budget of their own.
_MAX_THREADS = 1024


class Blocking:
    """Runs blocking calls in threads; ``cancel`` is set as soon as the scope around any of them is cancelled."""

    def __init__(self) -> None:
        self.cancel = Cancel()
        self._threads = trio.CapacityLimiter(_MAX_THREADS)

    async def run(self, call: Callable[..., T], *args: object) -> T:
        """``call(*args)`` in a thread. Waits for its end even when cancelled: it may own a task or a mapping."""
        ended = False

        async def watch() -> None:
            # A nursery inside of the operation may be cancelled by a failure of its own: that is the end of all, and
            # calls must not be waited for until they have moved their last gigabyte.
            try:
                await trio.sleep_forever()
            finally:
                if not ended:
                    self.cancel.set()

        result: Outcome[T]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                name = _name(call)
                result = Value(await trio.to_thread.run_sync(call, *args, thread_name=name, limiter=self._threads))
            except Exception as error:
                result = Error(error)
            ended = True
            nursery.cancel_scope.cancel()
        return result.unwrap()

    async def all(self, calls: Sequence[Callable[[], object]], at_once: int) -> None:
        """All ``calls``, at most ``at_once`` of them at the same time; the first failure ends the others."""
        places = trio.CapacityLimiter(at_once)

        async def one(call: Callable[[], object]) -> None:
            async with places:
                await self.run(call)

        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(one, call)


def _name(call: Callable[..., object]) -> str:
    """What ``ps -L`` and ``top -H`` show of a thread: what it runs."""
    while isinstance(call, partial):
        call = call.func
    return f"gr-{getattr(call, '__name__', 'call').strip('_')}"
