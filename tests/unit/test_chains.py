"""Chains of stages that one thread walks through."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio

from gpurestore.errors import CancelledError
from gpurestore.pipeline import graph
from gpurestore.pipeline.chains import chains
from gpurestore.pipeline.graph import Graph, Node, TaskFacts, TreeFacts
from gpurestore.pipeline.trace import Span, Trace
from gpurestore.pipeline.walk import Walk, Work


def tree(*tasks: TaskFacts) -> tuple[Graph, list[Node]]:
    """The graph of a restore, and its stages from the first fork on."""
    made = graph.restore(TreeFacts(tasks), [])
    return made, made.nodes[made.nodes.index(graph.FORK) : made.nodes.index(graph.RELEASE)]


def blocks(node: Node) -> bool:
    return node.name != "memory" or node.pid != 9


def names(chain: list[Node]) -> list[str]:
    return [f"{node.name} {node.pid or ''}".strip() for node in chain]


WAY = ["descriptors", "mappings", "threads", "memory", "protections", "state", "park"]


def test_a_task_is_walked_through_by_one_thread() -> None:
    made, nodes = tree(TaskFacts(1, 4096), TaskFacts(2, 4096))
    first, second = (names(chain) for chain in chains(made, nodes, blocks))
    assert first == ["fork", *(f"{name} 1" for name in WAY)]
    assert second == [f"{name} 2" for name in WAY]


def test_a_stage_that_needs_more_than_a_thread_stands_alone() -> None:
    made, nodes = tree(TaskFacts(9, 4096))
    assert [names(chain)[-1] for chain in chains(made, nodes, blocks)] == ["threads 9", "memory 9", "park 9"]


def test_births_come_first_where_there_are_more() -> None:
    made, nodes = tree(
        TaskFacts(1, 4096), *(TaskFacts(pid, 0, born_from=1, born_after=pid - 1 if pid > 2 else None) for pid in (2, 3))
    )
    first, *others = (names(chain) for chain in chains(made, nodes, blocks))
    assert first[4:8] == ["memory 1", "birth 2", "birth 3", "descriptors 3"]
    assert ["protections 1", "state 1", "park 1"] in others
    assert [chain[0] for chain in others] == ["descriptors 2", "protections 1"]


def test_a_chain_waits_for_nobody_once_it_has_begun() -> None:
    made, nodes = tree(
        TaskFacts(1, 4096), TaskFacts(2, 8, born_from=1), TaskFacts(3, 8, born_with=2), TaskFacts(4, 8, born_from=3)
    )
    found = chains(made, nodes, blocks)
    assert sorted(node for chain in found for node in chain) == sorted(nodes)
    for chain in found:
        ended = set(made.nodes) - set(nodes)
        todo = [chain[0]]
        for node in todo:  # what its first stage needs, directly or not
            ended.update(made.after[node])
            todo += made.after[node]
        for node in chain:
            assert ended >= set(made.after[node])
            ended.add(node)


class Two:
    """Threads for all stages but those of plugins."""

    def __init__(self, failing: str = "") -> None:
        self.limiter = trio.CapacityLimiter(2)
        self.done: list[Node] = []
        self.seen: dict[Node, int] = {}
        self.failing = failing
        self.is_cancelled = False

    def work(self, node: Node) -> Work | None:
        return lambda _: self._do(node)

    def _do(self, node: Node) -> None:
        if node.name == self.failing:
            self.is_cancelled = True
        self.seen[node] = threading.get_ident()
        self.done.append(node)

    def place(self, chain: object) -> trio.CapacityLimiter:
        return self.limiter

    async def run_in_thread(self, call: Callable[..., None], *args: object) -> None:
        await trio.to_thread.run_sync(call, *args)

    def check(self) -> None:
        if self.is_cancelled:
            raise CancelledError("cancelled")


async def never(node: Node, _: Span) -> None:
    raise AssertionError(f"{node} has work for a thread")


@pytest.mark.parametrize("serial", [False, True])
def test_a_walk_in_threads_obeys_every_edge(serial: bool) -> None:
    made, nodes = tree(TaskFacts(1, 4096), TaskFacts(2, 8, born_from=1), TaskFacts(3, 8), TaskFacts(4, 8, born_from=3))
    alone = Graph({node: tuple(n for n in made.after[node] if n in nodes) for node in nodes})
    threads, trace = Two(), Trace()

    async def main() -> None:
        with trio.fail_after(10):
            await Walk(trace, alone, serial=serial).run(nodes, never, threads)

    trio.run(main)
    assert sorted(threads.done) == sorted(nodes)
    for span in trace.spans:
        assert all(other.end_ns is not None and other.end_ns <= span.start_ns for other in span.after)
    if serial:
        assert threads.done == nodes


def test_a_chain_ends_between_two_stages_when_the_operation_is_cancelled() -> None:
    made, nodes = tree(TaskFacts(1, 4096))
    threads = Two(failing="mappings")

    async def main() -> None:
        walk = Walk(Trace(), Graph({node: tuple(n for n in made.after[node] if n in nodes) for node in nodes}))
        await walk.run(nodes, never, threads)

    with pytest.raises(ExceptionGroup):
        trio.run(main)
    assert [node.name for node in threads.done] == ["fork", "descriptors", "mappings"]
