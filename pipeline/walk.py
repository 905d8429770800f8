"""Running a graph of stages: each one begins when those that it needs have ended, and leaves a span that says so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

import trio

from gpurestore.pipeline.graph import Graph, Node
from gpurestore.pipeline.trace import Span, Trace

Action = Callable[[Node, Span], Awaitable[None]]


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
        for node in graph.after:
            self._ended.setdefault(node, trio.Event())

    @asynccontextmanager
    async def stage(self, node: Node) -> AsyncIterator[Span]:
        """The block is ``node``: it begins when all that it needs has ended, and ends it unless it raises."""
        needed = self.graph.after[node]
        for other in needed:
            await self._ended[other].wait()
        after = [self._spans[other] for other in needed]
        with self._trace.span(node.name, track=node.track, after=after) as span:
            self._spans[node] = span
            if node.plugin is not None and node.pid is not None:
                span.set(pid=node.pid)
            yield span
        self._ended[node].set()

    async def run(self, nodes: Iterable[Node], action: Action) -> None:
        """Run ``action`` for every one of ``nodes``, each in its stage. The first failure cancels the others."""
        if self._serial:
            for node in nodes:
                await self._one(node, action)
            return
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(self._one, node, action)

    async def _one(self, node: Node, action: Action) -> None:
        async with self.stage(node) as span:
            await action(node, span)

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
