"""What the stages of one operation share: where they run, how they are seen, and how many may work at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from gpurestore.pipeline.blocking import Blocking
from gpurestore.pipeline.trace import Span, Trace

_NO_LIMIT = 1 << 20


class Stages:
    """The stages of a restore. With ``serial`` they run one at a time: the same graph with one more edge."""

    def __init__(self, blocking: Blocking, spans: Trace, jobs: int, *, serial: bool) -> None:
        self.blocking = blocking
        self.spans = spans
        self.jobs = 1 if serial else jobs
        # The budget of memory workers, shared by all tasks. Hooks and other stages take nothing from it.
        self.memory_workers = trio.CapacityLimiter(self.jobs)
        self.turn = trio.CapacityLimiter(1 if serial else _NO_LIMIT)

    @asynccontextmanager
    async def stage(self, name: str, **args: Any) -> AsyncIterator[Span]:
        """A stage of the graph: a span, and its turn."""
        async with self.turn, self.spans.span(name, **args) as span:
            yield span
