"""The graph of a restore: its stages, and which of them each one really needs. A pure function of images and plugins.

pipeline/walk.py runs it, ``restore --dry-run`` prints it, pipeline/graphdrawing.py draws it. An edge is a need: the
stage touches what the other one leaves behind. ``--serial`` walks the same nodes in their order, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gpurestore.devplugins.api import Hook
from gpurestore.pipeline.trace import MAIN_TRACK, PLUGIN_TRACK
from gpurestore.units import format_bytes

if TYPE_CHECKING:
    from gpurestore.pipeline.load import LoadedTree

# The hooks of a restore that are stages. Claiming hooks are asked inside of others: "load", "open files".
STAGE_HOOKS = frozenset({Hook.RESTORE_INIT, Hook.POST_FORKING, Hook.RESUME_DEVICES_LATE})


class Node(NamedTuple):
    """A stage: of one task, of a plugin, of a plugin for one task, or of the whole operation."""

    name: str
    pid: int | None = None
    plugin: str | None = None

    @property
    def track(self) -> str:
        """Where its span is shown."""
        if self.plugin is not None:
            return f"{PLUGIN_TRACK}{self.plugin}"
        return MAIN_TRACK if self.pid is None else f"task {self.pid}"

    def __str__(self) -> str:
        whose = f" of {self.plugin}" if self.plugin is not None else ""
        if self.pid is None:
            return f"{self.name}{whose}"
        return f"{self.name}{whose} for task {self.pid}" if whose else f"{self.name} of task {self.pid}"


PLUGINS, VERIFY, LOAD, CHECK = Node("plugins"), Node("verify"), Node("load"), Node("check")
PLACE, OPEN_FILES, PLAN, FORK = Node("place"), Node("open files"), Node("plan"), Node("fork")
SHARED_MEMORY, GROUPS, RELEASE = Node("shared memory"), Node("groups"), Node("release")
LAZY_HANDLER, FILL = Node("lazy handler"), Node("fill")


class TaskFacts(NamedTuple):
    """A living task. ``born_from`` is the parent whose memory must be whole before it is cloned; None: any time.

    ``born_after``: another such child of that parent, cloned before it. ``born_with``: the task at whose birth this one
    is born, too, as its child, or as another one of its parent's. ``lazy_bytes`` come when it runs already.
    ``ancestral_bytes``: of memory that is there only while children are born; ``replaced_bytes``: of what comes then.
    """

    pid: int
    memory_bytes: int = 0
    shows_shared: bool = False
    born_from: int | None = None
    born_after: int | None = None
    born_with: int | None = None
    lazy_bytes: int = 0
    shows_late: bool = False
    ancestral_bytes: int = 0
    replaced_bytes: int = 0

    @property
    def behind(self) -> set[int]:
        """The tasks that stand before this one in any order."""
        return {pid for pid in (self.born_from, self.born_after, self.born_with) if pid is not None}


class TreeFacts(NamedTuple):
    """What the graph depends on in the images. ``late_groups``: process groups can only be made when all are born."""

    tasks: Sequence[TaskFacts]
    shared_bytes: int = 0
    late_groups: bool = False
    late_shared_bytes: int = 0


class PluginFacts(NamedTuple):
    """A plugin that takes part in the restore."""

    name: str
    hooks: frozenset[Hook]


@dataclass(frozen=True, slots=True)
class Graph:
    """``after``: of each node, those that it needs, all of which stand before it. Raises ValueError where one does not.

    ``weights`` are bytes to be moved, for readers and for "largest first".
    """

    after: Mapping[Node, tuple[Node, ...]]
    weights: Mapping[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[Node] = set()
        for node, needed in self.after.items():
            if missing := [str(other) for other in needed if other not in seen]:
                raise ValueError(f"{node} needs {', '.join(missing)}, which does not come before it")
            seen.add(node)

    def followers(self, nodes: Iterable[Node]) -> dict[Node, list[Node]]:
        """Of each node of the graph, which of ``nodes`` need it."""
        followers: dict[Node, list[Node]] = {node: [] for node in self.after}
        for node in nodes:
            for other in self.after[node]:
                followers[other].append(node)
        return followers

    @property
    def nodes(self) -> list[Node]:
        """All stages, each after those that it needs."""
        return list(self.after)


def facts_of(tree: LoadedTree) -> TreeFacts:
    """What the graph must know of loaded images."""
    showing = {view.pid for item in tree.objects.values() for view in item.views}
    births = tree.schedule()
    tasks = [
        TaskFacts(
            pid,
            task.pages.total_bytes,
            pid in showing,
            born_from=task.inherited.parent if task.inherited and pid in births.later else None,
            born_after=births.previous.get(pid),
            born_with=births.with_heir.get(pid) if pid not in births.later else None,
            lazy_bytes=task.lazy.total_bytes if task.lazy is not None else 0,
            shows_late=task.lazy is not None and bool(task.lazy.views),
            ancestral_bytes=task.ancestral.before.total_bytes if task.ancestral else 0,
            replaced_bytes=task.ancestral.after.total_bytes if task.ancestral else 0,
        )
        for pid, task in tree.tasks.items()
    ]
    shared = sum(plan.total_bytes for plan in tree.shared.values())
    late = sum(plan.total_bytes for plan in tree.late_shared.values())
    return TreeFacts(tasks, shared, bool(births.last), late)


# ---- building


def head(plugins: Iterable[PluginFacts], *, verify: bool = True) -> Graph:
    """The stages before anything is created: what can be refused is refused here."""
    made = _Builder()
    chain = [PLUGINS, *([VERIFY] if verify else []), LOAD, CHECK]
    for number, node in enumerate(chain):
        made.add(node, chain[number - 1 : number])
    initialised = [
        made.add(Node(Hook.RESTORE_INIT.name, plugin=name), [CHECK]) for name in _with(plugins, Hook.RESTORE_INIT)
    ]
    made.add(PLACE, initialised or [CHECK])
    made.add(OPEN_FILES, [PLACE])
    made.add(PLAN, [OPEN_FILES])
    return made.graph()


def restore(facts: TreeFacts, plugins: Sequence[PluginFacts], *, verify: bool = True) -> Graph:
    """The whole restore of a tree."""
    made = _Builder(head(plugins, verify=verify))
    lazy_bytes = sum(task.lazy_bytes for task in facts.tasks) + facts.late_shared_bytes
    made.add(FORK, [made.add(LAZY_HANDLER, [PLAN]) if lazy_bytes else PLAN])
    for name in _with(plugins, Hook.POST_FORKING):
        made.add(Node(Hook.POST_FORKING.name, plugin=name), [FORK])
    if facts.shared_bytes:
        made.add(SHARED_MEMORY, [FORK], facts.shared_bytes)
    order = _largest_first(facts)
    for task in order:
        _filling(made, task)
    for task in order:
        needed = [_filled(made, task.pid), *(Node("birth", t.pid) for t in order if t.born_from == task.pid)]
        if task.ancestral_bytes:
            needed = [made.add(Node("own memory", task.pid), needed, task.replaced_bytes)]
        if task.lazy_bytes or task.shows_late:
            # A child that is cloned late keeps what is there already, and gets what comes lazily by itself.
            needed = [made.add(Node("lazy pages", task.pid), needed)]
        made.add(Node("protections", task.pid), needed)
    if facts.late_groups:
        made.add(GROUPS, [Node("protections", task.pid) for task in order])
    for task in order:
        _ending(made, task, plugins)
    made.add(RELEASE, made.without_followers())
    if lazy_bytes:
        made.add(FILL, [RELEASE], lazy_bytes)
    return made.graph()


def _filling(made: _Builder, task: TaskFacts) -> None:
    """From an empty address space to one with everything in it."""
    before = FORK
    if task.born_from is not None:
        sibling = [Node("birth", task.born_after)] if task.born_after is not None else []
        before = made.add(Node("birth", task.pid), [_filled(made, task.born_from), *sibling])
    elif task.born_with is not None:
        before = Node("birth", task.born_with)
    for name in ("descriptors", "mappings", "threads"):
        before = made.add(Node(name, task.pid), [before])
    if task.memory_bytes:
        before = made.add(Node("memory", task.pid), [before], task.memory_bytes)
    if task.ancestral_bytes:
        made.add(Node("ancestral memory", task.pid), [before], task.ancestral_bytes)


def _filled(made: _Builder, pid: int) -> Node:
    """The stage after which children can have all memory of a task."""
    names = ("ancestral memory", "memory", "threads")
    return next(node for name in names if (node := Node(name, pid)) in made)


def _ending(made: _Builder, task: TaskFacts, plugins: Sequence[PluginFacts]) -> None:
    """From there to its last instruction. Its agent must be there, with all rights, until its children are."""
    needed = [Node("protections", task.pid), *([GROUPS] if GROUPS in made else [])]
    for name in ("state", "park"):
        needed = [made.add(Node(name, task.pid), needed)]
    # Shared memory is the task's memory, too.
    if task.shows_shared and SHARED_MEMORY in made:
        needed.append(SHARED_MEMORY)
    for plugin in _with(plugins, Hook.RESUME_DEVICES_LATE):
        content = Node(Hook.POST_FORKING.name, plugin=plugin)
        made.add(
            Node(Hook.RESUME_DEVICES_LATE.name, task.pid, plugin), [*needed, *([content] if content in made else [])]
        )


def _largest_first(facts: TreeFacts) -> list[TaskFacts]:
    """The last to end should be a small one; a task that is cloned late comes behind the one that it comes from."""
    by_size = sorted(facts.tasks, key=lambda task: -task.memory_bytes)
    placed: dict[int, TaskFacts] = {}
    waiting = by_size
    while waiting:
        fits = [task for task in waiting if task.behind <= placed.keys()]
        if not fits:
            raise ValueError(f"tasks {', '.join(str(task.pid) for task in waiting)} wait for one another's birth")
        placed.update((task.pid, task) for task in fits)
        waiting = [task for task in waiting if task.pid not in placed]
    return list(placed.values())


def _with(plugins: Iterable[PluginFacts], hook: Hook) -> list[str]:
    return [plugin.name for plugin in plugins if hook in plugin.hooks]


class _Builder:
    """A graph that grows, node by node."""

    def __init__(self, begun: Graph | None = None) -> None:
        self._after: dict[Node, tuple[Node, ...]] = dict(begun.after) if begun else {}
        self._weights: dict[Node, int] = {}

    def __contains__(self, node: Node) -> bool:
        return node in self._after

    def add(self, node: Node, needed: Iterable[Node], weight: int = 0) -> Node:
        self._after[node] = tuple(needed)
        if weight:
            self._weights[node] = weight
        return node

    def without_followers(self) -> list[Node]:
        """The stages that nobody needs yet."""
        needed = {other for others in self._after.values() for other in others}
        return [node for node in self._after if node not in needed]

    def graph(self) -> Graph:
        return Graph(self._after, self._weights)


# ---- for people


def lines(graph: Graph) -> Iterator[str]:
    """One line per stage, for ``--dry-run``: what it is, how much it moves, and what it comes after."""
    for node, needed in graph.after.items():
        weight = f" ({format_bytes(graph.weights[node])})" if node in graph.weights else ""
        after = f" after {', '.join(map(str, needed))}" if needed else ""
        yield f"stage {node}{weight}{after}"


def to_dot(graph: Graph) -> str:
    """The graph for Graphviz."""
    numbers = {node: number for number, node in enumerate(graph.after)}
    rows = ["digraph restore {", "  rankdir=LR;", "  node [shape=box, fontname=sans];"]
    rows += [f"  n{number} [label={_quoted(str(node))}];" for node, number in numbers.items()]
    rows += [f"  n{numbers[other]} -> n{numbers[node]};" for node, needed in graph.after.items() for other in needed]
    return "\n".join([*rows, "}"]) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
