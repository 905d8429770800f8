"""Running a graph of stages: each one begins when those that it needs have ended, and leaves a span that says so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

import trio

from gpurestore.pipeline.chains import chains
from gpurestore.pipeline.graph import Graph, Node
from gpurestore.pipeline.trace import Span, Trace

Action = Callable[[Node, Span], Awaitable[None]]
Work = Callable[[Span], object]


class Threads(Protocol):
    """Stages that only block, and where they do."""

    def work(self, node: Node) -> Work | None:
        """What ``node`` is to do, in a thread; None where it is an action."""

    def place(self, chain: Sequence[Node]) -> trio.CapacityLimiter:
        """Of what a chain of such stages takes one while it runs."""

    async def run_in_thread(self, call: Callable[..., None], *args: object) -> None:
        """``call`` in a thread."""

    def check(self) -> None:
        """Between two stages of a chain. Raises when the operation is cancelled."""


class Walk:
    """One run of a graph. It may :meth:`extend` while it is walked, as more becomes known.

    With ``serial`` a set of stages runs in the order of the graph, one at a time.
    """

    def __init__(self, trace: Trace, graph: Graph, *, serial: bool = False) -> None:
        self._trace, self._serial = trace, serial
        self._ended: dict[Node, trio.Event] = {}
        self._spans: dict[Node, Span] = {}
        self.extend(graph)

    def extend(self, graph: Graph) -> None:
        """Go on with ``graph``, which holds all stages that have begun."""
        if lost := [str(node) for node in self._spans if node not in graph.after]:
            raise ValueError(f"the longer graph has no {', '.join(lost)}")
        self.graph = graph
        self._followers = graph.followers(graph.after)
        for node in graph.after:
            self._ended.setdefault(node, trio.Event())

    @asynccontextmanager
    async def stage(self, node: Node) -> AsyncIterator[Span]:
        """The block is ``node``: it begins when all that it needs has ended, and ends it unless it raises."""
        await self._needed_by(node)
        with self._span(node) as span:
            yield span
        self._ended[node].set()

    async def _needed_by(self, node: Node) -> None:
        for other in self.graph.after[node]:
            await self._ended[other].wait()

    @contextmanager
    def _span(self, node: Node) -> Iterator[Span]:
        after = [self._spans[other] for other in self.graph.after[node]]
        with self._trace.span(node.name, track=node.track, after=after) as span:
            self._spans[node] = span
            if node.plugin is not None and node.pid is not None:
                span.set(pid=node.pid)
            yield span

    async def run(self, nodes: Sequence[Node], action: Action, threads: Threads | None = None) -> None:
        """Run ``action`` for every one of ``nodes``, each in its stage. The first failure cancels the others.

        Those that ``threads`` has work for are done there, and where one of them makes another one possible the thread
        goes on with that at once.
        """
        if self._serial:
            for node in nodes:
                await self._one([node], action, threads)
            return
        async with trio.open_nursery() as nursery:
            for chain in chains(self.graph, nodes, lambda node: threads is not None and threads.work(node) is not None):
                nursery.start_soon(self._one, chain, action, threads)

    async def _one(self, chain: list[Node], action: Action, threads: Threads | None) -> None:
        if threads is None or threads.work(chain[0]) is None:
            (node,) = chain
            async with self.stage(node) as span:
                await action(node, span)
            return
        await self._needed_by(chain[0])
        async with threads.place(chain):
            await threads.run_in_thread(self._go, chain, threads, trio.lowlevel.current_trio_token())
        for node in chain:
            self._ended[node].set()

    def _go(self, chain: list[Node], threads: Threads, trio_token: trio.lowlevel.TrioToken) -> None:
        """Walk a chain; runs in a thread. Others that wait for one of its stages are told when that has ended."""
        for node, link in zip(chain, [*chain[1:], None], strict=True):
            threads.check()
            work = threads.work(node)
            assert work is not None
            with self._span(node) as span:
                work(span)
            if any(other != link for other in self._followers[node]):
                trio_token.run_sync_soon(self._ended[node].set)

    def waiting(self) -> list[tuple[Node, list[Node]]]:
        """Stages that others have made ready in part, and those that run and hold them up, directly or not."""
        found = []
        for node, needed in self.graph.after.items():
            if node not in self._spans and any(self._ended[other].is_set() for other in needed):
                found.append((node, self._running_before(node)))
        return found

    def _running_before(self, node: Node) -> list[Node]:
        seen: dict[Node, None] = {}
        todo = [node]
        for one in todo:
            fresh = [other for other in self.graph.after[one] if not self._ended[other].is_set() and other not in seen]
            seen.update(dict.fromkeys(fresh))
            todo += fresh
        return [other for other in seen if other in self._spans]
