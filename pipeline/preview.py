"""What a restore would do, told without doing it: ``restore --dry-run``."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpurestore.devplugins.api import Hook, Stage
from gpurestore.devplugins.load import PluginInfo
from gpurestore.devplugins.load import preview as preview_plugins
from gpurestore.images.folder import ImageFolder
from gpurestore.images.magic import is_pages_file
from gpurestore.pipeline import graph, load, plan
from gpurestore.pipeline.graph import Graph, PluginFacts
from gpurestore.pipeline.lazy import LazySettings
from gpurestore.tasks import memory
from gpurestore.tasks.memory import HugePages, Reading, Ways
from gpurestore.tasks.memory.lazy import obstacle
from gpurestore.tasks.restorer import Restorer


@dataclass(frozen=True, slots=True)
class Preview:
    """The restore of some images: its plugins, its stages, and the batches of its tasks, in words and as a graph."""

    text: str
    graph: Graph


def preview(
    images_dir: Path,
    *,
    libdir: Path | None = None,
    shell_job: bool = False,
    verify: bool = True,
    jobs: int | None = None,
    hugepages: str = HugePages.AUTO,
    reading: str = Reading.AUTO,
    lazy: LazySettings | None = None,
) -> Preview:
    """What a restore would do. Raises as it would, but for pids that are taken and what plugins find in their init."""
    with ImageFolder(images_dir) as folder:
        needed = load.plugins_of(folder)
        plugins = preview_plugins(libdir, needed)
        if verify:
            folder.verify(leave_out=is_pages_file if lazy is not None else None)
        order = lazy.read_order() if lazy is not None else None
        tree = load.load(folder, None, Ways(HugePages(hugepages), Reading(reading)), order)
        restorer = Restorer.here()
        findings = load.check(tree, restorer) + load.check_session(tree, shell_job)
        if lazy is not None and (finding := obstacle()):
            findings.append(finding)
        load.refuse(tree, findings)
        stages = graph.restore(graph.facts_of(tree), facts_of(plugins), verify=verify)
        planned = plan.place(tree, jobs or memory.default_jobs())
        tree.files.assign(tree.files.keep_from)
        plan.fill(planned, tree, restorer)
        lines = [*_plugin_lines(plugins, needed), *graph.lines(stages), *plan.lines(planned, tree)]
        return Preview("\n".join(lines) + "\n", stages)


def facts_of(plugins: Collection[PluginInfo]) -> list[PluginFacts]:
    """Those that take part in a restore, for the graph."""
    return [
        PluginFacts(plugin.name, frozenset(Hook[name] for name in plugin.hooks))
        for plugin in plugins
        if Stage.RESTORE.name in plugin.stages
    ]


def _plugin_lines(plugins: Collection[PluginInfo], needed: Collection[str]) -> Iterator[str]:
    for plugin in plugins:
        named = "the images name it" if plugin.name in needed else "the images do not name it"
        yield f"plugin {plugin.name} {plugin.version} ({plugin.kind}), {named}: {' '.join(plugin.hooks) or 'no hooks'}"
    for name in needed:
        if name not in {plugin.name for plugin in plugins}:
            yield f"plugin {name}: the images name it; one of the others must serve it"
