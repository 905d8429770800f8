"""What a dump knows of a frozen tree before it writes anything, and the images that this becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gpurestore.images import pb
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks import cores, cpu, fs, ids, mm, pstree, shmem
from gpurestore.tasks.descriptors import FileTable
from gpurestore.tasks.frozen import FrozenTree


@dataclass(slots=True)
class Collected:
    """Everything about a frozen tree but the content of its memory and files."""

    entries: list[pb.pstree_entry]
    cores: dict[int, dict[int, pb.core_entry]] = field(default_factory=dict)  # by pid, then by thread id
    facts: dict[str, Any] = field(default_factory=dict)
    ids: dict[int, pb.task_kobj_ids_entry] = field(default_factory=dict)
    mms: dict[int, pb.mm_entry] = field(default_factory=dict)
    mm_facts: dict[str, Any] = field(default_factory=dict)
    fs: dict[int, pb.fs_entry] = field(default_factory=dict)
    fdinfos: dict[int, list[pb.fdinfo_entry]] = field(default_factory=dict)

    @property
    def parents(self) -> dict[int, int]:
        """The parent of each living task that has one in the tree."""
        return {e.pid: e.ppid for e in self.entries if e.pid in self.mms and e.ppid in self.mms}


def collect(tree: FrozenTree, table: FileTable, shell_job: bool, observed: bool) -> Collected:
    """Ask every resource. What cannot be carried is in ``tree.findings`` afterwards. Blocks.

    ``observed``: for a while nobody but the tree itself has used its memory.
    """
    found = tree.findings
    collected = Collected(pstree.collect(tree, shell_job))
    collected.ids = ids.collect(tree.living, found)
    trapping = [finding for task in tree.living for finding in cores.check_agent(task)]
    found += trapping
    if trapping or ids.memory_is_shared(found):
        # The agent's calls would be trapped, or the agent of one task would be in the other's memory as well: nothing
        # more can be asked.
        return collected
    for task in tree:
        collected.cores[task.pid], facts = cores.collect(task, found)
        if task.zombie:
            continue
        collected.facts[str(task.pid)] = facts
        collected.mms[task.pid] = mm.collect(task, table, found)
        if mm_facts := mm.collect_extension(task, observed):
            collected.mm_facts[str(task.pid)] = mm_facts
        collected.fs[task.pid] = fs.collect(task, table)
        collected.fdinfos[task.pid] = table.add_descriptors(task)
    table.finish()
    found += shmem.check_outsiders(shmem.objects(collected.mms), tree.tasks)
    return collected


def write_state(collected: Collected, writer: ImageWriter) -> None:
    """Write all images but the inventory, the files, and the content of memory."""
    writer.write("pstree", collected.entries)
    for threads in collected.cores.values():
        for tid, entry in threads.items():
            writer.write("core", [entry], tid)
    for pid, own_ids in collected.ids.items():
        writer.write("ids", [own_ids], pid)
        writer.write("mm", [collected.mms[pid]], pid)
        writer.write("fs", [collected.fs[pid]], pid)
        writer.write("fdinfo", collected.fdinfos[pid], own_ids.files_id)
    writer.cpu = cpu.record()
    writer.extension["tasks"] = collected.facts
    writer.extension["mm"] = collected.mm_facts
