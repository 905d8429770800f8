"""What the stages of one operation share: where they run, how they are seen, and how many may work at once."""

from __future__ import annotations

import trio

from gpurestore.pipeline.blocking import Blocking
from gpurestore.pipeline.trace import Trace
from gpurestore.pipeline.walk import Walk


class Stages:
    """The stages of a restore, as ``walk`` runs them."""

    def __init__(self, blocking: Blocking, spans: Trace, jobs: int, walk: Walk, *, serial: bool) -> None:
        self.blocking = blocking
        self.spans = spans
        self.walk = walk
        self.jobs = 1 if serial else jobs
        # The budget of memory workers, shared by all tasks. Hooks and other stages take nothing from it.
        self.memory_workers = trio.CapacityLimiter(self.jobs)
        # Chains of stages that move no memory. More of them would only wait for each other.
        self.short_chains = trio.CapacityLimiter(2 * self.jobs)
