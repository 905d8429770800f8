"""Stages that one thread can walk through in one go: to hand a task over to another thread for each of its stages takes
longer than most stages do. Pure functions of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpurestore.pipeline.graph import Graph, Node


def chains(graph: Graph, nodes: Sequence[Node], fits: Callable[[Node], bool]) -> list[list[Node]]:
    """Cut ``nodes`` into chains, in the order in which they begin. Whoever does not fit (``fits``) is alone.

    A link needs nothing but what has ended when the one before it has. So a chain never waits for another one once its
    first stage has begun. Where several stages could go on, the one with the longest way behind it does.
    """
    needs = _Needs(graph)
    followers = graph.followers(nodes)
    way: dict[Node, int] = {}
    for node in reversed(nodes):
        way[node] = 1 + max((way[other] for other in followers[node]), default=0)
    placed: set[Node] = set()

    def next_link(node: Node) -> Node | None:
        able = [n for n in followers[node] if n not in placed and fits(n) and needs.end_with(n, node)]
        return max(able, key=way.__getitem__, default=None)

    found = []
    for node in nodes:
        if node in placed:
            continue
        chain, link = [], node if fits(node) else None
        while link is not None:
            chain.append(link)
            placed.add(link)
            link = next_link(link)
        found.append(chain or [node])
    return found


class _Needs:
    """What each stage needs, directly or not, as bits."""

    def __init__(self, graph: Graph) -> None:
        self._after = graph.after
        self._bits = {node: 1 << number for number, node in enumerate(graph.after)}
        self._all: dict[Node, int] = {}
        for node, needed in graph.after.items():
            self._all[node] = self._bits[node]
            for other in needed:
                self._all[node] |= self._all[other]

    def end_with(self, node: Node, other: Node) -> bool:
        """Whether all that ``node`` needs has ended as soon as ``other`` has."""
        return all(self._bits[needed] & self._all[other] for needed in self._after[node])
