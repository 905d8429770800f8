"""The graph of a restore's stages: what waits for what, and that a walk keeps to it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import trio

from gpurestore.devplugins.api import Hook
from gpurestore.errors import GpurestoreError, UsageError
from gpurestore.pipeline import graph
from gpurestore.pipeline.graph import CHECK, FORK, LOAD, PLACE, RELEASE, SHARED_MEMORY, Graph, Node
from gpurestore.pipeline.graph import PluginFacts as Plugin
from gpurestore.pipeline.graph import TaskFacts as Task
from gpurestore.pipeline.graphdrawing import draw_file
from gpurestore.pipeline.trace import Span, Trace
from gpurestore.pipeline.walk import Walk

CUDA = Plugin("cuda", frozenset({Hook.RESTORE_INIT, Hook.POST_FORKING, Hook.RESUME_DEVICES_LATE}))
LATE = Plugin("late", frozenset({Hook.RESUME_DEVICES_LATE}))
DUMPER = Plugin("dumper", frozenset({Hook.PAUSE_DEVICES, Hook.RESTORE_EXT_FILE}))
CONTENT = Node("POST_FORKING", plugin="cuda")


def made(*tasks: Task, plugins: tuple[Plugin, ...] = (), shared_bytes: int = 0) -> Graph:
    return graph.restore(graph.TreeFacts(tasks, shared_bytes), plugins)


def before(stages: Graph, node: Node) -> set[Node]:
    """All that has ended when a stage begins."""
    found: set[Node] = set()
    waiting = [node]
    for one in waiting:
        waiting += [other for other in stages.after[one] if other not in found]
        found.update(stages.after[one])
    return found


def test_device_content_comes_back_while_tasks_are_filled() -> None:
    stages = made(Task(1, 4096), plugins=(CUDA,))
    assert stages.after[CONTENT] == (FORK,)
    assert CONTENT not in before(stages, Node("memory", 1))
    assert CONTENT not in before(stages, Node("park", 1))


def test_a_task_gets_its_devices_when_its_own_memory_and_their_content_are_there() -> None:
    stages = made(Task(1, 4096), Task(2, 8192), plugins=(CUDA, LATE))
    needed = before(stages, Node("RESUME_DEVICES_LATE", 1, "cuda"))
    assert {Node("memory", 1), Node("park", 1), CONTENT} <= needed
    assert not any(node.pid == 2 for node in needed)
    assert CONTENT not in before(stages, Node("RESUME_DEVICES_LATE", 1, "late"))


def test_only_tasks_that_show_shared_memory_wait_for_it() -> None:
    stages = made(Task(1, 1, shows_shared=True), Task(2, 1), plugins=(LATE,), shared_bytes=5)
    assert SHARED_MEMORY in stages.after[Node("RESUME_DEVICES_LATE", 1, "late")]
    assert SHARED_MEMORY not in before(stages, Node("RESUME_DEVICES_LATE", 2, "late"))
    assert SHARED_MEMORY in before(stages, RELEASE)


def test_shared_memory_that_comes_late_holds_nobody_up_but_is_watched_by_all_who_show_it() -> None:
    facts = graph.TreeFacts([Task(1, 1, shows_shared=True, shows_late=True), Task(2, 1)], late_shared_bytes=5)
    stages = graph.restore(facts, ())
    assert SHARED_MEMORY not in stages.after
    assert {Node("lazy pages", 1), Node("lazy handler")} <= before(stages, RELEASE)
    assert Node("lazy pages", 2) not in stages.after
    assert stages.weights[Node("fill")] == 5


def test_everything_ends_before_the_release() -> None:
    stages = made(Task(1, 1), Task(2), plugins=(CUDA, LATE, DUMPER), shared_bytes=5)
    assert before(stages, RELEASE) == set(stages.nodes) - {RELEASE}


def test_nothing_is_created_before_all_plugins_agreed() -> None:
    stages = made(Task(1), plugins=(CUDA, DUMPER))
    assert stages.after[PLACE] == (Node("RESTORE_INIT", plugin="cuda"),)
    assert stages.after[Node("RESTORE_INIT", plugin="cuda")] == (CHECK,)
    assert made(Task(1)).after[PLACE] == (CHECK,)


def test_without_verification_there_is_no_such_stage() -> None:
    assert Node("verify") not in graph.head([], verify=False).nodes
    assert graph.head([]).after[LOAD] == (Node("verify"),)


def test_the_largest_task_comes_first() -> None:
    names = [node.pid for node in made(Task(1, 10), Task(2, 30), Task(3, 20)).nodes if node.name == "memory"]
    assert names == [2, 3, 1]


def test_a_child_that_shares_pages_is_born_from_whole_memory_and_before_its_parent_loses_rights() -> None:
    stages = made(Task(1, 10), Task(2, 30, born_from=1), Task(3, born_from=2))
    birth = Node("birth", 2)
    assert stages.after[birth] == (Node("memory", 1),)
    assert stages.after[Node("descriptors", 2)] == (birth,)
    assert birth in stages.after[Node("protections", 1)]
    assert Node("park", 1) not in before(stages, birth)
    assert stages.after[Node("birth", 3)] == (Node("memory", 2),)


def test_births_of_one_parent_come_one_after_another_and_others_with_them() -> None:
    heirs = (Task(2, 40, born_from=1, born_after=4), Task(4, 2, born_from=1), Task(5, 9, born_with=2))
    stages = made(Task(1, 10), *heirs)
    assert stages.after[Node("birth", 2)] == (Node("memory", 1), Node("birth", 4))
    assert stages.after[Node("descriptors", 5)] == (Node("birth", 2),)
    assert Node("birth", 5) not in stages.nodes


def test_what_only_children_shall_see_comes_and_goes_around_their_births() -> None:
    stages = made(Task(1, 10, ancestral_bytes=8), Task(2, 3, born_from=1), Task(3, 3, born_from=1, born_after=2))
    assert stages.after[Node("ancestral memory", 1)] == (Node("memory", 1),)
    assert stages.after[Node("birth", 2)] == (Node("ancestral memory", 1),)
    assert {Node("birth", 2), Node("birth", 3)} <= set(stages.after[Node("own memory", 1)])
    assert stages.after[Node("protections", 1)] == (Node("own memory", 1),)


def test_groups_that_are_made_late_need_all_tasks_and_their_agents() -> None:
    stages = graph.restore(graph.TreeFacts([Task(1, 1), Task(2, 1, born_from=1)], late_groups=True), [])
    assert {Node("protections", 1), Node("protections", 2)} == set(stages.after[graph.GROUPS])
    assert all(graph.GROUPS in stages.after[Node("state", pid)] for pid in (1, 2))


def test_births_that_wait_for_one_another_are_an_error() -> None:
    with pytest.raises(ValueError, match="wait for one another"):
        made(Task(1, born_from=2), Task(2, born_from=1))


def test_a_graph_that_leads_back_cannot_be_made() -> None:
    one, two = Node("one"), Node("two")
    with pytest.raises(ValueError, match="one needs two"):
        Graph({one: (two,), two: (one,)})


def test_every_stage_is_a_line_of_its_own() -> None:
    stages = made(Task(12, 2048), plugins=(CUDA,))
    lines = list(graph.lines(stages))
    assert len(lines) == len(stages.nodes)
    assert "stage memory of task 12 (2.0 KiB) after threads of task 12" in lines
    resume = "stage RESUME_DEVICES_LATE of cuda for task 12 after park of task 12, POST_FORKING of cuda"
    assert resume in lines


# ---- drawing


def test_the_graph_is_drawn_with_every_stage_and_no_two_in_one_place(tmp_path: Path) -> None:
    stages = made(Task(1, 4096, shows_shared=True), Task(2, 10, born_from=1), plugins=(CUDA, LATE), shared_bytes=9)
    draw_file(stages, tmp_path / "graph.svg", "restore")
    root = ET.fromstring((tmp_path / "graph.svg").read_text())
    boxes = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    assert len(boxes) == len(stages.nodes)
    assert len({(box.get("x"), box.get("y")) for box in boxes}) == len(boxes)


def test_an_arrow_of_the_dot_file_is_a_need(tmp_path: Path) -> None:
    stages = made(Task(1, 4096), plugins=(Plugin('odd"name', frozenset({Hook.POST_FORKING})),))
    draw_file(stages, tmp_path / "graph.dot", "restore")
    text = (tmp_path / "graph.dot").read_text()
    assert text.count(" -> ") == sum(map(len, stages.after.values()))
    assert 'label="POST_FORKING of odd\\"name"' in text


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.svg, \.png or \.dot"):
        draw_file(made(Task(1)), tmp_path / "graph.gif", "restore")


# ---- walking


def walked(stages: Graph, *, serial: bool = False, failing: Node | None = None) -> tuple[Trace, list[Node]]:
    """A walk whose every stage lets all others go on before it ends."""
    trace = Trace()
    done: list[Node] = []

    async def act(node: Node, _: Span) -> None:
        for _turn in range(3):
            await trio.lowlevel.checkpoint()
        if node == failing:
            raise GpurestoreError(f"{node} failed")
        done.append(node)

    async def main() -> None:
        with trio.fail_after(10):
            await Walk(trace, stages, serial=serial).run(stages.nodes, act)

    trio.run(main)
    return trace, done


@pytest.mark.parametrize("serial", [False, True])
def test_a_walk_obeys_every_edge(serial: bool) -> None:
    stages = made(Task(1, 4096, True), Task(2, 10), Task(3, 5, born_from=1), plugins=(CUDA, LATE), shared_bytes=9)
    trace, done = walked(stages, serial=serial)
    assert set(done) == set(stages.nodes)
    spans = {(span.name, span.track, span.args.get("pid")): span for span in trace.spans}
    for node, needed in stages.after.items():
        span = spans[node.name, node.track, node.pid if node.plugin else None]
        assert {other.name for other in span.after} == {other.name for other in needed}
        assert all(other.end_ns is not None and other.end_ns <= span.start_ns for other in span.after)


def test_a_serial_walk_runs_one_stage_at_a_time_in_the_order_of_the_graph() -> None:
    stages = made(Task(1, 4096), Task(2, 10), plugins=(CUDA, LATE))
    trace, done = walked(stages, serial=True)
    assert done == stages.nodes
    for first, second in zip(trace.spans, trace.spans[1:], strict=False):
        assert first.end_ns is not None
        assert first.end_ns <= second.start_ns


def test_stages_that_need_nothing_of_one_another_run_at_the_same_time() -> None:
    trace, _ = walked(made(Task(1, 4096), Task(2, 10), plugins=(CUDA,)))
    first, second = [span for span in trace.spans if span.name == "memory"]
    assert second.end_ns is not None
    assert first.end_ns is not None
    assert second.start_ns < first.end_ns


def test_what_needs_a_stage_that_failed_never_begins() -> None:
    stages = made(Task(1, 4096), plugins=(CUDA,))
    with pytest.raises(ExceptionGroup) as raised:
        walked(stages, failing=CONTENT)
    assert [str(error) for error in raised.value.exceptions] == ["POST_FORKING of cuda failed"]


def test_a_longer_graph_must_hold_what_has_begun() -> None:
    async def main() -> None:
        walk = Walk(Trace(), graph.head([]))
        async with walk.stage(graph.PLUGINS):
            pass
        with pytest.raises(ValueError, match="has no plugins"):
            walk.extend(Graph({LOAD: ()}))

    trio.run(main)
